"""Ranges of byte positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """From one position in a plan to another."""

    begin: int
    end: int


def left(whole: Run, done: Iterable[Run]) -> list[Run]:
    """What of a run is in none of others."""
    found, at = [], whole.begin
    for run in [*sorted(done), Run(whole.end, whole.end)]:
        if run.begin > at:
            found.append(Run(at, run.begin))
        at = max(at, run.end)
    return found


def between(runs: Sequence[Run], begin: int, end: int) -> list[Run]:
    """Of runs in a row, what lies between two numbers of their bytes."""
    found = []
    at = 0
    for run in runs:
        size = run.end - run.begin
        first, last = max(begin - at, 0), min(end - at, size)
        if first < last:
            found.append(Run(run.begin + first, run.begin + last))
        at += size
    return found
