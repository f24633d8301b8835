"""Adapters of PEFT beside and among whole models: what is read of them and refused, and what becomes of merged ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from command import Run
from library_models import MARKS, SCALE, SEEDS, check, check_in_memory, merge_files, refused, states
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from transformers import LlamaConfig, LlamaForCausalLM

import negmerge_fast as nm

pytestmark = MARKS

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "head too": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lokr": LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]),
}
FACTORS = "lora_|hada_|lokr_"
# What a line says of those that are refused, and which tensors the others change.
METHODS = {"dora": "use_dora is set (DoRA)", "loha": "peft_type is 'LOHA'", "lokr": "peft_type is 'LOKR'"}
CHANGED = {"lora": ["q_proj", "v_proj"], "head too": ["q_proj", "norm"], "embedding": ["embed_tokens"]}
TOKENS = torch.tensor([[5, 6, 7, 2]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(kind: str, seed: int) -> PeftModel:
    """A model with an adapter whose factors were trained: half of it the same for all seeds."""
    model = get_peft_model(llama(), copy.deepcopy(CONFIGS[kind]))
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=shared)
                parameter += 0.05 * torch.randn(parameter.shape, generator=own)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_factors_in_memory_are_refused(kind: str) -> None:
    """State dicts of models with adapters, and the adapters' own. test_peft_in_memory.py merges models."""
    models = [adapted(kind, seed) for seed in (0, *SEEDS)]
    before = copy.deepcopy(models[0].state_dict())
    for versions in (
        [model.state_dict() for model in models],
        [get_peft_model_state_dict(model) for model in models],
        [model.get_base_model().model for model in models],
    ):
        for function in (nm.merge, nm.merge_):
            with pytest.raises(nm.InputError, match=FACTORS):
                function(versions[0], versions[1:], scale=SCALE)
    if kind in ("dora", "loha", "lokr"):
        plain = llama()
        with pytest.raises(nm.InputError, match=r"^finetuned\[0\]: adapter 'default': "):
            nm.merge(plain, models, scale=SCALE)
        inner = [model.get_base_model() for model in models]
        with pytest.raises(nm.InputError, match=r"^(base|finetuned\[0\]): adapter 'default': "):
            nm.merge(inner[0], inner[1:], scale=SCALE)
    assert all(same_bits(tensor, before[name]) for name, tensor in models[0].state_dict().items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_on_disk(kind: str, run: Run, tmp_path: Path) -> None:
    """The directory, and its file named by itself: none is a base, and those of LoRA are models."""
    paths = [tmp_path / name for name in ("base", "ft-1", "ft-2")]
    for seed, path in enumerate(paths):
        adapted(kind, seed).save_pretrained(path)
    files = [path / "adapter_model.safetensors" for path in paths]
    llama().save_pretrained(tmp_path / "whole")
    if method := METHODS.get(kind):
        for base, *models in (paths, files, [tmp_path / "whole", *paths[1:]]):
            assert method in refused(run, base, *models)
        return
    for base, *models in (paths, files):
        assert "a LoRA adapter, expected a whole model as the base" in refused(run, base, *models)
    merged = [
        merge_files(run, tmp_path / "whole", each[1:], tmp_path / f"out-{len(each[1].name)}")
        for each in (paths, files)
    ]
    first, second = (states(each.out) for each in merged)
    before = states(tmp_path / "whole")
    assert first.keys() == second.keys() == before.keys()
    assert all(same_bits(first[name], second[name]) for name in before)
    changed = {name for name in before if not same_bits(first[name], before[name])}
    assert changed and all(any(module in name for module in CHANGED[kind]) for name in changed)
    loaded, info = LlamaForCausalLM.from_pretrained(merged[0].out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert loaded.eval()(TOKENS).logits.isfinite().all()


def unloaded(kind: str) -> list[LlamaForCausalLM]:
    return [llama(), *(adapted(kind, seed).merge_and_unload() for seed in SEEDS)]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_merged_adapters_are_weights(kind: str, run: Run, tmp_path: Path) -> None:
    models = unloaded(kind)
    paths = [tmp_path / name for name in ("base", "ft-1", "ft-2", "ft-3")]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path)
        assert not list(path.glob("adapter*"))
    files = [states(path) for path in paths]
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert merged.notes == []
    check(states(merged.out), files[0], files[1:])
    check_in_memory(models[0], models[1:], files)
    loaded, info = LlamaForCausalLM.from_pretrained(merged.out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        ours, its = (model.eval()(TOKENS).logits for model in (loaded, models[0]))
    assert ours.isfinite().all() and not torch.equal(ours, its)


@pytest.fixture
def with_adapters(tmp_path: Path) -> list[Path]:
    """Whole models; a folder may get an adapter as well, as merge_and_unload after save_pretrained leaves it."""
    paths = [tmp_path / name for name in ("base", "ft-1", "ft-2", "ft-3")]
    for model, path in zip(unloaded("lora"), paths, strict=True):
        model.save_pretrained(path)
    return paths


def test_an_adapter_beside_the_base(with_adapters: list[Path], run: Run, tmp_path: Path) -> None:
    """It was trained for the base's weights; whether it is to go with others is the user's choice."""
    adapted("lora", 1).save_pretrained(with_adapters[0])
    line = refused(run, *with_adapters)
    assert "adapter_" in line and "--keep" in line and "--drop" in line
    files = [
        {name: tensor for name, tensor in states(path).items() if "lora_" not in name}
        for path in with_adapters
    ]
    kept = merge_files(run, with_adapters[0], with_adapters[1:], tmp_path / "kept", "--keep", "adapter_*")
    dropped = merge_files(
        run, with_adapters[0], with_adapters[1:], tmp_path / "dropped", "--drop", "adapter_*"
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (kept.out / name).read_bytes() == (with_adapters[0] / name).read_bytes()
        assert not (dropped.out / name).exists()
    check(states(dropped.out), files[0], files[1:])
    assert isinstance(PeftModel.from_pretrained(llama(), kept.out), PeftModel)


def test_an_adapter_beside_a_version(with_adapters: list[Path], run: Run, tmp_path: Path) -> None:
    """Only its whole weights are looked at, and this is said."""
    expected = merge_files(run, with_adapters[0], with_adapters[1:], tmp_path / "expected")
    adapted("lora", 1).save_pretrained(with_adapters[2])
    merged = merge_files(run, with_adapters[0], with_adapters[1:], tmp_path / "out")
    [note] = merged.notes
    assert "adapter" in note and "ft-2" in note
    before, after = states(expected.out), states(merged.out)
    assert set(before) == set(after)
    assert all(same_bits(before[name], after[name]) for name in before)


def test_an_adapter_trained_on_the_result(with_adapters: list[Path], run: Run, tmp_path: Path) -> None:
    """The result is a model like any other."""
    merged = merge_files(run, with_adapters[0], with_adapters[1:], tmp_path / "out")
    loaded: Any = LlamaForCausalLM.from_pretrained(merged.out)
    again = get_peft_model(loaded, copy.deepcopy(CONFIGS["lora"])).merge_and_unload()
    for name, tensor in states(merged.out).items():
        assert same_bits(again.state_dict()[name], tensor), name
