"""Files merged through a GPU: the pipeline itself on the CPU, with streams that do nothing before somebody waits for them."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from checkpoint_files import check, family, nothing_left, save_model

import negmerge_fast as nm
from negmerge_fast import backends, budget, cli, costs, lanes, reference, stream
from negmerge_fast.costs import Costs
from negmerge_fast.lanes import Straight, Timeline
from negmerge_fast.rule import Batch, Rule

NAMES = ("base", "ft-0", "ft-1", "ft-2")
DEVICE = "cuda:0"


class LateStream(Straight):
    """A stream of a GPU, faked: the work is done when it is waited for, on memory that is poisoned until then."""

    locked: ClassVar[set[int]] = set()

    def __init__(self, device: str, timeline: Timeline) -> None:
        super().__init__(device, timeline)
        self.later: list[tuple[str, Callable[[], None]]] = []

    def empty(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0xA5, dtype=torch.uint8)

    def lock(self, memory: torch.Tensor) -> None:
        self.locked.add(memory.data_ptr())

    def unlock(self, memory: torch.Tensor) -> None:
        assert not self.later, "memory is given back that the device still uses"
        self.locked.remove(memory.data_ptr())

    def put(self, stage: str, work: Callable[[], None]) -> None:
        assert len(self.locked) > 0
        self.later.append((stage, work))

    def wait(self) -> None:
        put_off, self.later = self.later, []
        for stage, work in put_off:
            super().put(stage, work)


def merge_there(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """The kernel of the device that is none."""
    assert batch.device == DEVICE
    return reference.merge(dataclasses.replace(batch, device="cpu"), rule, 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = backends.choose
    monkeypatch.setattr(LateStream, "locked", set())
    monkeypatch.setattr(lanes, "Stream", LateStream)
    monkeypatch.setattr(lanes, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(
        backends, "choose", lambda b, device, *a: ("cuda", merge_there) if device == DEVICE else real(b, device, *a)
    )  # fmt: skip
    forget = costs.link_speed.cache_clear
    forget()
    yield
    forget()
    assert not LateStream.locked


@pytest.fixture
def tensors(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    made = family()
    for model in made:  # long enough for many pieces
        model["long"] = torch.randn(9973, generator=torch.Generator().manual_seed(len(model)))
    made[1]["long"] = made[0]["long"].double() + 1  # converted by the kernel, not on the way
    made[2]["long"] = made[0]["long"].bfloat16() + 1
    names = list(made[0])
    for name, model in zip(NAMES, made, strict=True):
        save_model(tmp_path / name, model, [names[:3], names[3:]] if name == "ft-1" else None)
    return made


def prepare(folder: Path, **options: Any) -> stream.Job:
    base, *models = [folder / name for name in NAMES]
    return stream.prepare(base, models, folder / "out", **{"scale": 0.9, "device": DEVICE, **options})


def run(job: stream.Job, **options: Any) -> None:
    """Does a job; one that hangs is a failure, too."""
    before = threading.active_count()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            job.run(**options)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it hangs"
    assert threading.active_count() == before
    if raised:
        raise raised[0]


@pytest.mark.parametrize("stroke", [512, 4096, 1 << 20])
@pytest.mark.parametrize("threads", [1, 5])
def test_the_same_bytes_as_on_the_cpu(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, stroke: int, threads: int
) -> None:
    monkeypatch.setattr(stream, "_LONGEST_TO_DEVICE", stroke)
    timeline = Timeline()
    run(prepare(tmp_path, threads=threads), timeline=timeline)
    check(tmp_path / "out", tensors)
    assert {stage for _, stage, _, _ in timeline.spans} == {"read", "copy in", "merge", "copy out", "write"}
    assert all(began <= ended for _, _, began, ended in timeline.spans)
    assert {worker for worker, *_ in timeline.spans} <= {f"lane {k}" for k in range(threads + 2)}


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
        raise error

    return raises


def the_end_comes_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "preadv", lambda *_: 0)


def no_memory_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LateStream, "empty", fails(torch.cuda.OutOfMemoryError("out of memory on the device")))


def pages_stay_unlocked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LateStream, "lock", fails(RuntimeError("cannot lock pages")))


def the_link_fails(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LateStream, "copy", fails(RuntimeError("the link failed")))


def a_launch_fails(patch: pytest.MonkeyPatch) -> None:
    put = LateStream.put

    def some(self: LateStream, stage: str, work: Callable[[], None]) -> None:
        if stage == "merge":
            raise RuntimeError("cannot launch")
        put(self, stage, work)

    patch.setattr(LateStream, "put", some)


def the_device_is_lost(patch: pytest.MonkeyPatch) -> None:
    def lost(self: LateStream) -> None:
        self.later = []
        raise RuntimeError("the device is lost")

    patch.setattr(LateStream, "wait", lost)


def the_disk_is_full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "pwrite", fails(OSError(errno.ENOSPC, "No space left")))


FAULTS = {
    "ends at byte": the_end_comes_early,
    "out of memory on the device": no_memory_there,
    "cannot lock pages": pages_stay_unlocked,
    "the link failed": the_link_fails,
    "cannot launch": a_launch_fails,
    "the device is lost": the_device_is_lost,
    "No space left": the_disk_is_full,
}


@pytest.mark.parametrize("message", [*FAULTS, "the kernel failed"])
def test_a_fault_at_any_stage_leaves_nothing(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setattr(stream, "_LONGEST_TO_DEVICE", 4096)
    job = prepare(tmp_path, threads=3)
    if message == "the kernel failed":
        job = dataclasses.replace(job, merge=fails(RuntimeError(message)))
    else:
        FAULTS[message](monkeypatch)
    with pytest.raises((OSError, RuntimeError), match=message):
        run(job)
    assert nothing_left(tmp_path)


def test_stopped_while_lanes_are_under_way(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_LONGEST_TO_DEVICE", 4096)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(tmp_path, threads=3), progress=fails(KeyboardInterrupt()))
    assert nothing_left(tmp_path)


def test_what_is_not_finite_is_named(tmp_path: Path, tensors: Any, gpu: None) -> None:
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
    told = dataclasses.replace(usual, way=usual.way._replace(costs=Costs(1e9, False, 2e9, 5e9)))
    assert f"and as much on {DEVICE}" in cli._plan_text(told)
    for module, name, at in (
        (lanes, "free_memory", lambda _: 64 << 20),
        (budget, "free_memory", lambda: 128 << 20),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, at)
            less = prepare(tmp_path, threads=6)
            assert less.memory <= 64 << 20 < usual.memory
    monkeypatch.setattr(lanes, "free_memory", lambda _: 1 << 20)
    with pytest.raises(nm.InputError, match=f"free memory of {DEVICE}: 1,048,576 bytes, expected at least"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("found", "device", "why"),
    [
        (Costs(2e9, False, 20e9), "cpu", "as fast as the disk, for which a GPU would wait as well"),
        (Costs(50e9, True, 20e9), DEVICE, r"14\.3 GB/s on the CPU, 40\.0 GB/s through cuda:0"),
        (Costs(5e9, True, 50e9), "cpu", r"4\.5 GB/s on the CPU, 5\.0 GB/s through cuda:0"),
        (Costs(30e9, False, 4e9), DEVICE, r"4\.0 GB/s on the CPU, 30\.0 GB/s through cuda:0"),
    ],
)
def test_the_way_of_a_job_is_chosen_by_its_costs(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, found: Costs, device: str, why: str
) -> None:  # fmt: skip
    monkeypatch.setattr(costs, "measure", lambda *_: found)
    monkeypatch.setattr(costs, "link_speed", lambda _: 40e9)
    assert prepare(tmp_path, device="auto").way == ("cpu", "no GPU here", None)
    monkeypatch.setattr(costs, "gpu_at_hand", lambda: True)
    assert "less than it takes to begin on a GPU" in prepare(tmp_path, device="auto").way.why
    monkeypatch.setattr(costs, "_WAKING", 0.0)
    way = prepare(tmp_path, device="auto").way
    assert way.device == device and re.search(why, way.why), way


def test_costs_are_measured(tmp_path: Path, tensors: Any, gpu: None) -> None:
    measured = prepare(tmp_path).costs()
    assert measured.cached and min(measured.reading, measured.merging, measured.link or 0) > 0
    assert prepare(tmp_path, device="cpu").costs().link is None
    lines = list(costs.measured([DEVICE]))
    assert len(lines) == 2 and "GB/s to cuda:0" in lines[1]


class FakeCuda:
    """torch.cuda, as far as lanes use it: it notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now = 0.0

    def stream(self, stream: Any) -> Any:
        self.calls.append(f"on {stream.name}")
        return nullcontext()

    def device(self, device: str) -> Any:
        self.calls.append(f"device {device}")
        return nullcontext()

    def Stream(self, device: str) -> Any:
        return SimpleNamespace(name=f"stream of {device}")

    def Event(self, **options: bool) -> Any:
        event = SimpleNamespace(at=-1.0)

        def record(stream: Any) -> None:
            self.now += 1
            event.at = self.now

        event.record = record
        event.synchronize = lambda: self.calls.append("waited")
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def cudart(self) -> Any:
        return SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: self.calls.append(f"lock {size}") or 0,
            cudaHostUnregister=lambda address: self.calls.append("unlock"),
        )


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_lane_asks_of_a_gpu(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    cuda, timeline = FakeCuda(), Timeline(kept)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(Straight, "empty", lambda self, size: torch.zeros(size, dtype=torch.uint8))
    done = []
    with lanes.lane_on(DEVICE, 2, 512, timeline) as lane:
        for buffer in lane.hold([300, 200]):
            buffer[:] = bytes([7]) * len(buffer)

        def work(addresses: list[int], owner: torch.Tensor) -> None:
            assert addresses[1] - addresses[0] == 512 and addresses[0] == owner.data_ptr()
            assert owner[299] == 7 and owner[512] == 7
            owner[:300] = 9
            done.append(True)

        lane.merge(work)
        lane.wait()
        assert done and set(lane.memory[:300]) == {9} and set(lane.memory[512:712]) == {7}
    on_stream = [f"on stream of {DEVICE}"]
    assert cuda.calls == [*on_stream, f"device {DEVICE}", "lock 1024", *3 * on_stream, "waited", "unlock"]
    assert [stage for _, stage, _, _ in timeline.spans] == (["copy in", "merge", "copy out"] if kept else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton", "torch"])
def test_through_a_gpu(tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend != "auto" and (reason := backends.why_not(backend, DEVICE)):
        pytest.skip(reason)
    monkeypatch.setattr(stream, "_LONGEST_TO_DEVICE", 4096)
    timeline = Timeline()
    run(prepare(tmp_path, backend=backend), timeline=timeline)
    check(tmp_path / "out", tensors)
    assert len({stage for _, stage, _, _ in timeline.spans}) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_place_on_a_gpu_without_more_memory() -> None:
    base, *models = [torch.randn(1 << 24, device=DEVICE) for _ in range(4)]
    nm.merge_(base, models, scale=0.9)  # the kernel is tried, and loaded
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nm.merge_(base, models, scale=0.9)
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
