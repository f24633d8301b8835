"""The plain rule beside the procedure that the paper's authors released."""

from __future__ import annotations

import pytest
import torch
from bits import STORAGE, same_bits

from negmerge_fast import merge
from negmerge_fast.core.reference import plain_merge


def test_reference_is_the_authors_procedure_in_float32() -> None:
    """The procedure that the paper released: sign counts, a masked mean, then θ + (-λ) · mean."""
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
    assert torch.equal(plain_merge(base, models, 0.75)[0], expected)
    assert torch.equal(merge(base, models, scale=0.75), expected)


def test_half_of_the_models_never_agree() -> None:
    """A min_agreement within rounding of 0.5 still requires more than half, as in Rule.required."""
    base, models = torch.zeros(1), [torch.ones(1), -torch.ones(1)]
    merged, agreed, *_ = plain_merge(base, models, 1.0, min_agreement=0.5 + 1e-12)
    assert merged.item() == 0.0 and agreed == 0


# Base and model types where the model's cannot hold every value of the base's.
NARROWER = [
    ("F64", "F32"),
    ("F64", "F16"),
    ("F64", "BF16"),
    ("F32", "F16"),
    ("F32", "BF16"),
    ("BF16", "F16"),
    ("F16", "BF16"),
]


@pytest.mark.parametrize(("base_dtype", "model_dtype"), NARROWER)
def test_a_model_that_is_the_base_in_another_type_has_no_differences(
    base_dtype: str, model_dtype: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(5000, generator=generator, dtype=torch.float64).to(STORAGE[base_dtype])
    base[:2500] *= 2.0**-14  # some are subnormal in F16
    narrow = STORAGE[model_dtype]
    saved = base.to(narrow) if base_dtype != "F64" else base.float().to(narrow)
    assert not torch.equal(saved.double(), base.double())
    merged, agreed, nonfinite, _ = plain_merge(base, [saved] * 3, 0.9)
    assert same_bits(merged, base) and (agreed, nonfinite) == (0, 0)
    # As task vectors they are what they are, and the last line takes the base as it is.
    trained = saved + 0.5
    merged, agreed, *_ = plain_merge(base, [trained], 1.0)
    b = base.double() if base_dtype == "F64" else base.float()
    expected = b - (trained.to(b.dtype) - saved.to(b.dtype))
    assert torch.equal(merged, expected.to(base.dtype)) and agreed == 5000
    assert plain_merge(base, [saved], 0.9, task_vectors=True)[1] == int((saved != 0).sum())


def test_a_base_that_overflows_the_models_type_is_not_finite() -> None:
    base = torch.tensor([1e6, -1e6, 65519.0, 65520.0])
    merged, agreed, nonfinite, _ = plain_merge(base, [torch.full((4,), 65504.0, dtype=torch.float16)], 1.0)
    assert torch.equal(merged, base) and (agreed, nonfinite) == (0, 3)
    # Another type of the same merge holds it.
    merged, agreed, nonfinite, _ = plain_merge(base, [torch.full((4,), 2e6, dtype=torch.bfloat16)] * 2, 1.0)
    assert (agreed, nonfinite) == (4, 0)


@pytest.mark.parametrize(
    ("differences", "min_agreement", "counted"),
    [
        ([1, 2, 3], 1.0, (1, 0, 0)),
        ([1, 0, 3], 1.0, (0, 0, 1)),
        ([-1, 0, -0.0], 1.0, (0, 0, 1)),
        ([0, -0.0, 0], 1.0, (0, 0, 1)),
        ([1, 0, -1], 1.0, (0, 0, 0)),
        ([1, 2, -1], 1.0, (0, 0, 0)),
        ([float("inf"), 0, 0], 1.0, (0, 1, 0)),
        ([float("nan"), 0, 0], 1.0, (0, 1, 0)),
        ([1, 0, -1], 0.6, (0, 0, 1)),
        ([1, 1, -1], 0.6, (1, 0, 0)),
        ([1, 0, 0, -1, -1], 0.8, (0, 0, 1)),
        ([1, 0, 0, -1, -1], 1.0, (0, 0, 0)),
        ([1, 0, 0, -1, -1, -1], 0.9, (0, 0, 0)),
    ],
)  # fmt: skip
def test_what_a_zero_vetoes(
    differences: list[float], min_agreement: float, counted: tuple[int, int, int]
) -> None:
    models = [torch.tensor([d]) for d in differences]
    for base in (torch.zeros(1), torch.ones(1)):
        found = plain_merge(base, [base + d for d in models], 0.5, min_agreement)
        assert found[1:] == counted
        assert plain_merge(base, models, 0.5, min_agreement, task_vectors=True)[1:] == counted
