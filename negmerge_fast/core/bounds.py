"""Bounds of magnitudes: which differences Gate.MAGNITUDE lets pass.

The bounds of a tensor are |d_k| at two positions of all of its magnitudes, sorted: for each model its own, of each tensor or of all tensors
that are merged. Nothing is sorted. A sample tells two intervals in which they probably are. One read of all numbers counts what is below each
interval, and keeps what is in it. The bounds are then exact; an interval that missed its position is replaced, and the numbers are read again.

A magnitude is told by its key: its bits in an arithmetic type, as an integer. Keys are in the order of magnitudes. All that is not finite
has the key of infinity, and so counts as the largest: a merge keeps or refuses such elements.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# The key of infinity.
INFINITY = {"F32": 0xFF << 23, "F64": 0x7FF << 52}
_FORMATS = {"F32": ("<f", "<I"), "F64": ("<d", "<Q")}

# Keys below which ranks count at once: eight bits of a key are known after each of their exchanges.
_MAX_PIVOTS = 255


class Bounds(NamedTuple):
    """The bounds of a tensor: low and high of Terms, a number for each model."""

    low: tuple[float, ...]
    high: tuple[float, ...]


class Trimming(Protocol):
    """What is asked of a method: Method of methods/base.py."""

    @property
    def over(self) -> str: ...

    def ranks(self, models: int, numel: int) -> Sequence[tuple[int, int]]: ...


def key_of(magnitude: float, arithmetic: str) -> int:
    """The key of a magnitude, which the arithmetic type holds."""
    floats, integers = _FORMATS[arithmetic]
    key: int = struct.unpack(integers, struct.pack(floats, magnitude))[0]
    return key


def number_of(key: int, arithmetic: str) -> float:
    """The magnitude that a key tells."""
    floats, integers = _FORMATS[arithmetic]
    number: float = struct.unpack(floats, struct.pack(integers, key))[0]
    return number


def ceil_f32(number: float) -> float:
    """The least F32 that is not below a number of at least 0."""
    try:
        key = key_of(number, "F32")
    except OverflowError:
        return math.inf
    return number_of(key + (number_of(key, "F32") < number), "F32")


def floor_f32(number: float) -> float:
    """The largest F32 that is not above a number of at least 0."""
    above = ceil_f32(number)
    return above if above <= number else number_of(key_of(above, "F32") - 1, "F32")


class Interval(NamedTuple):
    """The keys low ≤ key < high."""

    low: int
    high: int


@dataclass
class Wanted:
    """The key at a position of all sorted ones. It is known to be low ≤ key < high."""

    position: int
    low: int
    high: int

    @property
    def is_found(self) -> bool:
        return self.high - self.low == 1

    def narrow(self, keys: Sequence[int], lower: Sequence[int]) -> None:
        """Learn how many are below some ascending keys."""
        for key, count in zip(keys, lower, strict=True):
            if count <= self.position:
                self.low = max(self.low, key)
            else:
                self.high = min(self.high, key)

    def pivots(self, step: int) -> list[int]:
        """Multiples of a step between low and high, evenly; none if there is none."""
        first, last = self.low // step + 1, (self.high - 1) // step
        stride = max(-(-(last - first + 1) // _MAX_PIVOTS), 1)
        return [multiple * step for multiple in range(first, last + 1, stride)]


class Search:
    """The search for the bounds of one model.

    Args:
        numel: How many magnitudes there are.
        bottom, top: How many are below the lower bound's position, and above the upper one's (Method.ranks).
        arithmetic: The type of their keys.

    Attributes:
        wanted: What is searched: none of a bound that nothing is beyond.
        intervals: Those of the next read: at most two, ascending, with no key in both.
    """

    def __init__(self, numel: int, bottom: int, top: int, arithmetic: str) -> None:
        self.arithmetic, self.numel = arithmetic, numel
        whole = 0, INFINITY[arithmetic] + 1
        self._low = Wanted(bottom, *whole) if bottom else None
        self._high = Wanted(numel - 1 - top, *whole) if top else None
        self.wanted = [each for each in (self._low, self._high) if each]
        self.intervals: list[Interval] = []

    @property
    def is_found(self) -> bool:
        return all(wanted.is_found for wanted in self.wanted)

    def plan(self, brackets: Sequence[tuple[int, int]] = ()) -> None:
        """Choose the intervals of the next read.

        Args:
            brackets: Where each of the wanted keys probably is, from a sample: low ≤ key < high. Without one it is wherever it can be.
        """
        end = INFINITY[self.arithmetic]
        intervals: list[Interval] = []
        for k, wanted in enumerate(self.wanted):
            low, high = brackets[k] if brackets else (0, end)
            interval = Interval(max(low, wanted.low), min(high, wanted.high, end))
            if wanted.is_found or interval.high <= interval.low:
                interval = Interval(wanted.low, min(wanted.high, end))
            if wanted.is_found or interval.high <= interval.low:
                continue
            if intervals and interval.low <= intervals[-1].high:
                last = intervals.pop()
                interval = Interval(min(interval.low, last.low), max(interval.high, last.high))
            intervals.append(interval)
        self.intervals = intervals

    def interval_of(self, wanted: Wanted) -> int | None:
        """The number of the interval that has all keys that are still possible."""
        fits = (k for k, w in enumerate(self.intervals) if w.low <= wanted.low and wanted.high <= w.high)
        return None if wanted.is_found else next(fits, None)

    def narrow_to_intervals(self, wanted: Wanted, lower: Sequence[int]) -> None:
        """Learn how many magnitudes are below the intervals' edges. below: in the order of the intervals, two numbers for each."""
        edges = [key for interval in self.intervals for key in interval]
        wanted.narrow(edges, lower)
        if wanted.low >= INFINITY[self.arithmetic]:
            wanted.low = INFINITY[self.arithmetic]

    def bounds(self) -> tuple[float, float]:
        """The bounds, once they are found."""
        low, high = (number_of(w.low, self.arithmetic) if w else None for w in (self._low, self._high))
        return 0.0 if low is None else low, math.inf if high is None else high


# Counts what is below some keys of a model: for each of several models' lists of keys, ascending ones.
CountLower = Callable[[Sequence[tuple[int, list[int]]]], Sequence[Sequence[int]]]


def locate(searches: Sequence[Search], step: Sequence[int], count: CountLower) -> None:
    """Narrow searches by what was counted in their intervals, as far as it tells. Ranks do it together: count then exchanges.

    Args:
        searches: One for each model.
        step: Of each model, in multiples of what keys in its intervals were counted.
        count: Given pairs of a model's number and keys, its intervals' edges or multiples of its step in them; returns how many are below.
    """
    pairs = [
        (k, wanted) for k, search in enumerate(searches) for wanted in search.wanted if not wanted.is_found
    ]
    edges = [(k, [key for interval in searches[k].intervals for key in interval]) for k, _ in pairs]
    for (k, wanted), lower in zip(pairs, count(edges), strict=True):
        searches[k].narrow_to_intervals(wanted, lower)
    while True:
        asked = []
        for k, wanted in pairs:
            pivots = wanted.pivots(step[k]) if searches[k].interval_of(wanted) is not None else []
            if pivots:
                asked.append((k, wanted, pivots))
        if not asked:
            return
        found = count([(k, pivots) for k, _, pivots in asked])
        for (_, wanted, pivots), lower in zip(asked, found, strict=True):
            wanted.narrow(pivots, lower)


def bounds_of(searches: Sequence[Search], arithmetic: str) -> Bounds:
    """The bounds of a tensor of an arithmetic type. Those of all tensors may be between two of its numbers."""
    low, high = zip(*(search.bounds() for search in searches), strict=True)
    if arithmetic == "F32":
        return Bounds(tuple(map(ceil_f32, low)), tuple(map(floor_f32, high)))
    return Bounds(tuple(low), tuple(high))
