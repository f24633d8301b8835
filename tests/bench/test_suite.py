"""The suite in bench/: what it refuses, and what a row holds. No speed is asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_rows import MACHINE, MEASURED, WORKLOAD, rows_of

from negmerge_fast.backends import native

ROOT = Path(__file__).parents[2]

# A plug-in that makes the last element of every BF16 merge on the CPU wrong by one bit.
PLANTED = """
import negmerge_fast.streaming.job  # with the right function in it: the wrong one merges files as other backends do
from negmerge_fast.backends import native
right = native.merge_cpu

def wrong(batch, rule, threads=None):
    counts = right(batch, rule, threads)
    if batch.signature.result == "BF16":
        out = batch.segments[-1].out.owner.view(-1)[-1:]
        out.view(dtype=__import__("torch").int16).bitwise_xor_(1)
    return counts

native.merge_cpu = wrong
"""


def suite(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--size",
        "tiny",
        "--results",
        "rows.jsonl",
        *arguments,
    ]
    command[command.index("rows.jsonl")] = str(tmp_path / "rows.jsonl")
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )


@pytest.mark.skipif(native.why_not("cpu", "cpu") is not None, reason="no CPU kernel")
@pytest.mark.processes
def test_a_wrong_kernel_gets_no_speed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    # The cases of a GPU, if there is one, would be right.
    which = "not gpu and " if torch.cuda.is_available() else ""
    done = suite(tmp_path, "-p", "planted", "-k", which + "one_tensor and (F32-2x or -BF16-2x)")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path / "rows.jsonl")
    assert {(row["way"], row["dtype"]) for row in rows} == {
        ("cpu", "F32"), ("cpu, in place", "F32"), ("torch", "F32"), ("torch", "BF16"),
    }  # fmt: skip
    for candidate in ("cpu", "cpu, in place"):
        refused = f"{candidate}: 1 element differs from the reference's, no speed (one tensor, BF16, n = 2)"
        assert refused in done.stdout
    for row in rows:
        assert set(row) == MACHINE | WORKLOAD | MEASURED
        assert (row["suite"], row["layout"], row["n"], row["state"]) == (
            "memory",
            "one tensor",
            2,
            "in memory",
        )
        assert row["bytes"] == 4 * row["numel"] * {"F32": 4, "BF16": 2}[row["dtype"]]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["GB/s"] == pytest.approx(row["bytes"] / row["p50"] / 1e9)
        assert (row["rounds"], row["differing"]) == (3 if row["way"] == "torch" else 7, 0)
        assert row["limit"] == "memory read"
        assert row["of_limit"] > 0 < row["limit GB/s"]
    assert (
        max(
            map(
                len, done.stdout.split("one tensor, F32, in memory")[1].split("rows appended")[0].splitlines()
            )
        )
        <= 100
    )
    if not torch.cuda.is_available():
        assert re.search(
            r"not measured: no CUDA device: (this torch|.*wants a driver for CUDA).*: \d+ case", done.stdout
        )


@pytest.mark.slow
def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("""
import torch
def init():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver")
torch.version.cuda, torch.cuda.init, torch.cuda.is_available = "13.0", init, lambda: False
""")
    done = suite(tmp_path, "-p", "old", "-k", "cuda and one_tensor and BF16")
    assert (
        "not measured: no CUDA device: The NVIDIA driver on your system is too old (found version 12040); "
        "this torch wants a driver for CUDA 13.0 or newer: " in done.stdout
    )


@pytest.mark.slow
def test_files_that_are_merged_wrong_get_no_speed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED.replace('"BF16"', '"F32"').replace("int16", "int32").replace(
        ".view(-1)[-1:]\n        out.view(dtype=__import__(\"torch\").int32).bitwise_xor_(1)", "\n        out[0] ^= 1"
    ))  # fmt: skip
    done = suite(tmp_path, "-p", "planted", "-k", "16_tensors and warm and cpu")
    assert done.returncode == 1, done.stdout
    assert "elements differ from the reference's, no speed (files)" in done.stdout
    assert {row["way"] for row in rows_of(tmp_path / "rows.jsonl")} == {
        "torch",
        "lazy files, formula, save_file",
    }


@pytest.mark.slow
def test_cases_of_gpus_are_collected_everywhere(tmp_path: Path) -> None:
    found = suite(tmp_path, "--collect-only").stdout.splitlines()
    for candidate in (
        "cuda",
        "cuda_in_place",
        "triton",
        "compiled_formula_max-autotune",
        "foreach_formula",
    ):
        assert any(
            text.startswith("bench/test_memory.py")
            and "[gpu-one_tensor-BF16-8x" in text
            and text.endswith(f"-{candidate}]")
            for text in found
        ), candidate
    for case in (
        "test_layouts.py::test_layout[gpu-Llama_8B-BF16-n2-cuda]",
        "test_layouts.py::test_layout[gpu-2000_tensors-F32-n8-merge_]",
        "test_files.py::test_files[gpu-16_tensors_in_files-F32-n8-cold-cuda]",
        "test_limits.py::test_limit[gpu-device_copy]",
    ):
        assert f"bench/{case}" in found, case
    assert not (tmp_path / "rows.jsonl").exists()
