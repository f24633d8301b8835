"""Writes the tables of docs/benchmarks.md, between its marks: the latest rows of each device in bench/results/suite.jsonl, and of a GPU
that the suite has not been run on those of the tuner in tune_gpu.jsonl; and the latest whole processes in peers.jsonl.

python bench/docs.py [--check]        check: exit status 1 if there are others
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from runs import Row, Unreadable, latest, read

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
SUITE = HERE / "results" / "suite.jsonl"
TUNER = HERE / "results" / "tune_gpu.jsonl"
PROCESSES = HERE / "results" / "peers.jsonl"
BEGIN, END = "<!-- written by bench/docs.py -->", "<!-- until here -->"
BEGIN_PROCESSES = "<!-- whole processes, written by bench/docs.py -->"
COMPILED, BEST = "compiled formula", "best compiled formula"
# Slow forms of what others can do, which earlier runs measured: nothing can be read from them.
SUPERSEDED = {
    "eager formula", "torch._foreach formula", "dense two-step", "torch.compile", "torch.compile max-autotune", "load_file, formula, save_file",
}  # fmt: skip
OURS = ("cuda", "triton", "cpu", "torch", "merge_")
# Rows of code that was taken back after them, by commit, kernel and dtype: of Triton's minimum and maximum for doubles, which
# were slower than the comparisons of the run before. Those are the code since then.
TAKEN_BACK = {("d19b937", "triton", "F64")}
# Candidates whose speeds are divided by each other.
COMPARED = (("triton", "cuda"), *((f"{kernel}, in place", BEST) for kernel in ("cpu", "cuda", "triton")))
# Commits of rows whose kernels for GPUs have been changed since.
CHANGED_SINCE = {"d0fa4c0", "d19b937"}
CHANGED = "Both kernels have been changed since, and not yet been measured again."
NO_GPU = "No GPU has been measured yet: where there is one, `make bench` measures the kernels there beside the same baselines."
NO_SUITE = "The suite has not been run on this GPU yet: `make bench` measures there whole models, streaming and the same baselines, too."


def table(head: list[str], lines: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def crossed(rows: list[Row], across: str, cell: Callable[[Row], str], corner: str) -> list[str]:
    """A table with a line for each candidate and a column for each value of `across`, in the order they come."""
    candidates, columns = (list(dict.fromkeys(row[name] for row in rows)) for name in ("way", across))
    cells = {(row["way"], row[across]): cell(row) for row in rows}
    return table(
        [corner, *map(str, columns)],
        (
            [f"**{candidate}**" if candidate.partition(",")[0] in OURS else candidate]
            + [cells.get((candidate, column), "–") for column in columns]
            for candidate in candidates
        ),
    )


def speed(row: Row) -> str:
    found = row["GB/s"]
    return (
        f"{found:,.0f} ({row['of_limit']:.2f})" if found >= 1000 else f"{found:.3g} ({row['of_limit']:.2f})"
    )


def seconds(row: Row) -> str:
    return f"{row['p50']:.3g} s ({row['of_limit']:.2f})"


def of_device(device: str, rows: list[Row]) -> list[str]:
    """The tables of one device."""
    last = rows[-1]
    where = f"driver {last['driver']}" if last["driver"] else f"{last['threads']} threads"
    lines = [f"**{device}**, {where}, torch {last['torch']}, {last['date'][:10]}, commit {last['commit']}"]
    # The largest of each: past every cache.
    largest: dict[tuple[str, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["numel"] or 0):
        if row["suite"] == "memory":
            largest[row["way"], row["dtype"], row["n"]] = row
    ordered = [row for row in rows if row in largest.values()]
    if usual := [row for row in ordered if row["n"] == 8]:
        usual = best_compiled(usual)
        corner = f"8 models, one tensor: GB/s (share of the limit, {usual[0]['limit']})"
        lines += ["", *crossed(usual, "dtype", speed, corner), ""]
        between = sorted(row["limit GB/s"] for row in usual)
        lines.append(
            f"The limit beside them was between {between[0]:.3g} and {between[-1]:.3g} GB/s."
            f"{''.join(_ratio(usual, *pair) for pair in COMPARED)}{_first_calls(rows)}"
        )
        by_n = [
            {**row, "way": f"{row['way']}, {row['dtype']}"}
            for row in ordered
            if row["way"].partition(",")[0] in OURS[:3]
        ]
        lines += ["", *crossed(by_n, "n", lambda row: f"{row['of_limit']:.2f}", "share of the limit, by n")]
    for suite, cell, corner in (
        ("layouts", speed, "GB/s (share of the limit)"),
        ("files", seconds, "seconds (share of reading and writing)"),
    ):
        if found := [row for row in rows if row["suite"] == suite]:
            named = [{**row, "what": _what(row)} for row in best_compiled(found)]
            lines += ["", *crossed(named, "what", cell, corner)]
    return lines


def kernel_of(row: Row) -> str:
    return str(row["way"].partition(",")[0])


def latest_tuned(rows: list[Row]) -> dict[str, list[Row]]:
    """The last run of each device, and before it the last rows of what that run did not measure: kernels and dtypes."""
    rows = [row for row in rows if (row["commit"], kernel_of(row), row["dtype"]) not in TAKEN_BACK]
    found = latest(rows)
    for device, last in found.items():
        measured = {(kernel_of(row), row["dtype"]) for row in last}
        lacking = [
            row for row in rows if row["device"] == device and (kernel_of(row), row["dtype"]) not in measured
        ]
        found[device] = [*latest(lacking).get(device, []), *last]
    return found


def of_tuner(rows: list[Row]) -> list[str]:
    """The table of a GPU of which there is only what the tuner measured: CUDA's best constants, Triton's best launch by type."""
    last = rows[-1]
    chosen: list[Row] = []
    for kernel, dtypes in (
        ("cuda", [None]),
        ("triton", list(dict.fromkeys(row["dtype"] for row in rows))),
    ):
        for dtype in dtypes:
            candidates: dict[str, list[Row]] = {}
            for row in rows:
                if kernel_of(row) == kernel and dtype in (None, row["dtype"]):
                    candidates.setdefault(row["way"], []).append(row)
            max_rows = max(map(len, candidates.values()), default=0)
            whole = [found for found in candidates.values() if len(found) == max_rows]
            chosen += max(whole, key=_fraction, default=[])
    named = [{**row, "way": f"{kernel_of(row)}, {row['dtype']}"} for row in chosen]
    limits = sorted(row["limit GB/s"] for row in chosen)
    older = {row["way"]: row["commit"] for row in named if row["commit"] != last["commit"]}
    of_other_commits = "".join(
        f" The rows of {candidate} are of commit {commit}." for candidate, commit in older.items()
    )
    changed = f" {CHANGED}" if any(row["commit"] in CHANGED_SINCE for row in chosen) else ""
    return [
        f"**{last['device']}**, driver {last['driver']}, torch {last['torch']}, {last['date'][:10]}, commit {last['commit']}",
        "",
        *crossed(named, "n", speed, f"by the tuner, n models: GB/s (share of the limit, {last['limit']})"),
        "",
        f"One tensor, {last['bytes'] / 1e9:.2g} GB in all. The limit beside them was between {limits[0]:.4g} and {limits[-1]:.4g} GB/s.{of_other_commits}{changed} {NO_SUITE}",
    ]


def _fraction(rows: list[Row]) -> float:
    return statistics.geometric_mean(row["of_limit"] for row in rows)


def best_compiled(rows: list[Row]) -> list[Row]:
    """Rows with the fastest form of the compiled formula of each workload, in place of all its forms."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        compiled = row["way"].startswith(COMPILED)
        candidate = BEST if compiled else row["way"]
        key = (candidate, row["layout"], row["dtype"], row["n"], row["numel"], row["state"])
        if key not in found or row["GB/s"] > found[key]["GB/s"]:
            found[key] = {**row, "way": candidate}
    return list(found.values())


def _ratio(rows: list[Row], one: str, other: str) -> str:
    """How the speeds of two candidates compare, by type; empty where they were not both measured."""
    found = {(row["way"], row["dtype"]): row["GB/s"] for row in rows}
    ratios = [
        f"{found[one, dtype] / speed:.3g} ({dtype})"
        for (candidate, dtype), speed in found.items()
        if candidate == other and (one, dtype) in found
    ]
    return f" `{one}` ÷ {other}: {', '.join(ratios)}." if ratios else ""


def _first_calls(rows: list[Row]) -> str:
    """How long the first calls of compiled formulas took."""
    found = sorted(
        row["first_call"] for row in rows if row["way"].startswith(COMPILED) and row.get("first_call")
    )
    return f" The first call of a compiled formula took {found[0]:.2g} to {found[-1]:.2g} s." if found else ""


def _what(row: Row) -> str:
    state = "" if row["state"] == "in memory" else f", {row['state']}"
    size = f"{row['bytes'] / 1e9:.2g} GB" if state else f"n = {row['n']}"
    return f"{row['layout']}, {row['dtype']}, {size}{state}"


def processes(path: Path) -> str:
    """The table of whole processes."""
    rows = [row for row in read(path) if not str(row["commit"]).endswith("-dirty")] if path.exists() else []
    lines = []
    for device, found in latest(rows).items():
        last = found[-1]
        moved = f"{last['n']} fine-tuned models, {last['dtype']}, {last['bytes'] / 1e9:.2g} GB moved, {last['state']}"
        lines += [
            f"**{device}**, {last['threads']} threads, torch {last['torch']}, {last['date'][:10]}, commit {last['commit']}", "",
            *table(
                [moved, "seconds", "times this package's", "peak memory", "elements that differ"],
                (
                    [
                        f"**{row['way']}**" if row["way"] == "negmerge merge" else row["way"], f"{row['p50']:.3g}", f"{row['times ours']:.3g}", amount(row["peak MB"]),
                        "–" if row["differing"] is None else f"{row['differing']:,}",
                    ]
                    for row in found if row["way"] not in SUPERSEDED
                ),
            ),
            "",
        ]  # fmt: skip
    return "\n".join([BEGIN_PROCESSES, "", *lines, END])


def amount(megabytes: float) -> str:
    return f"{megabytes / 1000:.2g} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def text(suite: Path, tuner: Path) -> str:
    """What stands between the marks."""
    # Numbers of what nobody else can have are for their maker.
    rows, tuned = (
        [
            row
            for row in read(path)
            if not str(row["commit"]).endswith("-dirty") and row["way"] not in SUPERSEDED
        ]
        if path.exists()
        else []
        for path in (suite, tuner)
    )
    lines = [line for device, found in latest(rows).items() for line in (*of_device(device, found), "")]
    measured = {row["device"] for row in rows}
    for device, found in latest_tuned(tuned).items():
        if device not in measured:
            lines += [*of_tuner(found), ""]
    if not any(row["driver"] for row in (*rows, *tuned)):
        lines += [NO_GPU, ""]
    return "\n".join([BEGIN, "", *lines, END])


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--check", action="store_true")
    check = options.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = before
    try:
        for begin, written in ((BEGIN, text(SUITE, TUNER)), (BEGIN_PROCESSES, processes(PROCESSES))):
            head, _, rest = after.partition(begin)
            after = head + written + rest.partition(END)[2]
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    if not check:
        PAGE.write_text(after, encoding="utf-8")
    return int(check and after != before)


if __name__ == "__main__":
    sys.exit(main())
