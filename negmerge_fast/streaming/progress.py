"""What a merge of checkpoints has done so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..core.ranges import Range, between
from ..core.stats import Stats
from ..output.journal import ProgressRecord


class Progress:
    """What became of the pieces of some runs, in their order, and how much of that was put on record."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._runs = ranges
        self._written = self._recorded = self._read = self._skipped = 0
        self._stats = Stats()
        self.whole = ProgressRecord(ranges, Stats(), 0)
        self.moved = 0

    def add(self, chunk: ChunkResult) -> None:
        for ranges, counts in chunk.counted:
            self._stats.add(ranges, counts)
        self._read += chunk.read
        self._written += chunk.written
        self._skipped += chunk.skipped
        self.moved += chunk.read + chunk.written + chunk.skipped

    def record(self) -> ProgressRecord:
        """What is done since the last one."""
        ranges = between(self._runs, self._recorded, self._written)
        made = ProgressRecord(ranges, self._stats, self._read, self._skipped)
        self.whole.stats.include(made.stats.tensors)
        read, skipped = self.whole.read + made.read, self.whole.skipped + made.skipped
        self.whole = self.whole._replace(read=read, skipped=skipped)
        self._recorded, self._stats = self._written, Stats()
        self._read = self._skipped = 0
        return made


# The name and the number of elements of each segment of a batch, and int64[segments, 2]: agreed and non-finite.
ChunkCounts: TypeAlias = "tuple[list[tuple[str, int]], np.ndarray[Any, Any]]"


class ChunkResult(NamedTuple):
    """What a worker says of a piece: the bytes that it read and wrote, and what was counted.

    skipped: those of the bytes that it did not need to read.
    """

    read: int = 0
    written: int = 0
    counted: Sequence[ChunkCounts] = ()
    skipped: int = 0
