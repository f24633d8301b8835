"""Scripts of bench/, imported from their folders."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a script by its name."""
    for folder in ("tuning", "processes", "processes/methods"):
        monkeypatch.syspath_prepend(str(BENCH / folder))
    return importlib.import_module


@pytest.fixture
def run(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs a script in a folder of its own; returns the rows it appends."""
    results = tmp_path / "results" / "rows.jsonl"
    results.parent.mkdir()

    def rows(name: str, *options: str) -> list[dict[str, Any]]:
        arguments = ["--folder", str(tmp_path), "--results", str(results), *options]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        script(name).main()
        assert {path.name for path in tmp_path.iterdir()} == {"results"}
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    return rows
