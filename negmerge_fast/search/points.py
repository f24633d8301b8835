"""Scores of scales: each is evaluated once, and kept in a file of JSON lines so that a search can go on.

The first line says which delta the scores are of, each further line is what one evaluation gave:

    {"format": "negmerge-points", "version": "1", "delta": "xxh3_128:…", "evaluated_by": null}
    {"scale": 0.5, "forget": 0.31, "retain": 0.97, "seconds": 61.5}

A score that was not asked for is not in its line; a later line with the same scale may have it. A last line that a crash cut short is
ignored.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ..checkpoints.reader import naming
from ..checkpoints.strict_json import parse_json
from ..core.errors import InputError, short_repr
from ..output.filesystem import sync_data

FORMAT, VERSION = "negmerge-points", "1"
SCORES = ("forget", "retain")

# The scores that are missing of a scale; a Mapping with these, or with both.
ScoreName = Literal["forget", "retain"]
Evaluate = Callable[[float, Sequence[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class ScalePoint:
    """The scores of a model at one λ.

    Attributes:
        scale: λ.
        forget: The score on what is to be forgotten: the lower, the more is forgotten. None if the search did not need it.
        retain: The score on the rest: the higher, the better. None if the search did not need it.
        seconds: How long the evaluations took.
    """

    scale: float
    forget: float | None = None
    retain: float | None = None
    seconds: float = 0.0


class PointsFile:
    """A file of scores, to be entered. While it is open no other search can open it.

    Args:
        path: The file. It is made if there is none.
        delta: What identifies the delta.
        evaluated_by: The command that evaluates; None for functions of Python.

    Attributes:
        points: What the file held, by scale.
        notes: What a user should know of it.
    """

    def __init__(self, path: str | os.PathLike[str], delta: str, evaluated_by: str | None = None) -> None:
        self.path = Path(path)
        self.points: dict[float, ScalePoint] = {}
        self.notes: list[str] = []
        self._head = {
            "format": FORMAT, "version": VERSION, "delta": delta, "evaluated_by": evaluated_by,
        }  # fmt: skip
        self._descriptor, self._is_empty = -1, False

    def __enter__(self) -> PointsFile:
        if not (parent := self.path.absolute().parent).is_dir():
            raise InputError(f"{self.path}: no directory {parent}, expected one to write to")
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"{self.path}: not a regular file, expected a file of points")
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            with naming(self.path):
                self._begin()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_empty:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def add(self, point: ScalePoint) -> None:
        """Append what one evaluation gave."""
        fields = {
            "scale": point.scale,
            "forget": point.forget,
            "retain": point.retain,
            "seconds": point.seconds,
        }
        self._is_empty = False
        with naming(self.path):
            self._write({name: value for name, value in fields.items() if value is not None})

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise InputError(f"{self.path}: not a regular file, expected a file of points")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another search is writing it") from None
        except OSError:
            pass  # a file system without locks

    def _begin(self) -> None:
        content = b"".join(iter(lambda: os.read(self._descriptor, 1 << 20), b""))
        *lines, cut = content.split(b"\n")
        if lines:
            self._check_head(self._parse(lines[0], 1))
            for number, line in enumerate(lines[1:], 2):
                self._take(self._parse(line, number), number)
        elif not self._encode(self._head).startswith(cut):
            raise InputError(f"{self.path}: expected a file of points, or none")
        if cut:
            os.ftruncate(self._descriptor, len(content) - len(cut))
        if not lines:
            self._is_empty = True  # until there is a score
            self._write(self._head)
        elif self.points:
            self.notes.append(f"{self.path}: the scores of {len(self.points)} scales are from there")

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        return parse_json(bytearray(line), self.path, f"line {number}")

    def _check_head(self, head: Mapping[str, Any]) -> None:
        for name in ("format", "version", "delta"):
            if head.get(name) != self._head[name]:
                raise InputError(
                    f"{self.path}: {name} {short_repr(head.get(name))}, expected {self._head[name]}"
                    + (": the scores are of another delta" if name == "delta" else "")
                )
        if (found := head.get("evaluated_by")) != self._head["evaluated_by"]:
            by = "functions of Python" if found is None else short_repr(found)
            self.notes.append(f"{self.path}: its scores were evaluated by {by}")

    def _take(self, line: Mapping[str, Any], number: int) -> None:
        where = f"{self.path}: line {number}"
        if unknown := sorted(line.keys() - {"scale", "seconds", *SCORES}):
            raise InputError(f"{where}: {short_repr(unknown[0])}, expected scale, seconds, forget and retain")
        values = {name: number_of(f"{where}: {name}", value) for name, value in line.items()}
        if "scale" not in values:
            raise InputError(f"{where}: no scale")
        point = ScalePoint(**values)
        self.points[point.scale] = combined(self.points.get(point.scale), point)

    def _write(self, fields: Mapping[str, Any]) -> None:
        data = memoryview(self._encode(fields))
        while data:
            data = data[os.write(self._descriptor, data) :]
        sync_data(self._descriptor)

    @staticmethod
    def _encode(fields: Mapping[str, Any]) -> bytes:
        return json.dumps(fields).encode() + b"\n"


class Scores:
    """The scores of scales, each evaluated when it is first asked for.

    Args:
        evaluate: Evaluates a scale; it is told which scores are wanted.
        file: Where scores are kept, and were kept before.
        on_point: Called with the number of scales that have been asked for so far.
    """

    def __init__(self, evaluate: Evaluate, file: PointsFile | None, on_point: Callable[[int], None]) -> None:
        self._evaluate, self._file, self._on_point = evaluate, file, on_point
        self._known = dict(file.points) if file else {}
        self._asked: dict[float, None] = {}

    @property
    def points(self) -> list[ScalePoint]:
        """What was asked for, by scale. What only the file has is of another search."""
        return [self._known[scale] for scale in sorted(self._asked)]

    def forget(self, scale: float) -> float:
        return self._get(scale, "forget")

    def retain(self, scale: float) -> float:
        return self._get(scale, "retain")

    def both(self, scale: float) -> ScalePoint:
        """Both scores, evaluated together."""
        self._get(scale, *SCORES)
        return self._known[scale]

    def _get(self, scale: float, *names: str) -> float:
        missing = [name for name in names if getattr(self._known.get(scale), name, None) is None]
        if missing:
            began = time.perf_counter()
            found = self._evaluate(scale, missing)
            seconds = time.perf_counter() - began
            values = {name: score_of(name, scale, found[name]) for name in SCORES if name in found}
            point = ScalePoint(scale, **values, seconds=seconds)
            if self._file is not None:
                self._file.add(point)
            self._known[scale] = combined(self._known.get(scale), point)
        self._asked[scale] = None
        self._on_point(len(self._asked))
        return float(getattr(self._known[scale], names[0]))


def combined(earlier: ScalePoint | None, later: ScalePoint) -> ScalePoint:
    """What two evaluations of a scale gave; where both have a score, the later one."""
    if earlier is None:
        return later
    return ScalePoint(
        later.scale,
        earlier.forget if later.forget is None else later.forget,
        earlier.retain if later.retain is None else later.retain,
        earlier.seconds + later.seconds,
    )


def score_of(name: str, scale: float, value: object) -> float:
    """A score as a finite float."""
    return number_of(f"{name} at λ {scale:g}", value)


def number_of(where: str, value: object) -> float:
    """A number, as of NumPy or in a tensor of one element, as a finite float.

    Raises:
        InputError: If it is none.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{where}: {short_repr(value)}, expected a number") from None
    if not math.isfinite(number):
        raise InputError(f"{where}: {number}, expected a finite number")
    return number + 0.0  # -0.0 and 0.0 are one scale
