"""PyTorch files as checkpoints: what torch loads is what is merged, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored_tensors import check

from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.dtypes import TORCH_NAMES

DTYPES = [getattr(torch, name) for name in TORCH_NAMES.values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.arange(35).reshape(5, 7).to(dtype),
        "b": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    torch.save(tensors, tmp_path / "m.pt")
    check(open_checkpoint(tmp_path / "m.pt"), tensors)


def views() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    big, long = torch.randn(30, 70, 3, generator=generator), torch.randn(40_000, generator=generator)
    wide = torch.randn(3, 40_000, generator=generator)
    return {
        "whole": big, "rows": big[10:20], "permuted": big.permute(2, 0, 1), "other": big.permute(1, 2, 0), "cut": big[::3, 5:60:7, 1],
        "expanded": torch.randn(4, 1, 5, generator=generator).expand(4, 90, 5), "scalar": big[1, 2, 0], "every other": long[::2],
        "far apart": torch.randn(4_000_000)[::400_000], "transposed": wide.t(), "wide": wide[:, 1:], "diagonal": big[0, :3].diagonal(),
        "overlapping": long.as_strided((300, 20), (3, 1)), "unfolded": long.unfold(0, 5, 2), "none": wide[:0].t(),
    }  # fmt: skip


@pytest.mark.parametrize("step", [1 << 30, 4096, 1001])
def test_views(tmp_path: Path, step: int) -> None:
    tensors = {name: view for name, view in views().items() if step > 1 << 20 or view.numel() < 10_000}
    torch.save(tensors, tmp_path / "m.pt")
    check(open_checkpoint(tmp_path / "m.pt"), tensors, step)
