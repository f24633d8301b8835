"""Models that cannot be merged: broken directories, special files, and versions that do not fit their base.

A Case spoils the model in a folder. `message` is a part of the line that refuses it, and `culprit` names the file at fault.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_files import entry, raw
from malformed import CONTROLS, POINTER, deep

INDEX, SHARD, OTHER = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)

Spoil = Callable[[Path], object]


class Case(NamedTuple):
    spoil: Spoil
    message: str
    culprit: str = ""


def shard(**entries: dict[str, Any]) -> bytes:
    return raw(
        {"__metadata__": {"format": "pt"}, **entries},
        bytes(max(e["data_offsets"][1] for e in entries.values())),
    )


def good_model(path: Path) -> None:
    """Three tensors in two shards, an index, and a file that is no weights."""
    path.mkdir()
    (path / SHARD).write_bytes(shard(a=entry(), c=entry(8, 12, shape=(1,))))
    (path / OTHER).write_bytes(shard(b=entry(0, 12, shape=(3,))))
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": dict(MAP)}))
    (path / "config.json").write_text("{}")


MAP = {"a": SHARD, "b": OTHER, "c": SHARD}


def put(name: str, make: Spoil) -> Spoil:
    """Replace a file."""

    def spoil(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return spoil


def symlink_to(to: str) -> Spoil:
    return lambda path: path.symlink_to(to)


def sparse(size: int, head: bytes = b"") -> Spoil:
    def make(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return make


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        listening.bind(path.name)
        os.chdir(before)


def content(text: str | bytes) -> Spoil:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def mapped(**changes: Any) -> Spoil:
    """An index with another weight_map."""
    return content(json.dumps({"weight_map": {**MAP, **changes}}))


STRANGE: dict[str, tuple[Spoil, str]] = {
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a socket": (bind_socket, "not a regular file"),
    "a directory": (Path.mkdir, "not a regular file"),
    "a link to nothing": (symlink_to("nowhere"), "No such file or directory, expected a file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a link to a directory": (symlink_to("."), "not a regular file"),
    "a link through a file": (symlink_to("config.json/x"), "Not a directory, expected a file"),
    "a link to /dev/zero": (symlink_to("/dev/zero"), "not a regular file"),
    "a link to /dev/null": (symlink_to("/dev/null"), "not a regular file"),
    "a link to /dev/stdin": (symlink_to("/dev/stdin"), "not a regular file"),
    "a link to /proc/self/status": (symlink_to("/proc/self/status"), ""),
    "a link to /proc/self/mem": (symlink_to("/proc/self/mem"), ""),
    "a link to /proc/self/root": (symlink_to("/proc/self/root"), "not a regular file"),
    "a link to /proc/sys": (symlink_to("/proc/sys/kernel/ostype"), ""),
    "a link to /sys": (symlink_to("/sys/kernel/mm/transparent_hugepage/enabled"), ""),
    "empty": (content(""), ""),
    "zeros": (content(bytes(5000)), ""),
    "a terabyte of nothing": (sparse(2**40), ""),
}
OUTSIDE = ["", ".", "..", "../x", "../base/config.json", "/etc/passwd", f"./../{SHARD}", f"{SHARD}/", "..\\x", "a\0b", "negmerge.json", "n" * 256, "é" * 1_000_000]  # fmt: skip
NO_INDEX = {
    "nothing": "{}", "null": '{"weight_map":null}', "a list": f'{{"weight_map":[["a","{SHARD}"]]}}', "text": f'{{"weight_map":"{SHARD}"}}',
    "a number": '{"weight_map":3}', "true": '{"weight_map":true}', "an empty one": '{"weight_map":{}}', "another key": '{"Weight_map":{"a":"b"}}',
}  # fmt: skip
W = json.dumps(MAP)
INDEX_NOT_JSON = {
    "unfinished": '{"weight_map":' + W, "a BOM": "\ufeff{}", "a NUL": '{"weight_map":' + W + "}\0", "NaN": f'{{"metadata":{{"total_size":NaN}},"weight_map":{W}}}',
    "Infinity": f'{{"metadata":{{"total_size":-Infinity}},"weight_map":{W}}}', "half a character": f'{{"metadata":"\\ud800","weight_map":{W}}}',
    "ten thousand digits": f'{{"metadata":{{"total_size":{"9" * 10_000}}},"weight_map":{W}}}', "deep metadata": deep(f'{{"metadata":@,"weight_map":{W}}}', 100_000),
    "a deep map": deep('{"weight_map":@}', 100_000), "a deep shard": deep('{"weight_map":{"a":@}}', 100_000), "Python": f"{{'weight_map':{W}}}",
}  # fmt: skip
TWICE = [
    f'{{"weight_map":{W},"weight_map":{W}}}', f'{{"weight_map":{{"a":"{SHARD}","a":"{SHARD}","b":"{OTHER}","c":"{SHARD}"}}}}',
    f'{{"metadata":{{"x":1,"x":1}},"weight_map":{W}}}', f'{{"weight_map":{{"a":"{SHARD}","\\u0061":"{SHARD}"}}}}',
]  # fmt: skip


def claim(length: int, offsets: list[int], shape: list[int]) -> bytes:
    return raw({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, length=length or None)


SPARSE = {
    "a tensor of nearly 2^63 bytes": (claim(0, [0, 2**63 - 4], [2**61 - 1]), "truncated"),
    "a tensor of 2^64 bytes": (claim(0, [0, 2**64], [2**62]), "data_offsets"),
    "a tensor of 2^66 bytes": (claim(0, [0, 4], [2**63 - 1, 2]), "expected 73786976294838206456"),
    "a tensor behind 2^63": (claim(0, [2**63 - 9, 2**63 - 1], [2]), "begins at byte"),
    "a small tensor": (claim(0, [0, 8], [2]), "bytes left over"),
    "a header of 2^39": (claim(2**39, [0, 8], [2]), "header of"),
    "a header of 2^63": (claim(2**63, [0, 8], [2]), "header of"),
    "a header of 100 MB of nothing": (claim(100_000_000, [0, 8], [2]), "header is not JSON"),
}


def rename_to(suffix: str) -> Spoil:
    return lambda model: [
        file.rename(file.with_suffix(suffix)) for file in model.iterdir() if file.name != "config.json"
    ]


def linked_shards(model: Path) -> None:
    (model / "weights").symlink_to(".")
    put(INDEX, mapped(a=f"weights/{SHARD}"))(model)


def two_copies(model: Path) -> None:
    """The index names the first copy, and the last is loaded."""
    (model / OTHER).write_bytes(shard(a=entry(), b=entry(8, 20, shape=(3,))))


def three_models(model: Path) -> None:
    (model / INDEX).unlink()
    for name in "ab":
        os.link(model / SHARD, model / f"{name}.safetensors")


def two_variants(model: Path) -> None:
    for name in (INDEX, OTHER):
        (model / name).unlink()
    (model / SHARD).rename(model / "model.fp16.safetensors")
    os.link(model / "model.fp16.safetensors", model / "model.bf16.safetensors")


def only_adapter(model: Path) -> None:
    for name in (INDEX, OTHER):
        (model / name).unlink()
    (model / SHARD).rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").touch()


def module(path: Any, **others: Any) -> str:
    return json.dumps([{"idx": 0, "name": "0", "path": path, "type": "x.Dense", **others}])


def add_part(folder: str = "2_Dense", name: str = "model.safetensors", data: bytes = b"") -> Spoil:
    """A model with a module in a folder, which holds one file."""

    def spoil(model: Path) -> None:
        (model / "modules.json").write_text(module(folder))
        (model / folder).mkdir(parents=True)
        (model / folder / name).write_bytes(data)

    return spoil


def linked_part(to: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / "modules.json").write_text(module("2_Dense"))
        (model / "2_Dense").symlink_to(to)

    return spoil


def add(name: str, data: str | bytes) -> Spoil:
    return lambda model: content(data)(model / name)


def parts() -> Iterator[tuple[str, Case]]:
    for outside in ("..", "../ft-0", "/etc", "a/../../ft-0", "a\\b", "a\0b", "n" * 256):
        message = "expected a folder of this directory"
        yield f"a part {outside[:9]!r}", Case(add("modules.json", module(outside)), message, "modules.json")
        pipeline = json.dumps({outside: ["a", "B"]})
        yield (
            f"a component {outside[:9]!r}",
            Case(add("model_index.json", pipeline), message, "model_index.json"),
        )
    for text in ('["x"]', "[{}]", '[{"path":3}]', '[{"path":null}]', "[[]]", "[3]"):
        yield (
            f"modules {text}",
            Case(add("modules.json", text), "expected an object with a path", "modules.json"),
        )
    for index in ("modules.json", "model_index.json", "router_config.json"):
        for name, data in {"no JSON": b"{", "deep": b"[" * 100_000, "zeros": bytes(99)}.items():
            yield f"{index} is {name}", Case(add(index, data), "index is not JSON", index)
        yield f"{index} is a pointer", Case(add(index, POINTER), "a Git LFS pointer", index)
        yield f"{index} is long", Case(add(index, bytes(10_000_001)), "expected an index of at most", index)
    for to in (".", "..", "../ft-0", "/"):
        yield f"a part that is a link to {to}", Case(linked_part(to), "a symbolic link, but ", "2_Dense")
    yield "a part of other weights", Case(add_part(name="flax_model.msgpack"), "--keep '2_Dense/flax_model.msgpack'", "2_Dense/flax_model.msgpack")  # fmt: skip
    yield (
        "a part of an adapter",
        Case(add_part(name="adapter_model.safetensors"), "holds LoRA factors", "2_Dense"),
    )
    yield (
        "a part cut off",
        Case(add_part(data=b"12"), "expected a safetensors header", "2_Dense/model.safetensors"),
    )
    yield (
        "a part that is a pointer",
        Case(add_part(data=POINTER), "a Git LFS pointer", "2_Dense/model.safetensors"),
    )
    yield "a part of two models", Case(two_in_a_part, "2 models (a.safetensors, b.safetensors)", "2_Dense")
    yield "a pipeline of nothing", Case(add("model_index.json", "{}"), "and the like")


def two_in_a_part(model: Path) -> None:
    add_part(name="a.safetensors")(model)
    (model / "2_Dense" / "b.safetensors").touch()


def both_hold_all(model: Path) -> None:
    (model / OTHER).unlink()
    os.link(model / SHARD, model / OTHER)


def directories() -> Iterator[tuple[str, Case]]:
    for place in (INDEX, SHARD):
        for name, (make, message) in STRANGE.items():
            yield f"{place} is {name}", Case(put(place, make), message, place)
    for outside in OUTSIDE:
        yield (
            f"a shard {outside[:300]!r}",
            Case(put(INDEX, mapped(a=outside)), "expected a file of this directory", INDEX),
        )
    for value in (None, 3, [], [SHARD], {}, True, 1.5):
        yield f"a shard {value!r}", Case(put(INDEX, mapped(a=value)), f"tensor 'a' is in {value!r}", INDEX)
    for name, text in NO_INDEX.items():
        yield f"no weight_map: {name}", Case(put(INDEX, content(text)), "no weight_map", INDEX)
    for text in ("[]", "null", '"x"', "3"):
        yield f"the index is {text}", Case(put(INDEX, content(text)), "expected an object", INDEX)
    for name, text in INDEX_NOT_JSON.items():
        yield f"the index is no JSON: {name}", Case(put(INDEX, content(text)), "index is not JSON", INDEX)
    for text in TWICE:
        yield f"twice: {text}", Case(put(INDEX, content(text)), " twice", INDEX)
    for name, (head, message) in SPARSE.items():
        yield f"a terabyte: {name}", Case(put(SHARD, sparse(2**40, head)), message, SHARD)
    for suffix in (".bin", ".gguf", ".pt", ".h5", ".ckpt", ".npz"):
        yield f"only {suffix}", Case(rename_to(suffix), " and the like, expected model.safetensors")
    yield "a long index", Case(put(INDEX, sparse(100_000_001)), "expected an index of at most", INDEX)
    yield "an index of brackets", Case(put(INDEX, content("[" * 2_000_000)), "mostly brackets", INDEX)
    yield (
        "in UTF-16",
        Case(put(INDEX, content(f'{{"weight_map":{W}}}'.encode("utf-16"))), "index is not JSON", INDEX),
    )
    yield "a missing shard", Case(lambda m: (m / SHARD).unlink(), f"missing, but named in {INDEX}", SHARD)
    yield (
        "a shard that never was",
        Case(put(INDEX, mapped(a="x.safetensors")), "missing, but named in", "x.safetensors"),
    )
    yield (
        "a shard to fool a terminal",
        Case(
            put(INDEX, mapped(a=CONTROLS.replace("\0", ""))),
            r"\n\r\t\x1b[2J\x07\x7f\x85\u2028\u202e: missing",
            "",
        ),
    )
    yield (
        "a shard that is the index",
        Case(put(INDEX, mapped(a=INDEX)), "not a safetensors file", INDEX),
    )
    yield (
        "a shard that is no weights",
        Case(put(INDEX, mapped(a="config.json")), "2 bytes, expected a safetensors header", "config.json"),
    )
    yield (
        "in the other shard",
        Case(put(INDEX, mapped(a=OTHER)), f"tensor 'a' is missing, but {INDEX} names it", OTHER),
    )
    yield (
        "a folder that is not there",
        Case(put(INDEX, mapped(a="a/b")), f"a/b: missing, but named in {INDEX}"),
    )
    yield "a folder that is a link", Case(linked_shards, "a symbolic link, but ", "weights")
    yield (
        "two copies",
        Case(two_copies, f"'a' is in {SHARD}, but transformers loads the copy in {OTHER}", INDEX),
    )
    yield (
        "named, but not there",
        Case(put(INDEX, mapped(zz=SHARD)), f"tensor 'zz' is missing, but {INDEX} names it", SHARD),
    )
    yield (
        "a long name, not there",
        Case(put(INDEX, mapped(**{"n" * 1_000_000: SHARD})), " is missing, but ", SHARD),
    )
    yield "one file under both names", Case(both_hold_all, "tensor 'b' is missing", OTHER)
    yield (
        "no index, and a shard is missing",
        Case(lambda m: [(m / name).unlink() for name in (INDEX, OTHER)], "1 of 2 shards"),
    )
    yield (
        "no index, and a tensor in both shards",
        Case(lambda m: [both_hold_all(m), (m / INDEX).unlink()], "is in another shard, too", OTHER),
    )
    yield "three models", Case(three_models, "3 models (a.safetensors, b.safetensors, ")
    yield "two variants", Case(two_variants, "2 models (model.bf16.safetensors, model.fp16.safetensors)")
    yield (
        "two indexes",
        Case(
            lambda m: (
                [os.link(m / INDEX, m / f"{x}.safetensors.index.json") for x in "xy"] + [(m / INDEX).unlink()]
            ),
            "2 models (x.safetensors.index.json, y.safetensors.index.json)",
        ),
    )
    yield "an adapter", Case(only_adapter, "configuration is not JSON", "adapter_config.json")
    yield "a Git LFS pointer", Case(put(INDEX, content(POINTER)), "a Git LFS pointer", INDEX)
    yield (
        "a Git LFS pointer: config",
        Case(put("config.json", content(POINTER)), "a Git LFS pointer", "config.json"),
    )
    yield from parts()
    yield (
        "empty",
        Case(
            lambda m: [file.unlink() for file in m.iterdir()], "empty directory, expected model.safetensors"
        ),
    )
    yield (
        "no weights",
        Case(
            lambda m: [f.unlink() for f in m.iterdir() if f.name != "config.json"],
            "no weights, expected model.safetensors",
        ),
    )


DIRECTORIES = dict(directories())


# A model that is well-formed, but no version of its base.


def other(*entries: tuple[str, str, tuple[int, ...]], size: int = 4) -> Spoil:
    """The first shard with other tensors, each of size bytes per element."""

    def make(path: Path) -> None:
        held, end = {}, 0
        for name, dtype, shape in entries:
            begin, end = end, end + size * math.prod(shape)
            held[name] = entry(begin, end, dtype, shape)
        path.write_bytes(raw(held, bytes(end)))
        path.with_name(INDEX).write_text(
            json.dumps({"weight_map": {**dict.fromkeys(held, SHARD), "b": OTHER}})
        )

    return put(SHARD, make)


C = ("c", "F32", (1,))
PAIRS = {
    "longer": Case(other(("a", "F32", (3,)), C), "tensor 'a': shape (3,), expected (2,) like base", SHARD),
    "another rank": Case(other(("a", "F32", (2, 1)), C), "tensor 'a': shape (2, 1), expected (2,)", SHARD),
    "a scalar": Case(other(("a", "F32", (2,)), ("c", "F32", ())), "tensor 'c': shape (), expected (1,)", SHARD),
    "nothing": Case(other(("a", "F32", (0,)), C), "tensor 'a': shape (0,), expected (2,)", SHARD),
    "integers": Case(other(("a", "I32", (2,)), C), "tensor 'a': dtype I32, expected one of F64, F32, F16, BF16", SHARD),
    "bool": Case(other(("a", "BOOL", (2,)), ("c", "BOOL", (1,)), size=1), "tensor 'a': dtype BOOL", SHARD),
    "eight bits": Case(other(("a", "F8_E4M3", (2,)), ("c", "F8_E5M2", (1,)), size=1), "tensor 'a': dtype F8_E4M3", SHARD),
    "complex": Case(other(("a", "C64", (2,)), ("c", "C64", (1,)), size=8), "tensor 'a': dtype C64", SHARD),
    "one missing": Case(other(C), "tensor 'a': missing, expected F32 (2,) like base"),
    "one too many": Case(other(("a", "F32", (2,)), C, ("d", "F32", (1,))), "tensor 'd': not in base", SHARD),
    "another case": Case(other(("A", "F32", (2,)), C), "tensor 'A': not in base", SHARD),
    "a space": Case(other(("a ", "F32", (2,)), C), "tensor 'a ': not in base", SHARD),
    "control characters": Case(other(("a", "F32", (2,)), C, (CONTROLS, "F32", (1,))), r"tensor '\n\r\t\x1b[2J\x07\x00", SHARD),
    "a name of a megabyte": Case(other(("a", "F32", (2,)), C, ("n" * 1_000_000, "F32", (1,))), ": not in base", SHARD),
    "no name": Case(other(("a", "F32", (2,)), C, ("", "F32", (1,))), "tensor '': not in base", SHARD),
    "100,000 others": Case(lambda m: other(*((f"t{i}", "F32", (0,)) for i in range(100_000)))(m), "(and 99,997 more)"),
}  # fmt: skip


# What is given instead of a model.


def spoil_path(make: Spoil) -> Spoil:
    def spoil(model: Path) -> None:
        shutil.rmtree(model)
        make(model)

    return spoil


PATHS: dict[str, Case] = {
    "nothing": Case(spoil_path(lambda path: None), "no such file or directory"),
    **{
        name: Case(spoil_path(make), "")
        for name, (make, _) in STRANGE.items()
        if name not in ("a directory", "a link to a directory", "a link to /proc/self/root")
    },
    "an empty directory": Case(spoil_path(Path.mkdir), "empty directory"),
    "a text": Case(
        spoil_path(content("weights")),
        "expected a directory, a .safetensors file, a PyTorch file or a .npy file",
    ),
    "a link to /proc": Case(spoil_path(symlink_to("/proc/self")), "no weights"),
}


# As somebody who may not read it.

UNREADABLE = {
    "a directory": (Path(), 0o000),
    "a directory, but for its names": (Path(), 0o744),
    "a shard": (Path(SHARD), 0o000),
    "the index": (Path(INDEX), 0o000),
}
