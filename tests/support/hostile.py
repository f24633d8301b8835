"""Models that are hard to merge."""

from __future__ import annotations

import torch

HOSTILE = [
    0.0, -0.0, 1e-45, -1e-45, 1e-40, 6e-8, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 65504.0, 1.0,
]  # fmt: skip


def random_models(
    n: int, length: int, base_dtype: torch.dtype, dtypes: list[torch.dtype], seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and n fine-tuned versions that lean to one side, with hostile values strewn in."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(length, generator=generator, dtype=torch.float64)
    lean = torch.randn(length, generator=generator, dtype=torch.float64)
    models = [
        base + lean * 0.1 + 0.05 * torch.randn(length, generator=generator, dtype=torch.float64)
        for _ in range(n)
    ]
    versions = [
        v.to(t)
        for v, t in zip(
            [base, *models], [base_dtype, *(dtypes[k % len(dtypes)] for k in range(n))], strict=True
        )
    ]
    for version in versions:
        hostile = torch.tensor(HOSTILE, dtype=torch.float64).to(version.dtype)
        if length:
            places = torch.randint(length, (min(length, 40),), generator=generator).unique()
            version[places] = hostile[torch.randint(len(hostile), places.shape, generator=generator)]
        if length > 8:  # an element that is zero in all, and one that none has changed
            version[0] = 0.0
            version[1] = float(versions[0][1])
    return versions[0], versions[1:]
