"""A small run of the measurement of small merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import negmerge_fast


@pytest.mark.slow
@pytest.mark.processes
def test_small_merges(run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("negmerge_fast._native")
    rows = run("small", "--rounds", "1", "--tensors", "2")
    assert [row["way"] for row in rows] == [
        "import click", "import negmerge_fast", "import numpy", "kernel call", "merge_ of 2 x 1000", "python", "tiny merge",
    ]  # fmt: skip
    assert {row["checkout"] for row in rows} == {str(Path(negmerge_fast.__file__).parents[1])}
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    assert "tiny merge" in capsys.readouterr().out
