"""negmerge apply, and what other commands say to a delta."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import MERGE, negmerge
from command import Run, run  # noqa: F401
from resumable import weights

from negmerge_fast.checkpoints.delta import open_delta
from negmerge_fast.deltas.job import delta_checkpoints

APPLY = ("apply", "base", "delta", "--output", "out")


@pytest.fixture
def delta(models: Any, tmp_path: Path) -> Path:
    delta_checkpoints(tmp_path / "base", sorted(tmp_path.glob("ft-*")), tmp_path / "delta")
    return tmp_path / "delta"


def test_one_scale(run: Run, delta: Path, tmp_path: Path) -> None:
    status, out, err = run(*APPLY, "--scale", "0.9", "--report", "report.json")
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path}/out: 6 tensors merged, 1 unchanged; ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert run(*MERGE[:-4], "-o", "merged", "--scale", "0.9", "--report", "merged.json")[0] == 0
    merged = json.loads((tmp_path / "merged.json").read_text())
    assert report["tensors"] == merged["tensors"] and report["models"] == ["delta"]
    assert weights(tmp_path / "out") == weights(tmp_path / "merged")
    status, out, err = run("verify", "out", "--against", "base", "delta")
    assert (status, err) == (0, "") and "merged again" in out
    status, _, err = run("verify", "out", "--against", "base", "ft-0")
    assert (status, err.count("\n")) == (2, 1) and "expected the files of delta" in err


def test_several_scales(run: Run, delta: Path, tmp_path: Path) -> None:
    scales = ("--scale", "0.5", "--scale", "1", "--scale=-0.25")
    status, out, err = run(*APPLY, *scales, "--report", "report.json")
    assert (status, err) == (0, "")
    names = ["out-0.5", "out-1.0", "out--0.25"]
    assert [line.partition(":")[0] for line in out.splitlines()[:3]] == [
        f"{tmp_path}/{name}" for name in names
    ]
    assert [each["scale"] for each in json.loads((tmp_path / "report.json").read_text())] == [0.5, 1.0, -0.25]
    assert run(*APPLY, *scales, "--quiet")[0] == 2
    assert run(*APPLY, *scales, "--quiet", "--resume") == (0, "", "")
    assert run(*APPLY, *scales, "--quiet", "--overwrite") == (0, "", "")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == sorted(names)


def test_dry_run(run: Run, delta: Path, tmp_path: Path) -> None:
    status, out, err = run(*APPLY, "--scale", "0.5", "--scale", "0.9", "--dry-run")
    assert (status, err) == (0, "") and not list(tmp_path.glob("*out*"))
    lines = out.splitlines()
    assert "delta     delta" in lines
    assert [line for line in lines if line.startswith("output")] == [
        f"output    {tmp_path}/out-{scale}: 5 files" for scale in (0.5, 0.9)
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--scale", "nan"), 2, "scale: nan, expected a finite number"),
        (("--scale", "0.5", "--scale", ".5"), 2, "scale: 0.5 twice, expected each once"),
        ((), 2, "Missing option '--scale'"),
        (("--scale", "1", "--report", "delta/report.json"), 2, "is inside delta, expected another place"),
        (
            ("--scale", "1", "--scale", "2", "--report", "out-2.0/report.json"),
            2,
            "/out-2.0, expected another place",
        ),
        (("--scale", "1", "--output", "delta/out"), 2, "the output is inside the input delta"),
    ],
)
def test_bad_input(run: Run, delta: Path, tmp_path: Path, arguments: Any, status: int, said: str) -> None:
    found, out, err = run(*APPLY, *arguments)
    assert (found, out) == (status, "") and said in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_models_and_deltas_are_told_apart(run: Run, delta: Path, tmp_path: Path) -> None:
    for command in (("merge", "base", "delta"), ("merge", "delta", "ft-0")):
        status, _, err = run(*command, "-o", "out", "--scale", "1")
        assert status == 2 and err.count("\n") == 1
        assert err.endswith(".safetensors: a consensus delta, expected the weights of a model\n")
    status, _, err = run("apply", "base", "ft-0", "-o", "out", "--scale", "1")
    assert (status, err.count("\n")) == (2, 1) and "expected a consensus delta" in err


def test_inspect(run: Run, delta: Path, tmp_path: Path) -> None:
    status, out, err = run("inspect", "delta")
    assert (status, err, out.count("\n")) == (0, "", 1 + 6)
    found = open_delta(delta).tensors["embed"]
    counted = f"{found.agreed} of 800 ({found.agreed / 800:.2%})"
    assert [line for line in out.splitlines() if line.split()[0] == "embed"] == [
        f"embed   F32 (50, 16): {counted}"
    ]
    assert out.startswith("delta: consensus delta of 'base' and 3 models (min_agreement 1.0), 3 files (")
    assert "elements agreed (" in out and "means in F32, F64" in out
    status, out, err = run("inspect", "base", "delta")
    assert (status, err) == (0, "") and out.endswith(" elements\n") and "can be applied: 6 tensors" in out
    status, _, err = run("inspect", "ft-0", "delta")
    assert (status, err.count("\n")) == (2, 1) and "in the base of delta" in err
    status, _, err = run("inspect", "base", "delta", "ft-0")
    assert status == 2 and "a consensus delta, expected the weights of a model" in err
    shutil.rmtree(tmp_path / "delta")
    (tmp_path / "delta").mkdir()
    assert run("inspect", "delta")[0] == 2


def test_no_torch_is_waited_for(delta: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    make = ("delta", "base", "ft-0", "-o", "own")
    for command in (make, (*APPLY, "--scale", "1")):
        done = negmerge(*command, "--threads", "1", cwd=tmp_path, env=environment)
        assert done.returncode == 0
        assert not any(line.endswith("| torch") for line in done.stderr.splitlines())
