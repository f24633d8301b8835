"""JSON that is little but keys, texts, numbers or lists is refused before it takes many times its size; real headers are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MAX_TIMES = 16
KINDS = "header", "index", "manifest"


def listed(item: str, count: int = 600_000) -> str:
    return f'{{"a":[{item * count}0]}}'


def keyed(pair: str, count: int = 400_000) -> str:
    """An object of pairs, in which %d is another number each time."""
    return "{" + ",".join(pair.replace("%d", f"{k:x}") for k in range(count)) + "}"


def tensors(name: str, shape: str, space: str = "") -> str:
    entry = f'"{name}":{space}{{"dtype":{space}"F32",{space}"shape":{space}{shape},{space}"data_offsets":{space}[%d,{space}%e]}}'
    size = 4 if "2" not in shape else 8
    pairs = (
        entry.replace("%n", f"{k}").replace("%d", f"{k * size}").replace("%e", f"{k * size + size}")
        for k in range(40_000)
    )
    return "{" + f",{space}".join(pairs) + "}"


REFUSED: dict[str, Callable[[], str]] = {
    "keys and numbers": lambda: keyed('"%d":0'),
    "keys and other numbers": lambda: keyed('"%d":12345'),
    "spaces before colons": lambda: keyed('"%d"   :0'),
    "keys of backslashes": lambda: keyed(r'"%d\\":0'),
    "keys and lists": lambda: keyed('"%d":[]'),
    "keys and objects": lambda: keyed('"%d":{}'),
    "keys and texts": lambda: keyed('"%d":"%d"'),
    "keys in an entry": lambda: '{"a":' + keyed('"%d":0') + "}",
    "keys in metadata": lambda: '{"__metadata__":' + keyed('"%d":""') + "}",
    "a key again and again": lambda: "{" + '"a":0,' * 600_000 + '"a":0}',
    "objects of a key": lambda: listed('{"a":0},       ', 400_000),
    "empty texts": lambda: listed('"",', 900_000),
    "short texts": lambda: listed('"ab",'),
    "other short texts": lambda: listed('"€",'),
    "texts of wide characters": lambda: listed('"😀",'),
    "small integers": lambda: listed("0,", 2_000_000),
    "integers": lambda: listed("257,", 900_000),
    "zeros with a sign": lambda: listed("-0,", 900_000),
    "numbers": lambda: listed("1.5,", 900_000),
    "empty lists": lambda: listed("[],", 900_000),
    "deep lists": lambda: listed("[" * 90 + "]" * 90 + ",", 20_000),
    "lists of a number": lambda: listed("[1.5],2.5,", 800_000),
    "objects and lists": lambda: listed('{"abcdefg":1.5},[ 1.5 ],  ', 400_000),
    "objects and their offsets": lambda: listed('{"data_offsets":{"a":{"b":9}}},', 400_000),
    "integers in a shape": lambda: (
        f'{{"a":{{"dtype":"F32","shape":[{"300," * 900_000}1],"data_offsets":[0,4]}}}}'
    ),
}
# Not dense, but no checkpoint either: refused when they are parsed.
SPARSE = {
    "long keys": lambda: keyed('"%d' + "k" * 30 + '":0', 100_000),
    "long texts": lambda: listed('"abcdef",'),
    "long integers": lambda: listed("12345,"),
    "lists far apart": lambda: listed("[0]," + " " * 12, 300_000),
}
REAL = {
    "short names": lambda: tensors("%n", "[1]"),
    "no extents": lambda: tensors("%n", "[]"),
    "five extents": lambda: tensors("t%n", "[1,1,2,1,1]"),
    "names with colons": lambda: tensors("%n/kernel:0", "[2]"),
    "spaces": lambda: tensors("%n.weight", "[1, 1]", " "),
    "JSON in metadata": lambda: json.dumps({
        "__metadata__": {"tags": json.dumps({f"{k:05}": k for k in range(100_000)})}
    }),
}  # fmt: skip

CHILD = """
import json, os, resource, sys
from pathlib import Path
from negmerge_fast.checkpoints import weights, safetensors, strict_json
from negmerge_fast.output import manifest
read = {"header": safetensors.read_header, "index": weights.read_index, "manifest": manifest.load}
for kind, path in json.loads(sys.stdin.read()):
    if not os.fork():
        before, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
        try:
            read[kind](Path(path))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps([took, message]), flush=True)
        os._exit(0)
    os.wait()
"""


def opened(*files: tuple[str, Path]) -> list[tuple[int, str]]:
    """Open files in processes of their own, and return the memory that each took and its error."""
    given = json.dumps([(kind, str(path)) for kind, path in files])
    done = subprocess.run([sys.executable, "-c", CHILD], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def put(path: Path, kind: str, text: str) -> int:
    """Write a header as a file of no tensor data, or a text, and return the size of the text."""
    data = text.encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data if kind == "header" else data)
    return len(data)


@pytest.mark.processes
@pytest.mark.parametrize("case", [*REFUSED, *SPARSE])
def test_what_is_refused_takes_a_few_times_its_size(tmp_path: Path, case: str) -> None:
    text = (REFUSED | SPARSE)[case]()
    sizes = [put(tmp_path / kind, kind, text) for kind in KINDS]
    assert min(sizes) > 1 << 20
    answers = opened(*((kind, tmp_path / kind) for kind in KINDS))
    for kind, size, (took, message) in zip(KINDS, sizes, answers, strict=True):
        assert took <= MAX_TIMES * size, f"{kind}: {took / size:.1f} times"
        if case in REFUSED:
            assert f"InputError: {tmp_path / kind}: {kind} is mostly " in message


@pytest.mark.parametrize("case", REAL)
def test_a_real_header_is_read(tmp_path: Path, case: str) -> None:
    size = put(tmp_path / "header", "header", text := REAL[case]())
    assert size > 1 << 20
    ends = [entry["data_offsets"][1] for entry in json.loads(text).values() if "data_offsets" in entry]
    os.truncate(tmp_path / "header", 8 + size + max(ends, default=0))
    ((_, message),) = opened(("header", tmp_path / "header"))
    assert message == ""


def test_a_real_index_is_read(tmp_path: Path) -> None:
    names = {f"t{k}": f"model-{k % 9 + 1:05}-of-00009.safetensors" for k in range(40_000)}
    for indent in (None, 2):
        size = put(tmp_path / "index", "index", json.dumps({"weight_map": names}, indent=indent))
        assert size > 1 << 20 and opened(("index", tmp_path / "index"))[0][1] == ""


def test_short_texts_are_not_counted(tmp_path: Path) -> None:
    put(tmp_path / "manifest", "manifest", keyed('"%d":0', 90_000))
    assert opened(("manifest", tmp_path / "manifest"))[0][1] == ""


def test_memory_is_measured(tmp_path: Path) -> None:
    """The processes of these tests see what parsing takes."""
    size = put(tmp_path / "manifest", "manifest", keyed('"%d":0', 90_000))
    ((took, _),) = opened(("manifest", tmp_path / "manifest"))
    assert took > 8 * size
