"""The elements on whose sign the models do not agree: the ablation of NegMerge (arXiv 2410.05583, section 5).

r = (d_1 + … + d_n) / n    unless all d_k > 0 or all d_k < 0,   else 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def conflict() -> Method:
    return Method("conflict", Gate.NONE, Election.CONFLICT, Reduction.MEAN)


def naive(d: torch.Tensor) -> torch.Tensor:
    agree = (d > 0).all(0) | (d < 0).all(0)
    return (in_order(d) / len(d)).where(~agree, 0.0)
