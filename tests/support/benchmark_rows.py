"""Rows of the benchmarks: their fields, those of a result file, and made-up ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MACHINE = {"commit", "date", "device", "driver", "threads", "negmerge_fast", "torch", "triton", "python"}
WORKLOAD = {"suite", "layout", "way", "dtype", "n", "numel", "bytes", "state"}
MEASURED = {
    "rounds",
    "p20",
    "p50",
    "p80",
    "GB/s",
    "limit",
    "limit GB/s",
    "of_limit",
    "differing",
    "first_call",
}

ON_A_CPU = {"commit": "0000001", "date": "2026-01-02T03:04:05+00:00", "device": "A CPU", "torch": "2.4"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read a result file."""
    return [json.loads(text) for text in path.read_text().splitlines()]


def row(
    p50: float = 1.0, fraction: float | None = 0.5, spread: float = 0.02, **others: Any
) -> dict[str, Any]:
    """A row of a merge of 10 GB in p50 seconds, which is a fraction of the limit."""
    limit = (
        {"of_limit": fraction, "limit": "memory read", "limit GB/s": 10 / p50 / fraction} if fraction else {}
    )
    return {
        **ON_A_CPU, "suite": "memory", "layout": "one tensor", "way": "cpu", "dtype": "F32", "n": 8, "numel": 250_000_000,
        "bytes": 10_000_000_000, "state": "in memory", "rounds": 7, "p20": p50 * (1 - spread), "p50": p50,
        "p80": p50 * (1 + spread), "GB/s": 10 / p50, **limit, **others,
    }  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> str:
    """Append rows to a result file, and return its path."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    return str(path)
