"""Statistics that are read while another stream than the merge's is the current one."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import negmerge_fast as nm
from negmerge_fast.backends import pytorch, registry
from negmerge_fast.core.batch import Batch
from negmerge_fast.core.rule import Rule

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


class OnDevice(torch.Tensor):
    """Counts in main memory that say that a GPU has them, and tell when they are read."""

    log: list[str]
    is_cuda = True

    def tolist(self) -> Any:
        self.log.append("read")
        return self.as_subclass(torch.Tensor).tolist()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a fake GPU was asked for, in order."""
    log: list[str] = []

    def merge(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        counts = pytorch.merge(batch, rule).as_subclass(OnDevice)
        counts.log = log
        log.append("merge")
        return counts

    class Event:
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(registry, "choose", lambda *_: ("cuda", merge))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in log)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return log


def models(device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    """Of two types, so that there are two batches."""
    dtypes = {"a": torch.float32, "b": torch.bfloat16}
    return [
        {name: torch.full((1000,), x, dtype=t, device=device) for name, t in dtypes.items()}
        for x in (0.0, 1.0, 2.0)
    ]


def test_an_event_after_the_merge_is_waited_for_by_whoever_reads(log: list[str]) -> None:
    base, *finetuned = models()
    stats = nm.merge_(base, finetuned, scale=1.0)
    assert log == ["merge", "merge", "record"]
    assert stats.agreed == 2000
    assert log[3:] == ["wait", "read", "wait", "read"]
    assert stats.elements == 2000 and len(log) == 7


def test_an_event_is_neither_recorded_in_a_capture_nor_where_nothing_is_read(log: list[str]) -> None:
    base, *finetuned = models()
    nm.merge(base, finetuned, scale=1.0)
    assert log == ["merge", "merge"]
    log[:] = ["capture"]
    stats = nm.merge_(base, finetuned, scale=1.0)
    assert log == ["capture", "merge", "merge"]
    assert stats.agreed == 2000 and log[3:] == ["read", "read"]


def test_statistics_are_copied_without_what_belongs_to_a_device(log: list[str]) -> None:
    base, *finetuned = models()
    stats = nm.merge_(base, finetuned, scale=1.0)
    copied = copy.deepcopy(stats)
    assert log[-1] == "read" and not stats._pending
    assert copied.tensors == stats.tensors and copied.agreed == 2000


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=needs_gpu)])
def test_statistics_are_read_on_another_stream(device: str, backend: str) -> None:
    base, *finetuned = models(device)
    nm.merge_(
        {name: t.clone() for name, t in base.items()}, finetuned, scale=1.0, backend=backend
    )  # self-tests
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # half a second
        stats = nm.merge_(base, finetuned, scale=1.0, backend=backend)
        assert not stream.query()
    assert stats.agreed == 2000


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=needs_gpu)])
def test_statistics_of_a_captured_merge(device: str, backend: str) -> None:
    base, *finetuned = models(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # self-tests, loads modules and allocates memory before the capture
        nm.merge_({name: t.clone() for name, t in base.items()}, finetuned, scale=1.0, backend=backend)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = nm.merge_(base, finetuned, scale=1.0, backend=backend)
    graph.replay()
    assert stats.agreed == 2000 and all((t == -1.5).all() for t in base.values())
