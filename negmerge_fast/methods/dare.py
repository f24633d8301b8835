"""DARE (arXiv 2311.03099): drop differences at random, divide the others by what is kept, and add them.

    e_k = d_k / (1 - p)    with probability 1 - p,   else 0
    r   = e_1 + … + e_n

The division is a multiplication by 1 / (1 - p), rounded (f_k of core/choices.py). The same seed drops the same elements on every device,
with any number of threads or ranks. mergekit rescales to the L1 norm of d_k instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.choices import KEEP_ALL, Election, Gate, Reduction
from ..core.generator import number
from .base import Method, in_order

if TYPE_CHECKING:
    import torch


def dare(drop: float = 0.9, seed: int = 0) -> Method:
    return Method("dare", Gate.RANDOM, Election.ALL, Reduction.SUM, drop=drop, seed=seed)


def dropped(d: torch.Tensor, drop: float, seed: int, key: int) -> torch.Tensor:
    """e_1 … e_n. key: of the tensor (core/choices.py)."""
    keep = round((1 - drop) * KEEP_ALL)
    kept = [[number(seed, key, k, i) < keep for i in range(d.shape[1])] for k in range(len(d))]
    factor = d.new_tensor(1 / (1 - drop))
    return (d * factor).where(d.new_tensor(kept) > 0, 0.0)


def naive(d: torch.Tensor, drop: float = 0.9, seed: int = 0, key: int = 0) -> torch.Tensor:
    return in_order(dropped(d, drop, seed, key))
