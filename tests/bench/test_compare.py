"""What is noise between two runs, on made-up rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import row, write
from compare import main, verdict

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (row(1.0, 0.5), row(1.01, 0.5), "noise"),
        (row(1.0, 0.5), row(0.8, 0.625), "faster"),
        (row(1.0, 0.5), row(1.25, 0.4), "slower"),
        (row(1.0, None), row(0.8, None), "faster"),
        (row(1.0, None), row(1.25, None), "slower"),
        (row(1.0, 0.5, spread=0.2), row(0.8, 0.625, spread=0.2), "noise"),
        # Slower, with the same share of the limit: the machine is slower.
        (row(1.0, 0.5), row(1.5, 0.5), "the limit moved"),
        # As fast as before, on a faster machine.
        (row(1.0, 0.5), row(1.0, 0.4), "the limit moved"),
        # Faster, but less so than the machine.
        (row(1.0, 0.5), row(0.8, 0.4), "the limit moved"),
        # Both changed, the candidate by more.
        (row(1.0, 0.5), row(0.5, 0.8), "faster"),
        # The intervals of the shares just overlap, and the limit changed by less than the rounds vary.
        (row(1.0, 0.5), row(1.05, 0.49), "noise"),
        (row(1.0, None, suite="limits"), row(1.5, None, suite="limits"), "the limit moved"),
        (row(1.0, None, suite="limits"), row(1.01, None, suite="limits"), "noise"),
        # Rows that do not have the limit's speed.
        (row(1.0, 0.5, **{"limit GB/s": None}), row(1.5, 0.5, **{"limit GB/s": None}), "the limit moved"),
    ],
)
def test_verdicts(old: dict[str, Any], new: dict[str, Any], expected: str) -> None:
    assert verdict(old, new) == expected


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "torch.compile max-autotune, and whatever else a candidate may be called"
    old = write(
        tmp_path / "old.jsonl",
        row(1.0), row(2.0, way=name, numel=8_030_261_248), row(way="gone"), row(9.9, layout="Llama 1B"),
        row(1.0, layout="Llama 1B"),
    )  # fmt: skip
    new = write(tmp_path / "new.jsonl", row(0.5, 1.0, torch="2.5"), row(2.0, way=name, numel=8_030_261_248))
    write(Path(new), row(1.0, layout="Llama 1B"))
    assert main([old, new]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert "torch: 2.4 -> 2.5 and 2.4" in lines
    assert "A CPU, memory, one tensor, in memory" in lines and "A CPU, memory, Llama 1B, in memory" in lines
    assert any(line.split()[-4:] == ["20", "2.00", "1.00", "faster"] for line in lines)
    assert printed.count("noise") == 3  # of what was measured twice, the last row counts
    assert lines[-2:] == [
        "3 rows in both: 1 faster, 2 noise",
        "1 rows only in the old run, 0 only in the new one",
    ]


def test_runs_are_selected_by_commit_or_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = {"commit": "0000002-dirty", "date": "2026-02-03T04:05:06+00:00"}
    file = write(tmp_path / "suite@home.jsonl", row(1.0), row(1.0, way="torch"), row(0.5, 1.0, **later))
    write(Path(file), row(0.4, 1.0, device="A GPU", commit="0000003"))
    for old, new, counted in (
        (f"{file}@0000001", f"{file}@0000002", "1 rows in both: 1 faster"),
        (f"{file}@2026-01", f"{file}@2026-02-03T04", "1 rows in both: 1 faster"),
        (file, f"{file}@0000003", "1 rows in both: 1 noise"),
        (f"{file}@0000001", file, "0 rows in both"),
    ):
        assert main([old, new]) == 0
        assert counted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("", "no rows"),
        ("{}\n", ":1: device None, expected text"),
        ("\n[1]\n", ":2: list, expected a JSON object"),
        ("nonsense\n", ":1: not a JSON line"),
        (json.dumps(row(p50=1.0, p20=0)) + "\n", ":1: p20 0, expected a positive number"),
        (json.dumps(row(p80=None)) + "\n", ":1: p80 None, expected a positive number"),
        (
            json.dumps(row(commit="0000009")) + "\n",
            "no rows of '0000001', the last ones are of 0000009 (2026-01-02)",
        ),
    ],
)
def test_unreadable_files_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    good = write(tmp_path / "good.jsonl", row())
    bad = tmp_path / "bad.jsonl"
    if text is not None:
        bad.write_text(text)
    assert main([good, f"{bad}@0000001"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith(str(bad)) and printed.err.endswith(message + "\n")
    assert printed.err.count("\n") == 1


def test_comparing_needs_no_torch(tmp_path: Path) -> None:
    file = write(tmp_path / "suite.jsonl", row())
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import compare
print(compare.main([{file!r}, {file!r}]), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("1 rows in both: 1 noise\n0 False\n")
