"""Buffers of a worker that merges on a device, and the streams that copy and merge there.

On the CPU, data is merged where it was read. For a GPU each worker has page-locked host memory, device memory of the same
size and a CUDA stream. A chunk is copied to the device at once, merged, and the base is copied back, while other workers
read, merge and write. Kernels convert storage types, so only the bytes of the files cross PCIe.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from .buffers import Timeline, WorkerBuffers

if TYPE_CHECKING:
    import torch


class DeviceBuffers(WorkerBuffers):
    """Host and device memory for all versions of a chunk that is merged on a device of torch."""

    def __init__(self, versions: int, chunk_bytes: int, timeline: Timeline, device: str) -> None:
        import torch

        super().__init__(versions, chunk_bytes, timeline)
        self.host = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.stream = stream_on(device, timeline)
        self.device = self.stream.empty(len(self.memory))

    def __enter__(self) -> DeviceBuffers:
        self.stream.lock(self.host)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            # The device may still use this memory. An error of the device has been raised already.
            with suppress(RuntimeError):
                self.stream.wait()
        with suppress(RuntimeError) if kind else nullcontext():
            self.stream.unlock(self.host)
        self.device.untyped_storage().resize_(0)
        super().__exit__(kind)

    def upload(self, array: Any) -> tuple[int, Any]:
        """Copy a NumPy array to the device, and wait for it: other workers will use it, too."""
        import torch

        host = torch.from_numpy(array).view(-1).view(torch.uint8)
        device = self.stream.empty(len(host))
        with self.stream.stage("copy in"):
            self.stream.copy(device, host)
        self.stream.wait()
        return device.data_ptr(), device

    @contextmanager
    def launch(self) -> Iterator[tuple[list[int], Any]]:
        host, device = self.host[: self.starts[-1]], self.device[: self.starts[-1]]
        base = slice(self.sizes[0])
        addresses = [self.device.data_ptr() + start for start in self.starts[:-1]]
        with self.stream.stage("copy in"):
            self.stream.copy(device, host)
        with self.stream.stage("merge"):
            yield addresses, self.device
        with self.stream.stage("copy out"):
            self.stream.copy(host[base], device[base])

    def wait(self) -> None:
        self.stream.wait()


class SyncStream:
    """The interface of a stream, and the stream of a device that has none: everything runs at once."""

    def __init__(self, device: str, timeline: Timeline) -> None:
        self.device, self.timeline = device, timeline

    def empty(self, size: int) -> torch.Tensor:
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def lock(self, memory: torch.Tensor) -> None:
        """Page-lock host memory, so that the device can copy it asynchronously."""

    def unlock(self, memory: torch.Tensor) -> None:
        """Release page-locked memory."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to.copy_(source)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Put what is launched in a block after all that was launched before; the timeline records it as a stage."""
        with self.timeline.span(name):
            yield

    def wait(self) -> None:
        """Wait until all that was launched is done."""


class CudaStream(SyncStream):
    """A CUDA stream: what is launched on it runs in order, and at the same time as on other streams."""

    def __init__(self, device: str, timeline: Timeline) -> None:
        import torch

        super().__init__(device, timeline)
        self._cuda: Any = torch.cuda
        self._stream = self._cuda.Stream(device)
        # A waiting thread sleeps, so that reading threads get its core.
        self._done = self._cuda.Event(blocking=True)
        self._timed: list[tuple[str, Any, Any]] = []
        if timeline.kept:
            self._zero, self._zero_at = self._mark(), time.perf_counter()

    @contextmanager
    def _current(self) -> Iterator[None]:
        # Leaving a stream sets the thread's earlier device again. If that is another one, CUDA makes a context there.
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
        # torch's allocator of page-locked memory takes up to twice as much, and keeps it.
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

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self._current():
            began = self._mark() if self.timeline.kept else None
            yield
            if began is not None:
                self._timed.append((name, began, self._mark()))

    def wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()
        for stage, *events in self._timed:
            began, ended = (self._zero_at + self._zero.elapsed_time(event) / 1e3 for event in events)
            self.timeline.add(stage, began, ended)
        self._timed.clear()


def buffers_on(device: str, versions: int, chunk_bytes: int, timeline: Timeline) -> WorkerBuffers:
    """Return buffers for merging on a device; the other arguments are those of WorkerBuffers."""
    if device == "cpu":
        return WorkerBuffers(versions, chunk_bytes, timeline)
    return DeviceBuffers(versions, chunk_bytes, timeline, device)


def stream_on(device: str, timeline: Timeline) -> SyncStream:
    """Return a stream of a device."""
    return CudaStream(device, timeline) if device.startswith("cuda") else SyncStream(device, timeline)


def available_bytes(device: str) -> int:
    """Return the bytes that can be allocated on a device, less a tenth for fragmentation; 2**62 if it is no GPU."""
    import torch

    if not device.startswith("cuda"):
        return 1 << 62
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(torch.cuda.mem_get_info(device)[0]) + cached) * 9 // 10
