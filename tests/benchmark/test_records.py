"""Result rows and their table."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmark_rows import MACHINE, row, rows_of

from negmerge_fast.benchmark import append, machine, table
from negmerge_fast.benchmark.records import COMPILED, line


def test_a_row_says_where_it_was_measured(tmp_path: Path) -> None:
    found = machine("cpu")
    assert set(found) == MACHINE and found["driver"] is None and found["torch"] == torch.__version__
    append(tmp_path / "new" / "rows.jsonl", [found])
    append(tmp_path / "new" / "rows.jsonl", [found])
    assert rows_of(tmp_path / "new" / "rows.jsonl") == [found, found]


def test_a_table_fits_100_columns() -> None:
    given = {
        "device": "NVIDIA H100 80GB HBM3", "suite": "layouts", "layout": "Llama 8B", "way": "compiled formula, max-autotune",
        "dtype": "BF16", "n": 32, "numel": 8_030_261_248, "state": "in memory", "p20": 12.3451, "p50": 12.4, "p80": 13.999,
        "GB/s": 3012.3, "limit": "device copy", "limit GB/s": 2999.9, "of_limit": 0.9876, "differing": 1_234_567_890,
    }  # fmt: skip
    limit = {
        **given,
        "suite": "limits",
        "n": None,
        "way": "host to device, pageable",
        "limit": None,
        "of_limit": None,
    }
    text = table([limit, given, {**given, "n": 2, "limit": None, "of_limit": None, "differing": None}])
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "n = 32, 8,030,261,248 elements",
        "12,400 (12,345 … 13,999)",
        "0.99",
        "1,234,567,890",
        "limit: device copy",
    ):
        assert part in text
    assert max(len(line(given)), len(line(limit))) <= 110


def test_a_table_names_the_best_form_of_the_compiled_formula() -> None:
    slow = row(2.0, way=COMPILED, differing=0)
    fast = row(0.5, way=f"{COMPILED}, dynamic", differing=3)
    other = row(0.1, way="cpu", differing=0)
    lines = table([slow, fast, other]).splitlines()
    dynamic, best = (
        next(line.split(name)[1].split() for line in lines if line.strip().startswith(name))
        for name in (f"{COMPILED}, dynamic", f"best {COMPILED}")
    )
    assert dynamic == best and best[-1] == "3"
    assert table([slow, fast, other, {**slow, "numel": 7}]).count(f"best {COMPILED}") == 2
    assert "best" not in table([other])
