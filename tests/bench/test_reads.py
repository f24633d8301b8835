"""A small run of the comparison with plain loops over files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# They compile programs and read files anew: too long for every run.
pytestmark = pytest.mark.slow

Run = Callable[..., list[dict[str, Any]]]


def test_reads(script: Callable[[str], Any], run: Run, tmp_path: Path) -> None:
    if reason := script("process").why_not():
        pytest.skip(reason)
    rows = run("reads", "--layers", "2", "--shrink", "8", "--rounds", "1", "--tmpfs", str(tmp_path))
    assert {row["state"] for row in rows} == {"warm, to tmpfs", "cold, within 512 MiB"}
    assert rows[0]["way"] == "negmerge merge" and rows[0]["limit"] == "in turn, 1 thread"
    for row in rows:
        assert row["p50"] > 0 and (row["of_limit"] == 1.0) <= (row["way"] == row["limit"])


def test_plain_loops_merge(script: Callable[[str], Any], tmp_path: Path) -> None:
    """All ways to read give the bytes that the package writes."""
    reads, llamas = script("reads"), script("llamas")
    models = llamas.make(tmp_path, reads.MODEL.shrunk(32)._replace(layers=2), 2, 5 << 30)
    case = reads.Case(models, "cold", tmp_path / "outs", reads.build(tmp_path), None)
    case.prepare()
    case.ours()
    (merged,) = llamas.weights(case.out / "merged")
    begin = int.from_bytes(merged.read_bytes()[:8], "little") + 8
    for access, threads, merges in reads.PLAIN.values():
        case.plain(access, threads, merges)
        expected = merged if merges else case.files[0]
        # The header is not of numbers.
        assert (case.out / "plain").read_bytes()[begin:] == expected.read_bytes()[begin:], access
