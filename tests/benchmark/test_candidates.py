"""Candidates and baselines compute the formula, and a wrong result is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from negmerge_fast.benchmark import candidates
from negmerge_fast.benchmark.records import COMPILED
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timing import timing_of
from negmerge_fast.benchmark.workload import Workload


def test_a_backend_that_failed_its_selftest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from negmerge_fast.backends import registry

    monkeypatch.setattr(registry, "_NEED_SELFTEST", {"torch"})
    monkeypatch.setattr(registry, "_selftest_failure", lambda *_: "not the reference's bits")
    workload = Workload("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    with pytest.raises(candidates.Refused, match="torch: not the reference's bits"):
        candidates.candidate(workload, "torch")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("name", [candidates.EAGER, candidates.FOREACH])
@pytest.mark.parametrize("n", [1, 3])
def test_baselines_compute_the_formula(
    monkeypatch: pytest.MonkeyPatch, dtype: str, name: str, n: int
) -> None:
    """In place, in blocks that end within tensors, and in groups of several."""
    monkeypatch.setitem(candidates._BLOCK_NUMEL, "cpu", 1000)
    shapes = {"a": (7, 11), "b": (), "c": (5000,), "d": (1000,), "e": (3, 3)}
    workload = Workload("five tensors", shapes, dtype, n, "cpu", rotate=False)
    baseline = candidates.candidate(workload, name)
    assert candidates.check(workload, baseline)[0] == 0
    baseline.task()  # on what is merged already
    assert workload.compare(workload.tensors(workload.out))[0] > 0


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", [name for name in candidates.BASELINES if name.startswith(COMPILED)])
def test_compiled_formulas_are_in_place_and_take_their_first_call_to_compile(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    """Without the compiler, which takes seconds: as the graph that it is given runs."""
    modes = []

    def compile(formula: Callable[..., None], **options: Any) -> Callable[..., None]:
        modes.append(options)
        return formula

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(candidates, "_SHORT_NUMEL", 1000)
    monkeypatch.setattr(candidates, "_fresh_cache", nullcontext)
    workload = Workload(
        "four tensors", {"a": (7, 11), "b": (), "c": (5000,), "d": (20,)}, dtype, 3, "cpu", rotate=False
    )
    differing, first_call = candidates.check(workload, candidates.candidate(workload, name))
    assert differing == 0 and first_call > 0
    assert candidates.without_compilation(name, first_call) == 0.0
    assert candidates.without_compilation(candidates.EAGER, first_call) == first_call
    assert len(modes) == 1 and modes[0]["dynamic"] == name.endswith("dynamic")


@pytest.mark.slow  # inductor compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ for inductor")
def test_the_compiled_formula_has_the_bits_of_the_reference() -> None:
    """On a CPU: on a GPU it may contract multiplications and additions."""
    workload = Workload("one tensor", one_tensor(4096), "BF16", 3, "cpu", rotate=False)
    assert candidates.check(workload, candidates.candidate(workload, COMPILED))[0] == 0


@pytest.mark.parametrize("name", ["torch", "merge_"])
def test_a_candidate_on_copies_that_take_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negmerge_fast.benchmark.workload.last_level_cache", lambda: 1 << 16)
    workload = Workload("three tensors", {"a": (7, 11), "b": (), "c": (500,)}, "BF16", 2, "cpu")
    assert workload.copies > 10 and len(workload.versions[0]) >= workload.copies * workload.numel
    chosen = candidates.candidate(workload, name)
    candidates.check(workload, chosen)
    timed = timing_of(workload, chosen, "layouts")
    row = timed.result(timed.measure(0, 2), workload.copies, differing=0)
    assert row["bytes"] == 4 * 578 * 2 and row["rounds"] == 2


def test_one_wrong_element_or_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negmerge_fast.benchmark.workload._COMPARED_BYTES", 1000)
    workload = Workload("two tensors", {"a": (300,), "b": (41, 17)}, "F32", 3, "cpu", rotate=False)
    chosen = candidates.candidate(workload, "torch")
    assert candidates.check(workload, chosen)[0] == 0
    for at, tensor in ((0, 0), (299, 0), (0, 1), (696, 1), (350, 1)):
        wrong = workload.tensors(workload.out)[tensor].view(-1)[at : at + 1].view(torch.int32)
        wrong.bitwise_xor_(1)
        assert workload.compare(workload.tensors(workload.out))[0] == 1
        wrong.bitwise_xor_(1)

    with pytest.raises(candidates.Refused, match="counts differ"):
        candidates.check(workload, replace(chosen, counts=lambda _: [[1, 0, 0], [2, 0, 0]]))


def test_reasons_of_baselines_are_one_line() -> None:
    assert candidates.failure(torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to")) == "out of memory"
    assert (
        candidates.failure(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
        == "out of memory"
    )
    assert candidates.failure(ValueError("one\ntwo")) == "ValueError: one"
