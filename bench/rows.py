"""Result rows: self-contained JSON lines, appended to bench/results/, and the table a person reads."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import negmerge_fast

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where and with what a row was measured."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu[1] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "negmerge_fast": negmerge_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """The commit that was measured; rows that a benchmark has just appended are no change to it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parents[1])
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


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


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p20": ordered[len(ordered) // 5],
        "p50": statistics.median(ordered),
        "p80": ordered[-1 - len(ordered) // 5],
    }


def record(file: str, rows: list[dict[str, Any]]) -> None:
    """Append the rows to a result file and print them as a table."""
    about = machine()
    with open(RESULTS / file, "a", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({**about, **row}) + "\n")
    shown = ("way", "dtype", "n", "numel", "state", "p50", "GB/s", "of_limit")
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
