"""Files merged through a GPU; without one, through a fake stream on which nothing runs before it is waited for."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import check, nothing_left, save_model
from gpu_jobs import fails, prepare, run, tensors  # noqa: F401
from late_stream import DEVICE, LateStream, gpu  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.backends import registry
from negmerge_fast.cli import text
from negmerge_fast.runtime import device as device_module
from negmerge_fast.runtime import memory
from negmerge_fast.runtime.buffers import Timeline
from negmerge_fast.runtime.device import SyncStream
from negmerge_fast.streaming import budget
from negmerge_fast.streaming.placement import Throughput


@pytest.mark.parametrize("chunk_bytes", [512, 4096, 1 << 20])
@pytest.mark.parametrize("threads", [1, 5])
def test_the_same_bytes_as_on_the_cpu(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, threads: int
) -> None:
    monkeypatch.setattr(budget, "MAX_DEVICE_CHUNK_BYTES", chunk_bytes)
    timeline = Timeline()
    run(prepare(tmp_path, threads=threads), timeline=timeline)
    check(tmp_path / "out", tensors)
    assert {stage for _, stage, _, _ in timeline.spans} == {"read", "copy in", "merge", "copy out", "write"}
    assert all(began <= ended for _, _, began, ended in timeline.spans)
    assert {worker for worker, *_ in timeline.spans} <= {f"worker {k}" for k in range(threads + 2)}


def test_two_workers_wait_at_the_same_time(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_DEVICE_CHUNK_BYTES", 512)
    wait, both, met = LateStream.wait, threading.Barrier(2, timeout=20), []

    def waits(self: LateStream) -> None:
        if not met:
            both.wait()
            met.append(True)
        wait(self)

    monkeypatch.setattr(LateStream, "wait", waits)
    run(prepare(tmp_path, threads=1))
    check(tmp_path / "out", tensors)


def test_an_error_that_is_held_holds_no_memory(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories, empty = [], LateStream.empty
    monkeypatch.setattr(
        LateStream, "empty", lambda self, size: memories.append(empty(self, size)) or memories[-1]
    )
    copies_fail(monkeypatch)
    with pytest.raises(RuntimeError, match="the copy failed"):
        run(prepare(tmp_path, threads=3))
    assert memories and not any(memory.untyped_storage().nbytes() for memory in memories)


def test_short_reads(tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def some(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        return real(descriptor, [memoryview(buffers[0])[:1000]], offset, *flags)

    job = prepare(tmp_path)
    monkeypatch.setattr(os, "preadv", some)
    run(job)
    check(tmp_path / "out", tensors)


def file_ends_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "preadv", lambda *_: 0)


def no_memory_on_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LateStream, "empty", fails(torch.cuda.OutOfMemoryError("out of memory on the device")))


def pages_stay_unlocked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LateStream, "lock", fails(RuntimeError("cannot lock pages")))


def copies_fail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SyncStream, "copy", fails(RuntimeError("the copy failed")))


def launches_fail(patch: pytest.MonkeyPatch) -> None:
    stage = LateStream.stage

    def some(self: LateStream, name: str) -> AbstractContextManager[None]:
        if name == "merge":
            raise RuntimeError("cannot launch")
        return stage(self, name)

    patch.setattr(LateStream, "stage", some)


def the_device_is_lost(patch: pytest.MonkeyPatch) -> None:
    def lost(self: LateStream) -> None:
        self.later = []
        raise RuntimeError("the device is lost")

    patch.setattr(LateStream, "wait", lost)


def the_disk_is_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "pwrite", fails(OSError(errno.ENOSPC, "No space left")))


def nothing_can_be_unlocked(patch: pytest.MonkeyPatch) -> None:
    unlock = LateStream.unlock

    def lost(self: LateStream, memory: torch.Tensor) -> None:
        unlock(self, memory)
        raise RuntimeError("and cannot be undone")

    the_device_is_lost(patch)
    patch.setattr(LateStream, "unlock", lost)


FAULTS = {
    "ends at byte": file_ends_early,
    "out of memory on the device": no_memory_on_device,
    "cannot lock pages": pages_stay_unlocked,
    "the copy failed": copies_fail,
    "cannot launch": launches_fail,
    "the device is lost": the_device_is_lost,
    "^the device is lost$": nothing_can_be_unlocked,
    "No space left": the_disk_is_full,
}


@pytest.mark.parametrize("message", [*FAULTS, "the kernel failed"])
def test_a_fault_at_any_stage_leaves_nothing(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setattr(budget, "MAX_DEVICE_CHUNK_BYTES", 4096)
    job = prepare(tmp_path, threads=3)
    if message == "the kernel failed":
        job = dataclasses.replace(job, merge=fails(RuntimeError(message)))
    else:
        FAULTS[message](monkeypatch)
    with pytest.raises((OSError, RuntimeError), match=message):
        run(job)
    assert nothing_left(tmp_path)


def test_a_job_is_stopped_while_chunks_are_under_way(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_DEVICE_CHUNK_BYTES", 4096)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(tmp_path, threads=3), progress=fails(KeyboardInterrupt()))
    assert nothing_left(tmp_path)


def test_a_nonfinite_element_is_named(tmp_path: Path, tensors: Any, gpu: None) -> None:
    tensors[2]["embed"][3, 5] = float("nan")
    save_model(tmp_path / "ft-1", tensors[2])
    for old in (tmp_path / "ft-1").glob("model-*"):
        old.unlink()
    (tmp_path / "ft-1" / "model.safetensors.index.json").unlink()
    with pytest.raises(nm.InputError, match=r"ft-1/.*: tensor 'embed': nan at \(3, 5\)"):
        run(prepare(tmp_path))
    assert nothing_left(tmp_path)


def test_memory_is_bounded_by_what_is_free(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = prepare(tmp_path, threads=6)
    assert usual.workers == 8 and usual.memory <= 1 << 30
    measured = dataclasses.replace(
        usual, placement=usual.placement._replace(throughput=Throughput(1e9, False, 2e9, 5e9))
    )
    assert f"and as much on {DEVICE}" in "\n".join(text.plan_lines([measured]))
    for module, name, at in (
        (device_module, "available_bytes", lambda _: 64 << 20),
        (memory, "free_memory", lambda: 128 << 20),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, at)
            less = prepare(tmp_path, threads=6)
            assert less.memory <= 64 << 20 < usual.memory
    monkeypatch.setattr(device_module, "available_bytes", lambda _: 1 << 20)
    with pytest.raises(nm.InputError, match=f"free memory of {DEVICE}: 1,048,576 bytes, expected at least"):
        prepare(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "torch"])
def test_through_a_gpu(tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend != "auto" and (reason := registry.why_not(backend, DEVICE)):
        pytest.skip(reason)
    monkeypatch.setattr(budget, "MAX_DEVICE_CHUNK_BYTES", 4096)
    timeline = Timeline()
    run(prepare(tmp_path, backend=backend), timeline=timeline)
    check(tmp_path / "out", tensors)
    assert len({stage for _, stage, _, _ in timeline.spans}) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_place_on_a_gpu_without_more_memory() -> None:
    base, *models = [torch.randn(1 << 24, device=DEVICE) for _ in range(4)]
    nm.merge_(base, models, scale=0.9)  # the kernel is tested, and loaded
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nm.merge_(base, models, scale=0.9)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_one_trained_tensor_of_ten_is_a_tenth_of_the_consensus(tmp_path: Path) -> None:
    """A float32 base with bfloat16 models: rounding is no training."""
    generator = torch.Generator().manual_seed(1)
    base = {f"t{i}": torch.randn(40, 25, generator=generator) for i in range(10)}
    save_model(tmp_path / "base", base)
    inputs = [tmp_path / f"ft-{k}" for k in range(3)]
    for path in inputs:
        save_model(path, {n: (t + 0.5 * (n == "t3")).bfloat16() for n, t in base.items()})
    report = nm.merge_checkpoints(tmp_path / "base", inputs, tmp_path / "out", scale=0.9)
    assert report.consensus_ratio == 0.1
    assert {t["name"]: t["agreed"] for t in report.tensors if t["agreed"]} == {"t3": 1000}
    assert nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", *inputs]).bytes_compared > 40_000


def test_a_base_beyond_the_type_of_a_model_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "base", {"w": torch.tensor([[1.0, 1e6]])})
    save_model(tmp_path / "ft", {"w": torch.ones(1, 2).half()})
    with pytest.raises(nm.InputError) as error:
        nm.merge_checkpoints(tmp_path / "base", [tmp_path / "ft"], tmp_path / "out", scale=0.9)
    assert str(error.value) == (
        f"{tmp_path}/base/model.safetensors: tensor 'w': 1000000.0 (infinite in a model's F16) at (0, 1), "
        "expected finite numbers (or --nonfinite keep-base)"
    )
