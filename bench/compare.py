"""Compares two runs row by row, and tells changes from noise.

    python bench/compare.py OLD NEW        each FILE.jsonl, FILE.jsonl@COMMIT or FILE.jsonl@DATE

The run of a file is its last one, unless a commit or the beginning of a date selects another. A difference is noise
if the intervals from p20 to p80 overlap. Seconds tell whether a candidate became faster. Its share of the limit tells
whether the candidate changed or the machine: if the two disagree, the limit moved.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from itertools import groupby

from runs import Row, Unreadable, by_key, named, roofline_of

WIDTH = 100
FASTER, SLOWER, NOISE, MOVED = "faster", "slower", "noise", "the limit moved"
Interval = tuple[float, float]


def apart(old: Interval, new: Interval) -> int:
    """1 if all of new is above old, -1 if below, 0 if they overlap."""
    return (new[0] > old[1]) - (new[1] < old[0])


def speeds(row: Row, at_p50: float = 1.0) -> Interval:
    """The interval of speeds from the slower rounds to the faster ones, where that of the median round is at_p50."""
    return at_p50 * row["p50"] / row["p80"], at_p50 * row["p50"] / row["p20"]


def roofline_ratio(old: Row, new: Row) -> float | None:
    """The new roofline's speed divided by the old one's, None if a row has none."""
    before, after = roofline_of(old), roofline_of(new)
    fractions = old.get("of_limit") and new.get("of_limit")
    return after / before if fractions and before and after else None


def is_roofline(row: Row) -> bool:
    """Whether a row is the measurement of a roofline itself."""
    return row.get("suite") == "limits" or row["way"] == row.get("limit")


def verdict(old: Row, new: Row) -> str:
    """Whether a candidate became faster or slower, the limit moved, or the difference is noise."""
    seconds = apart(speeds(old, 1 / old["p50"]), speeds(new, 1 / new["p50"]))
    if is_roofline(new):
        return MOVED if seconds else NOISE
    roofline = roofline_ratio(old, new)
    if roofline is None:
        return (NOISE, FASTER, SLOWER)[seconds]
    fraction = apart(speeds(old, old["of_limit"]), speeds(new, new["of_limit"]))
    if seconds == fraction:
        return (NOISE, FASTER, SLOWER)[seconds]
    # A roofline that changed by less than the rounds of one run vary explains no difference.
    scatter = max(row["p80"] / row["p20"] for row in (old, new))
    return MOVED if max(roofline, 1 / roofline) > scatter else NOISE


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def table(pairs: list[tuple[Row, Row]]) -> list[str]:
    """Tables of pairs of rows, one for each device, suite, layout and state."""
    head = ["way", "dtype", "n", "numel", "old GB/s", "new GB/s", "ratio", "limit", "verdict"]
    cells = [head]
    for old, new in pairs:
        roofline = roofline_ratio(old, new)
        cells.append([
            new["way"], str(new.get("dtype") or ""), str(new.get("n") or ""), f"{new.get('numel') or 0:,}",
            *(f"{row['GB/s']:.3g}" if row.get("GB/s") else "" for row in (old, new)),
            f"{old['p50'] / new['p50']:.2f}",
            f"{roofline:.2f}" if roofline else "", verdict(old, new),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
    widths[-1] = 0

    def shown(line: list[str]) -> str:
        name, dtype, *numbers, last = line
        aligned = [cut(name, widths[0]).ljust(widths[0]), dtype.ljust(widths[1])]
        aligned += [text.rjust(width) for text, width in zip(numbers, widths[2:-1], strict=True)]
        return "  ".join([*aligned, last]).rstrip()

    lines = []
    texts = zip(pairs, cells[1:], strict=True)
    for heading, group in groupby(texts, lambda pair: _heading(pair[0][1])):
        lines += ["", cut(heading, WIDTH), shown(head), *(shown(line) for _, line in group)]
    return lines


def _heading(row: Row) -> str:
    return ", ".join(str(row[name]) for name in ("device", "suite", "layout", "state") if row.get(name))


def differences(old: list[Row], new: list[Row]) -> list[str]:
    """What else differs between two runs, such as versions, in one line each."""
    lines = []
    for name in ("commit", "negmerge_fast", "torch", "triton", "python", "driver", "threads"):
        sides = [
            " and ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))
            for rows in (old, new)
        ]
        if sides[0] != sides[1]:
            lines.append(cut(f"{name}: {sides[0] or 'none'} -> {sides[1] or 'none'}", WIDTH))
    return lines


def compare(old: list[Row], new: list[Row]) -> list[str]:
    """The lines of a comparison."""
    before, after = by_key(old), by_key(new)
    common = [key for key in after if key in before]
    places = list(dict.fromkeys(_heading(row) for row in after.values()))
    common.sort(key=lambda key: places.index(_heading(after[key])))
    pairs = [(before[key], after[key]) for key in common]
    lines = differences(old, new)
    if pairs:
        lines += [*table(pairs), ""]
    counted = Counter(verdict(*pair) for pair in pairs)
    shown = ", ".join(f"{counted[what]} {what}" for what in (FASTER, SLOWER, NOISE, MOVED) if counted[what])
    lines.append(f"{len(pairs)} rows in both{': ' if shown else ''}{shown}")
    only = len(before) - len(pairs), len(after) - len(pairs)
    if any(only):
        lines.append(f"{only[0]} rows only in the old run, {only[1]} only in the new one")
    return lines


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("old")
    options.add_argument("new")
    given = options.parse_args(arguments)
    try:
        old, new = named(given.old), named(given.new)
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(compare(old, new)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
