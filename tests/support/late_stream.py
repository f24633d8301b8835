"""A fake CUDA stream: what is launched on it runs when it is waited for, on memory that is poisoned until then."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from negmerge_fast.backends import low_rank, pytorch, registry
from negmerge_fast.core.batch import Batch
from negmerge_fast.core.rule import Rule
from negmerge_fast.runtime import device as device_module
from negmerge_fast.runtime.buffers import Timeline
from negmerge_fast.runtime.device import SyncStream
from negmerge_fast.streaming import probes

DEVICE = "cuda:0"


class LateStream(SyncStream):
    """A fake stream of a GPU: what is launched on it runs when it is waited for."""

    locked: ClassVar[set[int]] = set()
    current: ClassVar[threading.local] = threading.local()

    def __init__(self, device: str, timeline: Timeline) -> None:
        super().__init__(device, timeline)
        self.later: list[tuple[str, Callable[[], None]]] = []
        self.name = ""

    def empty(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0xA5, dtype=torch.uint8)

    def lock(self, memory: torch.Tensor) -> None:
        self.locked.add(memory.data_ptr())

    def unlock(self, memory: torch.Tensor) -> None:
        assert not self.later, "memory is given back that the device still uses"
        self.locked.remove(memory.data_ptr())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        assert len(self.locked) > 0
        self.current.stream, self.name = self, name
        yield
        self.current.stream = None

    def launch(self, task: Callable[[], None]) -> None:
        self.later.append((self.name, task))

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self.launch(lambda: SyncStream.copy(self, to, source))

    def wait(self) -> None:
        launched, self.later = self.later, []
        for stage, task in launched:
            with self.timeline.span(stage):
                task()


class LateCounts:
    """Counts that are known once a stream was waited for."""

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None

    def tolist(self) -> Any:
        assert self.counts is not None
        return self.counts.tolist()


def merge_on_device(batch: Batch, rule: Rule, threads: int | None = None) -> LateCounts:
    """The kernel of the fake device, launched on the current stream."""
    return _launch(pytorch.merge, batch, rule)


def merge_low_rank_on_device(batch: Batch, rule: Rule, threads: int | None = None) -> LateCounts:
    """The same for models that are known by factors, which have to be on the device by now."""
    return _launch(partial(low_rank.merge, pytorch.merge, low_rank.expand), batch, rule)


def _launch(merge: Callable[..., Any], batch: Batch, rule: Rule) -> LateCounts:
    assert batch.device == DEVICE
    late = LateCounts()

    def run() -> None:
        late.counts = merge(dataclasses.replace(batch, device="cpu"), rule, 1)

    LateStream.current.stream.launch(run)
    return late


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real, real_low_rank = registry.choose, registry.choose_low_rank
    monkeypatch.setattr(LateStream, "locked", set())
    monkeypatch.setattr(device_module, "CudaStream", LateStream)
    monkeypatch.setattr(device_module, "available_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(
        registry, "choose", lambda b, device, *a: ("cuda", merge_on_device) if device == DEVICE else real(b, device, *a)
    )  # fmt: skip
    monkeypatch.setattr(
        registry, "choose_low_rank",
        lambda b, device, *a: ("cuda", merge_low_rank_on_device) if device == DEVICE else real_low_rank(b, device, *a),
    )  # fmt: skip
    forget = probes.h2d_bandwidth.cache_clear
    forget()
    yield
    forget()
    assert not LateStream.locked
