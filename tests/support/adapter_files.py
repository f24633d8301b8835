"""LoRA adapters for tests, as PEFT writes them, and what they are: the product written out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def save_adapter(
    path: Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int,
    alpha: float,
    **config: Any,
) -> Path:
    """A PEFT directory. factors: A (rank, in) and B (out, rank) by the path of a module."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def difference(a: torch.Tensor, b: torch.Tensor, scale: float, wide: torch.dtype) -> torch.Tensor:
    """s · Σ_r B[i, r] · A[r, m]: the sum starts at +0, r ascends, each product and each sum is rounded."""
    total = torch.zeros(len(b), a.shape[1], dtype=wide)
    for r in range(len(a)):
        product = b.to(wide)[:, r : r + 1] * a.to(wide)[r]
        total = total + product
    return total * torch.tensor(scale, dtype=torch.float64).to(wide)
