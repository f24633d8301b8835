"""Writing an output: nothing is left after a fault; the same bytes for any sharding, size of chunks and number of threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import family, load_model, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import contents
from small_chunks import set_chunk_bytes
from small_models import folder, merge  # noqa: F401

from negmerge_fast.backends import native, pytorch
from negmerge_fast.checkpoints import reader
from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.checkpoints.reader import File, Reader
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.output.writer import Writer
from negmerge_fast.runtime import memory
from negmerge_fast.streaming import api
from negmerge_fast.streaming.options import MergeOptions
from negmerge_fast.streaming.partition import chunks
from negmerge_fast.streaming.plan import make_plan
from negmerge_fast.streaming.worker import Worker


def test_stopped_while_syncing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []
    finish = Writer.finish

    def noted(self: Writer, *of_it: Any) -> None:
        finish(self, *of_it)
        finished.append(True)

    def stop(done: int, total: int) -> None:
        if finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish", noted)
    with pytest.raises(KeyboardInterrupt):
        merge(folder, progress=stop)
    assert finished and sorted(p.name for p in folder.iterdir()) == ["base", "ft-0", "ft-1"]


def fail_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of this process as a file: its first page cannot be read."""
    monkeypatch.setattr(Reader, "descriptor", lambda *_: os.open("/proc/self/mem", os.O_RDONLY))


def fail_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "descriptor", lambda *_: os.open("/dev/full", os.O_WRONLY))


def fail_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "merge_cpu", lambda *_: (_ for _ in ()).throw(OSError("the kernel failed")))


def fail_for_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]


def at_the_first_read(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Changes ft-1's file once it is open."""
    descriptor, changed = Reader.descriptor, []

    def and_change(self: Reader, file: File) -> int:
        found = descriptor(self, file)
        if file.path.parent.name == "ft-1" and not changed:
            changed.append(True)
            change(file.path)
        return found

    monkeypatch.setattr(Reader, "descriptor", and_change)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_first_read(monkeypatch, lambda path: os.truncate(path, path.stat().st_size - 4))


def overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_first_read(monkeypatch, lambda path: os.utime(path, ns=(0, 0)))


FAULTS = {
    "the disk fails": (fail_reading, r"Input/output error: '.*model\.safetensors'"),
    "the disk is full": (fail_writing, r"No space left on device: '.*out'"),
    "the kernel fails": (fail_merging, "the kernel failed"),
    "there is no room": (fail_for_space, "bytes are needed, 10 are free"),
    "an input shrinks": (shrink, "ends at byte|the file changed while it was being read"),
    "an input is overwritten": (overwrite, "ft-1/.*: the file changed while it was being read"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("skips", [False, True], ids=["native", "Python"])
def test_a_fault_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str, skips: bool
) -> None:
    plant, message = FAULTS[fault]
    models, options = [folder / "ft-0", folder / "ft-1"], MergeOptions(0.9, skip_unchanged=skips)
    job = api.prepare(folder / "base", models, folder / "out", options)
    plant(monkeypatch)
    if fault == "the kernel fails":
        job = api.prepare(folder / "base", models, folder / "out", options)
    with pytest.raises(OSError, match=message):
        job.run()
    assert sorted(p.name for p in folder.iterdir()) == ["base", "ft-0", "ft-1"]


def test_progress_may_stop_the_job(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = merge(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.bytes_read + report.bytes_written,) * 2

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(folder / "out")
    with pytest.raises(KeyboardInterrupt):
        merge(folder, progress=stop)
    assert sorted(p.name for p in folder.iterdir()) == ["base", "ft-0", "ft-1"]


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    for k, path in enumerate(("base", "ft-0", "ft-1")):
        tensors = {f"t{i}": torch.randn(5, generator=torch.Generator().manual_seed(k)) for i in range(120)}
        save_model(tmp_path / path, tensors, [[name] for name in tensors])
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "import negmerge_fast as nm; nm.merge_checkpoints('base', ['ft-0', 'ft-1'], 'out', scale=1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(load_model(tmp_path / "out")) == 120


def test_pages_are_given_back_when_a_job_is_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice: list[int] = []
    real = os.posix_fadvise

    def noted(descriptor: int, offset: int, size: int, what: int) -> None:
        advice.append(what)
        real(descriptor, offset, size, what)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    given_back = []
    for free in (1 << 40, 1000):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        advice.clear()
        merge(folder, overwrite=True, memory_budget="1GiB")
        given_back.append(advice.count(os.POSIX_FADV_DONTNEED))
    assert given_back[0] == 0 < given_back[1]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_change_no_byte_and_at_most_so_many_merge_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int, backend: str
) -> None:
    module, name = (native, "merge_cpu") if backend == "cpu" else (pytorch, "merge")
    real, lock, now, most = getattr(module, name), threading.Lock(), 0, 0

    def counted(*arguments: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        try:
            return real(*arguments)
        finally:
            with lock:
                now -= 1

    merge(folder, backend="torch")
    expected = contents(folder / "out")
    set_chunk_bytes(monkeypatch, 512)
    monkeypatch.setattr(module, name, counted)
    merge(folder, overwrite=True, threads=threads, backend=backend)
    assert contents(folder / "out") == expected  # the manifest, too
    assert 1 <= most <= (threads if backend == "cpu" else 1)


def test_the_first_error_in_the_order_of_the_chunks_is_raised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a later one is raised sooner; and no worker goes on long after it."""
    calls = []

    def failing(self: Worker, chunk: Any, *arguments: Any) -> None:
        calls.append(chunk)
        number = len(calls)
        time.sleep(0.2 if number == 1 else 0)
        raise OSError(f"chunk {number}")

    monkeypatch.setattr(Worker, "_read", failing)
    set_chunk_bytes(monkeypatch, 512)
    with pytest.raises(OSError, match="chunk 1"):
        merge(folder, threads=3, skip_unchanged=True)
    assert len(calls) <= 3


def test_a_thread_that_cannot_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, start, started = threading.active_count(), threading.Thread.start, []

    def refused(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        merge(folder)
    assert threading.active_count() == before
    assert sorted(p.name for p in folder.iterdir()) == ["base", "ft-0", "ft-1"]


def test_without_nonblocking_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_NOWAIT", None)
    merge(folder, backend="torch")
    assert (folder / "out" / "config.json").exists()


@st.composite
def sharding(draw: st.DrawFn) -> list[list[str]]:
    order = draw(st.permutations(list(family()[0])))
    cut = draw(st.integers(1, len(order) - 1))
    return [order[:cut], order[cut:]]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    shards=st.lists(sharding(), min_size=3, max_size=3),
    chunk_bytes=st.sampled_from([4096, 8192, 1 << 20]),
    seed=st.integers(0, 9),
)
def test_sharding_and_chunk_sizes_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[str]]], chunk_bytes: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("sharded")
    tensors = family(seed, n=2)
    for path, held, split in zip(("base", "ft-0", "ft-1"), tensors, shards, strict=True):
        save_model(folder / path, held, split)
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_chunk_bytes(monkeypatch, chunk_bytes)
        merge(folder)
    merged = load_model(folder / "out")
    for name, base in tensors[0].items():
        expected = base
        if base.is_floating_point():
            expected = plain_merge(base, [t[name] for t in tensors[1:]], 0.9)[0]
        assert same_bits(merged[name], expected), name


@settings(deadline=None, derandomize=True, max_examples=25)
@given(shards=st.lists(sharding(), min_size=2, max_size=2), chunk_bytes=st.integers(8, 3000))
def test_chunks_cover_every_byte_once(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[str]]], chunk_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("covered")
    for path, held, split in zip(("base", "ft"), family(n=1), shards, strict=True):
        save_model(folder / path, held, split)
    plan = make_plan(open_checkpoint(folder / "base"), [open_checkpoint(folder / "ft")])
    reached = dict.fromkeys(plan.files, 0)
    elements: dict[str, int] = {}
    for chunk in chunks(plan.extents, chunk_bytes):
        base = chunk.sources[0]
        assert base.offset == reached[chunk.path]
        reached[chunk.path] += base.nbytes
        assert all(source.nbytes <= chunk_bytes for source in chunk.sources)
        for tensor_slice in chunk.slices:
            assert tensor_slice.start == elements.get(tensor_slice.name, 0)
            elements[tensor_slice.name] = tensor_slice.start + tensor_slice.numel
    assert reached == {name: file.size for name, file in plan.files.items()}
    assert elements == {n: t.numel() for n, t in family()[0].items() if t.is_floating_point()}
