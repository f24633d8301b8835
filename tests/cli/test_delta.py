"""negmerge delta: what it writes and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import Run, run  # noqa: F401
from resumable import weights

from negmerge_fast.checkpoints.delta import open_delta
from negmerge_fast.deltas.job import delta_checkpoints

MODELS = ("base", "ft-0", "ft-1", "ft-2")


@pytest.mark.parametrize("options", [(), ("--min-agreement", "0.6", "--include", "^[en]", "--rename", "x=y")])
def test_a_delta_that_is_applied_is_a_merge(
    run: Run, models: Any, tmp_path: Path, options: tuple[str, ...]
) -> None:
    status, out, err = run("delta", *MODELS, "-o", "d", "--report", "report.json", *options)
    assert (status, err, out.count("\n")) == (0, "", 1)
    found = open_delta(tmp_path / "d")
    assert out.startswith(f"{tmp_path}/d: {len(found.tensors)} tensors; {found.agreed:,} of ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["scale"], report["agreed"]) == (None, found.agreed)
    assert run("apply", "base", "d", "-o", "out", "--scale", "0.9", "-q") == (0, "", "")
    assert run("merge", *MODELS, "-o", "merged", "--scale", "0.9", "-q", *options) == (0, "", "")
    assert weights(tmp_path / "out") == weights(tmp_path / "merged")
    assert run("verify", "d")[0] == run("verify", "d", "--against", *MODELS)[0] == 0


def test_half(run: Run, models: Any, tmp_path: Path) -> None:
    status, _, err = run("delta", *MODELS, "-o", "d", "--half")
    assert status == 0
    assert err == "negmerge: note: means are stored in BF16: applied, they give other bits than a merge\n"
    assert {each.means.spec.dtype for each in open_delta(tmp_path / "d").tensors.values()} == {"BF16"}
    assert run("delta", *MODELS, "-o", "e", "--half", "--quiet") == (0, "", "")


def test_task_vectors(run: Run, models: Any, tmp_path: Path) -> None:
    assert run("delta", "base", "ft-0", "ft-1", "-o", "d", "--task-vectors", "-q") == (0, "", "")
    assert open_delta(tmp_path / "d").info.inputs == "task_vectors"


def test_dry_run(run: Run, models: Any, tmp_path: Path) -> None:
    status, out, err = run("delta", *MODELS, "-o", "d", "--dry-run")
    assert (status, err) == (0, "") and not list(tmp_path.glob("*d"))
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["output"] == f"{tmp_path}/d: 3 files" and lines["models"] == "3"
    assert lines["write"].endswith(": masks, and the means of what agrees")


def test_resumed_and_replaced(run: Run, models: Any, tmp_path: Path) -> None:
    delta_checkpoints("base", MODELS[1:], "d")
    assert run("delta", *MODELS, "-o", "d")[0] == 2
    assert run("delta", *MODELS, "-o", "d", "--resume") == (0, f"{tmp_path}/d: was finished already\n", "")
    assert run("delta", *MODELS[:3], "-o", "d", "--overwrite", "-q") == (0, "", "")
    assert open_delta(tmp_path / "d").info.models == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("base", "-o", "d"), "no models, expected at least one"),
        ((*MODELS, "-o", "d", "--scale", "1"), "No such option"),
        ((*MODELS, "-o", "d", "--backend", "cuda"), "cuda"),
        ((*MODELS, "-o", "d", "--rename", "x"), "'x', expected RE=TEXT"),
        ((*MODELS, "-o", "base"), "base"),
        ((*MODELS, "-o", "d", "--report", "d/report.json"), "expected another place for the report"),
        (("base", "base", "-o", "d"), "is the base itself"),
    ],
)
def test_bad_input(run: Run, models: Any, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = run("delta", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err
    assert not list(tmp_path.glob("*d"))
