"""The shapes of models, held to those of transformers."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from negmerge_fast.benchmark.shapes import LAYOUTS


def test_sizes_of_layouts() -> None:
    totals = {name: sum(map(prod, make().values())) for name, make in LAYOUTS.items()}
    assert totals == {
        "2,000 tensors": 2_000_000,
        "2,000 large tensors": 200_000_000,
        "ViT-B/32": 113_448_705,
        "Llama 1B": 1_235_814_400,
        "Llama 8B": 8_030_261_248,
    }


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("Llama 1B", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}),
        ("Llama 8B", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    ],
)  # fmt: skip
def test_llamas_are_those_of_transformers(layout: str, settings: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, **settings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == LAYOUTS[layout]()


def test_the_vision_transformer_is_clip_without_its_text_transformer() -> None:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())  # whose defaults are ViT-B/32's
    left = {
        name: p.numel() for name, p in model.named_parameters() if ".encoder." not in name or "vision" in name
    }
    assert sum(left.values()) == sum(map(prod, LAYOUTS["ViT-B/32"]().values()))
