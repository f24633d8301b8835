"""Memory of one worker, in which chunks are merged."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from threading import current_thread
from typing import Any

import numpy as np

# Given the addresses of all versions and the owner of that memory, puts their merge under way.
Launch = Callable[[list[int], Any], None]

# Versions begin at multiples of it, so that kernels load 16 bytes at a time wherever the files allow it.
_ALIGNED = 256
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Timeline:
    """When each worker did what: (worker, stage, began, ended), in seconds since this was made. kept: or nothing of it."""

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
    """Memory for all versions of a piece, merged where it is read to.

    versions: with the base. chunk: the most bytes of each, a multiple of 256.
    """

    def __init__(self, versions: int, chunk_bytes: int, timeline: Timeline) -> None:
        # A mapping of its own, whose pages are given back as soon as the job is done.
        self._mapping = mmap.mmap(-1, versions * chunk_bytes, flags=_PRIVATE)
        self.memory = np.frombuffer(self._mapping, np.uint8)
        self.timeline = timeline
        self.starts: list[int] = []
        self.sizes: Sequence[int] = ()

    def __enter__(self) -> WorkerBuffers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whoever keeps an error keeps what its frames hold, but not these pages.
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def reserve(self, sizes: Sequence[int]) -> list[memoryview]:
        """Where to read the versions of the next piece to, the base first; each is so many bytes long."""
        self.sizes = sizes
        self.starts = [0, *accumulate(-(size // -_ALIGNED) * _ALIGNED for size in sizes)]
        return [self.memory.data[s : s + size] for s, size in zip(self.starts, sizes, strict=False)]

    def addresses(self) -> tuple[list[int], Any]:
        """The addresses of the versions, and the owner of their memory."""
        return [self.memory.ctypes.data + start for start in self.starts[:-1]], self.memory

    def launch(self, task: Launch) -> None:
        """Put a merge of what is held under way; it writes where the base is."""
        with self.timeline.span("merge"):
            task(*self.addresses())

    def wait(self) -> None:
        """Until what was put under way is done, and the base's memory holds the result."""
