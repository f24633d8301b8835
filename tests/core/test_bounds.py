"""Bounds of magnitudes: the search for a key among counted ones, whatever was counted."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence

import pytest

from negmerge_fast.core.bounds import (
    INFINITY,
    Bounds,
    Interval,
    Search,
    bounds_of,
    ceil_f32,
    floor_f32,
    key_of,
    locate,
    number_of,
)

END = INFINITY["F32"]


class Keys:
    """Sorted keys with how often each occurs; counts what is below keys, as after a read with these intervals."""

    def __init__(self, keys: dict[int, int]) -> None:
        self.keys = sorted(keys)
        self.sums = [0]
        for key in self.keys:
            self.sums.append(self.sums[-1] + keys[key])

    @property
    def numel(self) -> int:
        return self.sums[-1]

    def lower(self, key: int) -> int:
        return self.sums[bisect.bisect_left(self.keys, key)]

    def at(self, position: int) -> int:
        return self.keys[bisect.bisect_right(self.sums, position) - 1]


def found(
    counted: Keys, bottom: int, top: int, brackets: Sequence[tuple[int, int]] = (), step: int = 1
) -> tuple[Search, int]:
    """Search as several reads do; returns the search, and how many reads it took. step: of the first read."""
    search = Search(counted.numel, bottom, top, "F32")
    search.plan(brackets)
    reads = 0
    while not search.is_found:
        reads += 1
        assert reads < 40
        intervals = search.intervals
        assert 1 <= len(intervals) <= 2 and all(0 <= w.low < w.high <= END for w in intervals)
        assert len(intervals) < 2 or intervals[0].high < intervals[1].low

        def count(
            asked: Sequence[tuple[int, list[int]]], intervals: list[Interval] = intervals, step: int = step
        ) -> list[list[int]]:
            for _, keys in asked:
                assert keys == sorted(keys)
                for key in keys:  # nothing else is known after a read
                    edges = [edge for interval in intervals for edge in interval]
                    assert key in edges or (key % step == 0 and any(w.low < key < w.high for w in intervals))
            return [[counted.lower(key) for key in keys] for _, keys in asked]

        locate([search], [step], count)
        search.plan()
        step = 1
    return search, reads


def expected(counted: Keys, bottom: int, top: int) -> tuple[float, float]:
    low = number_of(counted.at(bottom), "F32") if bottom else 0.0
    return low, number_of(counted.at(counted.numel - 1 - top), "F32") if top else math.inf


KEYS = {
    "one": {7: 1},
    "all equal": {1 << 29: 1000},
    "all zero": {0: 1000},
    "two values": {3: 500, END - 1: 500},
    "neighbours": {5: 10, 6: 10, 7: 10},
    "subnormals": dict.fromkeys(range(1000), 1),
    "infinities": {4: 10, END: 20},
    "all infinite": {END: 20},
    "huge counts": {1 << 20: 1 << 61, (1 << 20) + 1: 1 << 61, 1 << 30: 1},
    "spread": {key * 2140000: 1 + key % 3 for key in range(990)},
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_the_keys_are_those_of_sorting(keys: dict[int, int]) -> None:
    counted = Keys(keys)
    generator = random.Random(0)
    for _ in range(8):
        bottom = generator.randrange(counted.numel)
        top = generator.randrange(counted.numel - bottom)
        step = 1 << generator.choice((0, 0, 3, 20))
        brackets = []
        for _ in range((bottom > 0) + (top > 0)):
            middle = generator.choice(counted.keys)
            brackets.append((max(middle - generator.randrange(1 << generator.randrange(30)), 0), middle + 1))
        for given in ((), brackets):
            search, _ = found(counted, bottom, top, given, step)
            assert search.bounds() == expected(counted, bottom, top)


def test_a_good_bracket_takes_one_read_and_a_bad_one_two() -> None:
    counted = Keys(dict.fromkeys(range(1000, 2000), 1))
    assert found(counted, 500, 0, [(1400, 1600)])[1] == 1
    assert found(counted, 500, 0, [(1600, 1700)])[1] == 2
    assert found(counted, 500, 100, [(1400, 1600), (1800, 1950)])[1] == 1
    assert found(counted, 0, 0)[1] == 0


def test_intervals_that_meet_become_one() -> None:
    search = Search(1000, 500, 400, "F32")
    search.plan([(10, 30), (20, 40)])
    assert search.intervals == [Interval(10, 40)]
    search.plan([(10, 30), (5, 40)])
    assert search.intervals == [Interval(5, 40)]


def test_keys_are_in_the_order_of_numbers() -> None:
    for arithmetic in ("F32", "F64"):
        numbers = [0.0, 5e-324 if arithmetic == "F64" else 1e-45, 1e-40, 0.5, 1.0, 65504.0, math.inf]
        keys = [key_of(number, arithmetic) for number in numbers]
        assert keys == sorted(set(keys)) and keys[-1] == INFINITY[arithmetic]
        assert [key_of(number_of(key, arithmetic), arithmetic) for key in keys] == keys


def test_bounds_of_a_tensor_of_f32_in_a_model_of_f64() -> None:
    above_one = 1.0 + 2.0**-40
    assert (ceil_f32(above_one), floor_f32(above_one)) == (1.0 + 2.0**-23, 1.0)
    assert (ceil_f32(1e300), floor_f32(1e300)) == (math.inf, number_of(END - 1, "F32"))
    assert (ceil_f32(0.25), floor_f32(0.25)) == (0.25, 0.25)
    assert (ceil_f32(5e-324), floor_f32(5e-324)) == (number_of(1, "F32"), 0.0)
    search = Search(4, 1, 1, "F64")
    for wanted in search.wanted:
        wanted.low = key_of(above_one, "F64")
        wanted.high = wanted.low + 1
    assert bounds_of([search], "F64") == Bounds((above_one,), (above_one,))
    assert bounds_of([search], "F32") == Bounds((1.0 + 2.0**-23,), (1.0,))
