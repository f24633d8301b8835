"""Some hundred random models, most of them malformed: they are refused, or merged to the bit. `make fuzz` tries more."""

from __future__ import annotations

from fuzzing import TRIED, fuzzed, fuzzed_torch_files


def test_a_few_hundred() -> None:
    fuzzed()
    assert TRIED["merged"] > 20 and TRIED["refused"] > 100


def test_a_hundred_pytorch_files() -> None:
    before = TRIED.copy()
    fuzzed_torch_files()
    assert TRIED["merged"] - before["merged"] > 20 and TRIED["refused"] - before["refused"] > 20
