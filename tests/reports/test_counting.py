"""Counts of prefixes: compiled for each instruction set, and with PyTorch, beside a count element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from negmerge_fast.backends import native
from negmerge_fast.backends.pytorch import TORCH_DTYPES
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.reports import counting
from negmerge_fast.reports.counting import COUNTED_OF_PREFIXES, EDGES, OF_PREFIX

HOSTILE = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, 6e-8, 65504.0, -1.0]


def instruction_sets() -> list[str]:
    if native.why_not("cpu", "cpu") is not None:
        return []
    from negmerge_fast import _native

    return list(_native.instruction_sets)


COUNTERS = ["torch", *instruction_sets()]


def count(counter: str, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> counting.Array:
    if counter == "torch":
        return counting.count_with_torch(batch)
    monkeypatch.setenv("NEGMERGE_CPU", counter)
    return counting.count_natively(batch)


def operand(tensor: torch.Tensor, dtype: str) -> Operand:
    return Operand(tensor.data_ptr(), dtype, tensor)


def sign(d: float) -> int:
    return int(d > 0) - int(d < 0) if math.isfinite(d) else 0


def plain_counts(b: float, d: Sequence[Any], arithmetic: Any) -> np.ndarray[Any, Any]:
    """The counts of one element, by the words of reports/counting.py. d: of the arithmetic type, a type of NumPy."""
    n = len(d)
    found = np.zeros((len(COUNTED_OF_PREFIXES), n), np.int64)
    bins = np.zeros(len(EDGES) + 1, np.int64)
    total, before, mean = arithmetic(0), math.isfinite(b), arithmetic(0)
    signs = [sign(each) for each in d]
    for k in range(n):
        total = total + d[k]
        mean = total / arithmetic(k + 1)
        so_far = signs[: k + 1]
        one_sign = all(s > 0 for s in so_far) or all(s < 0 for s in so_far)
        bad = not math.isfinite(b) or not all(map(math.isfinite, d[: k + 1]))
        nonfinite = bad or (one_sign and not math.isfinite(mean))
        agrees = one_sign and not nonfinite
        vetoed = not nonfinite and not one_sign and not {1, -1} <= set(so_far)
        by_sign = before and not one_sign and signs[k] != 0
        found[: len(OF_PREFIX), k] = agrees, nonfinite, vetoed, before and d[k] == 0, by_sign
        before = agrees
    for k in range(n if math.isfinite(b) else 0):
        others = signs[:k] + signs[k + 1 :]
        is_sole = any(all(s == side for s in others) and signs[k] != side for side in (1, -1))
        is_sole = is_sole and not (len(set(signs)) == 1 and signs[0])
        against = any(2 * signs.count(side) > n and signs[k] != side for side in (1, -1))
        kinds = [d[k] == 0, signs[k] != 0, not math.isfinite(d[k])]
        found[len(OF_PREFIX) :, k] = [*(is_sole and kind for kind in kinds), against]
    if before:
        bins[sum(edge <= abs(float(mean)) for edge in EDGES)] += 1
    return np.concatenate([found.flatten(), bins])


def case(
    result: str, models: Sequence[str], numel: int, *, task_vectors: bool, hostile: bool, seed: int
) -> tuple[Batch, list[torch.Tensor]]:
    """A batch of one segment, and its base and models."""
    generator = torch.Generator().manual_seed(seed)

    def made(values: torch.Tensor, dtype: str) -> torch.Tensor:
        if hostile:
            at = torch.rand(numel, generator=generator) < 0.1
            odd = torch.tensor(HOSTILE, dtype=torch.float64)
            values = torch.where(at, odd[torch.randint(len(HOSTILE), (numel,), generator=generator)], values)
        return values.to(TORCH_DTYPES[dtype])

    def noise() -> torch.Tensor:
        return torch.randn(numel, generator=generator, dtype=torch.float64)

    plain, common = noise(), 2 * noise()
    base, versions = made(plain, result), []
    for dtype in models:
        version = made((0 if task_vectors else plain) + 0.01 * (noise() + common), dtype)
        equal = torch.rand(numel, generator=generator) < 0.1
        version[equal] = 0 if task_vectors else base[equal].to(version.dtype)
        versions.append(version)
    segment = Segment(
        numel, operand(base, result), [operand(t, d) for t, d in zip(versions, models, strict=True)], None
    )
    return Batch("cpu", Signature(result, tuple(models), task_vectors), [segment]), [base, *versions]


def differences(batch: Batch, base: torch.Tensor, versions: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """d of core/rule.py: of each model and element."""
    signature = batch.signature
    wide = TORCH_DTYPES[signature.arithmetic]
    found = []
    for dtype, version in zip(signature.models, versions, strict=True):
        origin = base.to(wide)
        if signature.rounds_base(dtype):
            origin = base.to(TORCH_DTYPES[dtype]).to(wide)
        found.append(version.to(wide) if signature.task_vectors else version.to(wide) - origin)
    return torch.stack(found).numpy()


TYPES = [
    ("F32", ["F32"] * 5), ("BF16", ["BF16"] * 3), ("F16", ["F16"] * 2), ("F64", ["F64"] * 4),
    ("F32", ["BF16", "F32", "F16"]), ("BF16", ["F16", "F64"]), ("F32", ["F32"]),
]  # fmt: skip


@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize(
    "result, models", TYPES, ids=lambda each: each if isinstance(each, str) else "-".join(each)
)
def test_every_counter_counts_what_the_words_say(
    result: str, models: list[str], hostile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task_vectors in (False, True):
        batch, (base, *versions) = case(
            result, models, 130, task_vectors=task_vectors, hostile=hostile, seed=len(models)
        )
        arithmetic = np.float64 if batch.signature.arithmetic == "F64" else np.float32
        with np.errstate(all="ignore"):
            expected = sum(
                plain_counts(b, list(d), arithmetic)
                for b, d in zip(base.tolist(), differences(batch, base, versions).T, strict=True)
            )
        for counter in COUNTERS:
            found = count(counter, batch, monkeypatch)
            assert found.shape == (1, counting.columns(len(models)))
            assert np.array_equal(found[0], expected), counter


@pytest.mark.parametrize("numel", [0, 1, 63, 64, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_every_counter_counts_the_same_whatever_the_length(
    numel: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = case("F32", ["F32"] * n, numel, task_vectors=False, hostile=True, seed=numel)
    expected = counting.count_with_torch(batch)
    for counter in COUNTERS[1:]:
        assert np.array_equal(count(counter, batch, monkeypatch), expected), counter


def test_blocks_of_pytorch_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = case("BF16", ["BF16"] * 3, 1000, task_vectors=False, hostile=True, seed=0)
    expected = counting.count_with_torch(batch)
    monkeypatch.setattr(counting, "_BLOCK", 21)
    assert np.array_equal(counting.count_with_torch(batch), expected)


@pytest.mark.parametrize("counter", COUNTERS)
def test_without_a_base(counter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the means of a delta: each element agrees with itself, and its magnitude is its own."""
    means = torch.tensor([0.5, -0.5, 1e-30, 1e6, 2e-17, 9e3])
    segment = Segment(len(means), None, [operand(means, "F32")], None)
    found = count(counter, Batch("cpu", Signature("F32", ("F32",), True), [segment]), monkeypatch)[0]
    assert found[0] == len(means)
    filled = np.flatnonzero(found[len(COUNTED_OF_PREFIXES) :]).tolist()
    assert filled == sorted({sum(edge <= abs(float(m)) for edge in EDGES) for m in means})
    assert found[len(COUNTED_OF_PREFIXES)] == 2
    assert found[-1] == 1


@pytest.mark.parametrize("counter", COUNTERS)
def test_a_prefix_counts_what_a_merge_of_it_counts(counter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, (base, *versions) = case("F32", ["F32"] * 6, 500, task_vectors=False, hostile=False, seed=3)
    found = count(counter, batch, monkeypatch)[0, : 6 * len(COUNTED_OF_PREFIXES)].reshape(-1, 6)
    for p in range(1, 7):
        _, *expected = plain_merge(base, versions[:p], 0.5)
        assert found[:3, p - 1].tolist() == expected
        lost = found[0, p - 2] if p > 1 else 500
        assert lost - found[0, p - 1] == found[3:5, p - 1].sum(), "all that was lost was broken by the last"


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COUNTERS[1:]:
        pytest.skip("the kernel is not compiled")
    batch, _ = case("F32", ["F32"], 1, task_vectors=False, hostile=False, seed=0)
    monkeypatch.setattr(native, "instruction_set", lambda: "mmx")
    with pytest.raises(ValueError, match="no instruction set mmx here"):
        counting.count_natively(batch)
