"""EMR-Merging's unified task vector (arXiv 2405.17461): the largest magnitude of the differences that have the sign of their sum.

    s = sign of d_1 + … + d_n    (0 counts as +)
    r = the d_k of the largest magnitude with the sign s

The masks and scales for each task, which EMR-Merging keeps beside it, are not made. Its authors' code counts a sum of exactly 0 as -.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def emr() -> Method:
    return Method("emr", Gate.NONE, Election.SIGN_OF_SUM, Reduction.LARGEST)


def naive(d: torch.Tensor) -> torch.Tensor:
    sign = (in_order(d) >= 0) * 2.0 - 1.0
    elected = d.where(d * sign > 0, 0.0)
    largest = elected[0]
    for each in elected[1:]:
        largest = each.where(each.abs() >= largest.abs(), largest)
    return largest
