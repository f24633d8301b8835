"""Files merged through a GPU; without one, through a fake stream on which nothing runs before it is waited for."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import check, family, nothing_left, save_model
from late_stream import DEVICE, LateStream, gpu, merge_on_device  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.backends import registry
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.cli import text
from negmerge_fast.runtime import device as device_module
from negmerge_fast.runtime import memory
from negmerge_fast.runtime.buffers import Timeline
from negmerge_fast.runtime.device import SyncStream
from negmerge_fast.streaming import api, budget, placement, probes
from negmerge_fast.streaming.options import MergeOptions
from negmerge_fast.streaming.placement import Throughput

NAMES = ("base", "ft-0", "ft-1", "ft-2")


@pytest.fixture
def tensors(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    made = family()
    for model in made:  # long enough for many chunks
        model["long"] = torch.randn(9973, generator=torch.Generator().manual_seed(len(model)))
    made[1]["long"] = made[0]["long"].double() + 1  # converted by the kernel, not by the copy
    made[2]["long"] = made[0]["long"].bfloat16() + 1
    names = list(made[0])
    for name, model in zip(NAMES, made, strict=True):
        save_model(tmp_path / name, model, [names[:3], names[3:]] if name == "ft-1" else None)
    return made


def prepare(folder: Path, **options: Any) -> api.Job:
    base, *models = [folder / name for name in NAMES]
    chosen = MergeOptions(**{"scale": 0.9, "device": DEVICE, **options})
    return api.prepare(base, models, folder / "out", chosen)


def run(job: api.Job, **options: Any) -> None:
    """Run a job, and fail if it hangs or leaves a thread."""
    before = threading.active_count()
    raised: list[BaseException] = []

    def run_job() -> None:
        try:
            job.run(**options)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run_job, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    assert threading.active_count() == before
    if raised:
        raise raised[0]


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


def fails(error: BaseException) -> Callable[..., Any]:
    def raises(*_: Any) -> Any:
        raise type(error)(*error.args)  # another one for each thread

    return raises


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
    assert f"and as much on {DEVICE}" in "\n".join(text.plan_lines(measured))
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


@pytest.mark.parametrize(
    ("found", "device", "why"),
    [
        (
            Throughput(2e9, False, 20e9),
            "cpu",
            r"a GPU would wait for the files as well, and save 0\.0 s at best",
        ),
        (Throughput(50e9, True, 20e9), DEVICE, r"14\.3 GB/s on the CPU, 40\.0 GB/s through cuda:0"),
        (Throughput(50e9, None, 20e9), DEVICE, r"14\.3 GB/s on the CPU, 40\.0 GB/s through cuda:0"),
        (Throughput(5e9, True, 50e9), "cpu", r"4\.5 GB/s on the CPU, 5\.0 GB/s through cuda:0"),
        (Throughput(30e9, False, 4e9), DEVICE, r"4\.0 GB/s on the CPU, 30\.0 GB/s through cuda:0"),
    ],
)
def test_a_job_is_placed_by_its_bandwidths(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, found: Throughput, device: str, why: str
) -> None:  # fmt: skip
    monkeypatch.setattr(placement, "measure_throughput", lambda *_: found)
    monkeypatch.setattr(probes, "h2d_bandwidth", lambda _: 40e9)
    assert prepare(tmp_path, device="auto").placement == ("cpu", "no GPU here", None)
    monkeypatch.setattr(placement, "gpu_may_exist", lambda: True)
    assert prepare(tmp_path, device="auto").placement == ("cpu", "done before a GPU would have begun", None)
    monkeypatch.setattr(placement, "_MIN_JOB_BYTES", 0)
    assert prepare(tmp_path, device="auto").placement == ("cpu", "chunks too short for a GPU", None)
    monkeypatch.setattr(placement, "_MIN_EXTENT_BYTES", 0)
    monkeypatch.setattr(placement, "_GPU_STARTUP_S", 1e3)
    assert "at best" in prepare(tmp_path, device="auto").placement.reason
    monkeypatch.setattr(placement, "_GPU_STARTUP_S", 0.0 if device == DEVICE or "through" in why else 1e-9)
    chosen = prepare(tmp_path, device="auto").placement
    assert chosen.device == device and re.search(why, chosen.reason), chosen
    for backend, there in (("cuda", DEVICE), ("cpu", "cpu"), ("torch", "cpu")):
        assert prepare(tmp_path, device="auto", backend=backend).placement.device == there


def test_a_gpu_that_fails_is_not_used_unless_asked_for(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "measure_throughput", lambda *_: Throughput(50e9, True, 20e9))
    monkeypatch.setattr(placement, "gpu_may_exist", lambda: True)
    for name in ("_MIN_JOB_BYTES", "_MIN_EXTENT_BYTES", "_GPU_STARTUP_S"):
        monkeypatch.setattr(placement, name, 0)
    fake = registry.choose

    def torch_only(backend: str, device: str, *rest: Any) -> Any:
        return ("torch", merge_on_device) if device == DEVICE else fake(backend, device, *rest)

    def refused(backend: str, device: str, *rest: Any) -> Any:
        if device == DEVICE:
            raise nm.InputError("backend 'auto' cannot run here")
        return fake(backend, device, *rest)

    for place, name, planted, why in (
        (LateStream, "lock", fails(RuntimeError("no pages")), "cuda:0 cannot be used: no pages"),
        (device_module, "available_bytes", lambda _: 1 << 20, "only 1,048,576 bytes are free on cuda:0"),
        (registry, "choose", torch_only, "no kernel is usable on cuda:0"),
        (registry, "choose", refused, "cuda:0 cannot be used: backend 'auto' cannot run here"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, planted)
            assert prepare(tmp_path, device="auto").placement[:2] == ("cpu", why)
    monkeypatch.setattr(probes, "h2d_bandwidth", lambda _: 40e9)
    assert prepare(tmp_path, device="auto").placement.device == DEVICE


def test_bandwidths_are_measured(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare(tmp_path).throughput()
    assert found and found.cached
    assert min(found.read_bandwidth, found.merge_bandwidth, found.h2d_bandwidth or 0) > 0
    on_cpu = prepare(tmp_path, device="cpu")
    assert on_cpu.throughput() and on_cpu.throughput().h2d_bandwidth is None  # type: ignore[union-attr]
    integers = prepare(tmp_path, device="cpu", include="ids")
    assert integers.throughput() is None and "\nbandwidth " not in "\n".join(text.plan_lines(integers))
    lines = list(placement.describe([DEVICE]))
    assert len(lines) == 2 and "host to cuda:0 at" in lines[1]
    probes.h2d_bandwidth.cache_clear()
    monkeypatch.setattr(LateStream, "lock", fails(RuntimeError("no pages")))
    assert list(placement.describe([DEVICE]))[1] == "host to cuda:0 cannot be measured: no pages"
    # If one read came from the disk, the disk is measured; if one is unknown and none from the disk, it is unknown.
    for answers, cached in (([True], True), ([True, None], None), ([True, None, False], False)):
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read_into", lambda *_, a=answers: a.pop(0) if len(a) > 1 else a[0])
            assert probes.read_bandwidth(on_cpu.plan, 2)[1] is cached


def test_a_sample_is_spread_over_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_SAMPLE_BYTES", 64)
    names = [f"t{k}" for k in range(40)]
    models = [{n: torch.randn(1 if n != "t7" else 99_999) for n in names} for _ in range(2)]
    save_model(tmp_path / "base", models[0], [names[::2], names[1::2]])
    save_model(tmp_path / "ft", models[1], [names[::-1]])
    plan = api.prepare(tmp_path / "base", [tmp_path / "ft"], tmp_path / "out", MergeOptions(1.0)).plan
    sampled = list(probes._sample(plan, 50))
    assert sum(size > 4 for _, _, size in sampled) >= 48
    assert all(offset + size <= file.size for file, offset, size in sampled)
    assert sampled != list(probes._sample(plan, 50))


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
