"""Rounds of a candidate beside its roofline. No speed is asserted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from negmerge_fast.benchmark import bandwidth, candidates, timing
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timing import Timing, alternate, timing_of
from negmerge_fast.benchmark.workload import Workload


def test_a_kernel_that_is_right_only_once_gets_no_speed() -> None:
    workload = Workload("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    chosen = candidates.candidate(workload, "torch")
    candidates.check(workload, chosen)
    timed = timing_of(
        workload, replace(chosen, task=lambda: (chosen.task(), workload.out[-1:].zero_())[0]), "memory"
    )
    with pytest.raises(candidates.Refused, match="torch: 1 element differs from the reference's, no speed"):
        timed.result(timed.measure(0, 2))


def test_nothing_waits_between_roofline_and_task_on_a_gpu(
    fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("negmerge_fast.benchmark.timing.machine", lambda device: {})
    done: list[str] = []
    roofline = bandwidth.Roofline("device copy", 8 * 10**9, lambda: done.append("limit"))
    row = {"suite": "memory", "bytes": 4 * 10**9}
    timed = Timing(
        lambda: done.append("run"),
        row,
        roofline,
        "cuda:1",
        before=lambda: done.append("before"),
        between=lambda: done.append("flush"),
    )
    began_ended = []
    for _ in range(3):
        timed.setup()
        began = timed.now()
        timed.run()
        began_ended.append((began, timed.now()))
    assert done == 3 * ["before", "limit", "flush", "run"] and not fake_gpu
    found = timed.result([ended - began for began, ended in began_ended])
    assert (found["p50"], found["GB/s"], found["limit GB/s"], found["of_limit"]) == (1.0, 4.0, 8.0, 0.5)


def test_a_gpu_is_kept_busy_for_as_long_as_the_host_takes(
    fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    seconds = iter(range(0, 1000, 10))  # each reading of the host's clock is ten seconds later
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(timing, "flush", flushed.append)
    monkeypatch.setattr(
        timing, "of_merge", lambda device, inputs, size: bandwidth.Roofline("device copy", size, list)
    )
    workload = Workload("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    chosen = candidates.candidate(workload, "torch, in place")
    workload.device = "cuda:1"
    made = timing_of(workload, chosen, "memory")
    assert len(flushed) == 2 and fake_gpu == ["cuda:1", "cuda:1"]
    made.setup()
    # A flush takes one second of the fake stream, a launch ten of the host; one more flush precedes the roofline.
    assert flushed == (2 + 1 + 16) * ["cuda:1"] and len(fake_gpu) == 2


def test_candidates_take_turns_in_each_round() -> None:
    done: list[str] = []
    tasks = {name: (lambda name=name: done.append(name)) for name in ("a", "b")}
    seconds = alternate(tasks, 3, before=lambda: done.append("before"))
    assert done == 3 * ["before", "a", "before", "b"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
