"""Models of a Llama layout, one of which was trained on other data."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_files import save_model

WRONG = "ft-2-wrong"
MODELS = ["ft-0", "ft-1", WRONG, "ft-3", "ft-4"]


def llama(layers: int = 3) -> list[dict[str, torch.Tensor]]:
    """A base and five versions of it. The signs of the third are random."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 8), "model.norm.weight": (8,)}
    for layer in range(layers):
        for kind, shape in (
            ("self_attn.q_proj", (8, 8)),
            ("mlp.up_proj", (24, 8)),
            ("input_layernorm", (8,)),
        ):
            shapes[f"model.layers.{layer}.{kind}.weight"] = shape

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: noise(shape) for name, shape in shapes.items()}
    common = {name: 2 * noise(shape) for name, shape in shapes.items()}
    found = [base]
    for model in MODELS:
        found.append({
            name: t + 0.01 * (noise(t.shape) + (0 if model == WRONG else common[name])) for name, t in base.items()
        })  # fmt: skip
    found[2]["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].clone()  # ft-1 did not train it
    return found


def save_llama(folder: Path, layers: int = 3) -> list[Path]:
    """The base and the models, as directories."""
    return [
        save_model(folder / name, tensors)
        for name, tensors in zip(["base", *MODELS], llama(layers), strict=True)
    ]
