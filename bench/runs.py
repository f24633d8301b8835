"""Result files, read run by run. A run is the rows of one commit on one device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Rows of two runs are of the same measurement if these fields are equal.
KEY = ("device", "suite", "layout", "way", "dtype", "n", "numel", "state")
SPREAD = ("p20", "p50", "p80")


class Unreadable(Exception):
    """A file, line or run that cannot be read, in one line."""


def read(path: Path) -> list[Row]:
    """Read all rows of a file, in the order in which they were appended."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        raise Unreadable(f"{where}: not a JSON line") from None
    if not isinstance(row, dict):
        raise Unreadable(f"{where}: {type(row).__name__}, expected a JSON object")
    for name in ("device", "way"):
        if not isinstance(row.get(name), str):
            raise Unreadable(f"{where}: {name} {row.get(name)!r}, expected text")
    for name in (*SPREAD, "GB/s", "of_limit", "limit GB/s"):
        value = row.get(name)
        if value is None and name not in SPREAD:
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise Unreadable(f"{where}: {name} {value!r}, expected a positive number")
    return row


def results_of(path: Path, which: str | None = None) -> list[Row]:
    """Read one run of a file.

    Args:
        path: A result file.
        which: A commit, or the beginning of one or of a date. None is the last row's commit and device.
    """
    rows = read(path)
    if not rows:
        raise Unreadable(f"{path}: no rows")
    if which is None:
        last = rows[-1]
        return [row for row in rows if _commit_and_device(row) == _commit_and_device(last)]
    for found in (
        [row for row in rows if row.get("commit") == which],
        [row for row in rows if str(row.get("commit")).startswith(which)],
        [row for row in rows if str(row.get("date")).startswith(which)],
    ):
        if found:
            return found
    known = list(dict.fromkeys(f"{row.get('commit')} ({str(row.get('date'))[:10]})" for row in rows))
    raise Unreadable(f"{path}: no rows of {which!r}, the last ones are of {', '.join(known[-5:])}")


def named(text: str) -> list[Row]:
    """Read the run that FILE, FILE@COMMIT or FILE@DATE names."""
    if Path(text).exists() or "@" not in text:
        return results_of(Path(text))
    file, _, which = text.rpartition("@")
    return results_of(Path(file), which)


def latest(rows: list[Row]) -> dict[str, list[Row]]:
    """The last run of each device, without rows that were measured again later."""
    last = {row["device"]: _commit_and_device(row) for row in rows}
    return {
        device: list(by_key([row for row in rows if _commit_and_device(row) == of]).values())
        for device, of in last.items()
    }


def by_key(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """Rows by their measurement. The last row of a measurement replaces earlier ones."""
    return {tuple(row.get(name) for name in KEY): row for row in rows}


def _commit_and_device(row: Row) -> tuple[Any, ...]:
    return row.get("commit"), row["device"]


def roofline_of(row: Row) -> float | None:
    """GB/s of a row's roofline, measured in the same rounds; None without one."""
    if (stated := row.get("limit GB/s")) is not None:
        return float(stated)
    speed, fraction = row.get("GB/s"), row.get("of_limit")
    return speed / fraction if speed and fraction else None
