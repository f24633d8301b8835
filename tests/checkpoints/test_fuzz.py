"""Models with a few things wrong, or right after all: refused as they should be, or merged to the bit. fuzz.py does this for as long as one likes."""

from __future__ import annotations

from fuzzing import TRIED, fuzzed


def test_a_few_hundred() -> None:
    fuzzed()
    assert TRIED["merged"] > 20 and TRIED["refused"] > 100
