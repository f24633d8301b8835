"""The family with PyTorch: blocks, memory, deltas and low-rank models block by block, and what is told of non-finite elements."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from backend_cases import BackendCase
from bits import STORAGE, peak_allocated, same_bits
from family_cases import METHODS, SPELLED, Placed, expected_of, naive_of, one_thread, rule_of, sample, samples
from hostile import random_models

from negmerge_fast.backends import low_rank, pytorch, pytorch_delta, pytorch_family, registry
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.choices import Terms
from negmerge_fast.core.low_rank import ExpandBatch, ExpandSegment, Expansion, LowRank

__all__ = ["one_thread"]  # a fixture of all tests of this file

TORCH = BackendCase("torch")
BLOCKWISE = ["negmerge", "ties", "breadcrumbs", "dare", "dare-ties", "consensus"]


@pytest.mark.parametrize("block", [1, 3, 64, 1000])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_block_size_changes_no_bit(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = samples(METHODS[name], 3, (1500 if block > 3 else 50,), ("F32", "BF16"), False, "F32")
    rule = rule_of(METHODS[name], 3)
    whole, cut = (Placed(TORCH, made, False) for _ in range(2))
    counts = whole.merged(pytorch.merge, rule)
    monkeypatch.setattr(pytorch_family, "SCRATCH_BYTES", block * 4 * (3 + pytorch_family._TEMPORARIES))
    assert pytorch_family.FamilyWorkspace(cut.batch, rule, rule.choices).block == min(
        block, 1000, len(made[0].base) * 2 // 3 + 1
    )  # type: ignore[arg-type]
    assert cut.merged(pytorch.merge, rule) == counts
    assert torch.equal(cut.written, whole.written)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_what_a_delta_has_is_found_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = samples(METHODS[name], 3, (5000,), ("BF16", "F32"), False, "BF16")
    rule = rule_of(METHODS[name], 3)
    consensus = partial(pytorch_delta.consensus, pytorch.merge)
    whole, cut = (Placed(TORCH, made, False, "delta") for _ in range(2))
    counts = whole.merged(consensus, rule)
    monkeypatch.setattr(pytorch_delta, "CPU_BLOCK_BYTES", 1)
    assert cut.merged(consensus, rule) == counts and counts[0][0] > 0
    assert torch.equal(cut.written, whole.written)


@pytest.mark.parametrize(
    ("name", "n", "base_dtype", "model_dtype"),
    [
        ("dare", 1, "F32", "F16"), ("dare-ties", 3, "F32", "F16"), ("dare", 2, "BF16", "F64"), ("ties", 2, "F32", "F32"),
        ("ties", 3, "BF16", "F64"), ("negmerge", 30, "F32", "F16"), ("k-of-n", 1, "F16", "F32"), ("emr", 100, "F32", "BF16"),
    ],
)  # fmt: skip
def test_extra_memory_is_a_few_megabytes(name: str, n: int, base_dtype: str, model_dtype: str) -> None:
    """Of more elements than a block has."""
    base = torch.ones(pytorch.SCRATCH_BYTES // 4 // (n + 10), dtype=STORAGE[base_dtype])
    model, weight = base.to(STORAGE[model_dtype]), base.to(STORAGE["F64"])
    b, x, w = operands_of(base, model, weight)
    terms = Terms(0, 1, w, [0.0] * n, [1.0] * n)
    signature = Signature(base_dtype, (model_dtype,) * n, False)
    batch = Batch("cpu", signature, [Segment(len(base), b, [x] * n, b)], [terms])
    peak = peak_allocated(lambda: pytorch.merge(batch, rule_of(METHODS[name], n)))
    assert pytorch.SCRATCH_BYTES / 3 < peak <= pytorch.SCRATCH_BYTES


def operands_of(*tensors: torch.Tensor) -> list[Operand]:
    return [Operand(t.data_ptr(), SPELLED[t.dtype], t) for t in tensors]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"base": float("inf")}, ("base", "inf")),
        ({"models": float("nan")}, (1, "nan")),
        ({"weight": float("nan")}, ("weights", "nan")),
        ({"weight": -float("inf")}, ("weights", "-inf")),
        ({"models": 3e38, "others": 3e38}, ("result", "inf")),
        ({"base": 1.5e5}, ("base", "150000.0 (infinite in a model's F16)")),
    ],
    ids=str,
)
def test_where_the_first_non_finite_element_is(changed: dict[str, float], expected: Any) -> None:
    """In the second segment of a batch; nothing is written."""
    base, weight = torch.ones(50), torch.ones(50)
    models = [torch.full((50,), 2.0), torch.full((50,), 3.0), torch.full((50,), 1.0, dtype=torch.float16)]
    dtypes = ("F32", "F32", "F16")
    for name, value in changed.items():
        {"base": base, "weight": weight, "models": models[1], "others": models[0]}[name][30:] = value
    b, w, *x = operands_of(base, weight, *models)
    segments = [Segment(20, None, x, None), Segment(50, b, x, b)]
    terms = [Terms(0, 1, w), Terms(0, 2, w)]
    batch = Batch("cpu", Signature("F32", dtypes, False), segments, terms)
    found = registry.first_nonfinite(batch, rule_of(METHODS["task-arithmetic"], 3))
    assert found == (expected and (1, 30, *expected))
    assert bool((base[:30] == 1).all())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("task_vectors", [False, True])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_low_rank_models_are_merged_as_dense_ones(
    name: str, task_vectors: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of the scratch memory, each with its terms; also to what a delta has."""
    if reason := registry.why_not(backend, "cpu"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(4)
    left, right = torch.randn(60, 4, generator=generator), torch.randn(4, 31, generator=generator)
    factors = LowRank(left.data_ptr(), right.data_ptr(), 1, 60, 31, 4, 0.5, (left, right))
    base, [model] = random_models(1, 60 * 31, torch.float32, [torch.float32])
    dense = torch.empty_like(base)
    b, x, d = operands_of(base, model, dense)
    expansion = Expansion(factors, 0)
    low_rank.expand(
        ExpandBatch("cpu", "F32", *((None, [ExpandSegment(1860, expansion, None, d)]) if task_vectors else ("F32", [ExpandSegment(1860, expansion, b, d)])))
    )  # fmt: skip
    rule, each = rule_of(METHODS[name], 2), sample(METHODS[name], base, [dense, model], task_vectors)
    expected = expected_of(rule, naive_of(METHODS[name], 2, each.key), each, task_vectors)
    monkeypatch.setattr(low_rank, "CPU_SCRATCH_BYTES", 4 * 640)
    for choose, wanted in (
        (registry.choose_low_rank, (expected.out, expected.counts)),
        (registry.choose_low_rank_consensus, (expected.dense, expected.of_delta)),
    ):
        found = torch.full_like(base, torch.nan)
        [out] = operands_of(found)
        segments = [
            Segment(860, b, [expansion, x], out),
            Segment(1000, *_moved(860, b, [expansion, x], out)),
        ]
        terms = Terms(0, each.key, None, each.low, each.high)
        signature = Signature("F32", ("F32", "F32"), task_vectors)
        batch = Batch("cpu", signature, segments, [terms, terms.at(860)])
        counts = choose(backend, "cpu", rule)[1](batch, rule).tolist()
        assert [sum(column) for column in zip(*counts, strict=True)] == wanted[1]
        assert same_bits(found, wanted[0])


def _moved(start: int, base: Operand, models: list[Any], out: Operand) -> tuple[Operand, list[Any], Operand]:
    expansion, x = models
    b, m, o = (each._replace(address=each.address + 4 * start) for each in (base, x, out))
    return b, [expansion._replace(begin=start), m], o


def test_a_batch_without_terms_is_refused() -> None:
    [x] = operands_of(torch.ones(3))
    batch = Batch("cpu", Signature("F32", ("F32",), True), [Segment(3, None, [x], None)])
    with pytest.raises(ValueError, match="terms: None, expected those of each segment"):
        pytorch.merge(batch, rule_of(METHODS["mean"], 1))
