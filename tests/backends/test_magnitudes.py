"""Bounds of magnitudes of what is in memory: those of sorting, for every type and backend, whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import BackendCase
from bits import STORAGE
from hostile import random_models

from negmerge_fast.backends import magnitudes, native
from negmerge_fast.backends.magnitudes import EDGES, Group, IntervalCounts, bounds_in_memory, everything
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.bounds import INFINITY, Bounds, Interval, key_of
from negmerge_fast.core.low_rank import Expansion, LowRank
from negmerge_fast.core.reference import _differences
from negmerge_fast.methods.base import Method
from negmerge_fast.methods.catalogue import method

NAMES = {dtype: name for name, dtype in STORAGE.items()}
F64, F32, F16, BF16 = (STORAGE[name] for name in ("F64", "F32", "F16", "BF16"))
TYPES = [
    (F32, [F32]),
    (BF16, [BF16]),
    (F16, [F16]),
    (F64, [F64]),
    (F32, [BF16, F16, F32]),
    (BF16, [F16, F64]),
    (F64, [F32, F16]),
]


def differences(base: torch.Tensor, models: list[torch.Tensor], task_vectors: bool = False) -> torch.Tensor:
    """|d_k| in the arithmetic type; infinite where it is not finite."""
    return _differences(base, models, task_vectors)[1].abs().nan_to_num(math.inf, math.inf)


def by_sorting(magnitudes: torch.Tensor, of: Method) -> Bounds:
    """The bounds of magnitudes of shape [n, elements]."""
    n, numel = magnitudes.shape
    low, high = [], []
    for found, (bottom, top) in zip(magnitudes.sort(1).values.tolist(), of.ranks(n, numel), strict=True):
        low.append(found[bottom] if bottom else 0.0)
        high.append(found[numel - 1 - top] if top else math.inf)
    return Bounds(tuple(low), tuple(high))


def batch_of(tensors: Sequence[tuple[torch.Tensor, list[torch.Tensor]]], task_vectors: bool = False) -> Batch:
    """Tensors of one signature, as segments without outputs."""
    base, models = tensors[0]
    signature = Signature(NAMES[base.dtype], tuple(NAMES[m.dtype] for m in models), task_vectors)

    def operand(tensor: torch.Tensor) -> Operand:
        return Operand(tensor.data_ptr(), NAMES[tensor.dtype], tensor)

    return Batch(
        "cpu", signature, [Segment(len(b), operand(b), [operand(x) for x in m], None) for b, m in tensors]
    )


# Beside AVX-512 make slow has the other instruction sets.
OTHERS = [pytest.mark.slow] if BackendCase("cpu", instruction_set="avx512").why_not() is None else []


@pytest.fixture(
    params=["avx512", *(pytest.param(name, marks=OTHERS) for name in ("avx2", "baseline")), "torch"]
)
def measure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> magnitudes.Measure:
    """Each function that measures."""
    if request.param == "torch":
        monkeypatch.setattr(magnitudes, "choose", lambda device: magnitudes.measure_with_torch)
        return magnitudes.measure_with_torch
    if native.why_not("cpu", "cpu") is not None or request.param not in native.library().instruction_sets:
        pytest.skip(f"no {request.param} here")
    monkeypatch.setenv("NEGMERGE_CPU", request.param)
    return magnitudes.measure_natively


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, kept keys and blocks of a size that small tensors have."""
    for name, value in {
        "MAX_UNSAMPLED": 64,
        "_MIN_SAMPLE": 512,
        "MODEL_SAMPLE": 1024,
        "SAMPLE_BLOCK": 16,
        "_BLOCK": 3000,
    }.items():
        monkeypatch.setattr(magnitudes, name, value)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_what_is_measured(measure: magnitudes.Measure, types: tuple[torch.dtype, list[torch.dtype]]) -> None:
    generator = np.random.default_rng(0)
    for task_vectors in (False, True):
        tensors = [
            random_models(3, length, *types, seed=length) for length in (0, 1, 63, 64, 65, 300, 2047, 2049)
        ]
        batch = batch_of(tensors, task_vectors)
        wide = np.float64 if batch.signature.arithmetic == "F64" else np.float32
        edges = np.zeros((len(tensors), 3, EDGES))
        for row in range(len(tensors)):
            for k in range(3):
                choices = np.sort(
                    generator.choice([0, 1e-45, 0.01, 0.05, 0.1, 0.2, 0.5, 3, np.inf], 4, replace=False)
                ).astype(wide)
                edges[row, k] = choices if (row + k) % 2 else [*choices[:2], 0, 0]
                if (row + k) % 3 == 0:  # an interval of one number
                    edges[row, k, 1] = np.nextafter(wide(edges[row, k, 0]), wide(np.inf))
                    edges[row, k, 2:] = edges[row, k, 2:] if edges[row, k, 2] > edges[row, k, 1] else 0
        counts, found = measure(batch, edges)
        for row, (base, models) in enumerate(tensors):
            for k, d in enumerate(differences(base, models, task_vectors).numpy()):
                inside = np.zeros(len(d), bool)
                for w in range(0, 4 if edges[row, k, 3] else 2, 2):
                    low, high = edges[row, k, w : w + 2].astype(wide)
                    assert counts[row, k, w : w + 2].tolist() == [(d < low).sum(), (d < high).sum()]
                    if high > np.nextafter(low, wide(np.inf)):
                        inside |= (d >= low) & (d < high)
                assert counts[row, k, -1] == inside.sum()
                assert found[row][k].tolist() == d[inside].view(found[row][k].dtype).tolist()


METHODS = [method("ties", over="tensor"), method("breadcrumbs"), method("ties", density=0.999, over="tensor"),
           method("breadcrumbs", density=0.3, gamma=0.4), method("breadcrumbs", density=0.01, gamma=0.001)]  # fmt: skip


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_bounds_are_those_of_sorting(
    measure: magnitudes.Measure, small: None, types: tuple[torch.dtype, list[torch.dtype]]
) -> None:
    tensors = {
        f"t{length}": random_models(3, length, *types, seed=length) for length in (1, 2, 63, 65, 1000, 9001)
    }
    batch = batch_of(list(tensors.values()))
    for of in METHODS:
        bounds = bounds_in_memory([(batch, list(tensors))], of, threads=2)
        for name, (base, models) in tensors.items():
            assert bounds[name] == by_sorting(differences(base, models), of), (name, of)


def sorted_numbers(numel: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32)


def misleading(numel: int) -> torch.Tensor:
    """What a sample sees is large, and all else is small."""
    values = torch.linspace(0, 1, numel)
    for start, size in magnitudes.sample_blocks(
        numel, magnitudes.sample_size(numel), magnitudes.SAMPLE_BLOCK
    ):
        values[start : start + size] += 100
    return values


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "equal": lambda numel: torch.full((numel,), 0.25),
    "zero": lambda numel: torch.zeros(numel),
    "two values": lambda numel: (torch.arange(numel) % 10 < 7) * 0.5 + 0.25,
    "ties": lambda numel: torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16().float().round(decimals=1),
    "subnormals": lambda numel: torch.arange(numel, dtype=torch.int32).view(torch.float32),
    "not finite": lambda numel: torch.where(torch.arange(numel) % 3 == 0, math.nan, torch.linspace(0, 1, numel)),
    "infinite": lambda numel: torch.full((numel,), -math.inf),
    "sorted": sorted_numbers,
    "backwards": lambda numel: sorted_numbers(numel).flip(0),
    "misleading": misleading,
    "two scales": lambda numel: torch.randn(numel) * (1 + 1e30 * (torch.arange(numel) > numel // 2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kept", [40, 1 << 20])
def test_hostile_numbers(
    small: None, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], torch.Tensor], kept: int
) -> None:
    monkeypatch.setattr(magnitudes, "MAX_KEPT", kept)
    reads: list[Group] = []
    finish = Group.finish
    monkeypatch.setattr(Group, "finish", lambda group: (reads.append(group), finish(group)))
    for numel in (1, 70, 20000):
        values = kind(numel)
        models = [values, values.flip(0).clone(), -values]
        batch = batch_of([(torch.zeros(numel), models)], task_vectors=True)
        for of in METHODS:
            reads.clear()
            bounds = bounds_in_memory([(batch, ["w"])], of, threads=1)
            assert bounds == {"w": by_sorting(differences(torch.zeros(numel), models, True), of)}
            # 31 bits of a key, of which a read tells 19 or 4; and one that a sample misled.
            assert len(reads) <= (3 if kept > 40 else 9)


def test_random_numbers_take_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Group] = []
    finish = Group.finish
    monkeypatch.setattr(Group, "finish", lambda group: (reads.append(group), finish(group)))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(150_000, generator=generator)
    # Rows of other scales, as fine-tuning leaves them.
    scales = torch.rand(300, generator=generator).repeat_interleave(500)
    models = [base + scales * torch.randn(len(base), generator=generator) for _ in range(3)]
    for of in METHODS[:2]:
        reads.clear()
        bounds = bounds_in_memory([(batch_of([(base, models)]), ["w"])], of)
        assert bounds == {"w": by_sorting(differences(base, models), of)}
        assert len(reads) == 1


def over_model(tensors: Sequence[tuple[torch.Tensor, list[torch.Tensor]]], of: Method) -> tuple[float, ...]:
    """The lower bounds of all tensors together, in float64."""
    return by_sorting(torch.cat([differences(*each).double() for each in tensors], 1), of).low


@pytest.mark.parametrize("kept", [40, 1 << 20])
def test_bounds_over_a_model_of_many_types(
    measure: magnitudes.Measure, small: None, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(magnitudes, "MAX_KEPT", kept)
    of = method("ties")
    for types in (TYPES[:3], TYPES):
        tensors = [random_models(3, 500 + 700 * k, *each, seed=k) for k, each in enumerate(types)]
        given = [(batch_of([each]), [f"t{k}"]) for k, each in enumerate(tensors)]
        bounds = bounds_in_memory(given, of, threads=2)
        low = over_model(tensors, of)
        assert len(bounds) == len(tensors)
        for k, (base, models) in enumerate(tensors):
            d = differences(base, models)
            for model in range(3):  # the same elements pass
                assert torch.equal(d[model] >= bounds[f"t{k}"].low[model], d[model].double() >= low[model])
                assert bounds[f"t{k}"].high[model] == math.inf


def test_a_tensor_of_several_segments_and_one_of_none(small: None) -> None:
    of = method("breadcrumbs")
    base, models = random_models(2, 3001, F32, [F32])
    whole = batch_of([(base, models)])
    segments = [
        magnitudes._part_of(whole.segments[0], start, min(700, 3001 - start)) for start in range(0, 3001, 700)
    ]
    empty = batch_of([(base[:0], [m[:0] for m in models])])
    halves = [
        (Batch("cpu", whole.signature, part), ["w"] * len(part)) for part in (segments[:2], segments[2:])
    ]
    bounds = bounds_in_memory([*halves, (empty, ["none"])], of)
    assert bounds["w"] == by_sorting(differences(base, models), of)
    assert bounds["none"] == Bounds((0.0, 0.0), (math.inf, math.inf))


def test_low_rank_models_are_expanded(small: None) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(90, 4, generator=generator), torch.randn(4, 70, generator=generator)
    factors = LowRank(left.data_ptr(), right.data_ptr(), 1, 90, 70, 4, 0.5, (left, right))
    d = torch.zeros(90, 70)
    for r in range(4):
        d = d + left[:, r : r + 1] * right[r]
    dense = (d * 0.5).flatten()
    base, [x] = random_models(1, 6300, F32, [F32])
    x = x.nan_to_num(0.0, 1.0, 1.0)
    batch = batch_of([(base, [x, dense])], task_vectors=True)
    segment = batch.segments[0]._replace(models=[batch.segments[0].models[0], Expansion(factors, 0)])
    for of in METHODS:
        bounds = bounds_in_memory([(Batch("cpu", batch.signature, [segment]), ["w"])], of)
        assert bounds == {"w": by_sorting(differences(base, [x, dense], True), of)}


def test_too_many_keys_are_counted_in_bins() -> None:
    generator = np.random.default_rng(0)
    interval = Interval(key_of(0.1, "F32") + 3, key_of(3.0, "F32"))
    exact, full = IntervalCounts(interval, 1 << 20), IntervalCounts(interval, 100)
    keys = np.sort(generator.integers(*interval, 5000, dtype=np.int32))
    for part in np.array_split(generator.permutation(keys), 40):
        for each in (exact, full):
            each.add(7, len(part), part)
    assert exact.shift == 0 < full.shift
    for position in (0, 1, 2500, 4999):
        key = int(keys[position])
        assert exact.range_at(position) == (key, key + 1)
        low, high = full.range_at(position)
        assert low <= key < high <= low + (1 << full.shift)
        for each in (exact, full):
            at = key >> full.shift << full.shift
            if interval.low < at:
                assert each.count_lower(at) == 280 + int((keys < at).sum())
    assert [t.count_lower(k) for t in (exact, full) for k in (0, *interval)] == [280, 280, 5280] * 2


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_more_keys_than_different_ones_are_counted_in_bins_of_one(dtype: type) -> None:
    keys = np.random.default_rng(0).integers(1000, 1700, 100_000, dtype=dtype)
    counts = IntervalCounts(Interval(1000, 1700), capacity=1024, expected=100_000)
    for part in np.array_split(keys, 7):
        counts.add(0, len(part), part)
    assert counts.shift == 0
    keys.sort()
    for position in (0, 1, 50_000, 99_999):
        assert counts.range_at(position) == (keys[position], keys[position] + 1)
    assert counts.count_lower(1500) == int((keys < 1500).sum())


def test_everything_is_all_that_is_finite() -> None:
    base, models = random_models(2, 500, F32, [F32])
    batch = batch_of([(base, models)])
    measured = magnitudes.choose("cpu")(batch, everything(1, 2))
    keys: list[Any] = magnitudes.keys_of_all(measured, [500], "F32", "F64")
    for found, d in zip(keys, differences(base, models), strict=True):
        assert sorted(found.tolist()) == d.double().sort().values.view(torch.int64).tolist()
        assert found[-1] == INFINITY["F64"]
