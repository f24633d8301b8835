"""Tuning for a GPU, without one: the CUDA kernel's source compiled for the host, and a clock that likes one of the ways."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from negmerge_fast import trust

ROOT = Path(__file__).parents[1]
WAYS = {"as built": [], "another": ["THREADS=128", "TILE=2048"]}


@pytest.fixture
def tune_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import rows
    import tune_gpu

    host = [
        "g++",
        "-O0",
        "-ffp-contract=off",
        "-fPIC",
        f"-I{ROOT / 'tests' / 'cuda_on_host'}",
        "-w",
        "-x",
        "c++",
    ]
    monkeypatch.setattr(tune_gpu, "compiler", lambda device: host)
    monkeypatch.setattr(tune_gpu, "CUDA", WAYS)
    monkeypatch.setattr(tune_gpu, "FLUSHED", 1 << 10)
    monkeypatch.setattr(tune_gpu, "stream", lambda: 0)
    monkeypatch.setattr(tune_gpu, "mark", lambda: SimpleNamespace())
    monkeypatch.setattr(tune_gpu, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(
        rows, "machine", lambda device: {"commit": "abc1234", "device": "A GPU", "driver": "1.2"}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(trust, "_found", {})
    return tune_gpu


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
def test_the_fastest_way_that_is_right_wins(
    tune_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = tune_gpu.cuda_ways("cpu", str(tmp_path))
    built, another = ways.values()
    merges = [2.0]

    def liked(batch: Any, rule: Any, threads: Any = None) -> Any:
        merges[:] = [1.0]
        return another(batch, rule)

    def wrong(batch: Any, rule: Any, threads: Any = None) -> Any:
        counts = another(batch, rule)
        if batch.segments[0].numel > 4096:  # not where it is tried on hostile numbers
            batch.segments[0].out.owner[-1] += 1
        return counts

    def right(batch: Any, rule: Any, threads: Any = None) -> Any:
        merges[:] = [2.0]
        return built(batch, rule)

    turns = itertools.count()
    monkeypatch.setattr(tune_gpu, "seconds", lambda *_: merges[0] if next(turns) % 2 else 1.5)
    monkeypatch.setattr(tune_gpu, "DTYPES", {"F32": torch.float32, "BF16": torch.bfloat16})
    ways = {"cuda, as built": right, "cuda, another": liked, "cuda, wrong": wrong}
    said = tune_gpu.tune("cpu", ways, False, 1 << 21, 3)
    printed = capsys.readouterr().out
    assert "cuda, wrong, F32, n = 8: no speed, 1 elements differ from the reference's\n" in printed
    assert said[-1] == "all types: cuda, another: 1.500 of a device copy; cuda, as built: 0.750"
    rows = [json.loads(line) for line in (tmp_path / "tune_gpu.jsonl").read_text().splitlines()]
    assert {(row["way"], row["dtype"], row["n"]) for row in rows} == {
        (f"cuda, {way}", dtype, n) for way in WAYS for dtype in ("F32", "BF16") for n in (2, 8, 32)
    }
    assert {row["device"] for row in rows} == {"A GPU"} and {row["differing"] for row in rows} == {0}
    assert all(
        row["bytes"] == (row["n"] + 2) * row["numel"] * (4 if row["dtype"] == "F32" else 2) for row in rows
    )


def test_lines_for_triton_are_those_that_it_prints_itself(
    tune_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from negmerge_fast.kernels import launch as kernel

    from negmerge_fast.native import merge_cpu

    usual, liked = None, []

    def ways(signature: Any) -> Any:
        nonlocal usual
        usual, other, *_ = kernel.candidates(signature, True)
        liked[:] = [other]
        return {"triton, usual": merge_cpu, "triton, other": merge_cpu}, {
            "triton, usual": usual, "triton, other": other,
        }  # fmt: skip

    monkeypatch.setattr(tune_gpu, "triton_ways", ways)
    monkeypatch.setattr(tune_gpu, "DTYPES", {"F16": torch.float16})
    turns = iter([1.0, 3.0, 1.0, 2.0] * 100)
    monkeypatch.setattr(tune_gpu, "seconds", lambda began, ended: next(turns))
    said = tune_gpu.tune("cpu", {}, True, 1 << 20, 2)
    found = eval("{" + said[-1] + "\n}", {"Launch": kernel.Launch})
    assert found == {("A GPU", "F16", "F16", True): liked[0]}
    assert said[0] == "F16: triton, other: 0.500 of a device copy; triton, usual: 0.333"


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "tune_gpu.py")], capture_output=True, text=True, check=True
    )
    assert re.fullmatch("tune_gpu: .*\n", done.stdout) and not done.stderr
