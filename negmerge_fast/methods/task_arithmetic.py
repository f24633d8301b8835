"""Task arithmetic (arXiv 2212.04089): the sum of the differences.

r = d_1 + … + d_n
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def task_arithmetic() -> Method:
    return Method("task-arithmetic", Gate.NONE, Election.ALL, Reduction.SUM)


def naive(d: torch.Tensor) -> torch.Tensor:
    return in_order(d)
