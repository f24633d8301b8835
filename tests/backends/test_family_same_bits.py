"""Every backend and every method against its naive version: the same bits and the same counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from backend_cases import CASES, ON_HOST, BackendCase
from family_cases import (
    METHODS,
    WEIGHTS,
    Placed,
    PlainChoices,
    Reduce,
    Sample,
    expected_of,
    naive_of,
    one_thread,
    part_of,
    rule_of,
    sample,
    samples,
)
from hostile import random_models

from negmerge_fast.backends import pytorch_delta, registry
from negmerge_fast.core.batch import Batch, Merge, Signature
from negmerge_fast.core.choices import Choices, Election, Gate, Reduction, Terms
from negmerge_fast.core.generator import number
from negmerge_fast.core.rule import Rule
from negmerge_fast.methods.base import Method

__all__ = ["one_thread"]  # a fixture of all tests of this file

# Types of the base, then of models in turn: alike, with a base that is rounded to them, and wider ones.
TYPES = [
    ("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F64", "F64"), ("F32", "BF16", "F16"), ("BF16", "F32", "F64"),
    ("F64", "BF16"), ("F16", "F32", "BF16"),
]  # fmt: skip


# Quick are PyTorch and the best instruction set. The CUDA kernel takes long to compile for the host.
QUICK_CASES = [
    pytest.param(*each.values, id=each.id, marks=pytest.mark.slow)
    if each.values[0] in (ON_HOST, BackendCase("cpu", instruction_set="baseline"))
    else each
    for each in CASES
]


@pytest.fixture(params=QUICK_CASES)
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    found: BackendCase = request.param
    if (reason := found.why_not()) is not None:
        pytest.skip(reason)
    with found.chosen():
        yield found


def consensus_of(case: BackendCase, merge: Merge) -> Merge:
    return partial(pytorch_delta.consensus, merge) if case == ON_HOST else registry.consensus(case.backend)


def check(
    case: BackendCase,
    rule: Rule,
    reduces: Sequence[Reduce],
    made: Sequence[Sample],
    task_vectors: bool = False,
    offset: int = 0,
) -> list[list[int]]:
    """Merge samples to new memory, in place and to nowhere, and to what a delta has; returns the counts."""
    expected = [expected_of(rule, f, each, task_vectors) for f, each in zip(reduces, made, strict=True)]
    counts = [each.counts for each in expected]
    with case.chosen() as merge:
        for out in ("new", "base", "none"):
            placed = Placed(case, made, task_vectors, out, offset)
            memory = placed.with_results([each.out for each in expected if out != "none"])
            assert placed.merged(merge, rule) == counts, out
            assert torch.equal(placed.written.cpu(), memory), out
        if case.backend in ("cpu", "torch"):  # the others' come out of their merges
            placed = Placed(case, made, task_vectors, "delta", offset)
            memory = placed.with_results([each.dense for each in expected])
            assert placed.merged(consensus_of(case, merge), rule) == [each.of_delta for each in expected]
            assert torch.equal(placed.written.cpu(), memory)
    return counts


def check_method(
    case: BackendCase,
    name: str,
    n: int,
    types: Sequence[str],
    lengths: Sequence[int],
    task_vectors: bool = False,
    min_agreement: float = 1.0,
    weights: str | None = None,
    offset: int = 0,
) -> list[list[int]]:
    rule = rule_of(METHODS[name], n, 0.9, min_agreement)
    made = samples(METHODS[name], n, lengths, types, task_vectors, weights)
    reduces = [naive_of(METHODS[name], rule.required(n), each.key) for each in made]
    return check(case, rule, reduces, made, task_vectors, offset)


# Number of models, types and whether they are task vectors: of each method two of these, in turn.
QUICK = [(1, 0, False), (8, 2, False), (3, 3, False), (2, 1, True), (8, 4, False), (3, 6, False), (30, 0, True), (2, 5, True), (3, 7, True)]  # fmt: skip
EACH = [
    pytest.param(name, *QUICK[(2 * position + k) % len(QUICK)], marks=[pytest.mark.slow] if k else [])
    for position, name in enumerate(METHODS)
    for k in range(2)
]


@pytest.mark.parametrize(("name", "n", "types", "task_vectors"), EACH)
def test_same_bits(case: BackendCase, name: str, n: int, types: int, task_vectors: bool) -> None:
    """Several tensors in one batch, each with bounds and a key of its own, and cut in two."""
    # The naive versions of random gates draw one number after the other.
    lengths = (0, 1, 127, 130 if n > 2 or "dare" in name else 1025)
    check_method(case, name, n, TYPES[types], lengths, task_vectors, offset=n % 7)


@pytest.mark.parametrize("name", ["magmax", "ties"])
def test_long_tensors(case: BackendCase, name: str) -> None:
    check_method(case, name, 2, ("F32", "BF16"), (4097,))


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_no_bit(case: BackendCase, threads: int) -> None:
    """With enough elements for all threads, and with more threads than processors."""
    if case.backend != "cpu":
        pytest.skip("it has no threads of its own")
    torch.set_num_threads(threads)
    check_method(case, "emr", 2, ("BF16", "F32"), (300_001,), weights="U8")


@pytest.mark.slow
@pytest.mark.parametrize("types", range(len(TYPES)), ids=["+".join(each) for each in TYPES])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_type_in_long_tensors(case: BackendCase, name: str, types: int) -> None:
    """Each method has every number of models, and both inputs."""
    k = list(METHODS).index(name) + types
    lengths = (0, 1, 127, 257 if "dare" in name else 4097)
    check_method(case, name, (1, 2, 3, 8, 30)[k % 5], TYPES[types], lengths, k % 3 == 0, offset=3)


@pytest.mark.parametrize(("n", "min_agreement"), [(1, 0.51), (3, 0.51), (8, 0.75)])
def test_k_of_n(case: BackendCase, n: int, min_agreement: float) -> None:
    check_method(case, "k-of-n", n, ("F32", "F32"), (517,), min_agreement=min_agreement)


# Of the base and three models, as differences of zeros and as weights. Sums overflow, cancel and stay subnormal.
ODD = (0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, -3.0, 3.4e38, -3.4e38, float("inf"), float("nan"))


@pytest.mark.parametrize("task_vectors", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", METHODS)
def test_every_combination_of_hostile_values(case: BackendCase, name: str, task_vectors: bool) -> None:
    odd = torch.tensor(ODD[::2] if "dare" in name else ODD)
    models = list(torch.cartesian_prod(odd, odd, odd).T.contiguous())
    rule, method = rule_of(METHODS[name], 3), METHODS[name]
    bases = [torch.full_like(models[0], b) for b in (-0.0, 1.0, float("inf"))]
    made = [sample(method, b, models, task_vectors, name=str(k)) for k, b in enumerate(bases)]
    reduces = [naive_of(method, rule.required(3), each.key) for each in made]
    check(case, rule, reduces, made, task_vectors)


@pytest.mark.parametrize("name", METHODS)
def test_no_base_means_zeros(case: BackendCase, name: str) -> None:
    method, rule = METHODS[name], rule_of(METHODS[name], 3, -1.0)
    _, models = random_models(3, 300, torch.float32, [torch.float32, torch.bfloat16])
    each = sample(method, torch.zeros(300), models, task_vectors=True)
    expected = expected_of(rule, naive_of(method, rule.required(3), each.key), each, True)
    for out in ("new", "none"):
        placed = Placed(case, [each], True, out, with_base=False)
        memory = placed.with_results([expected.out] if out == "new" else [])
        with case.chosen() as merge:
            assert placed.merged(merge, rule) == [expected.counts]
        assert torch.equal(placed.written.cpu(), memory)


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, 1e-45, 1e30, 1e300])
def test_any_scale(case: BackendCase, scale: float) -> None:
    rule = rule_of(METHODS["emr"], 3, scale)
    made = samples(METHODS["emr"], 3, (300,), ("BF16", "F32"), False, None)
    check(case, rule, [naive_of(METHODS["emr"], 3, 0)], made)


MODEL_WEIGHTS = (0.5, -2.0, 1e-3, 3e38)
# Any two of the three are together in a quick test.
ALL_CHOICES = [
    pytest.param(
        each,
        id="-".join(c.name.lower() for c in each),
        marks=[pytest.mark.slow] if sum(list(type(c)).index(c) for c in each) % 3 else [],
    )
    for each in itertools.product(Gate, Election, Reduction)
]


@pytest.mark.parametrize("weights", [None, pytest.param("F32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("chosen", ALL_CHOICES)
def test_every_combination_of_choices(
    case: BackendCase, chosen: tuple[Gate, Election, Reduction], weights: str | None
) -> None:
    """With weights and numbers of each model, also those that no method of the catalogue has."""
    method = Method(
        "any", *chosen, density=(0.3, 0.9, 1.0, 0.5), gamma=0.1, drop=(0.0, 0.5, 0.9, 0.2), seed=3, mask_scale=0.7,
        model_weights=MODEL_WEIGHTS,
    )  # fmt: skip
    rule = rule_of(method, 4, 0.9, 0.75)
    made = samples(method, 4, (1, 150), ("F32", "BF16", "F32"), False, weights)
    assert rule.choices
    plain = [PlainChoices(rule.choices, 3, each.key, each.low, each.high).reduce for each in made]
    check(case, rule, plain, made)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("name", ["negmerge", "mean", "ties"])
def test_weights_of_every_type(case: BackendCase, name: str, dtype: str) -> None:
    """Zeros of both signs, numbers whose product with r underflows or overflows, and such as are not finite."""
    types = [("F32", "F32"), ("BF16", "F16"), ("F64", "F32")][(len(name) + len(dtype)) % 3]
    counts = check_method(case, name, 3, types, (1, 300), weights=dtype, offset=2)
    assert counts[1][3] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_weights_of_every_method(case: BackendCase, name: str) -> None:
    check_method(case, name, 3, ("F32", "BF16"), (127,), weights="F32")


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("min_agreement", [1.0, 0.6])
def test_a_weight_of_one_changes_no_bit_of_negmerge(
    case: BackendCase, min_agreement: float, dtype: str
) -> None:
    """Not of what its own kernel writes, and no count."""
    rule = rule_of(METHODS["negmerge"], 3, 0.9, min_agreement)
    base, models = random_models(3, 1001, torch.float32, [torch.bfloat16, torch.float32])
    ones = sample(METHODS["negmerge"], base, models, False, torch.ones(1001, dtype=WEIGHTS[dtype]))
    weighted, plain = Placed(case, [ones], False), Placed(case, [ones], False)
    plain.batch = replace(plain.batch, terms=None)
    with case.chosen() as merge:
        [[*counts, masked]] = weighted.merged(merge, rule)
        assert [counts] == plain.merged(merge, replace(rule, choices=None)) and not masked and counts[0]
    assert torch.equal(weighted.written.cpu(), plain.written.cpu())


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_a_weight_of_zero_keeps_the_base_and_is_counted(case: BackendCase, dtype: str) -> None:
    rule = rule_of(METHODS["mean"], 2)
    models = [torch.tensor([1.0, 2.0, -0.0, torch.inf, 5.0])] * 2
    base = torch.tensor([-0.0, 3.0, -0.0, 1.0, torch.nan])
    each = sample(METHODS["mean"], base, models, True, torch.zeros(5, dtype=WEIGHTS[dtype]))
    placed = Placed(case, [each], True)
    with case.chosen() as merge:
        assert placed.merged(merge, rule) == [[0, 2, 0, 2]]
    assert torch.equal(placed.written.cpu(), placed.with_results([base]))


def test_any_byte_of_a_mask_is_a_number(case: BackendCase) -> None:
    masks = torch.arange(256, dtype=torch.uint8)
    base, models = random_models(2, 256, torch.float32, [torch.float32])
    found = []
    for weight in (masks, masks.view(torch.bool), masks.to(torch.float32)):
        placed = Placed(case, [sample(METHODS["mean"], base, models, False, weight)], False)
        with case.chosen() as merge:
            found.append((placed.merged(merge, rule_of(METHODS["mean"], 2)), placed.written.cpu()))
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], found[2][1])


def test_a_product_that_underflows_changes_nothing(case: BackendCase) -> None:
    """Not even the sign of a zero: a delta has no such element in its mask, nor is it counted."""
    base, models = torch.tensor([-0.0, -0.0, 1.0]), [torch.tensor([1e-45, -1e-45, 1e-45])]
    each = sample(METHODS["negmerge"], base, models, True, torch.full((3,), 0.25))
    placed = Placed(case, [each], True)
    with case.chosen() as merge:
        assert placed.merged(merge, rule_of(METHODS["negmerge"], 1, -1.0)) == [[0, 0, 0, 0]]
    assert torch.equal(placed.written.cpu(), placed.with_results([base]))


@pytest.mark.parametrize(
    ("seed", "begin"), [(0, 0), (1, (1 << 34) - 3), ((1 << 32) + 1, 5), ((1 << 64) - 1, (1 << 40) + 2)]
)
def test_what_is_drawn_depends_on_seed_name_model_and_element_only(
    case: BackendCase, begin: int, seed: int
) -> None:
    """Also of an element beyond what 32 bits count, and in segments of every length and beginning."""
    keep, key, lengths = (1 << 31, 1 << 30, 0, 1 << 32), 0xFFFFFFF0, (1, 2, 3, 4, 5, 6, 7, 11, 64, 1, 33)
    choices = Choices(Gate.RANDOM, Election.ALL, Reduction.SUM, (1.0,) * 4, (1.0,) * 4, keep, seed)
    # Each model is another digit, so that a sum tells which were kept.
    models = [torch.full((sum(lengths),), 10.0**k) for k in range(4)]
    expected = [
        sum(10.0**k for k in range(4) if number(seed, key, k, begin + i) < keep[k])
        for i in range(sum(lengths))
    ]
    whole = Sample(key, torch.zeros(sum(lengths)), models, None, (), ())
    placed = Placed(case, [whole], True)
    segments, terms, at = [], [], 0
    for length in lengths:
        segments.append(part_of(placed.whole[0], at, at + length))
        terms.append(Terms(begin + at, key))
        at += length
    placed.batch = Batch(placed.batch.device, placed.signature, segments, terms)
    with case.chosen() as merge:
        assert merge(placed.batch, Rule(-1.0, 1.0, choices)).tolist() == [[n, 0, 0, 0] for n in lengths]
    assert torch.equal(placed.written.cpu(), placed.with_results([torch.tensor(expected)]))


def test_an_empty_batch(case: BackendCase) -> None:
    device = "cuda:0" if case.device == "cuda:0" else "cpu"
    for name in ("mean", "ties", "dare"):
        rule = rule_of(METHODS[name], 1)
        with case.chosen() as merge:
            assert merge(Batch(device, Signature("F32", ("F32",), False), [], []), rule).tolist() == []


@pytest.mark.parametrize("name", ["magmax", "ties"])
def test_flushing_subnormals_in_the_caller_changes_nothing(case: BackendCase, name: str) -> None:
    if case == ON_HOST or case.backend == "triton":
        pytest.skip("a GPU knows nothing of the caller's mode; this stand-in does")
    rule = rule_of(METHODS[name], 2)
    tiny = torch.finfo(torch.float32).tiny
    models = [torch.full((5000,), tiny / 8), torch.full((5000,), tiny / 4)]
    each = sample(METHODS[name], torch.zeros(5000), models, False, torch.full((5000,), 0.5))
    expected = expected_of(rule, naive_of(METHODS[name], 2, each.key), each, False)
    assert expected.counts[0] == 5000
    placed = Placed(case, [each], False)
    memory = placed.with_results([expected.out])
    torch.set_flush_denormal(True)
    try:
        with case.chosen() as merge:
            assert placed.merged(merge, rule) == [expected.counts]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(placed.written.cpu(), memory)
