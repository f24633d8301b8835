"""A hundred random deltas, most of them malformed: they are refused, or applied to the bit."""

from __future__ import annotations

from fuzzing import TRIED, fuzzed_deltas


def test_a_hundred() -> None:
    before = TRIED["refused"]
    fuzzed_deltas()
    assert TRIED["applied"] > 10 and TRIED["refused"] - before > 50
