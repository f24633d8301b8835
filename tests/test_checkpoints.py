"""Opening checkpoints: everything malformed is one line that names the file; what we accept, safetensors accepts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import entry, family, raw, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from negmerge_fast import InputError
from negmerge_fast.checkpoints import open_checkpoint
from negmerge_fast.checkpoints.safetensors import read_header

MALFORMED = {
    "empty": (b"", "0 bytes, expected a safetensors header"),
    "garbage": (b"garbage!" * 9, "not a safetensors file"),
    "2^60": (raw({}, length=2**60), "header of 1152921504606846976 bytes"),
    "header cut": (raw({"a": entry()}, length=5000), "truncated"),
    "truncated": (raw({"a": entry()}, b"1234"), "truncated"),
    "left over": (raw({"a": entry()}, b"123456789"), "bytes left over"),
    "no object": (raw([]), "not a safetensors file"),
    "no JSON": (raw(b"{nonsense"), "header is not JSON"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "header is not JSON"),
    "deep": (raw(b'{"a":' * 100_000), "header is not JSON (nested too deep)"),
    "twice": (raw(b'{"a":1,"a":1}'), "header names 'a' twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry": (raw({"a": 3}), "tensor 'a': expected dtype, shape and data_offsets"),
    "dtype": (raw({"a": entry(dtype="F33")}, b"12345678"), "tensor 'a': unknown dtype 'F33'"),
    "dtype list": (raw({"a": entry(dtype=[])}, b"12345678"), "tensor 'a': unknown dtype []"),
    "negative": (raw({"a": entry(shape=(-2,))}, b"12345678"), "tensor 'a': shape [-2]"),
    "bool": (raw({"a": entry(shape=(True, 2))}, b"12345678"), "tensor 'a': shape [True, 2]"),
    "huge": (
        raw({"a": entry(shape=(2**62, 2**62))}, b"12345678"),
        "tensor 'a': shape [4611686018427387904, 4611",
    ),
    "huge times none": (raw({"a": entry(0, 0, shape=(2**62, 2**62, 0))}), "no product over 2^64"),
    "minus zero": (
        raw(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "tensor 'a': shape [-0.0]",
    ),
    "half a character": (
        raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "header is not JSON",
    ),
    "half metadata": (raw(b'{"__metadata__":{"a":"\\uD800"}}'), "header is not JSON"),
    "too huge": (raw({"a": entry(shape=(2**63,))}, b"12345678"), "tensor 'a': shape [9223372036854775808]"),
    "too many": (raw({"a": entry(shape=tuple([2**62] * 99_999))}, b""), "tensor 'a': shape"),
    "overlap": (raw({"a": entry(), "b": entry(4, 12)}, b"123456789012"), "tensor 'b' begins at byte"),
    "hole": (raw({"a": entry(), "b": entry(9, 17)}, b"1" * 17), "tensor 'b' begins at byte"),
    "backwards": (raw({"a": entry(8, 0)}, b"12345678"), "tensor 'a': data_offsets [8, 0]"),
    "size": (raw({"a": entry(0, 4)}, b"1234"), "tensor 'a': 4 bytes, expected 8 for F32 of shape (2,)"),
}


def refused(path: Path, message: str, culprit: str | None = None) -> None:
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    text = str(error.value)
    assert message in text and (culprit or path.name) in text
    assert "\n" not in text and len(text) < 20_000_000


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(path, message)
    with pytest.raises(Exception):  # noqa: B017  the library has its own kinds
        safe_open(path, "pt").__enter__()


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(content["weight_map"])
        index.write_text(json.dumps(content))

    return edit


THREE_TENSORS = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
TWO_SHARDS = [["a", "c"], ["b"]]
SHARD = "model-00001-of-00002.safetensors"
DIRECTORIES = {
    "missing shard": (lambda p: (p / SHARD).unlink(), "missing, but named in model.safetensors.index.json", SHARD),
    "truncated shard": (lambda p: os.truncate(p / SHARD, (p / SHARD).stat().st_size - 3), "truncated", SHARD),
    "outside": (edit_index(lambda m: m.update(a="../x")), "tensor 'a' is in '../x'", "index.json"),
    "absolute": (edit_index(lambda m: m.update(a="/etc/passwd")), "tensor 'a' is in '/etc/passwd'", "index.json"),
    "the manifest": (edit_index(lambda m: m.update(a="negmerge.json")), "tensor 'a' is in 'negmerge.json'", "index.json"),
    "index of 3 GB": (lambda p: os.truncate(p / "model.safetensors.index.json", 3 << 30), "expected an index of at most", "index.json"),
    "not there": (edit_index(lambda m: m.update(zz=SHARD)), "tensor 'zz' is missing", SHARD),
    "not named": (edit_index(lambda m: m.pop("c")), "tensor 'c' is not in", SHARD),
    "index": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "no weight_map", "index.json"),
    "no index": (lambda p: (p / "model.safetensors.index.json").unlink(), "2 files end in .safetensors", "model"),
    "adapter": (lambda p: (p / "adapter_config.json").touch(), "holds LoRA factors", "model"),
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], "empty directory, expected model.safetensors", "model"),
    "only bin": (
        lambda p: [f.rename(f.with_suffix(".bin")) for f in p.iterdir()], "only config.bin and the like", "model",
    ),
    "fifo": (lambda p: [(p / SHARD).unlink(), os.mkfifo(p / SHARD)], "not a regular file", SHARD),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_malformed_directories(tmp_path: Path, case: str) -> None:
    path = save_model(tmp_path / "model", THREE_TENSORS, TWO_SHARDS)
    assert len(open_checkpoint(path).tensors) == 3
    change, message, culprit = DIRECTORIES[case]
    change(path)
    refused(path, message, culprit)


def test_missing_and_strange_paths(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such file or directory")
    refused(tmp_path / "nothing.safetensors", "No such file")
    refused(tmp_path / ("n" * 300), "File name too long")
    (tmp_path / "a.txt").touch()
    refused(tmp_path / "a.txt", "expected a directory")
    os.mkfifo(tmp_path / "f.npy")
    refused(tmp_path / "f.npy", "not a regular file")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([{}]), "dtype |O"),
        (np.zeros(3, ">f4"), "dtype >f4"),
        (np.zeros(3, "i4"), "dtype <i4"),
        (np.zeros((3, 2), "f4", order="F"), "column-major"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "v.npy", array)
    refused(tmp_path / "v.npy", message)


def test_broken_arrays(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, np.zeros(100, "f4"))
    assert open_checkpoint(path).tensors["vector"].numel == 100
    os.truncate(path, 500)
    refused(path, "500 bytes, expected 528 for shape (100,)")
    path.write_bytes(b"\x93NUMPY\x01\x00\x08\x00(((((((\n")
    refused(path, "not a .npy file")


def test_what_belongs_to_a_model_and_what_does_not(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", {"a": torch.zeros(2)})
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "training_args.bin",
        ".hidden",
        "model.ckpt.index",
        "model.SafeTensors.bak",
        "README.md",
        "1_Pooling/config.json",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).touch()
    (path / "link").symlink_to(tmp_path)
    opened = open_checkpoint(path)
    assert sorted(opened.others) == ["1_Pooling/config.json", "README.md", "config.json", "tokenizer.json"]
    assert sorted(opened.left_out) == [
        ".hidden",
        "link",
        "model.SafeTensors.bak",
        "model.ckpt.index",
        "model.gguf",
        "pytorch_model.bin",
        "training_args.bin",
    ]


def test_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw({f"t{i}": entry(8 * i, 8 * i + 8) for i in range(100_000)}, bytes(800_000)))
    assert len(open_checkpoint(path).tensors) == 100_000


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data())
def test_what_we_accept_safetensors_accepts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_model(path.parent, family()[0])
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, header - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(content)
    try:
        tensors, _ = read_header(path)
    except InputError:
        return
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(tensors)
        for name, tensor in tensors.items():
            held = library.get_tensor(name)
            assert tuple(held.shape) == tensor.form.shape
            assert held.reshape(-1).view(torch.uint8).numpy().tobytes() == content[tensor.offset : tensor.end]
