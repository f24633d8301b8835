"""Quantized weights and LoRA factors are told by names, types, shapes and configuration; what looks a little like them is not."""

from __future__ import annotations

from typing import Any

import pytest

from negmerge_fast.core.schema import TensorSpec
from negmerge_fast.core.unmergeable import is_counter, lora_factor, quantization_of, quantized_tensor

QUANTIZED: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "GPTQ": {"l.qweight": ("I32", (4, 8)), "l.scales": ("F16", (1, 8)), "l.g_idx": ("I32", (32,))},
    "AWQ": {"l.qweight": ("I32", (32, 1)), "l.qzeros": ("I32", (1, 1)), "l.scales": ("F16", (1, 8))},
    "bitsandbytes nf4": {"l.weight": ("U8", (64, 1)), "l.weight.absmax": ("F32", (2,))},
    "bitsandbytes nf4, its state": {"l.weight.quant_state.bitsandbytes__nf4": ("U8", (80,))},
    "bitsandbytes int8": {"l.weight": ("I8", (8, 8)), "l.SCB": ("F32", (8,))},
    "MXFP4": {"e.gate_up_proj_blocks": ("U8", (2, 8, 1, 16)), "e.gate_up_proj_scales": ("U8", (2, 8, 1))},
    "compressed-tensors": {"l.weight_packed": ("I32", (8, 1)), "l.weight_scale": ("BF16", (8, 1))},
    "torchao": {"l.weight:_data": ("I8", (8, 8)), "l.weight:_scale": ("F32", (8,))},
    "torchao, flattened": {"l._weight_qdata": ("I8", (8, 8)), "l._weight_scale": ("F32", (8,))},
    "HQQ": {"l.W_q": ("U8", (8, 8)), "l.scale": ("F16", (8, 1))},
    "AQLM": {"l.codes": ("I8", (8, 1, 2)), "l.codebooks": ("F16", (2, 16, 1, 8))},
    "any int8 with scales": {"l.w": ("I8", (8, 8)), "l.w_scale": ("F32", (8, 1))},
    "any integer weight": {"l.weight": ("I8", (8, 8))},
}
NOT_QUANTIZED: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "BERT": {"embeddings.position_ids": ("I64", (1, 512)), "embeddings.weight": ("F32", (8, 8))},
    "BatchNorm": {"n.weight": ("F32", (8,)), "n.num_batches_tracked": ("I64", ())},
    "Swin": {"a.relative_position_index": ("I64", (49, 49)), "a.scale": ("F32", (3, 1, 1))},
    "a mask": {"a.bias": ("BOOL", (1, 1, 8, 8)), "a.scale": ("F32", (3, 1, 1))},
    "floating-point scales": {"l.scales": ("F32", (8, 8)), "l.weight": ("F32", (8, 8))},
    "an index by number": {"vq.levels": ("I32", (4,)), "vq.scale": ("F32", (1,))},
}


def specs(given: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(*spec) for name, spec in given.items()}


@pytest.mark.parametrize("given", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantized_weights(given: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    found = quantized_tensor(specs(given))
    assert found is not None and found[0] == next(iter(given)) and "quantized weights" in found[1]


@pytest.mark.parametrize("given", NOT_QUANTIZED.values(), ids=NOT_QUANTIZED.keys())
def test_other_integers(given: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    assert quantized_tensor(specs(given)) is None


CONFIGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq'"),
    "old compressed-tensors": ({"compression_config": {"format": "int"}}, "compression_config"),
    "of a part": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantization_config 'awq'"),
    "no object": ({"quantization_config": "fp8"}, "quantization_config"),
    "null": ({"quantization_config": None}, None),
    "empty": ({"quantization_config": {}}, None),
    "none": ({"model_type": "bert", "vision_config": {"depth": 2}}, None),
}  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations(config: dict[str, Any], expected: str | None) -> None:
    assert quantization_of(config) == expected


A, B, W = (2, 16), (16, 2), (16, 16)
FACTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "PEFT": {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B},
    "PEFT, named": {"base_model.model.q.lora_A.default.weight": A, "base_model.model.q.base_layer.weight": W},
    "PEFT, embeddings": {"m.embed.lora_embedding_A": (2, 50), "m.embed.lora_embedding_B": (16, 2)},
    "only one of two": {"m.q.lora_B.weight": B},
    "torchtune": {"q.lora_a.weight": A, "q.lora_b.weight": B},
    "kohya": {"lora_unet_mid.lora_down.weight": A, "lora_unet_mid.lora_up.weight": B, "lora_unet_mid.alpha": ()},
    "kohya, a convolution": {"lora_unet_a.lora_down.weight": (2, 16, 3, 3), "lora_unet_a.lora_up.weight": (16, 2, 1, 1)},
    "diffusers": {"unet.to_q.lora.down.weight": A, "unet.to_q.lora.up.weight": B},
    "old diffusers": {"mid.processor.to_q_lora.down.weight": A, "mid.processor.to_q_lora.up.weight": B},
    "LoHa": {"lora_unet_a.hada_w1_a": B, "lora_unet_a.hada_w1_b": A},
    "LoKr": {"lora_unet_a.lokr_w1": (4, 4), "lora_unet_a.lokr_w2": (4, 4)},
    "DoRA": {"m.q.lora_magnitude_vector.weight": (16,)},
}  # fmt: skip
NO_FACTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "DeepSeek": {"l.q_a_proj.weight": A, "l.q_b_proj.weight": B},
    "RWKV-7": {"l.w_lora.lora.0.weight": A, "l.w_lora.lora.2.weight": B},
    "Llama": {"l.down_proj.weight": W, "l.up_proj.weight": W},
    "U-Net": {"down.0.weight": W, "up.0.weight": W, "a.down.weight": A, "a.up.weight": B},
    "words in the middle": {"colora_Ax.weight": A, "flora_down.weight": A},
    "no rank in common": {"x_lora.down.weight": (3, 16), "x_lora.up.weight": (17, 5)},
}


@pytest.mark.parametrize("given", FACTORS.values(), ids=FACTORS.keys())
def test_factors(given: dict[str, tuple[int, ...]]) -> None:
    made = {"w": TensorSpec("F32", W), **{name: TensorSpec("F32", shape) for name, shape in given.items()}}
    assert lora_factor(made) == next(iter(given))


@pytest.mark.parametrize("given", NO_FACTORS.values(), ids=NO_FACTORS.keys())
def test_no_factors(given: dict[str, tuple[int, ...]]) -> None:
    assert lora_factor({name: TensorSpec("F32", shape) for name, shape in given.items()}) is None


def test_counters() -> None:
    counters = ["n.num_batches_tracked", "global_step", "ema.num_updates", "step", "sched.n_averaged"]
    assert all(is_counter(name, TensorSpec("I64", (1,))) for name in counters)
    assert is_counter("any", TensorSpec("I64", ())) and is_counter("mask", TensorSpec("BOOL", (4, 4)))
    others = ["position_ids", "stepper", "codes", "discount"]
    assert not any(is_counter(name, TensorSpec("I64", (1, 4))) for name in others)
