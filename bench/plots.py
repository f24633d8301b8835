"""Draws the last run of each device: bandwidth by number of models, share of the limit by size, and a streamed merge's
timeline.

Each plot of each device is a PNG.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from runs import Row, Unreadable, latest, read, roofline_of

try:
    import matplotlib
except ImportError:
    print("no plots: matplotlib is not installed")
    sys.exit(0)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

HERE = Path(__file__).parent

# Colours that colour-blind people can tell apart (Okabe and Ito). Each backend keeps its own.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#777777",
)  # fmt: skip
OURS = {"cpu": (BLUE, "o"), "cuda": (GREEN, "o"), "triton": (ORANGE, "s"), "torch": (PURPLE, "^")}
BASELINES = [(RED, "v"), (SKY, "D"), (GREY, "P"), ("#000000", "X"), ("#8c6d1f", "*")]
STAGES = {"read": BLUE, "copy in": SKY, "merge": ORANGE, "copy out": PURPLE, "write": GREEN}

DTYPES = ("F32", "BF16", "F16", "F64")
TIME_WINDOW_S = 0.04  # the part of a timeline that is shown


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def marks(candidates: list[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each candidate: full lines for backends, dashed ones for the rest."""
    found = {}
    baselines = iter(BASELINES * len(candidates))
    for candidate in candidates:
        name, _, variant = candidate.partition(",")
        colour, marker = OURS[name] if name in OURS else next(baselines)
        found[candidate] = (colour, marker, "-" if name in OURS and not variant else "--")
    return found


def one_tensor(rows: list[Row]) -> list[Row]:
    """The rows that are plotted: one tensor in memory, without rooflines themselves."""
    return [
        row
        for row in rows
        if row.get("suite") == "memory" and row.get("layout") == "one tensor" and row.get("of_limit")
        and row.get("n") and row.get("bytes") and row["way"] != row.get("limit")
    ]  # fmt: skip


def panels(rows: list[Row], title: str) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel for each dtype, and the panels by dtype."""
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    across = min(len(dtypes), 2)
    down = -(len(dtypes) // -across)
    figure, axes = plt.subplots(
        down, across, figsize=(5 * across + 1, 3.3 * down + 1.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.suptitle(title, fontsize=11)
    flat = axes.ravel()
    for unused in flat[len(dtypes) :]:
        unused.set_visible(False)
    for axis, dtype in zip(flat, dtypes, strict=False):
        axis.set_title(dtype, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelleft=True)
    return figure, dict(zip(dtypes, flat, strict=False))


def legend(figure: Any, axes: list[Any]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), 4), fontsize=9
    )


def draw(axis: Any, candidates: list[str], points: dict[str, list[tuple[float, float]]]) -> None:
    for candidate, (colour, marker, line) in marks(candidates).items():
        if candidate in points:
            x, y = zip(*sorted(points[candidate]), strict=True)
            filled = colour if line == "-" else "white"
            axis.plot(
                x, y, line, color=colour, marker=marker, markerfacecolor=filled, label=candidate, lw=1.5, ms=6
            )


def names(rows: list[Row]) -> list[str]:
    """Candidates in the order in which they were measured, backends first."""
    found = list(dict.fromkeys(row["way"] for row in rows))
    return sorted(found, key=lambda candidate: candidate.partition(",")[0] not in OURS)


def bandwidth(rows: list[Row], title: str) -> Any:
    """GB/s against the number of models, each at its largest size, with the roofline of the same rounds."""
    rows = one_tensor(rows)
    if not rows:
        return None
    largest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        largest[row["way"], row["dtype"], row["n"]] = row
    shown = list(largest.values())
    figure, axes = panels(shown, f"Bandwidth of a merge of n models, one tensor in memory\n{title}")
    for dtype, axis in axes.items():
        points, rooflines = defaultdict(list), defaultdict(list)
        for row in shown:
            if row["dtype"] == dtype:
                points[row["way"]].append((row["n"], row["GB/s"]))
                rooflines[row["n"]].append(roofline_of(row) or 0.0)
        line = sorted((n, statistics.median(found)) for n, found in rooflines.items())
        name = next(row.get("limit") for row in shown if row["dtype"] == dtype)
        x, y = zip(*line, strict=True)
        axis.plot(
            x, y, ":", color="black", marker="_" if len(x) == 1 else "", lw=2, ms=14, label=f"limit: {name}"
        )
        draw(axis, names(shown), points)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(n) for n in x])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_yscale("log")  # baselines are slower by a factor of ten and more
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("n, fine-tuned models")
        axis.set_ylabel("GB/s, read and written")
    legend(figure, list(axes.values()))
    return figure


def fraction(rows: list[Row], title: str) -> Any:
    """The backends' share of the limit against bytes moved, for the n that was measured at the most sizes."""
    rows = one_tensor(rows)
    sizes = {(row["n"], row["dtype"], row["numel"]) for row in rows}
    if not sizes:
        return None
    n = Counter(n for n, *_ in sizes).most_common(1)[0][0]
    shown = [row for row in rows if row["n"] == n and row["way"].partition(",")[0] in OURS]
    figure, axes = panels(shown, f"Share of the limit by size, n = {n}, one tensor in memory\n{title}")
    for dtype, axis in axes.items():
        points = defaultdict(list)
        for row in shown:
            if row["dtype"] == dtype:
                points[row["way"]].append((row["bytes"], 100 * row["of_limit"]))
        name = next(row.get("limit") for row in shown if row["dtype"] == dtype)
        axis.axhline(100, ls=":", color="black", lw=2, label=f"limit: {name}")
        draw(axis, names(shown), points)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(10, numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(bottom=0)
        axis.set_xlabel("bytes read and written")
        axis.set_ylabel("% of the limit")
    legend(figure, list(axes.values()))
    return figure


def amount(value: float) -> str:
    """Bytes in words, such as 1 MB or 100 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def timeline(found: dict[str, Any], title: str) -> Any:
    """What each worker did for a while in the middle of a streamed merge, and the total seconds of each stage."""
    spans = [(worker, stage, float(began), float(ended)) for worker, stage, began, ended in found["spans"]]
    start, end = min(span[2] for span in spans), max(span[3] for span in spans)
    # A slow disk's chunks take long: the window is widened until it shows some of them.
    usual = statistics.median(ended - began for _, _, began, ended in spans)
    window = min(max(TIME_WINDOW_S, 20 * usual), end - start)
    left = start + (end - start - window) / 2
    workers = sorted({span[0] for span in spans}, key=lambda worker: (len(str(worker)), worker))
    stages = [stage for stage in STAGES if any(span[1] == stage for span in spans)]
    stages += sorted({span[1] for span in spans} - set(stages))
    colours = STAGES | dict.fromkeys(stages[len([s for s in stages if s in STAGES]) :], GREY)
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(11, 2.6 + 0.35 * len(workers) + 0.35 * len(stages)), layout="constrained",
        height_ratios=[1.2 + len(workers), 1.2 + len(stages)],
    )  # fmt: skip
    figure.suptitle(f"Time split of a streamed merge, {found.get('way', '')}\n{title}", fontsize=11)
    for place, worker in enumerate(workers):
        for stage in stages:
            bars = [
                ((began - left) * 1e3, (ended - began) * 1e3)
                for who, what, began, ended in spans
                if (who, what) == (worker, stage) and ended > left and began < left + window
            ]
            upper.broken_barh(bars, (place - 0.4, 0.8), color=colours[stage], lw=0)
    upper.set_yticks(range(len(workers)), [str(worker) for worker in workers])
    upper.set_ylabel("worker")
    upper.invert_yaxis()
    upper.set_xlim(0, window * 1e3)
    upper.set_xlabel(
        f"ms, from {(left - start) * 1e3:.0f} ms after the start of {(end - start) * 1e3:,.0f} ms"
    )
    upper.legend(
        handles=[Patch(color=colours[stage], label=stage) for stage in stages],
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(stages), fontsize=9, frameon=False,
    )  # fmt: skip
    totals = [sum(ended - began for _, what, began, ended in spans if what == stage) for stage in stages]
    bars = lower.barh(stages, totals, color=[colours[stage] for stage in stages])
    all_of_them = sum(totals)
    lower.bar_label(
        bars, [f"{t:.3g} s, {100 * t / all_of_them:.0f} %" for t in totals], padding=4, fontsize=9
    )
    lower.invert_yaxis()
    lower.set_xlim(0, 1.15 * max(totals))
    lower.set_xlabel("seconds of all workers together")
    return figure


def read_timeline(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        spans = found["spans"]
        good = isinstance(found["machine"]["device"], str) and all(
            isinstance(stage, str) and float(began) <= float(ended) for _, stage, began, ended in spans
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Unreadable(f"{path}: {getattr(error, 'strerror', None) or 'not a timeline'}") from None
    if not good or not spans:
        raise Unreadable(f"{path}: no spans")
    return dict(found)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


def about(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {str(machine.get('date'))[:10]}, commit {machine.get('commit')}"


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=HERE / "results" / "suite.jsonl")
    options.add_argument("--output", type=Path, default=HERE / "results", help="a folder")
    given = options.parse_args(arguments)
    places = sorted(given.results.parent.glob("timeline-*.json"))
    try:
        rows = read(given.results) if given.results.exists() else []
        times = [read_timeline(place) for place in places]
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for device, measured in latest(rows).items():
        for name, plot in (("bandwidth", bandwidth), ("share", fraction)):
            if (figure := plot(measured, about(measured[-1]))) is not None:
                save(figure, given.output / f"{name}-{slug(device)}.png")
                drawn += 1
    for place, found in zip(places, times, strict=True):
        figure = timeline(found, about(found["machine"]))
        save(figure, given.output / f"{place.stem}-{slug(found['machine']['device'])}.png")
        drawn += 1
    if not drawn:
        print(
            f"no plots: no rows of one tensor in memory in {given.results}, and no timeline-*.json beside it"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
