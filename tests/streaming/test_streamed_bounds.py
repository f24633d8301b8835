"""Bounds of magnitudes of checkpoints: those of sorting all of it, for every chunk size, budget, number of threads and ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from adapter_files import save_adapter
from hostile import random_models
from safetensors.torch import save_file

from negmerge_fast.backends import magnitudes
from negmerge_fast.core.bounds import Bounds
from negmerge_fast.core.errors import InputError
from negmerge_fast.core.reference import _differences
from negmerge_fast.methods.base import Method
from negmerge_fast.methods.catalogue import method
from negmerge_fast.runtime.distributed import SingleProcess
from negmerge_fast.streaming import bounds as module
from negmerge_fast.streaming.api import open_and_plan
from negmerge_fast.streaming.bounds import bytes_to_measure, measure
from negmerge_fast.streaming.options import MergeOptions
from negmerge_fast.streaming.plan import Plan

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
METHODS = [
    method("ties"),
    method("ties", over="tensor"),
    method("breadcrumbs"),
    method("breadcrumbs", gamma=0.2, over="model"),
]

# Names, lengths and types of base and models. Between them are tensors that are not merged.
TENSORS = {
    "a": (5000, F32, [F32]), "b": (1, F32, [F32]), "c": (777, BF16, [BF16]), "d": (3000, F32, [BF16, F32]),
    "e": (0, F32, [F32]), "f": (4001, F32, [F32]), "g": (640, F16, [F16]),
}  # fmt: skip

# Of the tensor of one element, which need not be read: all of it passes.
SINGLE_BYTES = 4 * 4


class Case:
    """A base and three models in files, and all |d_k| of each tensor."""

    def __init__(self, folder: Path, tensors: dict[str, tuple[int, torch.dtype, list[torch.dtype]]]) -> None:
        versions = {name: random_models(3, *each, seed=k) for k, (name, each) in enumerate(tensors.items())}
        self.magnitudes = {
            name: _differences(base, models, False)[1].abs().nan_to_num(math.inf, math.inf)
            for name, (base, models) in versions.items()
        }
        self.paths = [folder / f"{k}.safetensors" for k in range(4)]
        for k, path in enumerate(self.paths):
            held = {name: models[k - 1] if k else base for name, (base, models) in versions.items()}
            save_file({**held, "bb": torch.arange(9), "ff": torch.arange(5)}, path, {"format": "pt"})

    def plan(self, **options: Any) -> Plan:
        return open_and_plan(self.paths[0], self.paths[1:], MergeOptions(scale=1.0, **options))

    def check(self, found: dict[str, Bounds], of: Method) -> None:
        """Compare with sorting: the bounds of a tensor, or the elements that those of the model let pass."""
        assert set(found) == set(self.magnitudes)
        if of.over == "tensor":
            assert found == {name: by_sorting(d, of) for name, d in self.magnitudes.items()}
            return
        whole = by_sorting(torch.cat([d.double() for d in self.magnitudes.values()], 1), of)
        for name, d in self.magnitudes.items():
            for k in range(3):
                low, high = (each[k] for each in found[name])
                passing = (d[k].double() >= whole.low[k]) & (d[k].double() <= whole.high[k])
                assert torch.equal((d[k] >= low) & (d[k] <= high), passing)


def by_sorting(magnitudes: torch.Tensor, of: Method) -> Bounds:
    n, numel = magnitudes.shape
    low, high = [], []
    for found, (bottom, top) in zip(magnitudes.sort(1).values.tolist(), of.ranks(n, numel), strict=True):
        low.append(found[bottom] if bottom else 0.0)
        high.append(found[numel - 1 - top] if top else math.inf)
    return Bounds(tuple(low), tuple(high))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, TENSORS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of a size that small tensors have."""
    for name, value in {
        "MAX_UNSAMPLED": 64,
        "_MIN_SAMPLE": 256,
        "MODEL_SAMPLE": 1024,
        "SAMPLE_BLOCK": 16,
    }.items():
        monkeypatch.setattr(magnitudes, name, value)


@pytest.fixture(params=["native", "torch"])
def measured_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(magnitudes, "choose", lambda device: magnitudes.measure_with_torch)


@pytest.mark.parametrize("of", METHODS, ids=str)
@pytest.mark.parametrize(
    ("chunk", "kept"),
    [(4096, 50), (1 << 20, 1 << 20), *(pytest.param(256, k, marks=pytest.mark.slow) for k in (50, 1 << 20))],
)
def test_bounds_are_those_of_sorting(
    case: Case,
    small: None,
    measured_by: None,
    monkeypatch: pytest.MonkeyPatch,
    of: Method,
    chunk: int,
    kept: int,
) -> None:
    monkeypatch.setattr(magnitudes, "MAX_KEPT", kept)
    monkeypatch.setattr(module, "_MIN_KEPT", 1)
    monkeypatch.setattr("negmerge_fast.streaming.budget.MAX_CHUNK_BYTES", chunk)
    monkeypatch.setattr("negmerge_fast.streaming.budget._MIN_CHUNK_BYTES", 256)
    for threads in (1, 3):
        moved: list[int] = []
        plan = case.plan(threads=threads)
        found = measure(plan, of, MergeOptions(scale=1.0, threads=threads), on_moved=moved.append)
        case.check(found, of)
        assert moved == sorted(moved) and moved[-1] >= bytes_to_measure(plan) - SINGLE_BYTES


@pytest.mark.parametrize("of", METHODS, ids=str)
def test_models_of_f32_and_f64(tmp_path: Path, small: None, of: Method) -> None:
    case = Case(tmp_path, {**TENSORS, "h": (2000, F64, [F64, F32]), "i": (900, F32, [F64])})
    case.check(measure(case.plan(), of, MergeOptions(scale=1.0)), of)


@pytest.mark.parametrize("of", METHODS, ids=str)
def test_a_tiny_budget(case: Case, small: None, of: Method) -> None:
    budget = 64 << 20
    with pytest.raises(InputError, match=r"memory_budget: .* expected at least") as refused:
        measure(case.plan(), of, MergeOptions(scale=1.0, memory_budget=1 << 20))
    budget = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    case.check(measure(case.plan(), of, MergeOptions(scale=1.0, memory_budget=budget)), of)


def test_without_a_sample_all_is_kept(case: Case) -> None:
    for of in METHODS:
        case.check(measure(case.plan(), of, MergeOptions(scale=1.0)), of)


class Rank(SingleProcess):
    """One of several ranks that are threads, and exchange JSON as processes do."""

    def __init__(self, rank: int, count: int, barrier: Barrier, answers: dict[int, str]) -> None:
        self.rank, self.count, self._barrier, self._answers = rank, count, barrier, answers

    def all_gather(self, task: Callable[[], Any]) -> list[Any]:
        try:
            self._answers[self.rank] = json.dumps(task())
        except BaseException:
            self._barrier.abort()
            raise
        self._barrier.wait()
        found = [json.loads(self._answers[rank]) for rank in range(self.count)]
        self._barrier.wait()
        return found


@pytest.mark.parametrize("of", METHODS, ids=str)
@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", [50, 1 << 20])
def test_ranks_find_the_same(
    case: Case, small: None, monkeypatch: pytest.MonkeyPatch, of: Method, count: int, kept: int
) -> None:
    monkeypatch.setattr(magnitudes, "MAX_KEPT", kept)
    monkeypatch.setattr(module, "_MIN_KEPT", 1)
    barrier, answers = Barrier(count), dict[int, str]()
    found: dict[int, dict[str, Bounds]] = {}
    moved = [0] * count

    def run(rank: int) -> None:
        def on_moved(done: int) -> None:
            moved[rank] = done

        ranks = Rank(rank, count, barrier, answers)
        found[rank] = measure(case.plan(), of, MergeOptions(scale=1.0), ranks, on_moved)

    threads = [Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count and all(each == found[0] for each in found.values())
    case.check(found[0], of)
    if kept > 50:
        # Each tensor is read once, by one rank, unless its sample missed.
        assert -SINGLE_BYTES <= sum(moved) - bytes_to_measure(case.plan()) < bytes_to_measure(case.plan())


def test_adapters_are_expanded(tmp_path: Path, small: None) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.q_proj.weight": torch.randn(90, 70, generator=generator),
        "model.norm.weight": torch.randn(70, generator=generator),
    }
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    differences = []
    for k in range(2):
        a, b = torch.randn(3, 70, generator=generator), torch.randn(90, 3, generator=generator)
        save_adapter(tmp_path / f"adapter-{k}", {"model.q_proj": (a, b)}, rank=3, alpha=6)
        d = torch.zeros(90, 70)
        for r in range(3):
            d = d + b[:, r : r + 1] * a[r]
        differences.append((d * 2.0).flatten())
    options = MergeOptions(scale=1.0)
    plan = open_and_plan(
        tmp_path / "base.safetensors", [tmp_path / f"adapter-{k}" for k in range(2)], options
    )
    d = torch.stack(differences).abs()
    for of in METHODS:
        assert measure(plan, of, options) == {"model.q_proj.weight": by_sorting(d, of)}


def test_progress_stops_it(case: Case) -> None:
    def on_moved(done: int) -> None:
        raise KeyboardInterrupt

    for of in METHODS[:2]:
        with pytest.raises(KeyboardInterrupt):
            measure(case.plan(), of, MergeOptions(scale=1.0), on_moved=on_moved)


def test_a_file_that_shrank_is_an_error(case: Case, small: None) -> None:
    plan = case.plan()
    with case.paths[2].open("r+b") as file:
        file.truncate(2000)
    for of in METHODS[:2]:
        with pytest.raises(OSError, match=r"2\.safetensors"):
            measure(plan, of, MergeOptions(scale=1.0))
