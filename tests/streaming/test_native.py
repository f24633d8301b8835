"""Chunks in one call of the compiled library: the same bytes however they are read, and a file that shrinks ends nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import save_model
from interrupted import contents
from small_chunks import set_chunk_bytes
from small_models import folder, merge  # noqa: F401

from negmerge_fast.benchmark.bandwidth import make_cold
from negmerge_fast.streaming import read_ahead
from negmerge_fast.streaming.plan import Extent
from negmerge_fast.streaming.progress import ChunkResult
from negmerge_fast.streaming.read_ahead import ReadAhead
from negmerge_fast.streaming.worker import Worker

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("chunk_bytes", [512, 5000, 1 << 20])
@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("release", [False, True])
def test_the_same_bytes_however_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, requests: bool, cold: bool, release: bool
) -> None:
    merge(folder, backend="torch")
    expected = contents(folder / "out")
    set_chunk_bytes(monkeypatch, chunk_bytes)
    read: list[bool] = []
    monkeypatch.setattr(ReadAhead, "requests", requests, raising=False)
    monkeypatch.setattr(ReadAhead, "record", lambda self, cached, nbytes, seconds: read.append(cached))
    monkeypatch.setattr(ReadAhead, "__init__", lambda self: None)
    monkeypatch.setattr("negmerge_fast.runtime.memory.free_memory", lambda: 1000 if release else 1 << 40)
    process = Worker.process_chunk

    def when_cold(self: Worker, chunk: Extent) -> ChunkResult:
        make_cold(list(folder.glob("*/*.safetensors")))
        return process(self, chunk)

    if cold:
        monkeypatch.setattr(Worker, "process_chunk", when_cold)
    merge(folder, overwrite=True, backend="cpu", memory_budget="1GiB")
    assert contents(folder / "out") == expected
    if not release:
        assert all(read) == (not cold)


def test_every_chunk_is_processed_natively(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "_read", None)
    assert merge(folder).bytes_read


# Both models are cut short after the first chunk, of which the library is told that they are cached.
SHRINKING = """
import ctypes, os, signal, sys
import negmerge_fast as nm
from negmerge_fast.output.writer import Writer
from negmerge_fast.streaming import budget
budget.MAX_CHUNK_BYTES = 1 << 16
descriptor, chunks = Writer.descriptor, []
def cut(self, name):
    chunks.append(name)
    if len(chunks) == 3:
        os.environ["SHIM"] = "mincore=1"
        os.truncate("ft-1/model.safetensors", 1 << 16)
        if sys.argv[1:] == ["unguarded"]:
            ctypes.CDLL(None).signal(signal.SIGBUS, 0)  # SIG_DFL; Python's function is for the main thread
    return descriptor(self, name)
Writer.descriptor = cut
try:
    nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", scale=0.9, threads=1)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_mapped_file_that_shrinks_is_one_error(tmp_path: Path, guarded: bool) -> None:
    """The merge reads what is not there any more: without the guard the process ends."""
    library = tmp_path / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, SUPPORT / "shim.c", "-ldl"], check=True)
    for k, name in enumerate(("base", "ft-0", "ft-1")):
        generator = torch.Generator().manual_seed(k)
        save_model(tmp_path / name, {"w": torch.randn(1 << 18, generator=generator)})
    done = subprocess.run(
        [sys.executable, "-c", SHRINKING, *([] if guarded else ["unguarded"])],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": str(library), "SHIM": ""},
    )  # fmt: skip
    if not guarded:
        assert done.returncode == -signal.SIGBUS
        return
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ft-1/model.safetensors: ends at byte \d+, expected 1048680 bytes\n", done.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft-0", "ft-1", "shim.so"]


@pytest.mark.parametrize(("requested", "chosen"), [(0.5, True), (0.95, False), (2.0, False)])
def test_the_faster_way_to_read_is_chosen(requested: float, chosen: bool) -> None:
    found = ReadAhead()
    found.record(cached=True, nbytes=1, seconds=1000.0)  # not from the disk
    for _ in range(1000):
        found.record(False, 1 << 20, requested if found.requests else 1.0)
    assert found.requests == chosen


def test_what_was_read_ahead_does_not_count_for_requests() -> None:
    found = ReadAhead()
    for _ in range(read_ahead._PROBED):
        found.record(False, 1, 1.0)
    for _ in range(read_ahead._UNCOUNTED):
        assert found.requests
        found.record(True, 1, 0.0)
    for _ in range(read_ahead._PROBED):
        assert found.requests
        found.record(False, 1, 2.0)
    assert not found.requests
