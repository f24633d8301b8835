"""The script of the recipe for open-unlearning that reads scores, with a stand-in. tests/docs runs the whole recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import recipe


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "negmerge/evaluate.py", *arguments], capture_output=True, text=True
    )


@pytest.mark.processes
def test_scores_are_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the directory has those of another model, which open-unlearning would keep."""
    recipe.prepare(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = next(tmp_path.glob("home/hub/models--open-unlearning*/snapshots/*"))
    Path("saves/eval/0").mkdir(parents=True)
    for benchmark in ("tofu", "muse"):
        Path(f"saves/eval/0/{benchmark.upper()}_EVAL.json").write_text('{"former": {"agg_value": 0.1}}')
        done = evaluate(benchmark, str(model), "saves/eval/0")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"forget": pytest.approx(0.982, abs=1e-3), "retain": 0.6}
        assert "evaluation suite" in done.stderr


@pytest.mark.processes
def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.prepare(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert "MODEL OUTPUT" in evaluate("wmdp", "model", "out").stderr
    done = evaluate("tofu", str(tmp_path), "out", "forget_splitt=forget05")
    assert done.returncode and "forget_splitt" in done.stderr and not done.stdout
