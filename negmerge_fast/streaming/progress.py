"""Progress of a merge of checkpoints: what chunks did, counted and put on record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import NamedTuple, TypeAlias

from ..core.batch import Rows
from ..core.ranges import Range, between
from ..core.stats import Stats
from ..output.journal import Journal, ProgressRecord

# Called with bytes done and bytes in all; it may raise to stop the job.
OnProgress = Callable[[int, int], None]

# The name and the number of elements of each segment of a batch, and its counts.
ChunkCounts: TypeAlias = "tuple[list[tuple[str, int]], Rows]"


class ChunkResult(NamedTuple):
    """What a worker did with a chunk.

    read, written: bytes. counted: the counts of each batch. skipped: bytes that did not need to be read.
    """

    read: int = 0
    written: int = 0
    counted: Sequence[ChunkCounts] = ()
    skipped: int = 0


class Progress:
    """What became of the chunks of some ranges, in their order.

    whole: all that was recorded. moved: bytes that were read, written or skipped.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = ranges
        self._written = self._recorded = self._read = self._skipped = 0
        self._stats = Stats()
        self._torn = False  # an interrupt has come while a chunk was counted
        self.whole = ProgressRecord(ranges, Stats(), 0)
        self.moved = 0

    def add(self, chunk: ChunkResult) -> None:
        self._torn = True
        for named_sizes, counts in chunk.counted:
            self._stats.add(named_sizes, counts)
        self._read += chunk.read
        self._written += chunk.written
        self._skipped += chunk.skipped
        self.moved += chunk.read + chunk.written + chunk.skipped
        self._torn = False

    def record(self) -> ProgressRecord:
        """Return what was done since the last record: nothing, if it is not known which chunks are counted."""
        if self._torn:
            return ProgressRecord([], Stats(), 0)
        ranges = between(self._ranges, self._recorded, self._written)
        made = ProgressRecord(ranges, self._stats, self._read, self._skipped)
        self.whole.stats.include(made.stats.tensors)
        read, skipped = self.whole.read + made.read, self.whole.skipped + made.skipped
        self.whole = self.whole._replace(read=read, skipped=skipped)
        self._recorded, self._stats = self._written, Stats()
        self._read = self._skipped = 0
        return made


class Recorder:
    """Keeps a job's journal while its chunks are processed, as a context manager: on exit all that is done is on record.

    Args:
        ranges: What this process does.
        journal: Where it is recorded; None of what no run can go on from.
        on_moved: Called with the bytes moved after each chunk.
        keep: Whether there is a last record on exit: of a job that is not to be resumed none is needed.
    """

    def __init__(
        self,
        ranges: Sequence[Range],
        journal: Journal | None,
        on_moved: Callable[[int], None],
        keep: bool,
    ) -> None:
        self._progress, self._journal, self._on_moved, self._keep = Progress(ranges), journal, on_moved, keep

    @property
    def whole(self) -> ProgressRecord:
        return self._progress.whole

    def on_result(self, result: ChunkResult) -> None:
        self._progress.add(result)
        self._on_moved(self._progress.moved)
        if self._journal and self._journal.due():
            self._journal.keep(self._progress.record())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError) if kind else nullcontext():  # the first error is the one to report
            if self._journal:
                self._journal.flush()
            record = self._progress.record()
            if self._journal and record.ranges and self._keep:
                self._journal.keep_now(record)
