"""The PyTorch backend: its fast path, its memory, and torch's modes. test_same_bits.py is for all backends."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from bits import STORAGE, peak_allocated, same_bits
from hostile import random_models
from hypothesis import given, settings
from hypothesis import strategies as st

from negmerge_fast import Rule, merge, merge_
from negmerge_fast.backends import pytorch


@pytest.mark.parametrize("dtype", STORAGE)
def test_general_path_of_a_unanimous_rule_is_the_fast_path(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = random_models(8, 4097, STORAGE[dtype], [STORAGE[dtype]])
    expected = merge(base, models, scale=0.7, backend="torch")
    monkeypatch.setattr(
        pytorch._Workspace, "_unanimous_mean", lambda self, *_: pytest.fail("not the general path")
    )
    monkeypatch.setattr(Rule, "required", lambda self, models: _Unequal(models))
    assert same_bits(merge(base, models, scale=0.7, backend="torch"), expected)


class _Unequal(int):
    """A number that equals nothing, so that the rule is not taken for a unanimous one."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_threads_started_in_flushing_mode_change_nothing(backend: str) -> None:
    """In a process of its own: torch's threads keep the mode for ever."""
    code = """
import sys, torch
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.ones(1 << 20).mul_(2)
import negmerge_fast as nm
smallest = [torch.full((1 << 20,), bits, dtype=torch.int32).view(torch.float32) for bits in (0, 1 << 20, 1 << 21)]
assert (smallest[2] * 1.0).view(torch.int32).count_nonzero() == 0, 'nothing flushes here'
merged = nm.merge(smallest[0], smallest[1:], scale=1.0, backend=sys.argv[1])
assert merged.view(torch.int32).count_nonzero() == 1 << 20
assert torch.get_num_threads() == 2
"""
    subprocess.run([sys.executable, "-c", code, backend], check=True)


def test_the_callers_defaults_change_nothing() -> None:
    base, models = random_models(3, 100, torch.float32, [torch.float32])
    expected = merge(base, models, scale=0.9)
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    try:
        merged = merge(base, models, scale=0.9)
        stats = merge_(base, models, scale=0.9)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert same_bits(merged, expected) and same_bits(base, expected) and stats.elements == 100


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    block=st.integers(1, 300),
    threads=st.integers(1, 4),
    n=st.integers(1, 5),
    dtype=st.sampled_from(sorted(STORAGE)),
)
def test_block_size_and_threads_change_no_bit(block: int, threads: int, n: int, dtype: str) -> None:
    base, models = random_models(n, 1000, STORAGE[dtype], [STORAGE[dtype]])
    expected = merge(base, models, scale=0.9, backend="torch")
    before, size = torch.get_num_threads(), pytorch.CPU_BLOCK_BYTES
    try:
        torch.set_num_threads(threads)
        pytorch.CPU_BLOCK_BYTES = block * 8
        assert same_bits(merge(base, models, scale=0.9, backend="torch"), expected)
    finally:
        torch.set_num_threads(before)
        pytorch.CPU_BLOCK_BYTES = size


@pytest.mark.parametrize(
    ("base_dtype", "model_dtype"), [("BF16", "F64"), ("F64", "BF16"), ("F32", "F16")], ids=str
)
def test_extra_memory_is_a_few_megabytes(
    base_dtype: str, model_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A majority rule allocates the most where results, or the base of differences, are rounded to another dtype."""
    base, models = random_models(3, 1_000_000, STORAGE[base_dtype], [STORAGE[model_dtype]])
    monkeypatch.setattr(pytorch, "_per_thread", threading.local())
    peak = peak_allocated(lambda: merge_(base, models, scale=0.9, min_agreement=0.6, backend="torch"))
    assert pytorch.CPU_BLOCK_BYTES < peak <= pytorch.SCRATCH_BYTES
