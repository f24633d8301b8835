"""Variances below zero in an output are told of: by one process or several, after a resumption, and in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_files import save_model
from command import Run, run  # noqa: F401
from interrupted import finish, start
from resumable import Stop
from small_chunks import record_every_chunk

import negmerge_fast as nm

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WITHOUT_SCALE = ("merge", "base", "ft-0", "ft-1", "-o", "out")
MERGE = (*WITHOUT_SCALE, "--scale", "1")


def save(folder: Path) -> None:
    """A network with variances of each type, of which those of bn0 … bn3 end below zero, in the last element only."""
    for k, name in enumerate(("base", "ft-0", "ft-1")):
        tensors = {"w": torch.full((100_000,), 1.0 + k), "z": torch.full((100_000,), 2.0 - k)}
        for i, dtype in enumerate(TYPES):
            variance = torch.ones(300_001 if i else 7, dtype=dtype)
            variance[-1] += 2.0 * k
            tensors[f"bn{i}.running_var"] = variance
            tensors[f"bn{i}.running_mean"] = torch.full((7,), -1.0 - k, dtype=dtype)
            fine = torch.full((7,), 0.5, dtype=dtype)
            fine[0], fine[1] = -0.0, math.nan
            tensors[f"fine{i}.running_var"] = fine
        names = list(tensors)
        save_model(folder / name, tensors, [names[:5], names[5:]])


LINE = (
    "the output: 'bn0.running_var', 'bn1.running_var', 'bn3.running_var' and 1 more: below zero somewhere after the merge, "
    "but the square root of a variance is taken: a network gives NaN there (exclude them, or estimate them anew)"
)


def test_variances_below_zero_are_told_of(run: Run) -> None:
    save(Path())
    status, _, err = run(*MERGE, "--nonfinite", "keep-base", "--report", "report.json")
    assert (status, err) == (0, f"negmerge: note: {LINE}\n")
    assert json.loads(Path("report.json").read_text())["notes"] == [LINE]
    assert run(*MERGE, "--nonfinite", "keep-base", "--overwrite", "--quiet") == (0, "", "")
    for merge in (
        (*MERGE, "--exclude", "running_var"),
        (*MERGE, "--dry-run"),
        (*WITHOUT_SCALE, "--scale", "0.1"),
    ):
        assert run(*merge, "--nonfinite", "keep-base", "--overwrite")[::2] == (0, "")


def test_what_is_not_merged_is_not_examined(run: Run) -> None:
    save(Path())
    status, _, err = run(*MERGE, "--nonfinite", "keep-base", "--exclude", "bn[013]")
    assert (status, err[: err.index(": below")]) == (0, "negmerge: note: the output: 'bn2.running_var'")


def test_a_warning_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path)
    with pytest.warns(nm.MergeWarning, match="^the output: 'bn0.running_var'"):
        report = nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", scale=1.0, nonfinite="keep-base")
    assert report.notes == [LINE]


@pytest.mark.parametrize("at", [0.5, 0.999])
def test_after_a_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    """Also of what was written before the interruption."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path)
    record_every_chunk(monkeypatch)

    def progress(done: int, total: int) -> None:
        if done > at * total:
            raise Stop

    options = {"scale": 1.0, "nonfinite": "keep-base", "resume": True, "threads": 1}
    with pytest.raises(Stop):
        nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", progress=progress, **options)  # type: ignore[arg-type]
    with pytest.warns(nm.MergeWarning):
        report = nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", **options)  # type: ignore[arg-type]
    assert report.notes == [LINE] and report.bytes_done_before > 0
    with pytest.warns(nm.MergeWarning):  # it is finished
        assert nm.merge_checkpoints("base", ["ft-0", "ft-1"], "out", **options).notes == [LINE]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.processes
def test_of_several_processes(tmp_path: Path) -> None:
    save(tmp_path)
    arguments = (*MERGE, "--threads", "1", "--nonfinite", "keep-base", "--report", "report.json")
    assert [status for status, *_ in finish(start(tmp_path, ranks=3, wait=0.0, arguments=arguments))] == [
        0,
        0,
        0,
    ]
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == [LINE]
