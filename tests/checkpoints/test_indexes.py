"""Indexes, shards and variants: the tensors that transformers loads, or a refusal that says what to choose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from bits import same_bits
from checkpoint_files import load_model, negmerge, save_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import negmerge_fast as nm
from negmerge_fast.checkpoints.base import Checkpoint, TensorRef
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.errors import InputError
from negmerge_fast.core.reference import plain_merge

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Tensors = dict[str, torch.Tensor]


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def write_index(path: Path, weight_map: Mapping[str, str], name: str = INDEX) -> None:
    path.mkdir(exist_ok=True)
    (path / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(weight_map)}))


def read(tensors: Mapping[str, TensorRef]) -> Tensors:
    found = {}
    for name, (spec, source) in tensors.items():
        data = source.file.path.read_bytes()[source.offset : source.end]
        assert spec.dtype == "F32"
        found[name] = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(spec.shape)
    return found


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = list(tensors)
    return {n: tensors[n] for n in names[:3]}, {n: tensors[n] for n in names[3:]}


def overlay(path: Path, tensors: Tensors, stale: Tensors) -> None:
    """The last shard replaces tensors of the first."""
    over = dict(list(tensors.items())[:2])
    write(path / FIRST, tensors | {name: stale[name] for name in over})
    write(path / "model-overlay.safetensors", over)
    write_index(path, dict.fromkeys(tensors, FIRST) | dict.fromkeys(over, "model-overlay.safetensors"))


def in_folders(path: Path, tensors: Tensors, stale: Tensors) -> None:
    first, second = halves(tensors)
    write(path / "weights" / "a" / FIRST, first)
    write(path / SECOND, second)
    names = dict.fromkeys(first, f"weights/a/{FIRST}") | dict.fromkeys(second, SECOND)
    write_index(path, names | {next(iter(second)): f"./{SECOND}"})


def single_beside_shards(path: Path, tensors: Tensors, stale: Tensors) -> None:
    write(path / SINGLE, tensors)
    first, second = halves(stale)
    write(path / FIRST, first)
    write(path / SECOND, second)
    write_index(path, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND))


def other_shards_unnamed(path: Path, tensors: Tensors, stale: Tensors) -> None:
    """A shard beside the index that it does not name."""
    write(path / FIRST, tensors)
    write(path / SECOND, stale)
    write_index(path, dict.fromkeys(tensors, FIRST))


def named_by_config(path: Path, tensors: Tensors, stale: Tensors) -> None:
    write(path / SINGLE, stale)
    write(path / "other.safetensors", tensors)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))


def variant_beside(path: Path, tensors: Tensors, stale: Tensors) -> None:
    write(path / SINGLE, tensors)
    write(path / "model.fp16.safetensors", stale)


LAYOUTS = [
    overlay, in_folders, single_beside_shards, other_shards_unnamed, named_by_config, variant_beside,
]  # fmt: skip
Layout = Callable[[Path, Tensors, Tensors], None]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tensors_that_transformers_loads(tmp_path: Path, llama: LlamaForCausalLM, layout: Layout) -> None:
    llama.config.save_pretrained(tmp_path)
    tensors = dict(llama.state_dict())
    layout(tmp_path, tensors, {name: t + 1 for name, t in tensors.items()})
    assert same(dict(LlamaForCausalLM.from_pretrained(tmp_path).state_dict()), tensors)
    for extra_files in (True, False):
        opened = open_checkpoint(tmp_path, extra_files=extra_files)
        assert same(read(opened.tensors), tensors)
    assert not opened.unindexed


def test_what_the_index_omits(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    """transformers loads it. Its bytes stay the base's, and that is said."""
    llama.config.save_pretrained(tmp_path)
    tensors = dict(llama.state_dict())
    write(tmp_path / FIRST, tensors)
    left, named = halves(tensors)
    write_index(tmp_path, dict.fromkeys(named, FIRST))
    opened = open_checkpoint(tmp_path)
    assert same(read(opened.tensors), named) and same(read(opened.unindexed), left)
    assert same(dict(LlamaForCausalLM.from_pretrained(tmp_path).state_dict()), tensors)
    assert not open_checkpoint(tmp_path, extra_files=False).notes
    (note,) = opened.notes
    assert f"3 tensors ({next(iter(left))!r}, …) are in its shards without being named" in note


def test_copies_of_which_transformers_loads_another_than_the_index_names(
    tmp_path: Path, llama: LlamaForCausalLM
) -> None:
    llama.config.save_pretrained(tmp_path)
    tensors = dict(llama.state_dict())
    name = next(iter(tensors))
    write(tmp_path / "a-overlay.safetensors", {name: tensors[name] + 1})
    write(tmp_path / FIRST, tensors)
    write_index(tmp_path, dict.fromkeys(tensors, FIRST) | {name: "a-overlay.safetensors"})
    assert same(dict(LlamaForCausalLM.from_pretrained(tmp_path).state_dict()), tensors)
    with pytest.raises(
        InputError, match=f"is in a-overlay.safetensors, but transformers loads the copy in {FIRST}"
    ):
        open_checkpoint(tmp_path)


TWO = {"a": torch.ones(2), "b": torch.zeros(3)}


def open_one(path: Path) -> Checkpoint:
    opened = open_checkpoint(path)
    assert same(read(opened.tensors), TWO)
    return opened


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "any.other", "Qwen2.5-7B"])
def test_shards_without_an_index(tmp_path: Path, stem: str) -> None:
    for k, name in enumerate(TWO):
        write(tmp_path / f"{stem}-{k + 1:05d}-of-00002.safetensors", {name: TWO[name]})
    opened = open_one(tmp_path)
    assert len(opened.weights) == 2 and "all 2 shards are taken" in opened.notes[0]


@pytest.mark.parametrize(
    "names",
    [
        ["model.fp16.safetensors"],
        ["diffusion_pytorch_model.bf16.safetensors"],
        ["model.any_name.safetensors"],
        ["unet.fp16.safetensors"],
    ],
)
def test_a_variant_alone_is_taken_and_said(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path / names[0], TWO)
    opened = open_one(tmp_path)
    assert list(opened.weights) == names and "no other variant is there" in opened.notes[0]


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"),
    ],
)  # fmt: skip
def test_shards_of_a_variant(tmp_path: Path, index: str, shard: str) -> None:
    write(tmp_path / shard, TWO)
    write_index(tmp_path, dict.fromkeys(TWO, shard), index)
    opened = open_one(tmp_path)
    assert "no other variant is there" in opened.notes[0] and list(opened.extra_files) == [index]
    # The plain one is preferred, whatever it is called.
    (tmp_path / shard).rename(tmp_path / "moved.safetensors")
    write_index(tmp_path, dict.fromkeys(TWO, "moved.safetensors"), index)
    write(tmp_path / "plain-00001-of-00001.safetensors", TWO)
    (tmp_path / "moved.safetensors").rename(tmp_path / shard)
    assert list(open_one(tmp_path).weights) == ["plain-00001-of-00001.safetensors"]


def test_of_diffusers_the_index_wins(tmp_path: Path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", {"c": torch.zeros(1)})
    write(tmp_path / FIRST, TWO)
    write_index(tmp_path, dict.fromkeys(TWO, FIRST), "diffusion_pytorch_model.safetensors.index.json")
    assert list(open_one(tmp_path).weights) == [FIRST]


def test_an_overlay_is_merged_and_the_superseded_copy_stays(tmp_path: Path) -> None:
    base = {"a": torch.randn(9), "b": torch.randn(5), "c": torch.randn(4)}
    stale = {name: torch.full_like(t, 7.0) for name, t in base.items()}
    models = [{name: t + k * 0.5 for name, t in base.items()} for k in (1, 2)]
    (tmp_path / "base").mkdir()
    overlay(tmp_path / "base", base, stale)
    for k, model in enumerate(models):
        save_model(tmp_path / f"ft-{k}", model)
    done = negmerge("merge", "base", "ft-0", "ft-1", "-o", "out", "--scale", "0.9", cwd=tmp_path)
    assert (
        done.returncode == 0 and done.stderr.count("negmerge: note: base/model.safetensors.index.json: ") == 1
    )
    assert "2 tensors ('a', …) are in other shards than it names, too" in done.stderr
    merged = load_file(tmp_path / "out" / "model-overlay.safetensors")
    for name, tensor in merged.items():
        assert same_bits(tensor, plain_merge(base[name], [model[name] for model in models], 0.9)[0])
    expected = plain_merge(base["c"], [model["c"] for model in models], 0.9)[0]
    assert same(load_file(tmp_path / "out" / FIRST), stale | {"c": expected})
    nm.verify_checkpoint(tmp_path / "out", [tmp_path / name for name in ("base", "ft-0", "ft-1")])


def test_what_a_base_or_a_model_omits(tmp_path: Path) -> None:
    base = {"a": torch.randn(9), "b": torch.randn(5), "c": torch.randn(3)}
    models = [{name: t + k * 0.5 for name, t in base.items()} for k in (1, 2)]
    write(tmp_path / "base" / FIRST, base)
    write_index(tmp_path / "base", {"a": FIRST, "c": FIRST})
    save_model(tmp_path / "ft-0", models[0])
    # What only the model's index omits is loaded all the same; what the base lacks is not asked for.
    write(tmp_path / "ft-1" / FIRST, {**models[1], "stale": torch.zeros(2)})
    write_index(tmp_path / "ft-1", {"a": FIRST, "b": FIRST})
    with pytest.warns(
        nm.MergeWarning, match=r"base.*1 tensors \('b'\) are in its shards without being named"
    ):
        report = nm.merge_checkpoints(
            tmp_path / "base", [tmp_path / "ft-0", tmp_path / "ft-1"], tmp_path / "out", scale=0.9
        )
    assert [tensor["name"] for tensor in report.tensors] == ["a", "c"]
    merged = load_model(tmp_path / "out")
    for name, tensor in base.items():
        expected = plain_merge(tensor, [model[name] for model in models], 0.9)[0] if name != "b" else tensor
        assert same_bits(merged[name], expected), name
    nm.verify_checkpoint(tmp_path / "out", [tmp_path / name for name in ("base", "ft-0", "ft-1")])
