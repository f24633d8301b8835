"""The methods against formulas that are written another time, and what their authors say of them."""

from __future__ import annotations

import math

import pytest
import torch
from bits import same_bits
from family_cases import METHODS, expected_of, naive_of, one_thread, rule_of, sample
from hostile import random_models

from negmerge_fast.backends import pytorch
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.choices import Terms
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.methods import catalogue

__all__ = ["one_thread"]  # a fixture of all tests of this file


def differences(n: int, length: int, seed: int = 0) -> torch.Tensor:
    """Rounded, so that many are equal, opposite or zero."""
    d = torch.randn(n, length, generator=torch.Generator().manual_seed(seed))
    return (d * 4).round() / 4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_negmerge_is_the_rule_of_the_paper(n: int) -> None:
    base, models = random_models(n, 500, torch.float32, [torch.float32])
    each = sample(METHODS["negmerge"], base, models, False)
    found = expected_of(rule_of(METHODS["negmerge"], n), naive_of(METHODS["negmerge"], n, 0), each, False)
    out, *counts = plain_merge(base, models, 0.9)
    assert same_bits(found.out, out) and found.counts == [*counts, 0]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_magmax_keeps_the_largest_magnitude_and_of_equal_ones_the_later(n: int) -> None:
    d = differences(n, 300)
    expected = []
    for column in d.T.tolist():
        largest = max(map(abs, column))
        expected.append([x for x in column if abs(x) == largest][-1])
    assert torch.equal(naive_of(METHODS["magmax"], 0, 0)(d), torch.tensor(expected))


def test_ties_trims_elects_and_averages() -> None:
    d = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    kept = torch.zeros_like(d)
    for row, each in zip(kept, d, strict=True):
        chosen = each.abs().topk(200).indices
        row[chosen] = each[chosen]
    expected = []
    for column in kept.T.tolist():
        positive, negative = [x for x in column if x > 0], [x for x in column if x < 0]
        elected = positive if sum(positive) >= -sum(negative) else negative
        expected.append(sum(elected) / max(len(elected), 1))
    found = naive_of(catalogue.method("ties", density=0.2), 0, 0)(d)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_breadcrumbs_drops_both_ends() -> None:
    d = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2))
    kept = torch.zeros_like(d)
    for row, each in zip(kept, d, strict=True):
        chosen = each.abs().argsort()[
            90:990
        ]  # 0.9 of them; 0.01 are too large, and the smallest make up the rest
        row[chosen] = each[chosen]
    found = naive_of(catalogue.method("breadcrumbs", density=0.9, gamma=0.01), 0, 0)(d)
    assert torch.equal(found, kept[0] + kept[1] + kept[2])


def test_emr_takes_the_largest_of_the_elected_sign() -> None:
    d = differences(4, 500)
    expected = []
    for column in d.T.tolist():
        sign = 1 if sum(column) >= 0 else -1
        expected.append(sign * max([abs(x) for x in column if x * sign > 0], default=0.0))
    assert torch.equal(naive_of(METHODS["emr"], 0, 0)(d), torch.tensor(expected))


def test_consensus_needs_two_masks() -> None:
    d = differences(3, 500)
    expected = []
    for column in d.T.tolist():
        masks = [abs(x) >= 0.5 * abs(sum(column) - x) for x in column]
        expected.append(sum(column) if sum(masks) >= 2 else 0.0)
    found = naive_of(catalogue.method("consensus", mask_scale=0.5), 0, 0)(d)
    assert torch.equal(found, torch.tensor(expected)) and 0 < int((found == 0).sum()) < 400


def test_mean_and_conflict_and_negmerge_are_one_whole() -> None:
    """What NegMerge leaves unchanged is what the conflicting elements are; together they are the mean."""
    d = differences(3, 500)
    mean, conflict, negmerge, arithmetic = (
        naive_of(METHODS[name], 3, 0)(d) for name in ("mean", "conflict", "negmerge", "task-arithmetic")
    )
    assert torch.equal(conflict + negmerge, mean) and torch.equal(arithmetic / 3, mean)
    assert conflict.any() and negmerge.any() and not (conflict * negmerge).any()
    assert torch.equal(naive_of(METHODS["k-of-n"], 3, 0)(d), negmerge)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9, 0.99])
def test_dare_keeps_its_fraction_and_the_mean(drop: float) -> None:
    """Both within three standard errors, of each of two models; and models are dropped independently."""
    numel = 400_000
    d = torch.randn(2, numel, generator=torch.Generator().manual_seed(3)) + 1
    kept = torch.stack([dare_of_one(d, k, drop) for k in range(2)])
    fractions = (kept != 0).double().mean(1)
    assert ((fractions - (1 - drop)).abs() <= 3 * math.sqrt(drop * (1 - drop) / numel)).all()
    # Given d, the variance of the mean of the kept is that of dropping.
    errors = (drop / (1 - drop) * d.double().square().sum(1)).sqrt() / numel
    assert ((kept.double().mean(1) - d.double().mean(1)).abs() <= 3 * errors).all()
    both = float(((kept[0] != 0) & (kept[1] != 0)).double().mean())
    p = (1 - drop) ** 2
    assert abs(both - p) <= 3 * math.sqrt(p * (1 - p) / numel)


def dare_of_one(d: torch.Tensor, k: int, drop: float) -> torch.Tensor:
    """What is kept of model k: the others are zeros."""
    models = [each if number == k else torch.zeros_like(each) for number, each in enumerate(d)]
    out = torch.full_like(d[0], torch.nan)
    operands = [Operand(t.data_ptr(), "F32", t) for t in (*models, out)]
    segment = Segment(len(out), None, operands[:-1], operands[-1])
    rule = rule_of(catalogue.method("dare", drop=drop, seed=11), len(d), -1.0)
    pytorch.merge(Batch("cpu", Signature("F32", ("F32",) * len(d), True), [segment], [Terms(0, 5)]), rule)
    return out
