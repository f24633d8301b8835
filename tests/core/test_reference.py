"""The plain rule beside the procedure that the paper's authors released."""

from __future__ import annotations

import pytest
import torch
from bits import STORAGE, same_bits

from negmerge_fast import MergeWarning, merge
from negmerge_fast.core.reference import plain_merge


def released(base: torch.Tensor, models: list[torch.Tensor], scale: float) -> torch.Tensor:
    """What the released code computes: the sum of the task vectors and of their signs, a mask where all signs are equal, the
    mean, its negation, and θ + λ · of that."""
    merged, signs = torch.zeros_like(base), torch.zeros_like(base)
    for model in models:
        vector = model - base
        merged += vector
        signs += torch.sign(vector)
    vector = torch.where(torch.abs(signs) == len(models), merged / len(models), torch.zeros_like(merged))
    return base + scale * -vector


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.75, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_the_bits_of_the_released_loops_in_float32(n: int, scale: float) -> None:
    """With zeros of both signs, subnormals, and elements that some or all models leave alone."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(20_000, generator=generator)
    base[:8000] *= torch.logspace(-44, 36, 8000)
    base[8000:9000], base[9000:10_000] = 0.0, -0.0
    steps = torch.randn(n, 20_000, generator=generator).abs() * torch.randn(20_000, generator=generator)
    steps[:, ::2] *= base[::2].abs()  # of the size of the element
    steps[:, ::5] *= torch.randn(n, 4000, generator=generator).sign()
    steps[0, ::7] = 0.0
    steps[:, ::11] = 0.0
    models = [base + step for step in steps]
    expected = released(base, models, scale)
    merged, agreed, nonfinite, _ = plain_merge(base, models, scale)
    assert nonfinite == 0 and 5000 < agreed < 19_000
    assert same_bits(merged, expected)
    assert same_bits(merge(base, models, scale=scale), expected)


def test_where_the_released_loops_give_other_bits() -> None:
    """Where something overflows, and with λ of -0.0 or below: there zeros lose their sign."""
    base, model = torch.tensor([-3e38]), torch.tensor([3e38])
    with pytest.warns(MergeWarning):
        assert same_bits(merge(base, [model], scale=1.0), base)
    assert released(base, [model], 1.0).tolist() == [-torch.inf]
    base = torch.tensor([-0.0])
    for scale in (-0.0, -1.0):
        assert same_bits(merge(base, [base], scale=scale), base)
        assert same_bits(released(base, [base], scale), torch.tensor([0.0]))


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
