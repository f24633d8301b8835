"""NumPy arrays for tests, and the expected merge of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from negmerge_fast.core.reference import plain_merge


def arrays(*shape: int, n: int = 3, dtype: Any = np.float32) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    base = random.normal(size=shape)
    return [base.astype(dtype)] + [(base + random.normal(0.05, 0.1, shape)).astype(dtype) for _ in range(n)]


def expected(held: list[Any], scale: float = 0.9) -> torch.Tensor:
    base, *models = (torch.tensor(np.array(t)) if isinstance(t, np.ndarray) else t.detach() for t in held)
    return plain_merge(base, models, scale)[0]
