"""The journal of a merge: which ranges of its output are on the disk, and what was counted in them.

The first line is the job's fingerprint, each further line a progress record: a CRC-32 and JSON. A last line that a crash cut
short is ignored. Each rank of a job has a journal of its own.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Event, Lock
from typing import Any, NamedTuple

from ..checkpoints.reader import naming
from ..checkpoints.strict_json import are_sizes, parse_json
from ..core.errors import InputError, short_repr
from ..core.ranges import Range
from ..core.stats import Stats, TensorStats
from .directory import Entry
from .filesystem import sync

# Seconds between records. A crash costs at most that, and what was being written.
INTERVAL_S = 5.0

Fingerprint = Mapping[str, Any]


class ProgressRecord(NamedTuple):
    """Progress since the last record.

    Attributes:
        ranges: The ranges of the output that are done.
        stats: The counts of their elements.
        read: Bytes of the inputs that were read.
        skipped: Bytes of the inputs that did not need to be read.
    """

    ranges: Sequence[Range]
    stats: Stats
    read: int
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        counts = {
            name: [t.elements, t.agreed, t.nonfinite, t.vetoed_by_zero, *([t.masked] if t.masked else [])]
            for name, t in self.stats.tensors.items()
        }
        return {"runs": list(self.ranges), "read": self.read, "skipped": self.skipped, "tensors": counts}

    @classmethod
    def of_json(cls, line: Mapping[str, Any]) -> ProgressRecord:
        stats = Stats()
        stats.include({name: TensorStats(*_sizes(counts, 4, 5)) for name, counts in line["tensors"].items()})
        ranges = [Range(*_sizes(range_, 2)) for range_ in line["runs"]]
        return cls(ranges, stats, *_sizes([line["read"], line["skipped"]], 2))


def _sizes(value: Any, *counts: int) -> list[int]:
    if not are_sizes(value) or len(value) not in counts:
        raise ValueError(f"{short_repr(value)}, expected {counts[0]} sizes")
    return list(value)


class Journal:
    """Writes progress records on a thread of its own, each after the output that it speaks of is synced.

    Args:
        entry: The journal's file.
        fingerprint: What determines the bytes of the output.
        sync: Syncs all that the output's writer has written.
    """

    def __init__(self, entry: Entry, fingerprint: Fingerprint, sync: Callable[[], None]) -> None:
        self.entry, self.fingerprint, self.sync = entry, fingerprint, sync
        self._last = time.monotonic()
        self._size: int | None = None  # of its whole lines; not known before the first record
        self._written = Event()  # no record is being written
        self._written.set()
        self._error: BaseException | None = None

    def due(self) -> bool:
        """Whether the last record is written and it is time for another."""
        if self._written.is_set():
            self.flush()
        return self._written.is_set() and time.monotonic() - self._last >= INTERVAL_S

    def keep(self, record: ProgressRecord) -> None:
        """Write a record in the background."""
        self._last = time.monotonic()
        token = Lock()
        try:
            self._written.clear()
            # Not a Thread: its start waits, and an interrupt there does not tell whether it runs.
            start_new_thread(self._keep, (record, token))
        except BaseException:
            if token.acquire(blocking=False):  # it does not run, or finds that it is not to
                self._written.set()
            raise

    def flush(self) -> None:
        """Wait for the record that is being written, and raise its error; an interrupt is raised after that."""
        raised: BaseException | None = None
        while not self._written.is_set():
            try:
                self._written.wait()
            except BaseException as interrupt:
                raised = interrupt
        if (raised := raised or self._error) is not None:
            raise raised

    def _keep(self, record: ProgressRecord, token: Lock) -> None:
        if not token.acquire(blocking=False):
            return
        try:
            self.sync()
            self.append(record)
        except BaseException as error:
            self._error = error
        finally:
            self._written.set()

    def keep_now(self, record: ProgressRecord) -> None:
        """Write a record before returning."""
        self.flush()
        self.sync()
        self.append(record)

    def append(self, record: ProgressRecord) -> None:
        if self._size is None:
            self._size = _lines(self.entry)[1]
        lines = _line(record.to_json()) if self._size else _line(self.fingerprint) + _line(record.to_json())
        descriptor = self.entry.open(os.O_WRONLY | os.O_CREAT)
        with naming(self.entry.path), open(descriptor, "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(lines)
            file.flush()
            sync(descriptor)
        if not self._size:
            self.entry.parent.sync()
        self._size += len(lines)


def read(entry: Entry, fingerprint: Fingerprint) -> list[ProgressRecord]:
    """Read the records of a journal; none if there is no journal.

    Raises:
        InputError: If it is another job's, with what differs, or if negmerge did not write it.
    """
    lines, _ = _lines(entry)
    path = entry.path
    if not lines:
        return []
    if differs := difference(lines[0], fingerprint):
        raise InputError(f"{path}: the unfinished output {differs} (without --resume it is made anew)")
    try:
        return [ProgressRecord.of_json(line) for line in lines[1:]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: a record that negmerge did not write ({short_repr(error)})") from None


def difference(recorded: Fingerprint, current: Fingerprint) -> str | None:
    """How a recorded job differs from the current one, as a predicate of "the unfinished output"; None if it does not."""
    for name in {**current, **recorded}:
        was, now = recorded.get(name), current.get(name)
        if was == now:
            continue
        if name == "files" and isinstance(was, dict) and isinstance(now, dict):
            return _file_difference(was, now)
        return f"was made with {name} {short_repr(was)}, expected {short_repr(now)}"
    return None


def _file_difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for path in now:
        if path not in was:
            return f"was not made of {path}"
        if was[path] != now[path]:
            return f"was made of another {path}: (size, time in ns, header, sample) {short_repr(was[path])}, expected {now[path]}"
    return f"was made of {short_repr(next(path for path in was if path not in now))}, too"


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(entry: Entry) -> tuple[list[dict[str, Any]], int]:
    """The complete lines at the beginning of a journal, and their size in bytes."""
    try:
        raw = entry.read_bytes()
    except FileNotFoundError:
        return [], 0
    found: list[dict[str, Any]] = []
    size = 0
    for line in raw.splitlines(keepends=True):
        crc, _, text = line.partition(b" ")
        if not text.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text[:-1]):
            break
        found.append(parse_json(bytearray(text), entry.path, "a line", surrogates=True, dense=True))
        size += len(line)
    return found, size


def summed(records: Iterable[ProgressRecord]) -> ProgressRecord:
    """The sum of records, as one record."""
    ranges: list[Range] = []
    stats, read_, skipped = Stats(), 0, 0
    for record in records:
        ranges += record.ranges
        stats.include(record.stats.tensors)
        read_, skipped = read_ + record.read, skipped + record.skipped
    return ProgressRecord(ranges, stats, read_, skipped)
