"""Models in several folders: modules of sentence-transformers and components of diffusers, found and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import negmerge, save_model
from interrupted import contents, finish, start
from safetensors.torch import load_file, save_file
from small_chunks import record_every_chunk

import negmerge_fast as nm
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.core.errors import InputError
from negmerge_fast.core.reference import plain_merge

Tensors = dict[str, torch.Tensor]
INPUTS = ("base", "ft-0", "ft-1")


def modules(*paths: str) -> str:
    return json.dumps([
        {"idx": k, "name": str(k), "path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
        for k, path in enumerate(paths)
    ])  # fmt: skip


def save_part(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"in": str(folder.name)}))
    save_file(tensors, folder / file)


def save_dense_model(path: Path, seed: int) -> Tensors:
    """A transformer in shards, pooling, a module whose folder is empty and so missing, and a Dense module."""
    draw = torch.Generator().manual_seed(seed)
    transformer = {f"layer.{k}.weight": torch.randn(99, 64, generator=draw) for k in range(4)}
    dense = {
        "linear.weight": torch.randn(64, 64, generator=draw),
        "linear.bias": torch.randn(64, generator=draw),
    }
    names = list(transformer)
    save_model(path, transformer, [names[:2], names[2:]])
    (path / "modules.json").write_text(modules("", "1_Pooling", "2_Dense", "3_Normalize"))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text("{}")
    save_part(path / "2_Dense", dense)
    return {**transformer, **{f"2_Dense/{name}": t for name, t in dense.items()}}


def save_pipeline(path: Path, seed: int) -> Tensors:
    """Two components with weights, one with shards, and others without; a single file that no index names."""
    draw = torch.Generator().manual_seed(seed)
    unet = {f"conv.{k}.weight": torch.randn(9, 8, generator=draw) for k in range(3)}
    text = {"embed.weight": torch.randn(30, 4, generator=draw)}
    path.mkdir()
    components = {
        "_class_name": "StableDiffusionPipeline",
        "_ignored": ["a", "b"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "requires_safety_checker": False,
        "sizes": [1, 2],
    }
    (path / "model_index.json").write_text(json.dumps(components))
    names = list(unet)
    save_model(path / "unet", unet, [names[:1], names[1:]])
    stem = "diffusion_pytorch_model.safetensors"
    (path / "unet" / "model.safetensors.index.json").rename(path / "unet" / f"{stem}.index.json")
    save_file({"x": torch.zeros(1)}, path / "unet" / stem.replace(".", ".fp16."))
    save_part(path / "text_encoder", text)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text("{}")
    save_file({"everything": torch.zeros(2)}, path / "v1-5-pruned.safetensors")
    (path / "_ignored").mkdir()
    named = {"unet": unet, "text_encoder": text}
    return {f"{part}/{name}": t for part, held in named.items() for name, t in held.items()}


SAVED = {"dense": save_dense_model, "pipeline": save_pipeline}


@pytest.fixture(params=SAVED)
def models(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    monkeypatch.chdir(tmp_path)
    return [SAVED[request.param](tmp_path / name, k) for k, name in enumerate(INPUTS)]


def load(path: Path) -> Tensors:
    found = {}
    for file in sorted(path.rglob("*.safetensors")):
        folder = file.parent.relative_to(path).as_posix()
        prefix = "" if folder == "." else f"{folder}/"
        found.update({prefix + name: t for name, t in load_file(file).items()})
    return found


def check(models: list[Tensors], out: str = "out") -> None:
    merged = load(Path(out))
    assert merged.keys() == models[0].keys()
    for name, base in models[0].items():
        assert same_bits(merged[name], plain_merge(base, [m[name] for m in models[1:]], 0.9)[0]), name


def merge(out: str = "out", **options: Any) -> nm.Report:
    return nm.merge_checkpoints("base", INPUTS[1:], out, scale=0.9, **options)


def test_every_part_is_merged_and_verified(models: list[Tensors]) -> None:
    done = negmerge("merge", *INPUTS, "-o", "out", "--scale", "0.9")
    assert (done.returncode, done.stderr) == (0, "")
    check(models)
    skipped = {
        line.removeprefix("skipped  ") for line in done.stdout.splitlines() if line.startswith("skipped")
    }
    copied = {str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file()} - {"negmerge.json"}
    assert copied | skipped == {str(p.relative_to("base")) for p in Path("base").rglob("*") if p.is_file()}
    assert skipped <= {"v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    verified = negmerge("verify", "out", "--against", *INPUTS)
    assert verified.returncode == 0, verified.stderr
    for part in ("2_Dense", "text_encoder"):
        if (damaged := Path("out", part, "model.safetensors")).exists():
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    assert f"{damaged.parent.parent}/" in negmerge("verify", "out").stderr


def test_the_parts_of_a_checkpoint(models: list[Tensors]) -> None:
    opened, model = open_checkpoint("base"), open_checkpoint("ft-0", extra_files=False)
    parts = ("", "2_Dense") if "2_Dense/linear.bias" in models[0] else ("unet", "text_encoder")
    for checkpoint in (opened, model):
        assert tuple(checkpoint.configs) == parts and checkpoint.tensors.keys() == models[0].keys()
        assert {name.rpartition("/")[0] for name in checkpoint.weights} == set(parts)
        assert checkpoint.configs.keys() == set(parts) and checkpoint.configs[parts[1]] == {"in": parts[1]}
    indexes = {
        name for name in opened.extra_files if name.endswith("index.json") and name != "model_index.json"
    }
    assert model.extra_files.keys() == indexes and len(indexes) == 1


def test_resumed(models: list[Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    merge("expected")
    record_every_chunk(monkeypatch)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        merge(threads=1, resume=True, progress=stop)
    merge(resume=True)
    check(models)
    assert contents(Path("out")) == contents(Path("expected"))
    again = negmerge("merge", *INPUTS, "-o", "out", "--scale", "0.9", "--resume")
    assert again.returncode == 0 and "was finished already" in again.stdout


@pytest.mark.processes
def test_by_two_ranks(models: list[Tensors]) -> None:
    ended = finish(start(Path(), ranks=2, wait=0.0))
    assert [status for status, *_ in ended] == [0, 0], ended
    merge("expected")
    assert contents(Path("out")) == contents(Path("expected"))


def test_a_version_that_lacks_a_part(models: list[Tensors]) -> None:
    part = "2_Dense" if Path("base/2_Dense").exists() else "unet"
    shutil.rmtree(f"ft-1/{part}")
    with pytest.raises(InputError, match=rf"ft-1: tensor '{part}/.*': missing"):
        merge()
    assert not Path("out").exists()


def test_a_part_by_other_names(tmp_path: Path) -> None:
    """Named twice, with slashes and dots, and through other modules: it is one part."""
    save_model(tmp_path, {"a": torch.zeros(2)})
    (tmp_path / "modules.json").write_text(
        modules("", "2_Dense", "2_Dense/", "./2_Dense", "x/../2_Dense", ".")
    )
    save_part(tmp_path / "2_Dense", {"b": torch.zeros(2)})
    (tmp_path / "2_Dense" / "modules.json").write_text(modules(""))
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "2_Dense/b"]


def test_parts_of_parts(tmp_path: Path) -> None:
    """A router's modules, in its own file or in config.json; a pipeline within a pipeline."""
    (tmp_path / "modules.json").write_text(modules("0_Router", "1_Asym"))
    types = {"query_0_Static": "x.StaticEmbedding", "document_0_Transformer": "x.Transformer"}
    router = json.dumps({"types": types, "structure": {"query": ["query_0_Static"]}, "parameters": {}})
    for folder, index in (("0_Router", "router_config.json"), ("1_Asym", "config.json")):
        for part in types:
            save_part(tmp_path / folder / part, {"w": torch.zeros(2)})
        (tmp_path / folder / index).write_text(router)
    (tmp_path / "model_index.json").write_text('{"prior": ["diffusers", "PriorPipeline"]}')
    save_part(tmp_path / "prior" / "unet", {"u": torch.zeros(2)})
    (tmp_path / "prior" / "model_index.json").write_text('{"unet": ["diffusers", "UNet"]}')
    expected = {f"{folder}/{part}/w" for folder in ("0_Router", "1_Asym") for part in types} | {
        "prior/unet/u"
    }
    assert open_checkpoint(tmp_path).tensors.keys() == expected


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_the_directory_itself_if_modules_name_only_others(tmp_path: Path, name: str) -> None:
    """Its weights are a part if they have the usual name; any other file is skipped."""
    (tmp_path / "modules.json").write_text(modules("0_Transformer"))
    save_part(tmp_path / "0_Transformer", {"a": torch.zeros(2)})
    save_file({"b": torch.zeros(2)}, tmp_path / name)
    opened = open_checkpoint(tmp_path)
    is_part = name == "model.safetensors"
    assert tuple(opened.configs) == (("", "0_Transformer") if is_part else ("0_Transformer",))
    assert (name in opened.skipped_files) != is_part


def test_a_part_in_a_hidden_folder(tmp_path: Path) -> None:
    save_model(tmp_path, {"a": torch.zeros(2)})
    (tmp_path / "modules.json").write_text(modules("", ".x/2_Dense"))
    save_part(tmp_path / ".x" / "2_Dense", {"b": torch.zeros(2)})
    opened = open_checkpoint(tmp_path)
    assert ".x/2_Dense/config.json" in opened.extra_files and ".x/2_Dense/b" in opened.tensors


def test_tensors_of_the_same_name_in_two_parts(tmp_path: Path) -> None:
    save_model(tmp_path, {"2_Dense/b": torch.zeros(2)})
    (tmp_path / "modules.json").write_text(modules("", "2_Dense"))
    save_part(tmp_path / "2_Dense", {"b": torch.zeros(2)})
    with pytest.raises(InputError, match="2_Dense: tensor '2_Dense/b' is in another part, too"):
        open_checkpoint(tmp_path)


def test_weights_of_a_part_in_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were fine-tuned, and would be left out: refused by name, or copied as they are."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(INPUTS):
        save_dense_model(tmp_path / name, k)
        Path(name, "2_Dense", "model.safetensors").unlink()
        Path(name, "2_Dense", "flax_model.msgpack").write_bytes(b"weights\xff\0" + bytes([k]))
        Path(name, "1_Pooling", "notes.bin").write_text("text, which is no weights")
    with pytest.raises(
        InputError, match=r"base/2_Dense/flax_model.msgpack: other weights than \.safetensors"
    ) as found:
        merge()
    assert "--keep '2_Dense/flax_model.msgpack'" in str(found.value)
    merge(keep=["2_Dense/*.msgpack"])
    assert (
        Path("out/2_Dense/flax_model.msgpack").read_bytes()
        == Path("base/2_Dense/flax_model.msgpack").read_bytes()
    )
    nm.verify_checkpoint("out", INPUTS)


def test_what_only_looks_like_an_index(tmp_path: Path) -> None:
    save_model(tmp_path, {"a": torch.zeros(2)})
    for text in ('{"path": "../x"}', "3", "null", '"x"'):
        (tmp_path / "modules.json").write_text(text)
        assert tuple(open_checkpoint(tmp_path).configs) == ("",)
