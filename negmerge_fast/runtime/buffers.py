"""Buffers of one worker, in which chunks are read, merged and written."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from threading import current_thread
from typing import Any

# Versions begin at multiples of this, so that kernels load 16 bytes at a time wherever the files allow it.
_ALIGNMENT = 256
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Timeline:
    """Spans of time in which each worker did something.

    Args:
        kept: Whether spans are recorded.

    Attributes:
        spans: (worker, stage, began, ended), in seconds since the timeline was made.
    """

    def __init__(self, kept: bool = True) -> None:
        self.spans: list[tuple[str, str, float, float]] = []
        self.kept, self.made = kept, time.perf_counter()

    def add(self, stage: str, began: float, ended: float) -> None:
        if self.kept:
            self.spans.append((current_thread().name, stage, began - self.made, ended - self.made))

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(stage, began, time.perf_counter())


class WorkerBuffers:
    """Memory for all versions of a chunk, which is merged where it was read.

    Args:
        versions: The number of models, with the base.
        chunk_bytes: The most bytes of one version, a multiple of 256.
        timeline: Records when a merge was launched.
    """

    def __init__(self, versions: int, chunk_bytes: int, timeline: Timeline) -> None:
        # A private mapping: its pages can be released as soon as the job is done.
        self._mapping = mmap.mmap(-1, versions * chunk_bytes, flags=_PRIVATE)
        self.memory = memoryview(self._mapping)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.timeline = timeline
        self.starts: list[int] = []
        self.sizes: Sequence[int] = ()

    # What copies an array to the device on which is merged; None where that is main memory.
    upload: Callable[[Any], tuple[int, Any]] | None = None

    def __enter__(self) -> WorkerBuffers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error that is kept holds its frames, and they hold this memory: release the pages now.
        with suppress(OSError):  # locked memory keeps its pages
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def reserve(self, sizes: Sequence[int]) -> list[memoryview]:
        """Lay out the versions of the next chunk.

        Args:
            sizes: Bytes of each version, the base first.

        Returns:
            A buffer to read each version to.
        """
        self.sizes = sizes
        self.starts = [0, *accumulate(-(size // -_ALIGNMENT) * _ALIGNMENT for size in sizes)]
        return [self.memory[s : s + size] for s, size in zip(self.starts, sizes, strict=False)]

    def addresses(self) -> tuple[list[int], Any]:
        """Return the addresses of the versions, and the owner of their memory."""
        return [self._address + start for start in self.starts[:-1]], self.memory

    @contextmanager
    def launch(self) -> Iterator[tuple[list[int], Any]]:
        """Let the caller launch a merge of the reserved versions, in place on the base.

        Yields:
            The addresses of the versions, and the owner of their memory.
        """
        with self.timeline.span("merge"):
            yield self.addresses()

    def wait(self) -> None:
        """Wait until the base's buffer holds the result."""
