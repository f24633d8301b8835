"""The mean of the differences: a uniform soup of the models (arXiv 2203.05482), negated.

r = (d_1 + … + d_n) / n
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def mean() -> Method:
    return Method("mean", Gate.NONE, Election.ALL, Reduction.MEAN)


def naive(d: torch.Tensor) -> torch.Tensor:
    return in_order(d) / len(d)
