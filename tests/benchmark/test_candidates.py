"""Candidates and baselines compute the formula, and a wrong result is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from negmerge_fast.benchmark import candidates
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
@pytest.mark.parametrize("name", ["eager formula", "torch._foreach formula", "dense two-step"])
def test_baselines_compute_the_formula(dtype: str, name: str) -> None:
    shapes = {"a": (7, 11), "b": (), "c": (5000,)}
    workload = Workload("three tensors", shapes, dtype, 3, "cpu", rotate=False)
    differing, _ = candidates.check(workload, candidates.candidate(workload, name))
    # Summation in another order may round to another number.
    assert differing == 0 or (name == "dense two-step" and differing < 0.5 * workload.numel)


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
