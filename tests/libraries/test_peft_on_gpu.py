"""Adapters of PEFT beside a model on a GPU: the bits of the products written out, with each backend. On the CPU, too, to hold the test."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from bits import same_bits
from library_models import MARKS

import negmerge_fast as nm
from negmerge_fast.backends import registry
from negmerge_fast.core.reference import plain_merge

pytestmark = MARKS

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PLACES = [("cpu", "auto"), *(pytest.param("cuda:0", name, marks=GPU) for name in ("auto", *registry.NAMES[:2], "torch"))]  # fmt: skip
TARGETS, RANK, ALPHA = ("q_proj", "down_proj"), 16, 24


def llama(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=136, intermediate_size=560, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def adapted(dtype: torch.dtype, names: tuple[str, ...]) -> Any:
    """A model with adapters, half of whose factors is the same in all."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(dtype), copy.deepcopy(config), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, copy.deepcopy(config))
    for k, name in enumerate(names):
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(k + 1)
        for where, parameter in model.named_parameters():
            if f".{name}." in where:
                moves = [torch.randn(parameter.shape, generator=each) for each in (shared, own)]
                parameter.data = 0.1 * moves[0] + 0.03 * moves[1]
    return model


def expected_of(model: Any, names: tuple[str, ...], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    factors = {where: parameter.detach().cpu() for where, parameter in model.named_parameters()}
    expected = dict(base)
    for name in base:
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in TARGETS:
            continue
        differences = []
        for adapter in names:
            left, right = (
                factors[f"base_model.model.{module}.lora_{factor}.{adapter}.weight"] for factor in "BA"
            )
            total = torch.zeros(len(left), right.shape[1])
            for r in range(RANK):
                total = total + left[:, r : r + 1] * right[r]
            differences.append(total * (ALPHA / RANK))
        expected[name] = plain_merge(base[name], differences, 0.9, task_vectors=True)[0]
        assert not same_bits(expected[name], base[name])
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_adapters_in_memory(device: str, backend: str, dtype: torch.dtype) -> None:
    if backend != "auto" and (reason := registry.why_not(backend, device)) is not None:
        pytest.skip(reason)
    names = ("a", "b", "c")
    base, model = llama(dtype), adapted(dtype, names)
    expected = expected_of(model, names, {name: t.clone() for name, t in base.state_dict().items()})
    merged = nm.merge(base.to(device), [model.to(device)], scale=0.9, backend=backend)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].device == torch.device(device) and same_bits(merged[name].cpu(), tensor), name
