"""Lanes of a streamed merge: each is one worker's memory, with the way from there to where it is merged, and back.

On the CPU it is merged where it lies. Through a GPU a lane has page-locked memory, as much again on the device and a stream
there: what was read crosses the link in one stroke, is merged, and the base comes back changed, while other lanes read, merge
and write. The kernel converts storage types, so that no byte crosses the link but those of the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
from .buffers import Launch, Timeline, WorkerBuffers


class DeviceBuffers(WorkerBuffers):
    """Memory for all versions of a piece that a device of torch merges."""

    def __init__(self, versions: int, chunk_bytes: int, timeline: Timeline, device: str) -> None:
        import torch

        super().__init__(versions, chunk_bytes, timeline)
        self.host = torch.from_numpy(self.memory)
        self.stream = stream_on(device, timeline)
        self.device = self.stream.empty(len(self.memory))

    def __enter__(self) -> DeviceBuffers:
        self.stream.lock(self.host)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            # The device may still be using this memory; what else is wrong with it was said when it went wrong.
            with suppress(RuntimeError):
                self.stream.wait()
        with suppress(RuntimeError) if kind else nullcontext():
            self.stream.unlock(self.host)
        self.device.untyped_storage().resize_(0)
        super().__exit__(kind)

    def launch(self, task: Launch) -> None:
        host, device = self.host[: self.starts[-1]], self.device[: self.starts[-1]]
        base = slice(self.sizes[0])
        addresses = [self.device.data_ptr() + start for start in self.starts[:-1]]
        self.stream.put("copy in", lambda: self.stream.copy(device, host))
        self.stream.put("merge", lambda: task(addresses, self.device))
        self.stream.put("copy out", lambda: self.stream.copy(host[base], device[base]))

    def wait(self) -> None:
        self.stream.wait()


class SyncStream:
    """A device of torch on which everything is done in turn, when it is asked for."""

    def __init__(self, device: str, timeline: Timeline) -> None:
        self.device, self.timeline = device, timeline

    def empty(self, size: int) -> torch.Tensor:
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def lock(self, memory: torch.Tensor) -> None:
        """Keep pages where they are, so that the device can copy them by itself."""

    def unlock(self, memory: torch.Tensor) -> None:
        """Undo lock."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)

    def put(self, stage: str, task: Callable[[], None]) -> None:
        """Do some work after what was put before it."""
        with self.timeline.span(stage):
            task()

    def wait(self) -> None:
        """Until all that was put is done."""


class CudaStream(SyncStream):
    """A stream of a GPU, whose work is done in turn beside that of other streams: all that lanes need of torch.cuda."""

    def __init__(self, device: str, timeline: Timeline) -> None:
        import torch

        super().__init__(device, timeline)
        self._cuda: Any = torch.cuda
        self._stream = self._cuda.Stream(device)
        # A thread that waits leaves its processor to those that read.
        self._done = self._cuda.Event(blocking=True)
        self._timed: list[tuple[str, Any, Any]] = []
        if timeline.kept:
            self._zero, self._zero_at = self._mark(), time.perf_counter()

    @contextmanager
    def _current(self) -> Iterator[None]:
        # Not the stream alone: leaving it would make a context on the thread's device before, which may be another.
        with self._cuda.device(self.device), self._cuda.stream(self._stream):
            yield

    def _mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def empty(self, size: int) -> torch.Tensor:
        with self._current():
            return super().empty(size)

    def lock(self, memory: torch.Tensor) -> None:
        # torch's own allocator of such memory takes up to twice as much, and keeps it.
        with self._current():
            error = self._cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(error):
            reason = self._cuda.cudart().cudaGetErrorString(error)
            what = f"{memory.numel():,} bytes of memory cannot be locked for {self.device}: {reason}"
            raise RuntimeError(f"{what} (a smaller memory budget, or the CPU, may do)")

    def unlock(self, memory: torch.Tensor) -> None:
        with self._current():
            self._cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def put(self, stage: str, task: Callable[[], None]) -> None:
        with self._current():
            if not self.timeline.kept:
                return task()
            began = self._mark()
            task()
            self._timed.append((stage, began, self._mark()))

    def wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()
        for stage, *events in self._timed:
            began, ended = (self._zero_at + self._zero.elapsed_time(event) / 1e3 for event in events)
            self.timeline.add(stage, began, ended)
        self._timed.clear()


def buffers_on(device: str, versions: int, chunk_bytes: int, timeline: Timeline) -> WorkerBuffers:
    if device == "cpu":
        return WorkerBuffers(versions, chunk_bytes, timeline)
    return DeviceBuffers(versions, chunk_bytes, timeline, device)


def stream_on(device: str, timeline: Timeline) -> SyncStream:
    return CudaStream(device, timeline) if device.startswith("cuda") else SyncStream(device, timeline)


def available_bytes(device: str) -> int:
    """Bytes that can be had on a device, but for a tenth that is lost between the pieces; no end of them where torch can't tell."""
    import torch

    if not device.startswith("cuda"):
        return 1 << 62
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(torch.cuda.mem_get_info(device)[0]) + kept) * 9 // 10
