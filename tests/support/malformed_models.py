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
from malformed import CONTROLS, deep

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
OUTSIDE = ["", ".", "..", "../x", "../base/config.json", "/etc/passwd", "a/b", f"./{SHARD}", f"{SHARD}/", "..\\x", "a\0b", "negmerge.json", "n" * 256, "é" * 1_000_000]  # fmt: skip
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


def nest(model: Path) -> None:
    (model / "/".join("d" * 70)).mkdir(parents=True)


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
        Case(put(INDEX, mapped(a=INDEX)), f"tensor 'a' is not in {INDEX}", SHARD),
    )
    yield (
        "a shard that is no weights",
        Case(put(INDEX, mapped(a="config.json")), "2 bytes, expected a safetensors header", "config.json"),
    )
    yield "in the other shard", Case(put(INDEX, mapped(a=OTHER)), f"tensor 'a' is not in {INDEX}", SHARD)
    yield (
        "named, but not there",
        Case(put(INDEX, mapped(zz=SHARD)), f"tensor 'zz' is missing, but {INDEX} names it", SHARD),
    )
    yield (
        "there, but not named",
        Case(
            put(INDEX, content(json.dumps({"weight_map": {"a": SHARD, "b": OTHER}}))),
            "tensor 'c' is not in",
            SHARD,
        ),
    )
    yield (
        "a long name, not there",
        Case(put(INDEX, mapped(**{"n" * 1_000_000: SHARD})), " is missing, but ", SHARD),
    )
    yield "one file under both names", Case(both_hold_all, f"tensor 'a' is not in {INDEX}", OTHER)
    yield "no index", Case(lambda m: (m / INDEX).unlink(), "2 files end in .safetensors")
    yield (
        "two indexes",
        Case(
            lambda m: (
                [os.link(m / INDEX, m / f"{x}.safetensors.index.json") for x in "xy"] + [(m / INDEX).unlink()]
            ),
            "2 files end in",
        ),
    )
    yield "an adapter", Case(lambda m: (m / "adapter_config.json").touch(), "holds LoRA factors")
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
    yield "folders without end", Case(nest, "expected at most 64 directories in each other")


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
    "100,000 others": Case(lambda m: other(*((f"t{i}", "F32", (0,)) for i in range(100_000)))(m), "; and 99,982 more"),
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
        spoil_path(content("weights")), "expected a directory, a .safetensors file or a .npy file"
    ),
    "a link to /proc": Case(spoil_path(symlink_to("/proc/self")), "no weights"),
}


# As somebody who may not read it.

UNREADABLE = {
    "a directory": (Path(), 0o000),
    "a directory, but for its names": (Path(), 0o744),
    "a shard": (Path(SHARD), 0o000),
    "the index": (Path(INDEX), 0o000),
    "a folder in it": (Path("folder"), 0o000),
}
