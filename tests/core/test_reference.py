"""The plain rule beside the procedure that the paper's authors released."""

from __future__ import annotations

import torch

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
    merged, agreed, _ = plain_merge(base, models, 1.0, min_agreement=0.5 + 1e-12)
    assert merged.item() == 0.0 and agreed == 0
