"""Made-up models that are merged."""

from __future__ import annotations

import pytest

from negmerge_fast.benchmark import candidates
from negmerge_fast.benchmark.shapes import LAYOUTS, one_tensor
from negmerge_fast.benchmark.workload import Lacking, Workload


def test_versions_agree_on_the_documented_fraction() -> None:
    workload = Workload("one tensor", one_tensor(1 << 18), "F32", 8, "cpu", rotate=False)
    (_, ((agreed, nonfinite, _),)) = workload.compare(workload.tensors(workload.out))
    assert nonfinite == 0 and agreed / workload.numel == pytest.approx(2 / 9, abs=0.01)


def test_a_workload_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negmerge_fast.benchmark.workload.free_memory", lambda device: 10**9)
    with pytest.raises(Lacking, match=r"Llama 8B, F32, n = 8: 322 GB needed, 1 GB free on cpu"):
        Workload("Llama 8B", LAYOUTS["Llama 8B"](), "F32", 8, "cpu")
    workload = Workload("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    monkeypatch.setattr(candidates, "free_memory", lambda device: 1000)
    with pytest.raises(Lacking, match=r"blocked eager formula of one tensor, F32, n = 2: .* needed"):
        candidates.candidate(workload, candidates.EAGER)
