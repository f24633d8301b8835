"""What statistics of a consensus say, in sentences; and the points of a search for λ."""

from __future__ import annotations

import math
import os
import statistics as numbers
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.reader import File
from ..checkpoints.strict_json import parse_json
from ..core.errors import InputError, short_repr
from .names import model_labels
from .statistics import ConsensusStatistics

# A model stands out if it alone removes so many times what the others do (their median), and so large a share of all elements; or if
# it is so many times as often against the majority.
_SOLE_FACTOR, _MIN_SOLE, _MAJORITY_FACTOR, _MIN_AGAINST = 4, 0.01, 2, 0.1

_CAUSES = {
    "sole_by_sign": "has the other sign",
    "sole_by_zero": "is exactly zero",
    "sole_by_nonfinite": "is not finite",
}

# From this share on, zeros are worth a sentence.
_MIN_VETOED = 0.05

# The paper's rule for λ.
_KEPT = 0.95


class Point(NamedTuple):
    """Scores of one λ; None where a model was not evaluated."""

    scale: float
    forget: float | None
    retain: float | None


def read_points(path: str | os.PathLike[str]) -> list[Point]:
    """Read the points of a search, by λ. Lines without a scale are not points; of several with one scale the last of each score counts.

    Raises:
        InputError: If a line is none of JSON, or a score is no number.
    """
    path = Path(path)
    file = File.at(path)
    points: dict[float, Point] = {}
    for number, line in enumerate(file.read(0, file.size).splitlines(), 1):
        if line.strip():
            found = parse_json(line, path, f"line {number}", dense=True)
            if "scale" in found:
                scale, forget, retain = (found.get(key) for key in Point._fields)
                values = (scale, forget, retain)
                if (
                    not all(type(v) in (int, float) and math.isfinite(v) for v in values if v is not None)
                    or scale is None
                ):
                    raise InputError(
                        f"{path}: line {number}: {short_repr(found)}, expected numbers as scale, forget and retain"
                    )
                earlier = points.get(scale, Point(scale, None, None))
                points[scale] = Point(
                    scale,
                    earlier.forget if forget is None else forget,
                    earlier.retain if retain is None else retain,
                )
    if not points:
        raise InputError(f"{path}: no points, expected lines of JSON with scale, forget and retain")
    return sorted(points.values())


def retain_floor(points: Sequence[Point]) -> float | None:
    """The lowest retain score that the paper's rule allows; None if the base, λ = 0, was not evaluated."""
    return next((_KEPT * p.retain for p in points if p.scale == 0 and p.retain is not None), None)


def percent(ratio: float) -> str:
    """A share with three digits, of which at most two are behind the point unless it is small."""
    value = 100 * ratio
    return f"{value:.1f} %" if value >= 9.995 else f"{value:.2f} %" if value >= 0.995 else f"{value:.3g} %"


def sole_dissents(found: ConsensusStatistics, k: int) -> int:
    """How many elements would agree without model k."""
    assert found.dissent
    return sum(count for kind, count in found.dissent[k].items() if kind.startswith("sole_"))


def outliers(found: ConsensusStatistics) -> list[int]:
    """The models that stand out among three or more, by the numbers of their places."""
    if not found.dissent or found.model_count < 3 or not found.elements:
        return []
    sole = [sole_dissents(found, k) for k in range(found.model_count)]
    against = [row["against_majority"] for row in found.dissent]

    def stands_out(k: int, counts: Sequence[int], factor: float, least: float) -> bool:
        others = numbers.median(counts[:k] + counts[k + 1 :])  # type: ignore[operator]
        return counts[k] >= factor * others and counts[k] >= least * found.elements

    return [
        k
        for k in range(found.model_count)
        if stands_out(k, sole, _SOLE_FACTOR, _MIN_SOLE)
        or stands_out(k, against, _MAJORITY_FACTOR, _MIN_AGAINST)
    ]


def median_magnitude(found: ConsensusStatistics) -> float | None:
    """The middle, on a logarithmic scale, of the bin that has the median of the means; None if there are none."""
    if not found.magnitudes or not (whole := sum(found.magnitudes["counts"])):
        return None
    edges = found.magnitudes["edges"]
    bin_ = next(k for k, count in enumerate(accumulate(found.magnitudes["counts"])) if 2 * count >= whole)
    return float(math.sqrt(edges[max(bin_ - 1, 0)] * edges[min(bin_, len(edges) - 1)]))


def sentences(found: ConsensusStatistics) -> list[tuple[str, bool]]:
    """What a reader should know first, and whether it is a warning."""
    labels = model_labels(found.models, found.model_count)
    told = []
    for k in sorted(outliers(found), key=lambda k: -sole_dissents(found, k)):
        assert found.dissent
        without = found.agreed + sole_dissents(found, k)
        cause = max(_CAUSES, key=lambda kind: found.dissent[k][kind])  # type: ignore[index]
        told.append((
            f"Model {k + 1}, {labels[k]}, stands out: without it {percent(without / found.elements)} of the elements would agree, "
            f"not {percent(found.consensus_ratio)}; in most of these its difference {_CAUSES[cause]}. It is against the majority in "
            f"{percent(found.dissent[k]['against_majority'] / found.elements)} of all.",
            True,
        ))  # fmt: skip
    if found.nonfinite:
        told.append((f"{found.nonfinite:,} elements are not finite in the base or a model.", True))
    if found.vetoed_by_zero and found.elements and found.vetoed_by_zero >= _MIN_VETOED * found.elements:
        told.append((
            f"{percent(found.vetoed_by_zero / found.elements)} of the elements are vetoed by exact zeros alone: weights that a model did not "
            "train, or whose change its storage type rounded away.",
            False,
        ))  # fmt: skip
    silent = [t["name"] for t in found.tensors if not t["agreed"] and t["vetoed_by_zero"]]
    if silent and found.agreed:
        names = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        told.append((
            f"{len(silent)} of {len(found.tensors)} tensors agree nowhere, and have differences of exactly zero: {names}. "
            "Perhaps a model did not train them.",
            False,
        ))  # fmt: skip
    if found.elements and not found.agreed:
        told.append(("No element agrees: there is nothing to take off the base.", True))
    return told
