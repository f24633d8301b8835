"""The rule: its parameters, and its properties. tests/backends/test_same_bits.py compares all backends."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bits import STORAGE, same_bits
from hostile import random_models
from hypothesis import given, settings
from hypothesis import strategies as st

from negmerge_fast import InputError, Rule, merge


def test_rounding_of_float64_to_16_bits_goes_by_way_of_float32() -> None:
    # Just above the middle of two bf16 numbers: one rounding goes up, by way of float32 it goes to the even one below.
    value = 1.0 + 2.0**-8 + 2.0**-40
    out = merge(torch.ones(1, dtype=torch.bfloat16), [torch.tensor([value], dtype=torch.float64)], scale=-1.0)
    assert out.item() == 1.0


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
