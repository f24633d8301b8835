"""Models of transformers, made from configurations: saved, merged on disk and in memory, and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from bits import same_bits
from command import Run
from library_models import (
    MARKS,
    SCALE,
    SEEDS,
    check,
    check_in_memory,
    finetuned,
    merge_files,
    refused,
    states,
)
from safetensors.torch import load_file, load_model, save_file, save_model

import negmerge_fast as nm

pytestmark = MARKS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 64}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
TOKENS = torch.tensor([[5, 6, 7, 2]])
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def llama() -> tuple[Any, Any]:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


def mixtral() -> tuple[Any, Any]:
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3)
    return transformers.MixtralForCausalLM(config), {"input_ids": TOKENS}


def vit() -> tuple[Any, Any]:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)), {"pixel_values": PIXELS}


def clip() -> tuple[Any, Any]:
    text = {**TEXT, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    return transformers.CLIPModel(config), {"input_ids": TOKENS, "pixel_values": PIXELS}


def bert() -> tuple[Any, Any]:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)), {"input_ids": TOKENS}


def gpt2() -> tuple[Any, Any]:
    config = transformers.GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def t5() -> tuple[Any, Any]:
    """Its embeddings have four names."""
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


# Names in memory and in files are the same, or differ: transformers 5 renames, and fuses experts, when it loads.
SAME_NAMES = [llama, clip, bert, gpt2, t5]
OTHER_NAMES = [mixtral, vit]


class Family(NamedTuple):
    """A base and its fine-tuned versions, in memory and on disk. inputs: of a forward pass."""

    modules: list[Any]
    paths: list[Path]
    inputs: dict[str, torch.Tensor]

    @property
    def files(self) -> list[dict[str, torch.Tensor]]:
        return [states(path) for path in self.paths]


def saved(folder: Path, make: Callable[[], tuple[Any, Any]]) -> Family:
    """The base is one file; the others have shards, each in its own way."""
    torch.manual_seed(0)
    base, inputs = make()
    modules = [base.eval(), *(finetuned(base, seed) for seed in SEEDS)]
    paths = [folder / name for name in ("base", "ft-1", "ft-2", "ft-3")]
    for module, path, size in zip(modules, paths, ("1GB", "10KB", "20KB", "1GB"), strict=True):
        module.save_pretrained(path, max_shard_size=size)
    return Family(modules, paths, inputs)


def loaded(family: Family, path: Path) -> Any:
    """A model whose names are complete and whose output is finite and not the base's."""
    base = family.modules[0]
    module, info = type(base).from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        ours, its = (each.eval()(**family.inputs)[0] for each in (module, base))
    assert ours.isfinite().all() and not torch.equal(ours, its)
    return module


@pytest.mark.parametrize("make", SAME_NAMES + OTHER_NAMES)
def test_directories(make: Callable[[], tuple[Any, Any]], run: Run, tmp_path: Path) -> None:
    family = saved(tmp_path, make)
    merged = merge_files(run, family.paths[0], family.paths[1:], tmp_path / "out")
    assert merged.notes == []
    check(states(merged.out), family.files[0], family.files[1:])
    module = loaded(family, merged.out)

    # In memory, under the names in memory, it is what the modules merge to.
    of_modules = nm.merge(family.modules[0], family.modules[1:], scale=SCALE)
    assert set(of_modules) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert same_bits(tensor, of_modules[name]), name


@pytest.mark.parametrize("make", SAME_NAMES + OTHER_NAMES)
def test_saved_again(make: Callable[[], tuple[Any, Any]], run: Run, tmp_path: Path) -> None:
    """A base that was loaded and saved again, and a result that is."""
    family = saved(tmp_path, make)
    expected = states(merge_files(run, family.paths[0], family.paths[1:], tmp_path / "out").out)
    loaded(family, family.paths[1]).save_pretrained(tmp_path / "ft-again")
    type(family.modules[0]).from_pretrained(family.paths[0]).save_pretrained(tmp_path / "again")
    models = [tmp_path / "ft-again", *family.paths[2:]]
    merged = merge_files(run, tmp_path / "again", models, tmp_path / "out-again")
    loaded(family, merged.out).save_pretrained(tmp_path / "result-again")
    for path in (merged.out, tmp_path / "result-again"):
        tensors = states(path)
        assert set(tensors) == set(expected)
        assert all(same_bits(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("make", SAME_NAMES)
def test_modules_and_files_in_memory(make: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    family = saved(tmp_path, make)
    check_in_memory(family.modules[0], family.modules[1:], family.files)


@pytest.mark.parametrize("make", OTHER_NAMES)
def test_other_names_in_memory_are_refused(make: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    """Never half a model: what has other names in files is not paired with a module."""
    family = saved(tmp_path, make)
    before = {name: tensor.clone() for name, tensor in family.modules[0].state_dict().items()}
    with pytest.raises(nm.InputError, match="finetuned"):
        nm.merge_(family.modules[0], family.files[1:], scale=SCALE)
    with pytest.raises(nm.InputError, match="finetuned"):
        nm.merge(family.files[0], family.modules[1:], scale=SCALE)
    for name, tensor in family.modules[0].state_dict().items():
        assert same_bits(tensor, before[name])


# From the names in files to those in memory.
VIT_NAMES = [
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(\w)\w+", r"attention.\1_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
]


def test_other_names_are_renamed_on_demand(run: Run, tmp_path: Path) -> None:
    """The state dict of a module in a file of its own, and versions as transformers saves them."""
    family = saved(tmp_path, vit)
    expected = nm.merge(family.modules[0], family.modules[1:], scale=SCALE)
    with pytest.warns(nm.MergeWarning, match="is taken for"):
        of_files = nm.merge(family.modules[0], family.files[1:], scale=SCALE, rename=VIT_NAMES)
    assert set(of_files) == set(expected)
    assert all(same_bits(of_files[name], expected[name]) for name in expected)

    save_model(family.modules[0], str(tmp_path / "base.safetensors"))
    options = [word for pattern, text in VIT_NAMES for word in ("--rename", f"{pattern}={text}")]
    out = tmp_path / "out.safetensors"
    merged = load_file(merge_files(run, tmp_path / "base.safetensors", family.paths[1:], out, *options).out)
    assert set(merged) == set(expected)
    assert all(same_bits(merged[name], expected[name]) for name in expected)


def test_raw_state_dicts(run: Run, tmp_path: Path) -> None:
    """What safetensors saves of a module itself, which keeps the last name of tied weights."""
    family = saved(tmp_path, llama)
    files = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for module, file in zip(family.modules, files, strict=True):
        save_model(module, str(file))
    tensors = [load_file(file) for file in files]
    assert "lm_head.weight" in tensors[0] and "model.embed_tokens.weight" not in tensors[0]
    merged = merge_files(run, files[0], files[1:], tmp_path / "out.safetensors")
    check(load_file(merged.out), tensors[0], tensors[1:])
    module = llama()[0]
    assert load_model(module, str(merged.out)) == (set(), [])
    assert module(**family.inputs)[0].isfinite().all()
    check_in_memory(family.modules[0], family.modules[1:], tensors)


@pytest.mark.parametrize("of_base", [True, False])
def test_tied_weights_under_both_names(of_base: bool, run: Run, tmp_path: Path) -> None:
    """Older files hold tied weights twice: those of the base, or those of the fine-tuned versions."""
    family = saved(tmp_path, llama)
    both = family.paths[:1] if of_base else family.paths[1:]
    for path in both:
        tensors = states(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for file in path.glob("model*"):
            file.unlink()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    merged = merge_files(run, family.paths[0], family.paths[1:], tmp_path / "out")
    tensors = states(merged.out)
    assert ("lm_head.weight" in tensors) is of_base
    with pytest.warns(nm.MergeWarning, match=r"^finetuned\[0\] and 2 more: .*'lm_head.weight'.* tie"):
        of_files = nm.merge(family.files[0], family.files[1:], scale=SCALE)
    for name, tensor in nm.merge(family.modules[0], family.modules[1:], scale=SCALE).items():
        if name in tensors:
            assert same_bits(tensors[name], tensor), name
            assert same_bits(of_files[name], tensor), name
    assert loaded(family, merged.out)


@pytest.mark.parametrize("of_base", [True, False])
def test_position_ids_of_older_files(of_base: bool, run: Run, tmp_path: Path) -> None:
    """Files before transformers 4.31 have integer buffers that those of today do not have."""
    family = saved(tmp_path, clip)
    ids = {
        "text_model.embeddings.position_ids": torch.arange(8)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    older = family.paths[0] if of_base else family.paths[3]
    save_file({**states(older), **ids}, older / "model.safetensors", metadata={"format": "pt"})
    merged = merge_files(run, family.paths[0], family.paths[1:], tmp_path / "out")
    [note] = merged.notes
    assert "position_ids" in note
    tensors = states(merged.out)
    check(tensors, family.files[0], family.files[1:])
    assert ("text_model.embeddings.position_ids" in tensors) is of_base
    loaded(family, merged.out)
    # The same in memory, where the modules have none.
    with pytest.warns(nm.MergeWarning, match="position_ids"):
        nm.merge(family.files[0], family.files[1:], scale=SCALE)
    with pytest.warns(nm.MergeWarning, match="position_ids"):
        versions = family.modules[1:] if of_base else family.files[1:]
        nm.merge(family.files[0], versions, scale=SCALE)


def test_gpt2_of_the_hub(run: Run, tmp_path: Path) -> None:
    """It has no transformer. before its names, and masks as floats, which nobody trains."""
    family = saved(tmp_path, gpt2)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in family.files[0].items()}
    tensors |= {f"h.{k}.attn.bias": torch.ones(8, 8).tril()[None, None] for k in range(2)}
    save_file(tensors, family.paths[0] / "model.safetensors", metadata={"format": "pt"})
    assert "attn.bias" in refused(run, *family.paths)
    options = ("--exclude", r"\.attn\.bias$")
    merged = merge_files(run, family.paths[0], family.paths[1:], tmp_path / "out", *options)
    assert merged.notes and all("transformer." in note for note in merged.notes)
    after, expected = states(merged.out), nm.merge(family.modules[0], family.modules[1:], scale=SCALE)
    assert set(after) == set(tensors)
    for name, tensor in after.items():
        assert same_bits(
            tensor, tensors[name] if name.endswith(".attn.bias") else expected[f"transformer.{name}"]
        )
    loaded = transformers.GPT2LMHeadModel.from_pretrained(merged.out)
    assert all(same_bits(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_another_architecture_is_refused(run: Run, tmp_path: Path) -> None:
    family = saved(tmp_path, vit)
    torch.manual_seed(0)
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=5))
    other.save_pretrained(tmp_path / "other")
    assert "classifier" in refused(run, *family.paths, tmp_path / "other")


def saved_as_bin(folder: Path, make: Callable[[], tuple[Any, Any]], shards: int) -> Family:
    """The same models, as torch.save writes their state dicts; tied weights share their storage."""
    family = saved(folder, make)
    for module, path in zip(family.modules, family.paths, strict=True):
        for file in path.glob("*.safetensors*"):
            file.unlink()
        state = module.state_dict()
        if shards == 1:
            torch.save(state, path / "pytorch_model.bin")
            continue
        size, weight_map = -(-len(state) // shards), {}
        for k in range(shards):
            file = path / f"pytorch_model-{k + 1:05}-of-{shards:05}.bin"
            part = dict(list(state.items())[k * size : (k + 1) * size])
            torch.save(part, file)
            weight_map.update(dict.fromkeys(part, file.name))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return family


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("wanted", ["auto", "pt"])
@pytest.mark.parametrize("make", SAME_NAMES)
def test_pytorch_model_bin(
    make: Callable[[], tuple[Any, Any]], wanted: str, shards: int, run: Run, tmp_path: Path
) -> None:
    family = saved_as_bin(tmp_path, make, shards)
    merged = merge_files(run, family.paths[0], family.paths[1:], tmp_path / "out", "--format", wanted)
    suffix = ".bin" if wanted == "pt" else ".safetensors"
    assert {p.suffix for p in merged.out.iterdir()} == {suffix, ".json"}
    assert wanted == "pt" or "becomes model" in merged.notes[0]
    module = loaded(family, merged.out)
    expected = nm.merge(family.modules[0], family.modules[1:], scale=SCALE)
    assert set(expected) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert same_bits(tensor, expected[name]), name


def test_a_state_dict_and_what_a_script_loads(run: Run, tmp_path: Path) -> None:
    family = saved(tmp_path, llama)
    files = [tmp_path / f"{k}.pt" for k in range(4)]
    for module, file in zip(family.modules, files, strict=True):
        torch.save({"state_dict": module.state_dict(), "epoch": 1}, file)
    expected = nm.merge(family.modules[0], family.modules[1:], scale=SCALE)
    merged = merge_files(run, files[0], files[1:], tmp_path / "out.pt", "--format", "pt")
    module = llama()[0]
    module.load_state_dict(torch.load(merged.out, weights_only=True)["state_dict"])
    assert all(same_bits(tensor, expected[name]) for name, tensor in module.state_dict().items())
    merged = merge_files(run, files[0], files[1:], tmp_path / "out.safetensors")
    module = llama()[0]
    assert load_model(module, str(merged.out)) == (set(), [])
    assert all(same_bits(tensor, expected[name]) for name, tensor in module.state_dict().items())
