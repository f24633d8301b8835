"""The search for launch parameters, without a GPU."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from negmerge_fast.core.batch import Batch, Signature
from negmerge_fast.core.rule import Rule

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_the_usual_launch_for_16_bits_is_the_fastest_that_was_measured(dtype: str) -> None:
    """On every GPU, also where nothing was searched for."""
    from negmerge_fast.kernels import launch as kernel

    fractions: dict[str, list[float]] = {}
    for line in (ROOT / "bench" / "results" / "tune_gpu.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["commit"] == "d19b937" and row["dtype"] == dtype and row["way"].startswith("triton"):
            fractions.setdefault(row["way"], []).append(row["of_limit"])
    best = max(fractions, key=lambda candidate: statistics.geometric_mean(fractions[candidate]))
    for n in (2, 8, 32):
        usual = kernel.usual_launch(Signature(dtype, (dtype,) * n, False), True)
        assert (
            best
            == f"triton, {usual.elements} x {usual.threads} elements, {usual.group} models at once, {usual.programs} programs"
        )
    assert all(dtype not in key for key in kernel.FOUND)


def test_launch_parameters_are_searched_and_printed_to_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock that finds one of the candidates fastest."""
    from negmerge_fast.kernels import launch as kernel

    signature = Signature("BF16", ("BF16",) * 17, False)  # as many as are searched with
    usual, *others = kernel.candidates(signature, True)
    assert usual == kernel.usual_launch(signature, True) and len({usual, *others}) == 1 + len(others) > 20
    fastest, launched = others[5], []

    def launch_merge(batch: Batch, rule: Rule, launch: Any) -> None:
        launched.append(launch)

    def clock(function: Any) -> float:
        function()
        return 1.0 if launched[-1] == fastest else 2.0

    monkeypatch.setattr(kernel, "SEARCHED_BYTES", 1 << 20)
    monkeypatch.setattr(kernel, "FOUND", {})
    monkeypatch.setattr(triton.testing, "do_bench", clock)
    monkeypatch.setattr(torch.cpu, "get_device_name", lambda device: "A GPU", raising=False)
    assert kernel.launch_for(signature, True, "cpu", launch_merge) == usual and not launched
    monkeypatch.setenv("NEGMERGE_AUTOTUNE", "1")
    assert kernel.launch_for(signature, True, "cpu", launch_merge) == fastest
    assert launched == [usual, *others]
    printed = capsys.readouterr().err
    assert eval("{" + printed + "}", {"Launch": kernel.Launch}) == kernel.FOUND
    assert kernel.launch_for(signature, True, "cpu", launch_merge) == fastest
    assert launched == [usual, *others] and not capsys.readouterr().err
