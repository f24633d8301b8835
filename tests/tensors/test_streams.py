"""Statistics that are read while another stream than the merge's is the current one."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import negmerge_fast as nm
from negmerge_fast.backends import pytorch, registry
from negmerge_fast.core.batch import Batch
from negmerge_fast.core.rule import Rule
from negmerge_fast.tensors import counts

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
        found = pytorch.merge(batch, rule).as_subclass(OnDevice)
        found.log = log
        log.append("merge")
        return found

    class Event:
        def record(self) -> None:
            log.append("record")

        def query(self) -> bool:
            return "done" in log

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(registry, "choose", lambda *_: ("cuda", merge))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in log)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: log.append("new stream"))
    monkeypatch.setattr(counts, "_untold", [])
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


def test_no_event_is_recorded_in_a_capture(log: list[str]) -> None:
    base, *finetuned = models()
    nm.merge(base, finetuned, scale=1.0)
    assert log == ["merge", "merge", "record"]
    log[:] = ["capture"]
    stats = nm.merge_(base, finetuned, scale=1.0)
    assert log == ["capture", "merge", "merge"]
    assert stats.agreed == 2000 and log[3:] == ["read", "read"]


def nan_models() -> list[dict[str, torch.Tensor]]:
    base, *finetuned = models()
    finetuned[1]["b"][3:5] = torch.nan
    return [base, *finetuned]


CALLS = {
    "merge": (lambda base, *finetuned: nm.merge(base, finetuned, scale=1.0), "left as in the base"),
    "merge_": (lambda base, *finetuned: nm.merge_(base, finetuned, scale=1.0), "left as in the base"),
    "negate_": (lambda base, _, tau: nm.negate_(base, tau, scale=1.0), "left as in the base"),
    "merge_task_vectors": (lambda _, *taus: nm.merge_task_vectors(taus), "set to 0"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_later_call_tells_of_what_was_not_finite_on_a_gpu(log: list[str], call: str) -> None:
    """No call waits: the first that finds the counts written reads them, on a stream of its own."""
    merge, kept = CALLS[call]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(*nan_models())
        nm.merge(*plain(), scale=1.0)
    assert set(log) == {"merge", "record"}
    log.append("done")
    with pytest.warns(nm.MergeWarning) as told:
        nm.merge(*plain(), scale=1.0)
    (only,) = told
    text = (
        f"the result of an earlier call: 2 elements of 'b' {kept}: not finite in a version or after the merge"
    )
    assert (str(only.message), only.filename) == (text, __file__)
    assert log[log.index("done") + 1 :][:2] == ["new stream", "wait"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.merge(*plain(), scale=1.0)


def plain() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.zeros(3), [torch.ones(3)]


def test_the_end_of_the_process_tells_of_what_was_not_finite_on_a_gpu(log: list[str]) -> None:
    nm.merge(nan_models()[0], nan_models()[1:], scale=1.0)
    with pytest.warns(nm.MergeWarning, match="an earlier call: 2 elements of 'b' left as in the base"):
        counts._tell_at_exit()
    assert "wait" in log and counts._untold == []


def test_no_one_tells_in_a_capture(log: list[str]) -> None:
    nm.merge(nan_models()[0], nan_models()[1:], scale=1.0)
    log[:] = ["capture", "done"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.merge(nan_models()[0], nan_models()[1:], scale=1.0)
    assert log == ["capture", "done", "merge", "merge"] and len(counts._untold) == 1


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
