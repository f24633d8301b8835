"""The command that writes a page about a consensus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Run, run  # noqa: F401
from report_models import MODELS, WRONG, save_llama

from negmerge_fast.cli.signals import Signals, Stopped
from negmerge_fast.deltas.job import delta_checkpoints
from negmerge_fast.reports import api
from negmerge_fast.reports.statistics import consensus_statistics

REPORT = ("report", "base", *MODELS, "--output", "out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path)
    return tmp_path


def test_a_report_of_models(run: Run, folder: Path) -> None:
    (folder / "points.jsonl").write_text(
        '{"scale": 0, "forget": 0.9, "retain": 1}\n{"scale": 1, "forget": 0.1, "retain": 1}\n'
    )
    status, out, err = run(*REPORT, "--points", "points.jsonl", "--threads", "2", "--memory-budget", "64MiB")
    assert (status, err) == (0, "")
    first, wrong, *_ = out.splitlines()
    found = consensus_statistics("base", MODELS)
    assert first == (
        f"{folder / 'out' / 'index.html'}: 5 models, {found.agreed:,} of {found.elements:,} elements agree "
        f"({found.consensus_ratio:.2%})"
    )
    assert wrong.startswith(f"Model 3, {WRONG}, stands out: ")
    assert {path.name for path in (folder / "out").iterdir()} == {
        "index.html", "statistics.json", "consensus.png", "models.png", "layers.png", "magnitudes.png", "scales.png",
    }  # fmt: skip
    assert json.loads((folder / "out" / "statistics.json").read_text()) == json.loads(found.to_json())


def test_a_report_of_a_delta_and_of_a_report(run: Run, folder: Path) -> None:
    delta_checkpoints("base", MODELS, "D")
    assert run("report", "D", "--output", "of-delta", "--quiet") == (0, "", "")
    assert (
        run(
            "merge",
            "base",
            *MODELS,
            "--output",
            "merged",
            "--scale",
            "1",
            "--report",
            "report.json",
            "--quiet",
        )[0]
        == 0
    )
    assert run("report", "report.json", "--output", "of-report", "--quiet") == (0, "", "")
    assert run("report", "of-delta/statistics.json", "--output", "again", "--quiet") == (0, "", "")
    pages = {
        path: {each.name for each in (folder / path).glob("*.png")}
        for path in ("of-delta", "of-report", "again")
    }
    assert pages == {
        "of-delta": {"layers.png", "magnitudes.png"}, "of-report": {"layers.png"}, "again": {"layers.png", "magnitudes.png"},
    }  # fmt: skip


def test_options_of_a_report(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        api, "render", lambda found, _: {"index.html": b"", "statistics.json": found.to_json().encode()}
    )
    options = ("--include", "layers", "--exclude", "mlp", "--task-vectors", "--rename", "x=y", "--quiet")
    assert run(*REPORT, *options) == (0, "", "")
    expected = consensus_statistics("base", MODELS, include="layers", exclude="mlp", inputs="task_vectors")
    assert json.loads((folder / "out" / "statistics.json").read_text()) == json.loads(expected.to_json())
    assert run(*REPORT, "--overwrite", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("report", "base", "--output", "out"), "base: no delta.safetensors and no delta.safetensors.index.json, expected a consensus delta"),
        (("report", "base", "ft-0"), "Missing option '--output' / '-o'."),
        ((*REPORT[:-1], "base"), "base: exists, expected no such path (or --overwrite)"),
        ((*REPORT[:-1], "base", "--overwrite"), "base: has 'config.json', expected a report to replace"),
        ((*REPORT, "--points", "no"), "no: No such file or directory, expected a file"),
        ((*REPORT, "--rename", "x"), "Invalid value for '--rename': 'x', expected RE=TEXT"),
        ((*REPORT, "--memory-budget", "1"), "memory_budget: 1 bytes, expected at least"),
    ],
)  # fmt: skip
def test_errors_of_a_report_are_one_line(
    arguments: tuple[str, ...], told: str, run: Run, folder: Path
) -> None:
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"negmerge: {told}")
    assert not (folder / "out").exists()


def test_a_signal_while_models_are_read_leaves_nothing(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Signals) -> None:
        if self.guarded:
            self.received = 2
            raise Stopped

    monkeypatch.setattr(Signals, "check", stop)
    before = sorted(folder.iterdir())
    assert run(*REPORT) == (130, "", "negmerge: interrupted\n")
    assert sorted(folder.iterdir()) == before
