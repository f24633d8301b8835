"""Some hundred random models, most of them malformed: they are refused, or merged to the bit. `make fuzz` tries more."""

from __future__ import annotations

from fuzzing import TRIED, fuzzed


def test_a_few_hundred() -> None:
    fuzzed()
    assert TRIED["merged"] > 20 and TRIED["refused"] > 100
