"""What the tuning scripts share: ways that take turns, and rows appended to a result file and shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from negmerge_fast.benchmark import append, machine, percentiles

RESULTS = Path(__file__).parent / "results"

__all__ = ["RESULTS", "alternate", "percentiles", "record"]


def alternate(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: time.sleep(0.02),
) -> dict[str, list[float]]:
    """Seconds of each way in each round. One round runs them all in turn, so that a drift of the machine hits all.

    before: done before each, and not timed; threads of the way before must have stopped waiting for more work, busily.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            before()
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def record(file: str, rows: list[dict[str, Any]], device: str = "cpu", also: tuple[str, ...] = ()) -> None:
    """Append the rows to a result file and print them as a table. also: what it shows beside the usual."""
    append(RESULTS / file, ({**machine(device), "suite": "tune", **row} for row in rows))
    shown = ("way", "dtype", "n", "numel", "state", "p50", "GB/s", "of_limit", *also)
    texts = [
        [
            f"{row.get(key, ''):.3g}" if isinstance(row.get(key), float) else str(row.get(key, ""))
            for key in shown
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [list(shown), *texts]) for i in range(len(shown))]
    for line in [list(shown), *texts]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
