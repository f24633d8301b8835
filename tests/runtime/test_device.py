"""Calls of torch.cuda by device buffers: their order, device and stream, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from negmerge_fast.runtime import device as device_module
from negmerge_fast.runtime.buffers import Timeline
from negmerge_fast.runtime.device import SyncStream

DEVICE = "cuda:0"


class FakeCuda:
    """The part of torch.cuda that device buffers use; it records calls, devices and streams."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current: list[str] = []
        self.locked: set[tuple[int, int]] = set()
        self.refuses = 0

    @contextmanager
    def device(self, device: str) -> Iterator[None]:
        self.current.append(device)
        yield
        self.current.pop()

    def stream(self, stream: str) -> Any:
        return self.device(stream)

    def Stream(self, device: str) -> str:
        return f"stream of {device}"

    def Event(self, blocking: bool = False, enable_timing: bool = False) -> Any:
        event = SimpleNamespace(at=0)

        def record(stream: str) -> None:
            self.calls.append(f"record on {stream}" if blocking else "mark")
            event.at, event.stream = len(self.calls), stream

        def synchronize() -> None:
            assert event.at and blocking
            self.calls.append("waited")

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def cudart(self) -> Any:
        return SimpleNamespace(
            cudaHostRegister=self.lock, cudaHostUnregister=self.unlock, cudaGetErrorString=lambda error: f"error {error}"
        )  # fmt: skip

    def lock(self, address: int, size: int, flags: int) -> int:
        assert self.current == [DEVICE, f"stream of {DEVICE}"]
        self.locked.add((address, size))
        return self.refuses

    def unlock(self, address: int) -> int:
        assert self.current == [DEVICE, f"stream of {DEVICE}"]
        self.locked = {(a, size) for a, size in self.locked if a != address}
        self.calls.append("unlock")
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(SyncStream, "empty", lambda self, size: torch.zeros(size, dtype=torch.uint8))
    return cuda


@pytest.mark.parametrize("kept", [True, False])
def test_calls_of_device_buffers(cuda: FakeCuda, kept: bool) -> None:
    timeline, current = Timeline(kept), [DEVICE, f"stream of {DEVICE}"]
    with device_module.buffers_on(DEVICE, 2, 512, timeline) as buffers:
        assert cuda.locked == {(buffers.host.data_ptr(), 1024)}
        for memory in buffers.reserve([300, 200]):
            memory[:] = bytes([7]) * len(memory)

        with buffers.launch() as (addresses, owner):
            assert addresses == [owner.data_ptr(), owner.data_ptr() + 512] and cuda.current == current
            assert owner[299] == 7 and owner[512] == 7
            owner[:] = 9
            cuda.calls.append("launch")
        buffers.wait()
        # The base alone comes back.
        assert set(buffers.memory[:300]) == {9} and set(buffers.memory[512:712]) == {7}
    assert not cuda.locked and not cuda.current
    assert [call for call in cuda.calls if call != "mark"] == [
        "launch",
        f"record on {current[1]}",
        "waited",
        "unlock",
    ]
    assert [stage for _, stage, _, _ in timeline.spans] == (["copy in", "merge", "copy out"] if kept else [])
    assert cuda.calls.count("mark") == (7 if kept else 0)


def test_a_copy_on_a_stream_waits_for_nothing(cuda: FakeCuda) -> None:
    asked: list[Any] = []
    to = SimpleNamespace(copy_=lambda source, **options: asked.append((source, options)))
    device_module.CudaStream(DEVICE, Timeline(kept=False)).copy(to, "source")  # type: ignore[arg-type]
    assert asked == [("source", {"non_blocking": True})]


def test_memory_that_cannot_be_locked(cuda: FakeCuda) -> None:
    cuda.refuses = 2
    with (
        pytest.raises(
            RuntimeError, match=r"^1,024 bytes of memory cannot be locked for cuda:0: error 2 \(a smaller"
        ),
        device_module.buffers_on(DEVICE, 2, 512, Timeline()),
    ):
        pass
