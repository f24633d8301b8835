"""MagMax (arXiv 2407.06322): of each element the difference of the largest magnitude; of equal ones that of the later model.

    r = d_k    with the largest |d_k|

Its authors add it with a scale of 0.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method

if TYPE_CHECKING:
    import torch


def magmax() -> Method:
    return Method("magmax", Gate.NONE, Election.ALL, Reduction.LARGEST)


def naive(d: torch.Tensor) -> torch.Tensor:
    largest = d[0]
    for each in d[1:]:
        largest = each.where(each.abs() >= largest.abs(), largest)
    return largest
