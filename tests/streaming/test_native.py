"""Chunks in one call of the compiled library: the same bytes however they are read, and a file that shrinks ends nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from checkpoint_files import save_model
from interrupted import contents
from small_chunks import set_chunk_bytes
from small_models import folder, merge  # noqa: F401

from negmerge_fast.benchmark.bandwidth import make_cold
from negmerge_fast.core.rule import NonFinite
from negmerge_fast.streaming import read_ahead
from negmerge_fast.streaming.native import ChunkMerger
from negmerge_fast.streaming.plan import Extent
from negmerge_fast.streaming.progress import ChunkResult
from negmerge_fast.streaming.read_ahead import ReadAhead
from negmerge_fast.streaming.worker import Worker

Run: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"
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
    monkeypatch.setattr(ReadAhead, "record", lambda self, cached, *_: read.append(cached))
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


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_of_two_workers_on_one_thread_one_merges_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    turns: list[object] = []
    made = ChunkMerger.__init__

    def note(self: ChunkMerger, *arguments: Any) -> None:
        turns.append(arguments[-1])
        made(self, *arguments)

    monkeypatch.setattr(ChunkMerger, "__init__", note)
    merge(folder, threads=threads)
    assert len(turns) == max(threads, 2) and len(set(turns)) == 1
    assert (turns[0] is not None) == (threads == 1)


# A merge of chunks of 64 KiB. At the third something happens.
MERGE = """
import os
import negmerge_fast as nm
from negmerge_fast.output.writer import Writer
from negmerge_fast.streaming import budget
budget.MAX_CHUNK_BYTES = 1 << 16
os.environ["SHIM"] = {shim!r}
descriptor, chunks = Writer.descriptor, []
def at_third(self, name):
    chunks.append(name)
    if len(chunks) == 3:
        {event}
    return descriptor(self, name)
Writer.descriptor = at_third
try:
    nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", scale=0.9, threads=1)
except OSError as error:
    print(error)
"""
CUT = 'os.truncate("ft-1/model.safetensors", 1 << 16)'
# What another worker opens later has changed.
SHRANK = r"ft-1/model.safetensors: (ends at byte \d+, expected 1048680 bytes|the file changed while it was being read)\n"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    library = tmp_path / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, SUPPORT / "shim.c", "-ldl"], check=True)
    for k, name in enumerate(("base", "ft-0", "ft-1")):
        generator = torch.Generator().manual_seed(k)
        save_model(tmp_path / name, {"w": torch.randn(1 << 18, generator=generator)})

    def merge_until(event: str, shim: str = "") -> subprocess.CompletedProcess[str]:
        script = MERGE.format(event=event, shim=shim)
        environment = {**os.environ, "LD_PRELOAD": str(library), "SHIM": ""}
        return subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    return merge_until


def test_a_file_that_shrinks_is_one_error(tmp_path: Path, run: Run) -> None:
    done = run(CUT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(SHRANK, done.stdout), done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft-0", "ft-1", "shim.so"]


# What the native reads are answered, while Python's are not: pread=5 is EIO, for which a chunk is read anew.
@pytest.mark.parametrize(
    "shim",
    ["preadv2=95 pread=5", "preadv2=38", "preadv2=95 short=1", "short=1", "fadvise=38", "sync_file_range=38"],
)  # fmt: skip
def test_the_same_bytes_where_calls_are_missing_or_do_a_part(tmp_path: Path, run: Run, shim: str) -> None:
    assert run("pass").returncode == 0
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    done = run(f"os.environ['SHIM'] = {shim!r}", shim=shim)
    assert (done.returncode, done.stdout) == (0, ""), done
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("shim", "said"), [("pwrite=28", "No space left on device"), ("full=1", "Input/output error")]
)
def test_what_cannot_be_written_is_one_error(tmp_path: Path, run: Run, shim: str, said: str) -> None:
    done = run(f"os.environ['SHIM'] = {shim!r}")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"\[Errno \d+\] {said}: '.*/out'\n", done.stdout)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm")
def test_files_of_a_tmpfs_are_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be asked."""
    read: list[bool] = []
    monkeypatch.setattr(ReadAhead, "record", lambda self, cached, *_: read.append(cached))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as in_memory:
        copied = Path(shutil.copytree(folder, Path(in_memory) / "folder"))
        merge(copied, backend="cpu")
    assert read and all(read)


@pytest.mark.parametrize("nonfinite", ["error", "keep-base"])  # natively, or not
def test_models_that_are_not_cached_are_noticed_if_the_base_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, nonfinite: NonFinite
) -> None:
    read: list[bool] = []
    monkeypatch.setattr(ReadAhead, "record", lambda self, cached, *_: read.append(cached))
    process = Worker.process_chunk

    def when_cold(self: Worker, chunk: Extent) -> ChunkResult:
        make_cold(list(folder.glob("ft-*/*.safetensors")))
        return process(self, chunk)

    monkeypatch.setattr(Worker, "process_chunk", when_cold)
    merge(folder, backend="cpu", nonfinite=nonfinite)
    assert not all(read)


@pytest.mark.parametrize(("requested", "chosen"), [(0.5, True), (0.8, False), (2.0, False)])
def test_the_faster_way_to_read_is_chosen(requested: float, chosen: bool) -> None:
    found = ReadAhead()
    found.record(cached=True, nbytes=1, seconds=1000.0, requested=False)  # not from the disk
    for _ in range(1000):
        found.record(False, 1 << 20, requested if found.requests else 1.0, found.requests)
    assert found.requests == chosen


def test_what_was_read_ahead_does_not_count_for_requests() -> None:
    found = ReadAhead()
    for _ in range(read_ahead._EACH):
        found.record(False, 1, 1.0, requested=False)
    for _ in range(read_ahead._UNCOUNTED):
        assert found.requests
        found.record(True, 1, 0.0, requested=True)
    for _ in range(read_ahead._PROBED):
        assert found.requests
        found.record(False, 1, 2.0, requested=True)
    assert not found.requests


def test_chunks_that_were_under_way_are_not_counted_as_requested() -> None:
    """With very many workers there are more of them than are left uncounted."""
    found = ReadAhead()
    for seconds in [1.0] * read_ahead._EACH + [0.0] * 100:
        found.record(False, 1, seconds, requested=False)
    for _ in range(100):
        found.record(False, 1, 1.0, found.requests)
    assert not found.requests
