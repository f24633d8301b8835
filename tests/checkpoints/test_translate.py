"""Bases that are translated to another format: the files of the output, byte by byte, before anything is merged."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import family, save_model
from safetensors.torch import load_file, save, save_file

import negmerge_fast as nm
from negmerge_fast.checkpoints import zip_layout
from negmerge_fast.checkpoints.base import ByteRange, Checkpoint, TensorRef
from negmerge_fast.checkpoints.composed import ComposedFile
from negmerge_fast.checkpoints.formats import open_checkpoint, translate
from negmerge_fast.checkpoints.reader import File, Reader
from negmerge_fast.checkpoints.translate import format_notes, lay_out
from negmerge_fast.core.schema import TensorSpec

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16,
    torch.uint32, torch.int32, torch.uint64, torch.int64, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64,
]  # fmt: skip


def content(file: File, step: int = 1 << 20) -> bytes:
    """All of a file, read so many bytes at a time."""
    with Reader(4) as reader:
        return b"".join(
            _read(file, reader, at, min(step, file.size - at)) for at in range(0, file.size, step)
        )


def _read(file: File, reader: Reader, at: int, size: int) -> bytes:
    buffer = bytearray(size)
    file.read_into(reader, at, memoryview(buffer))
    return bytes(buffer)


def every_type() -> dict[str, torch.Tensor]:
    """Tensors of all types, with names in no order."""
    tensors = {
        f"{k * 7 % 5}.{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for k, dtype in enumerate(TYPES)
    }
    return {**tensors, 'ü "quoted"': torch.ones(3), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}


@pytest.fixture
def opened(tmp_path: Path) -> Checkpoint:
    save_file(every_type(), tmp_path / "all.safetensors", metadata={"format": "pt"})
    return open_checkpoint(tmp_path / "all.safetensors")


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_safetensors_file_is_the_librarys_byte_for_byte(opened: Checkpoint, step: int) -> None:
    file, placed = lay_out(next(iter(opened.weights.values())), opened.tensors, {})
    assert content(file, step) == save(every_type(), metadata={"format": "pt"})
    assert {name: tensor.spec for name, tensor in placed.items()} == {
        n: t.spec for n, t in opened.tensors.items()
    }


def test_the_library_orders_what_has_other_names_for_the_metadata(tmp_path: Path, opened: Checkpoint) -> None:
    kept = {name: tensor for name, tensor in opened.tensors.items() if name != "scalar"}
    file, _ = lay_out(next(iter(opened.weights.values())), kept, {"scalar": "empty", "b": "empty"})
    (tmp_path / "out.safetensors").write_bytes(content(file))
    again = open_checkpoint(tmp_path / "out.safetensors")
    assert again.tensors.keys() == kept.keys() and again.aliases.keys() == {"scalar", "b"}


@pytest.mark.parametrize("step", [1, 64, 1 << 20])
def test_a_zip_file_is_what_torch_loads(tmp_path: Path, opened: Checkpoint, step: int) -> None:
    translated = translate(opened, "pt")
    [file] = translated.weights.values()
    (tmp_path / "out.pt").write_bytes(content(file, step))
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mmap)
        assert list(loaded) == list(opened.tensors)
        for name, tensor in every_type().items():
            assert same_bits(loaded[name], tensor) and loaded[name].is_contiguous(), name
    for tensor in translated.tensors.values():
        assert tensor.source.offset % 64 == 0


def test_a_zip_file_has_nothing_of_its_name_or_of_torchs_version(tmp_path: Path, opened: Checkpoint) -> None:
    [file] = translate(opened, "pt").weights.values()
    with zipfile.ZipFile(io.BytesIO(content(file))) as archive:
        names = archive.namelist()
    data = [f"archive/data/{k}" for k in range(len(opened.tensors))]
    assert names == ["archive/data.pkl", "archive/byteorder", "archive/version", *data]


@pytest.mark.parametrize("wrapper", [["state_dict"], ["a", "b"]])
def test_a_state_dict_under_keys(tmp_path: Path, opened: Checkpoint, wrapper: list[str]) -> None:
    file, _ = zip_layout.lay_out(
        next(iter(opened.weights.values())), opened.tensors, {"tied": "scalar"}, wrapper
    )
    (tmp_path / "out.pt").write_bytes(content(file))
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    for key in wrapper:
        assert list(loaded) == [key]
        loaded = loaded[key]
    assert list(loaded) == [*opened.tensors, "tied"]
    assert loaded["tied"].data_ptr() == loaded["scalar"].data_ptr()


@pytest.mark.parametrize(
    "sizes", [[5, 1 << 32, 7], [3, (1 << 32) - 1], pytest.param([1] * 66_000, marks=pytest.mark.slow)]
)
def test_sizes_offsets_and_counts_that_need_64_bits(tmp_path: Path, sizes: list[int]) -> None:
    (tmp_path / "like").touch()
    like = replace(File.at(tmp_path / "like"), size=1 << 50)
    tensors = {str(k): TensorRef(TensorSpec("U8", (n,)), ByteRange(like, 0, n)) for k, n in enumerate(sizes)}
    file, _ = zip_layout.lay_out(like, tensors, {})
    with (tmp_path / "out.pt").open("wb") as out:  # sparse: what tensors hold is not written
        out.truncate(file.size)
        at = 0
        for part in file.parts:
            size = len(part) if isinstance(part, bytes) else part.nbytes
            if isinstance(part, bytes):
                out.seek(at)
                out.write(part)
            at += size
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert [each.file_size for each in archive.infolist()[3:]] == sizes
    loaded = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    assert [tensor.numel() for tensor in loaded.values()] == sizes
    assert not any(tensor[-1] for tensor in loaded.values())


def test_what_torch_does_not_load(opened: Checkpoint) -> None:
    [name] = [name for name, tensor in opened.tensors.items() if name == "scalar"]
    opened.tensors[name] = TensorRef(TensorSpec("F4", ()), opened.tensors[name].source)
    with pytest.raises(
        nm.InputError, match=r"all\.safetensors: tensor 'scalar': F4, which torch\.load does not read"
    ):
        translate(opened, "pt")


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Path]:
    [base] = family(n=0)
    names = list(base)
    path = save_model(tmp_path / "base", base, [names[:3], names[3:]])
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["metadata"] = {"total_size": 3, "total_parameters": 5}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards_and_their_index(sharded: Path, tmp_path: Path) -> None:
    before = open_checkpoint(sharded)
    translated = translate(before, "pt")
    assert translated.origin is before and translated.inputs == {**before.weights, **before.extra_files}
    assert list(translated.weights) == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]
    assert translated.extra_files.keys() == {"pytorch_model.bin.index.json", "config.json", "tokenizer.json"}
    assert list(translated.tensors) == list(before.tensors)
    index = json.loads(content(translated.extra_files["pytorch_model.bin.index.json"]))
    total = sum(tensor.source.nbytes for tensor in before.tensors.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": 5}
    for file, held in translated.weights.items():
        (tmp_path / file).write_bytes(content(held))
        named = {name for name, shard in index["weight_map"].items() if shard == file}
        assert torch.load(tmp_path / file, weights_only=True).keys() == named
    note = "model-00001-of-00002.safetensors becomes pytorch_model-00001-of-00002.bin (of 2 files)"
    assert format_notes(translated) == [f"{sharded}: {note}"] and not format_notes(before)


@pytest.mark.parametrize("wanted", ["auto", "safetensors"])
def test_what_is_written_as_it_is(sharded: Path, wanted: Any) -> None:
    before = open_checkpoint(sharded)
    assert translate(before, wanted) is before


def test_a_file_that_would_be_copied_over_the_weights(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", family(n=0)[0])
    (path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(
        nm.InputError, match=r"pytorch_model\.bin: would be copied, and the output has a file of this name"
    ):
        translate(open_checkpoint(path, keep=["*.bin"]), "pt")


def test_a_configuration_that_names_the_weights(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base", family(n=0)[0])
    (path / "config.json").write_text('{"transformers_weights": "model.safetensors"}')
    assert translate(open_checkpoint(path)).format is None
    with pytest.raises(
        nm.InputError, match=r"config\.json: transformers_weights is 'model\.safetensors', which is copied"
    ):
        translate(open_checkpoint(path), "pt")


def test_a_composed_file_knows_where_its_bytes_lie(opened: Checkpoint) -> None:
    [like] = opened.weights.values()
    parts = [b"abc", ByteRange(like, 8, 100), b"", ByteRange(like, 0, 8)]
    file = ComposedFile.of(like, [*parts, ByteRange(ComposedFile.of(like, [b"x" * 9]), 2, 5)])
    assert file.size == 116 and file.locate(3, 100) == (like, 8) and file.locate(5, 3) == (like, 10)
    assert file.locate(0, 2) == (file, 0) and file.locate(100, 4) == (file, 100)
    assert [file.stored_before(at) for at in (0, 3, 4, 103, 111, 116)] == [0, 0, 1, 100, 108, 108]
    assert list(file.sources) == [like, *[f for f in file.sources if f is not like]]


def of_ranks(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """What torch.distributed.checkpoint writes on two ranks: of each tensor its first rows, and the others."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    begins: list[dict[str, dict[str, list[int]]]] = [{}, {}]
    for name, tensor in tensors.items():
        parts = tensor.split(max(-(-len(tensor) // 2), 1)) if tensor.dim() and len(tensor) else [tensor]
        for k, part in enumerate(parts):
            halves[k][name] = part.contiguous()
            first = [k * len(parts[0])] if k else [0]
            begins[k][name] = {"saved_offsets": [*first, *[0] * tensor.dim()][: tensor.dim()]}
    for k in range(2):
        path = folder / f"shard-0000{k + 1}-model-00001-of-00001.safetensors"
        save_file(halves[k], path, metadata={"DCP_SHARDING_INFO": json.dumps(begins[k])})
    return folder


def test_shards_of_ranks_are_consolidated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [base] = family(n=0)
    before = open_checkpoint(of_ranks(tmp_path / "base", base))
    for wanted in ("auto", "safetensors"):
        translated = translate(before, wanted)  # type: ignore[arg-type]
        assert list(translated.weights) == ["model.safetensors"] and translated.format == "safetensors"
        [file] = translated.weights.values()
        assert content(file) == save(base, metadata={"format": "pt"})
        assert file.sources == dict.fromkeys(before.weights.values())
    note = "shard-00001-model-00001-of-00001.safetensors becomes model.safetensors"
    assert format_notes(translated) == [f"{tmp_path}/base: {note}"]
    monkeypatch.setattr("negmerge_fast.checkpoints.translate._MAX_SHARD_BYTES", 1000)
    for wanted, suffix, index in (("auto", ".safetensors", "model"), ("pt", ".bin", "pytorch_model")):
        translated = translate(before, wanted)  # type: ignore[arg-type]
        names = [f"{index}-0000{k}-of-00003{suffix}" for k in (1, 2, 3)]
        assert list(translated.weights) == names
        held = json.loads(content(translated.extra_files[f"{index}{suffix}.index.json"]))
        assert held["metadata"] == {"total_size": sum(t.nbytes for t in base.values())}
        for name, file in translated.weights.items():
            (tmp_path / name).write_bytes(content(file))
            loaded = load_file(tmp_path / name) if wanted == "auto" else torch.load(tmp_path / name)
            assert loaded.keys() == {n for n, shard in held["weight_map"].items() if shard == name}
            assert all(same_bits(tensor, base[n]) for n, tensor in loaded.items())


def test_parts_in_different_formats(tmp_path: Path) -> None:
    [base] = family(n=0)
    path = save_model(tmp_path / "base", base)
    save_model(path / "unet", base)
    (path / "vae").mkdir()
    (path / "vae" / "config.json").write_text("{}")
    torch.save({"w": base["embed"], "tied": base["embed"]}, path / "vae" / "diffusion_pytorch_model.bin")
    parts = {name: ["diffusers", "Model"] for name in ("unet", "vae")}
    (path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **parts}))
    before = open_checkpoint(path)
    translated = translate(before)
    new = "vae/diffusion_pytorch_model.safetensors"
    kept = {name: file for name, file in before.weights.items() if name.endswith(".safetensors")}
    assert {name: translated.weights[name] for name in kept} == kept
    assert translated.weights.keys() == {*kept, new}
    (tmp_path / "vae.safetensors").write_bytes(content(translated.weights[new]))
    assert load_file(tmp_path / "vae.safetensors").keys() == {"w"}
    assert translated.tensors.keys() == before.tensors.keys() - {"vae/tied"}
    as_pt = translate(before, "pt")
    assert {Path(name).suffix for name in as_pt.weights} == {".bin"}
    assert as_pt.weights.keys() >= {"vae/diffusion_pytorch_model.bin", "unet/pytorch_model.bin"}
    (tmp_path / "unet.bin").write_bytes(content(as_pt.weights["unet/pytorch_model.bin"]))
    assert torch.load(tmp_path / "unet.bin").keys() == base.keys()
