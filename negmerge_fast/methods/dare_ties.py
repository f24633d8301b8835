"""DARE with the election of TIES (arXiv 2311.03099, section 3.2): of what is kept, the sum of those with the elected sign.

e_k = d_k / (1 - p)    with probability 1 - p,   else 0
s   = sign of e_1 + … + e_n    (0 counts as +)
r   = sum of the e_k with the sign s

As mergekit, which sums; the authors put their differences into TIES, which would trim and average them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import Election, Gate, Reduction
from .base import Method, in_order
from .dare import dropped

if TYPE_CHECKING:
    import torch


def dare_ties(drop: float = 0.9, seed: int = 0) -> Method:
    return Method("dare-ties", Gate.RANDOM, Election.SIGN_OF_SUM, Reduction.SUM, drop=drop, seed=seed)


def naive(d: torch.Tensor, drop: float = 0.9, seed: int = 0, key: int = 0) -> torch.Tensor:
    e = dropped(d, drop, seed, key)
    sign = (in_order(e) >= 0) * 2.0 - 1.0
    return in_order(e.where(e * sign > 0, 0.0))
