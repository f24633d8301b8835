"""Result rows: self-contained JSON lines, and tables of them."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
# The beginning of the names of all forms of the formula under torch.compile.
COMPILED = "compiled formula"
# Fields that say what was measured, None where one does not apply.
WORKLOAD_FIELDS = ("suite", "layout", "way", "dtype", "n", "numel", "bytes", "state")


def machine(device: str = "cpu") -> Row:
    """The fields of a row that say when, where and with what versions it was measured."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "negmerge_fast": __version__,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
    }


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"  # torch calls AMD's GPUs "cuda", too


@cache
def device_name(device: str) -> str:
    if on_gpu(device):
        return str(torch.cuda.get_device_name(device))
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


@cache
def _driver(device: str) -> str | None:
    """The version of a GPU's driver, from nvidia-smi or the kernel."""
    if not on_gpu(device):
        return None
    asked = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if asked:
        return asked.splitlines()[0].strip()
    for module in ("amdgpu", "nvidia"):
        if (path := Path("/sys/module", module, "version")).is_file():
            return path.read_text().strip()
    return None


@cache
def _triton() -> str | None:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


@cache
def _commit() -> str | None:
    """The commit of the checkout, None for an installed package. It ends in "-dirty" if tracked files were changed.

    The files that benchmarks write, result files and the page of docs/, do not count.
    """
    project = ROOT / "pyproject.toml"
    if not project.is_file() or 'name = "negmerge_fast"' not in project.read_text(encoding="utf-8"):
        return None
    git = ("git", "-C", str(ROOT))
    top, head = (
        _output_of(*git, "rev-parse", "--show-toplevel"),
        _output_of(*git, "rev-parse", "--short", "HEAD"),
    )
    if not top or not head or Path(top).resolve() != ROOT.resolve():
        return None
    changed = _output_of(
        *git, "status", "--porcelain", "--untracked-files=no", "--", ":!bench/results", ":!docs/benchmarks.md"
    )
    return head + ("-dirty" if changed else "")


def _output_of(*command: str) -> str | None:
    """The output of a program, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median of seconds, and the 20th and 80th percentiles."""
    ordered = sorted(seconds)
    return {
        "p20": ordered[len(ordered) // 5],
        "p50": statistics.median(ordered),
        "p80": ordered[-1 - len(ordered) // 5],
    }


def speed(row: Row, seconds: Sequence[float]) -> Row:
    """The row of a measurement: the fields of its workload, and the seconds of its rounds as percentiles and GB/s."""
    spread = percentiles(seconds)
    timed = {"rounds": len(seconds), **spread, "GB/s": row["bytes"] / spread["p50"] / 1e9}
    rest = {"limit": None, "limit GB/s": None, "of_limit": None, "differing": None, "first_call": None}
    return {**dict.fromkeys(WORKLOAD_FIELDS), **row, **timed, **rest}


def roofline_fields(name: str, rooflines: Sequence[float], speeds: Sequence[float]) -> Row:
    """The fields of a row that compare speeds with those of a roofline, round by round, both in bytes per second."""
    fractions = [speed / roofline for speed, roofline in zip(speeds, rooflines, strict=True)]
    return {
        "limit": name,
        "limit GB/s": statistics.median(rooflines) / 1e9,
        "of_limit": statistics.median(fractions),
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a result file, one by one, so that an interrupted run keeps what it has measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            out.flush()


def record(path: Path, rows: Sequence[Row], device: str = "cpu", also: Sequence[str] = ()) -> None:
    """Append rows of a script to a result file and print them as a table. also: further fields that the table shows."""
    append(path, ({**machine(device), "suite": "tune", **row} for row in rows))
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


def table(rows: Sequence[Row]) -> str:
    """Tables of rows, one for each suite, layout, dtype and state, in lines of at most 100 characters."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[part] for part in ("device", "suite", "layout", "dtype", "state"))
        groups.setdefault(key if row["n"] else (row["device"], row["suite"]), []).append(row)
    return "\n\n".join("\n  ".join(_group(rows)) for rows in groups.values())


def line(row: Row) -> str:
    """One line about a row, for progress: the candidate and its speed."""
    workload = "" if not row["n"] else f"{row['layout']}, {row['dtype']}, n = {row['n']}, {row['numel']:,}: "
    fraction = f", {row['of_limit']:.2f} of {row['limit']}" if row["of_limit"] else ""
    state = f" {row['state']}" if row["state"] in ("cold", "warm") and workload else ""
    return f"{workload}{row['way']}{state}: {_short(row['GB/s'])} GB/s{fraction}"


def _group(rows: list[Row]) -> list[str]:
    first = rows[0]
    if not first["n"]:
        cells = [["way", "ms (p20 … p80)", "GB/s"]]
        cells += [[row["way"], _spread(row), _short(row["GB/s"])] for row in rows]
        return [f"limits on {first['device']}", *_aligned(cells)]
    title = f"{first['layout']}, {first['dtype']}, {first['state']}, on {first['device']}"
    cells, before = [], None
    for row in with_best_compiled(rows):
        if (workload := (row["n"], row["numel"])) != before:
            heading = f"n = {row['n']}, {row['numel']:,} elements"
            cells.append([heading, "ms (p20 … p80)", "GB/s", "limit", "share", "differing"])
        before = workload
        with_roofline = row["limit"] is not None
        cells.append([
            "  " + row["way"], _spread(row), _short(row["GB/s"]), _short(row["limit GB/s"]) if with_roofline else "",
            f"{row['of_limit']:.2f}" if with_roofline else "", "" if row["differing"] is None else f"{row['differing']:,}",
        ])  # fmt: skip
    return [title + (f"; limit: {first['limit']}" if first["limit"] else ""), *_aligned(cells)]


def with_best_compiled(rows: Sequence[Row]) -> list[Row]:
    """Rows, and after those of each workload the fastest form of the compiled formula once more."""
    workloads: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        workloads.setdefault((row["n"], row["numel"]), []).append(row)
    for found in workloads.values():
        if compiled := [row for row in found if row["way"].startswith(COMPILED)]:
            found.append({**max(compiled, key=lambda row: float(row["GB/s"])), "way": f"best {COMPILED}"})
    return [row for found in workloads.values() for row in found]


def _spread(row: Row) -> str:
    p20, p50, p80 = (_short(1e3 * row[p]) for p in ("p20", "p50", "p80"))
    return f"{p50} ({p20} … {p80})"


def _short(number: float) -> str:
    """A number with three significant digits."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _aligned(cells: list[list[str]]) -> list[str]:
    """Lines of cells in columns. The first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{text:<{width}}" if i == 0 else f"{text:>{width}}"
            for i, (text, width) in enumerate(zip(texts, widths, strict=True))
        ).rstrip()
        for texts in cells
    ]
