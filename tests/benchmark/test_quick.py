"""The command `negmerge bench`. No speed is asserted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import MACHINE, MEASURED, WORKLOAD, rows_of
from command import Run, run  # noqa: F401

from negmerge_fast.benchmark import quick, workload
from negmerge_fast.benchmark.candidates import EAGER
from negmerge_fast.benchmark.timing import Timing


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(quick, "SECONDS", 0.0)
    monkeypatch.setattr(quick, "MODELS", (2,))
    monkeypatch.setattr(quick, "COMPARED", {("F32", 2): (EAGER,)})
    monkeypatch.setattr(quick, "FLOAT_SIZES", {"F32": 4, "BF16": 2})
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 18)
    monkeypatch.setattr("negmerge_fast.benchmark.timing.rest", lambda device: None)


def test_negmerge_bench(run: Run, small: None, tmp_path: Path) -> None:
    status, out, err = run("bench", "--device", "cpu", "--report", "rows.jsonl")
    assert (status, err) == (0, "")
    rows = rows_of(tmp_path / "rows.jsonl")
    assert {row["way"] for row in rows} >= {"memory read", "memory copy", "torch", EAGER}
    assert all(set(row) == MACHINE | WORKLOAD | MEASURED for row in rows)
    assert "one tensor, BF16, in memory" in out and "not measured: backend triton on cpu: is for GPUs" in out
    status, out, err = run("bench", "--device", "cuda:77")
    assert (status, out) == (2, "") and err.startswith("negmerge: device: 'cuda:77'") and err.count("\n") == 1
    status, out, err = run("bench", "--device", "cpu", "--report", "nowhere/rows.jsonl")
    assert (status, out, err.count("\n")) == (2, "", 1) and "nowhere" in err


def test_negmerge_bench_refuses_a_wrong_kernel(
    run: Run, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from negmerge_fast.backends import pytorch

    def wrong(right: Any, *arguments: Any) -> Any:
        counts = right(*arguments)
        counts[0, 0] += 1
        return counts

    monkeypatch.setattr(
        "negmerge_fast.backends.registry._merge_of", lambda name: partial(wrong, pytorch.merge)
    )
    status, out, err = run("bench", "--device", "cpu")
    assert (
        status == 1 and "torch: counts differ from the reference's, no speed" in err and err.count("\n") == 1
    )
    assert EAGER in out and "  torch  " not in out


def test_negmerge_bench_is_interrupted_with_one_line(
    run: Run, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def interrupt(self: Timing) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Timing, "run", interrupt)
    assert run("bench", "--device", "cpu", "--quiet") == (130, "", "negmerge: interrupted\n")
