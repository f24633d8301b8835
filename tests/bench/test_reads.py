"""A small run of the benchmark of reads against memory maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., list[dict[str, Any]]]


def test_reads(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("reads", "--bytes", "4000000", "--rounds", "1", "--tmpfs", str(tmp_path))
    assert [row["way"] for row in rows[:2]] == ["positioned reads", "maps, WILLNEED"]
    assert {(row["dtype"], row["state"]) for row in rows} == {
        (dtype, f"{state}, to tmpfs") for dtype in ("F32", "BF16") for state in ("warm", "cold")
    }
    assert capsys.readouterr().out.count(" of read and write\n") == 4
