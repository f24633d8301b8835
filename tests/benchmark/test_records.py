"""Result rows and their table."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmark_rows import MACHINE, rows_of

from negmerge_fast.benchmark import append, machine, table
from negmerge_fast.benchmark.records import line


def test_a_row_says_where_it_was_measured(tmp_path: Path) -> None:
    found = machine("cpu")
    assert set(found) == MACHINE and found["driver"] is None and found["torch"] == torch.__version__
    append(tmp_path / "new" / "rows.jsonl", [found])
    append(tmp_path / "new" / "rows.jsonl", [found])
    assert rows_of(tmp_path / "new" / "rows.jsonl") == [found, found]


def test_a_table_fits_100_columns() -> None:
    row = {
        "device": "NVIDIA H100 80GB HBM3", "suite": "layouts", "layout": "Llama 8B", "way": "torch.compile max-autotune",
        "dtype": "BF16", "n": 32, "numel": 8_030_261_248, "state": "in memory", "p20": 12.3451, "p50": 12.4, "p80": 13.999,
        "GB/s": 3012.3, "limit": "device copy", "limit GB/s": 2999.9, "of_limit": 0.9876, "differing": 1_234_567_890,
    }  # fmt: skip
    limit = {
        **row,
        "suite": "limits",
        "n": None,
        "way": "host to device, pageable",
        "limit": None,
        "of_limit": None,
    }
    text = table([limit, row, {**row, "n": 2, "limit": None, "of_limit": None, "differing": None}])
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "n = 32, 8,030,261,248 elements",
        "12,400 (12,345 … 13,999)",
        "0.99",
        "1,234,567,890",
        "limit: device copy",
    ):
        assert part in text
    assert max(len(line(row)), len(line(limit))) <= 110
