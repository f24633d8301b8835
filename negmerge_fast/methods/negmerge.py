"""NegMerge (arXiv 2410.05583): the mean of the differences, where all have one sign.

    r = (d_1 + … + d_n) / n    if all d_k > 0 or all d_k < 0,   else 0

With a min_agreement below 1, where so many have one sign: the mean of those. core/rule.py is the whole rule; its kernels are its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def negmerge() -> Method:
    return Method("negmerge", Gate.NONE, Election.AGREEMENT, Reduction.MEAN)


def naive(d: torch.Tensor) -> torch.Tensor:
    agree = (d > 0).all(0) | (d < 0).all(0)
    return (in_order(d) / len(d)).where(agree, 0.0)
