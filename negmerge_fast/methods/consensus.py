"""Consensus task arithmetic with TALL masks (arXiv 2405.07813): the sum of the differences, where two models or more need the element.

    mask_k = |d_k| ≥ λ_t · |S - d_k|    with S = d_1 + … + d_n
    r      = S    if at least two masks are set,   else 0

Not the consensus of NegMerge: signs do not matter. λ_t is mask_scale; its authors search 0.2 … 0.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def consensus(mask_scale: float = 0.4) -> Method:
    return Method("consensus", Gate.NONE, Election.MASKS, Reduction.SUM, mask_scale=mask_scale)


def naive(d: torch.Tensor, mask_scale: float = 0.4) -> torch.Tensor:
    total = in_order(d)
    masks = d.abs() >= d.new_tensor(mask_scale) * (total - d).abs()
    return total.where(masks.sum(0) >= 2, 0.0)
