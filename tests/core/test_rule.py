"""The rule itself, and what the reference alone has to keep; test_same_bits.py is for all backends."""

from __future__ import annotations

import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bits import STORAGE, peak_allocated, same_bits
from hostile import random_models
from hypothesis import given, settings
from hypothesis import strategies as st

from negmerge_fast import InputError, Rule, merge, merge_
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
    """A number that equals nothing, so that no shortcut is taken for it."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_threads_that_were_started_flushing_change_nothing(backend: str) -> None:
    """torch's own threads keep the mode for ever: a process of its own."""
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


def test_rounding_of_float64_to_16_bits_goes_by_way_of_float32() -> None:
    # Just above the middle of two bf16 numbers: rounded once it goes up, by way of float32 to the even one below.
    value = 1.0 + 2.0**-8 + 2.0**-40
    out = merge(torch.ones(1, dtype=torch.bfloat16), [torch.tensor([value], dtype=torch.float64)], scale=-1.0)
    assert out.item() == 1.0


def test_the_authors_loops_in_float32() -> None:
    """The paper's released procedure, as it stands: sign counts, masked mean, then θ + (-λ) applied to the mean."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(10_000, generator=generator)
    models = [base + torch.randn(10_000, generator=generator) * 0.1 + 0.1 for _ in range(5)]
    vectors = [m - base for m in models]
    positive, negative, total = torch.zeros(10_000), torch.zeros(10_000), torch.zeros(10_000)
    for vector in vectors:
        positive += vector > 0
        negative += vector < 0
        total += vector
    mask = (positive == 5) | (negative == 5)
    mean = torch.where(mask, total / 5, torch.zeros(10_000))
    expected = base + 0.75 * -mean
    assert torch.equal(merge(base, models, scale=0.75), expected)


@pytest.mark.parametrize(
    ("n", "min_agreement", "required"),
    [
        (1, 1.0, 1),
        (8, 1.0, 8),
        (3, 2 / 3, 2),
        (10, 0.7, 7),
        (2, 0.5 + 1e-12, 2),
        (300, 0.51, 153),
        (25, 0.56, 14),
    ],
)
def test_required(n: int, min_agreement: float, required: int) -> None:
    assert Rule(1.0, min_agreement).required(n) == required


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"scale": float("nan")}, "scale: nan, expected a finite number"),
        ({"scale": float("inf")}, "scale: inf, expected a finite number"),
        ({"scale": 1, "min_agreement": 0.5}, "min_agreement: 0.5, expected more than 0.5 and at most 1"),
        ({"scale": 1, "min_agreement": 1.01}, "min_agreement: 1.01, expected more than 0.5 and at most 1"),
    ],
)
def test_a_rule_out_of_range(options: dict[str, float], found: str) -> None:
    with pytest.raises(InputError, match=found):
        Rule(**options)
    with pytest.raises(TypeError, match="scale: '1', expected a number"):
        Rule("1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale: too large for a float"):
        Rule(10**400)


@pytest.mark.parametrize(
    "scale", [0, 1, np.uint8(1), np.int8(-128), np.float32(0.7), Fraction(9, 10)], ids=repr
)
def test_any_kind_of_number_is_the_float_it_equals(scale: Any) -> None:
    base, models = random_models(3, 200, torch.float32, [torch.float32])
    base[:3] = -0.0
    models = [torch.cat([torch.ones(3), m[3:]]) for m in models]
    assert same_bits(merge(base, models, scale=scale), merge(base, models, scale=float(scale)))
    assert Rule(1, np.float32(0.6)).required(25) == Rule(1, float(np.float32(0.6))).required(25)


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


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    n=st.integers(1, 6),
    dtype=st.sampled_from(sorted(STORAGE)),
    scale=st.floats(-8, 8),
    seed=st.integers(0, 99),
)
def test_copies_of_the_base_and_a_scale_of_zero_change_nothing(
    n: int, dtype: str, scale: float, seed: int
) -> None:
    base, models = random_models(n, 200, STORAGE[dtype], [STORAGE[dtype]], seed)
    assert same_bits(merge(base, [base.clone() for _ in range(n)], scale=scale), base)
    unscaled = merge(base, models, scale=0.0)
    # Values, not bits: -0.0 + 0.0 is 0.0.
    assert torch.equal(unscaled.nan_to_num(7.0), base.nan_to_num(7.0))


def test_extra_memory_is_a_few_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that is ever allocated: by a general merge in double precision, rounded to another type."""
    base, models = random_models(3, 1_000_000, torch.bfloat16, [torch.float64])
    monkeypatch.setattr(pytorch, "_per_thread", threading.local())
    peak = peak_allocated(lambda: merge_(base, models, scale=0.9, min_agreement=0.6, backend="torch"))
    assert pytorch.CPU_BLOCK_BYTES < peak <= pytorch.SCRATCH_BYTES
