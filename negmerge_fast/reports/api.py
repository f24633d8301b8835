"""Reports of a consensus: a page, its pictures and its numbers, as files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._version import __version__
from ..core.errors import InputError, escape, short_repr
from ..streaming.options import PathLike, as_path
from . import findings, pictures
from .findings import Point, percent
from .names import model_labels, shortened
from .statistics import ConsensusStatistics

PAGE, STATISTICS = "index.html", "statistics.json"
_NAMES = {
    PAGE,
    STATISTICS,
    *(f"{name}.png" for name in ("consensus", "models", "layers", "magnitudes", "scales")),
}

# Rows of the table of tensors. A page with more is slow to open.
_MAX_TENSORS = 1000
_MAX_NAME = 200

_SOURCES = {
    "models": "Counted from the models.",
    "delta": "Read from a consensus delta.",
    "report": "Read from the report of a merge.",
}


def write_report(
    statistics: ConsensusStatistics,
    output: PathLike,
    *,
    points: PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a report: a page that needs no other file and no network, its pictures as PNG files, and statistics.json.

    Args:
        statistics: What is reported, as consensus_statistics counted it.
        output: The path of the report, a directory. It appears complete or not at all.
        points: A file of the scores of several λ, a line of JSON with scale, forget and retain for each.
        overwrite: Replace output if it is a report, with no other files in it.

    Returns:
        The path of the page.

    Raises:
        InputError: If output exists, a point is none, or matplotlib or jinja2 is not installed.
        OSError: If writing fails.
    """
    path = as_path("output", output)
    check_output(path, overwrite)
    return publish(render(statistics, read_points(points)), path, overwrite)


def read_points(path: PathLike | None) -> list[Point]:
    """Read a file of points, if there is one."""
    return [] if path is None else findings.read_points(as_path("points", path))


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse a path that a report cannot be written to."""
    try:
        exists = os.path.lexists(path)
        if exists and not overwrite:
            raise InputError(f"{path}: exists, expected no such path (or --overwrite)")
        if exists:
            if path.is_symlink() or not path.is_dir():
                raise InputError(f"{path}: not a directory, expected a report to replace")
            unknown = sorted(set(os.listdir(path)) - _NAMES)
            if unknown or not (path / PAGE).exists():
                what = short_repr(unknown[0]) if unknown else f"no {PAGE}"
                raise InputError(f"{path}: has {what}, expected a report to replace")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path.absolute().parent}: no such directory, expected one to hold {path.name}")
        if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise InputError(f"{path.absolute().parent}: cannot be written to")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def render(statistics: ConsensusStatistics, points: Sequence[Point] = ()) -> dict[str, bytes]:
    """Return the files of a report, by their names."""
    drawn = pictures.draw(statistics, points)
    files = {f"{picture.name}.png": pictures.as_png(picture) for picture in drawn}
    files[STATISTICS] = statistics.to_json().encode()
    files[PAGE] = _page(statistics, points, [(p, pictures.as_svg(p)) for p in drawn]).encode(
        "utf-8", "replace"
    )
    return files


def publish(files: Mapping[str, bytes], path: Path, overwrite: bool = False) -> Path:
    """Write files into a new directory beside a path, and move it there."""
    path = Path(os.path.abspath(path))
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:80]}.", dir=path.parent) as staging:
        made, former = Path(staging, "report"), Path(staging, "former")
        made.mkdir()  # with the permissions that a user's directories have
        for name, content in files.items():
            (made / name).write_bytes(content)
        check_output(path, overwrite)
        if path.exists():
            os.rename(path, former)
        try:
            os.rename(made, path)
        except OSError:
            if former.exists():
                os.rename(former, path)
            raise
        shutil.rmtree(former, ignore_errors=True)
    return path / PAGE


class _Row(NamedTuple):
    """A row of a table."""

    name: str
    cells: list[str]
    number: int = 0
    is_outlier: bool = False


def _page(
    statistics: ConsensusStatistics, points: Sequence[Point], drawn: Sequence[tuple[pictures.Picture, str]]
) -> str:
    try:
        import jinja2
    except ImportError:
        raise InputError("a report needs jinja2: pip install 'negmerge_fast[report]'") from None
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    count = statistics.model_count
    return template.render(
        s=statistics,
        version=__version__,
        title=f"Consensus of {count} model{'s' if count > 1 else ''}",
        source=_SOURCES[statistics.source],
        figures=_figures(statistics),
        sentences=findings.sentences(statistics),
        pictures=drawn,
        models=_model_rows(statistics),
        tensors=_tensor_rows(statistics),
        points=points,
    )


def _printable(value: object) -> object:
    """What a page shows of a value: names and paths may have any characters."""
    return escape(value) if type(value) is str else value


def _figures(statistics: ConsensusStatistics) -> list[tuple[str, str]]:
    """What is in large letters."""
    elements = max(statistics.elements, 1)
    found = [
        ("models", f"{statistics.model_count:,}"),
        ("elements", _count(statistics.elements)),
        ("agree", percent(statistics.consensus_ratio)),
    ]
    if statistics.vetoed_by_zero is not None:
        found.append(("vetoed by zero", percent(statistics.vetoed_by_zero / elements)))
    if statistics.nonfinite is not None:
        found.append(("not finite", f"{statistics.nonfinite:,}"))
    if (middle := findings.median_magnitude(statistics)) is not None:
        found.append(("median mean", f"{middle:.2g}"))
    return found


def _count(count: int) -> str:
    """A number with its digits, or three of a large one and the letter of models' names."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _model_rows(statistics: ConsensusStatistics) -> list[_Row]:
    if not statistics.models and not statistics.prefixes:
        return []
    elements, outliers = max(statistics.elements, 1), findings.outliers(statistics)
    rows = []
    for k, label in enumerate(model_labels(statistics.models, statistics.model_count)):
        cells = []
        if statistics.prefixes and statistics.dissent:
            prefix = statistics.prefixes[k]
            cells = [
                percent(prefix["agreed"] / elements),
                percent(prefix["broken_by_sign"] / elements),
                percent(prefix["broken_by_zero"] / elements),
                percent((statistics.agreed + findings.sole_dissents(statistics, k)) / elements)
                if statistics.model_count > 1
                else "–",
                percent(statistics.dissent[k]["against_majority"] / elements),
            ]
        rows.append(_Row(shortened(label, _MAX_NAME), cells, k + 1, k in outliers))
    return rows


def _tensor_rows(statistics: ConsensusStatistics) -> list[_Row]:
    tensors = statistics.tensors
    if len(tensors) > _MAX_TENSORS:
        tensors = sorted(tensors, key=lambda tensor: -tensor["elements"])[:_MAX_TENSORS]
    return [_Row(shortened(tensor["name"], _MAX_NAME), _tensor_cells(tensor)) for tensor in tensors]


def _tensor_cells(tensor: Mapping[str, Any]) -> list[str]:
    elements, vetoed, nonfinite = tensor["elements"], tensor["vetoed_by_zero"], tensor["nonfinite"]
    return [
        f"{elements:,}",
        percent(tensor["agreed"] / elements) if elements else "–",
        percent(vetoed / elements) if elements and vetoed is not None else "–",
        "–" if nonfinite is None else f"{nonfinite:,}",
    ]
