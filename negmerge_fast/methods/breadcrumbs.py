"""Model Breadcrumbs (arXiv 2312.06795): the sum of the differences, without the smallest and the largest of each tensor.

    e_k = d_k    if |d_k| is neither among the fraction `gamma` of the largest of its tensor, nor among the smallest, of which
                 a fraction `density` is left,   else 0
    r   = e_1 + … + e_n

Differences as large as the smallest or the largest that is kept are kept, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, Over, in_order

if TYPE_CHECKING:
    import torch


def breadcrumbs(density: float = 0.9, gamma: float = 0.01, over: Over = "tensor") -> Method:
    return Method(
        "breadcrumbs", Gate.MAGNITUDE, Election.ALL, Reduction.SUM, density=density, gamma=gamma, over=over
    )


def naive(d: torch.Tensor, density: float = 0.9, gamma: float = 0.01) -> torch.Tensor:
    numel = d.shape[1]
    top = int(gamma * numel)
    bottom = numel - max(int(density * numel), 1) - top
    if bottom < 0:
        bottom, top = 0, max(top + bottom, 0)
    magnitudes = d.abs().nan_to_num(math.inf)
    ascending = magnitudes.sort(1).values
    low, high = ascending[:, bottom : bottom + 1], ascending[:, numel - 1 - top : numel - top]
    return in_order(d.where((magnitudes >= low) & (magnitudes <= high), 0.0))
