"""A CUDA stream that is faked: work is done when it is waited for, on memory that is poisoned until then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch

from negmerge_fast.backends import pytorch, registry
from negmerge_fast.core.batch import Batch
from negmerge_fast.core.rule import Rule
from negmerge_fast.runtime import device as device_module
from negmerge_fast.runtime.buffers import Timeline
from negmerge_fast.runtime.device import SyncStream
from negmerge_fast.streaming import probes

DEVICE = "cuda:0"


class LateStream(SyncStream):
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

    def put(self, stage: str, task: Callable[[], None]) -> None:
        assert len(self.locked) > 0
        self.later.append((stage, task))

    def wait(self) -> None:
        put_off, self.later = self.later, []
        for stage, task in put_off:
            super().put(stage, task)


def merge_there(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """The kernel of the device that is none."""
    assert batch.device == DEVICE
    return pytorch.merge(dataclasses.replace(batch, device="cpu"), rule, 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = registry.choose
    monkeypatch.setattr(LateStream, "locked", set())
    monkeypatch.setattr(device_module, "CudaStream", LateStream)
    monkeypatch.setattr(device_module, "available_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(
        registry, "choose", lambda b, device, *a: ("cuda", merge_there) if device == DEVICE else real(b, device, *a)
    )  # fmt: skip
    forget = probes.h2d_bandwidth.cache_clear
    forget()
    yield
    forget()
    assert not LateStream.locked
