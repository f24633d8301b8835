"""k of n by count: the mean of all differences, where k of them have one sign and the mean has it, too.

    r = m = (d_1 + … + d_n) / n    if #(d > 0) ≥ k and m > 0, or #(d < 0) ≥ k and m < 0,   else 0

k is min_agreement · n, as in core/rule.py. negmerge with a min_agreement is the other definition: it averages only those that agree.
This one is that of torchunlearn. With k = n both are NegMerge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def k_of_n() -> Method:
    return Method("k-of-n", Gate.NONE, Election.COUNTED, Reduction.MEAN)


def naive(d: torch.Tensor, required: int) -> torch.Tensor:
    total = in_order(d)
    positive = ((d > 0).sum(0) >= required) & (total > 0)
    negative = ((d < 0).sum(0) >= required) & (total < 0)
    return (total / len(d)).where(positive | negative, 0.0)
