"""Half-open ranges of byte positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Range(NamedTuple):
    """The positions of a plan from begin to before end."""

    begin: int
    end: int


def subtract(whole: Range, done: Iterable[Range]) -> list[Range]:
    """The ranges of a whole that none of the done ranges covers."""
    found, at = [], whole.begin
    for range_ in [*sorted(done), Range(whole.end, whole.end)]:
        if range_.begin > at:
            found.append(Range(at, range_.begin))
        at = max(at, range_.end)
    return found


def between(ranges: Sequence[Range], begin: int, end: int) -> list[Range]:
    """Slice consecutive ranges as if their bytes were one array: what lies between two offsets in it."""
    found = []
    at = 0
    for range_ in ranges:
        size = range_.end - range_.begin
        first, last = max(begin - at, 0), min(end - at, size)
        if first < last:
            found.append(Range(range_.begin + first, range_.begin + last))
        at += size
    return found
