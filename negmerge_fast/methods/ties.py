"""TIES (arXiv 2306.01708): trim each model to its largest differences, elect a sign, average those that have it.

    e_k = d_k    if |d_k| is among the largest fraction `density` of model k,   else 0
    s   = sign of e_1 + … + e_n    (0 counts as +)
    r   = mean of the e_k with the sign s

The authors trim over the whole model and keep a fraction of 0.2; mergekit trims each tensor (over="tensor"). Differences as large as
the smallest that is kept are kept, too. The fraction is rounded down, as by mergekit; the authors' code keeps one more of each model, and
gives a sum of exactly 0 the sign that most sums of the model have.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, Over, in_order

if TYPE_CHECKING:
    import torch


def ties(density: float = 0.2, over: Over = "model") -> Method:
    return Method("ties", Gate.MAGNITUDE, Election.SIGN_OF_SUM, Reduction.MEAN, density=density, over=over)


def naive(d: torch.Tensor, density: float = 0.2) -> torch.Tensor:
    """d: of one tensor, or of all of a model's."""
    bottom = d.shape[1] - max(int(density * d.shape[1]), 1)
    magnitudes = d.abs().nan_to_num(math.inf)
    e = d.where(magnitudes >= magnitudes.sort(1).values[:, bottom : bottom + 1], 0.0)
    sign = (in_order(e) >= 0) * 2.0 - 1.0
    elected = e * sign > 0
    number = elected.sum(0).clamp(min=1).to(d.dtype)
    return in_order(e.where(elected, 0.0)) / number
