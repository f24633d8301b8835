"""Pictures of a consensus, drawn with matplotlib: each as a PNG, and as an SVG whose colours are those of the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.errors import InputError
from . import findings
from .findings import Point, percent
from .names import by_layer, model_labels, shortened, without_common_prefix
from .statistics import ConsensusStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the light page, by the names of their variables in page.html: an SVG refers to these, so that it is also dark. Series are
# told apart by people who do not see all colours (Okabe and Ito), and by their places and marks.
COLOURS = {
    "ink": "#1f2328", "muted": "#59636e", "grid": "#d8dee4", "surface": "#fefefe",
    "blue": "#0072b2", "orange": "#c77700", "grey": "#8c959f", "red": "#c8102e",
}  # fmt: skip

# More than so many models are not all named in a picture, nor cells of a map drawn one by one.
_MAX_BARS, _MAX_LABELS, _MAX_VECTOR_CELLS = 48, 40, 1500
_WIDTH = 8.0


class Picture(NamedTuple):
    """A picture.

    Attributes:
        name: Of its file, without .png.
        title: Its heading.
        caption: How it is read.
        alternative: What it shows, in words.
        figure: The drawing.
    """

    name: str
    title: str
    caption: str
    alternative: str
    figure: Figure


def draw(statistics: ConsensusStatistics, points: Sequence[Point] = ()) -> list[Picture]:
    """Draw what is known of a consensus.

    Raises:
        InputError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("a report needs matplotlib: pip install 'negmerge_fast[report]'") from None
    found: list[Picture] = []
    with _style():
        if statistics.prefixes and statistics.model_count > 1:
            found.append(_prefixes(statistics))
        if statistics.dissent and statistics.model_count > 1:
            found.append(_dissent(statistics))
        if any(tensor["elements"] for tensor in statistics.tensors):
            found.append(_layers(statistics))
        if statistics.magnitudes and any(statistics.magnitudes["counts"]):
            found.append(_magnitudes(statistics))
        if points:
            found.append(_scales(points))
    return found


def as_png(picture: Picture) -> bytes:
    """Return a picture as a PNG file, for light pages."""
    return _saved(picture.figure, format="png", dpi=150, metadata={"Software": None})


def as_svg(picture: Picture) -> str:
    """Return a picture as an SVG element, with the colours and the font of the page around it."""
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    text = _saved(picture.figure, format="svg", metadata=metadata, transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows them
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Several pictures are on one page.
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{picture.name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # The page says in words what it shows.
    return text.replace("<svg", '<svg aria-hidden="true"', 1)


def _saved(figure: Figure, **options: Any) -> bytes:
    file = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font does not have
        figure.savefig(file, **options)
    return file.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    ink, muted = COLOURS["ink"], COLOURS["muted"]
    with matplotlib.rc_context({
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": muted,
        "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False, "grid.color": COLOURS["grid"], "grid.linewidth": 0.8,
        "axes.axisbelow": True, "axes.linewidth": 0.8, "legend.frameon": False, "figure.facecolor": COLOURS["surface"],
        "axes.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "negmerge", "text.parse_math": False,
        "axes.formatter.use_mathtext": False, "mathtext.default": "regular",
    }):  # fmt: skip
        yield


def _figure(height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # pyplot would keep figures and a backend for the whole process.
    figure = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.06))
    return figure, figure.subplots(1, columns, **options)


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _prefixes(statistics: ConsensusStatistics) -> Picture:
    assert statistics.prefixes
    elements = max(statistics.elements, 1)
    models = [row["models"] for row in statistics.prefixes]
    agreed = [row["agreed"] / elements for row in statistics.prefixes]
    vetoed = [row["vetoed_by_zero"] / elements for row in statistics.prefixes]
    figure, axes = _figure(3.4)
    mark = "o" if len(models) <= _MAX_LABELS else None
    chance = [2.0 ** (1 - n) for n in models]
    axes.plot(
        models, chance, color=COLOURS["grey"], linestyle=":", linewidth=1.4, label="if signs were random"
    )
    axes.plot(
        models, vetoed, color=COLOURS["orange"], linestyle="--", marker=mark and "s", markersize=4,
        label="vetoed by an exact zero",
    )  # fmt: skip
    axes.plot(models, agreed, color=COLOURS["blue"], linewidth=2.2, marker=mark, markersize=5, label="agree")
    labels = model_labels(statistics.models, statistics.model_count)
    for k in findings.outliers(statistics):
        axes.plot(models[k], agreed[k], "o", color=COLOURS["red"], markersize=8, zorder=5)
        axes.annotate(
            shortened(labels[k], 36), (models[k], agreed[k]), (8, 12), textcoords="offset points",
            color=COLOURS["red"], fontweight="bold",
        )  # fmt: skip
    axes.set(
        xlabel="models, in the order given", ylabel="share of all elements", ylim=(0, None),
        xlim=(min(0.8, models[0]), models[-1] + 0.2),
    )  # fmt: skip
    _integers(axes, "x")
    _percent_axis(axes.yaxis)
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    alternative = "Line chart. " + "; ".join(
        f"{n} models: {percent(ratio)} agree" for n, ratio in _some(list(zip(models, agreed, strict=True)))
    )
    caption = (
        "The share of elements on whose sign the first 1, 2, … models all agree. A step down is a model that disagrees with those before "
        "it; the order of the models decides where it is. Where only differences of exactly zero are in the way, an element is vetoed by zero."
    )
    return Picture("consensus", "Consensus against the number of models", caption, alternative, figure)


def _integers(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(integer=True, nbins=16))


def _some(items: list[Any], count: int = 12) -> list[Any]:
    """All of a few items, or some of many with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def _dissent(statistics: ConsensusStatistics) -> Picture:
    from matplotlib.ticker import MaxNLocator

    assert statistics.dissent
    elements, n = max(statistics.elements, 1), statistics.model_count
    labels = model_labels(statistics.models, n)
    outliers = findings.outliers(statistics)
    shown = list(range(n))
    if n > _MAX_BARS:
        largest = sorted(shown, key=lambda k: -findings.sole_dissents(statistics, k))[:_MAX_BARS]
        shown = sorted({*largest, *outliers})
    figure, (left, right) = _figure(max(0.24 * len(shown) + 1.1, 1.9), 2, sharey=True)
    rows = range(len(shown))
    begins = [0.0] * len(shown)
    kinds = (
        ("sole_by_sign", "other sign", "blue"),
        ("sole_by_zero", "exact zero", "orange"),
        ("sole_by_nonfinite", "not finite", "red"),
    )
    for kind, label, colour in kinds:
        widths = [statistics.dissent[k][kind] / elements for k in shown]
        if not any(widths):
            continue
        left.barh(
            rows, widths, left=begins, color=COLOURS[colour], height=0.68, label=label,
            edgecolor=COLOURS["surface"], linewidth=0.5,
        )  # fmt: skip
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    against = [statistics.dissent[k]["against_majority"] / elements for k in shown]
    right.barh(rows, against, color=COLOURS["grey"], height=0.68)
    left.set_yticks(rows, [shortened(labels[k], 30) for k in shown])
    for row, k in enumerate(shown):
        if k in outliers:
            left.get_yticklabels()[row].set(color=COLOURS["red"], fontweight="bold")
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.set_xlabel("would agree without this model")
    right.set_xlabel("against the majority")
    for axes, ends in ((left, begins), (right, against)):
        _percent_axis(axes.xaxis)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(ends) * 1.2 or 0.01)
        axes.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
        for row, end in enumerate(ends):
            axes.annotate(
                percent(end), (end, row), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    if any(begins):
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=1.2)
    worst = sorted(range(n), key=lambda k: -findings.sole_dissents(statistics, k))[:8]
    alternative = "Bar chart. Elements that would agree without one model, most first: " + "; ".join(
        f"{labels[k]} {percent(findings.sole_dissents(statistics, k) / elements)}" for k in worst
    )
    caption = (
        "Left: elements that this model alone keeps from the consensus, because its difference has the other sign, is exactly zero or is not "
        "finite. Right: elements in which more than half of the models have one sign, and this model has not. Neither depends on the order. "
        "A model that stands out was probably trained on other data, or is broken."
    )
    return Picture("models", "What each model removes", caption, alternative, figure)


def _layers(statistics: ConsensusStatistics) -> Picture:
    import numpy as np

    found = by_layer(statistics.tensors)
    ratios = np.array([[math.nan if r is None else r for r in row] for row in found.ratios])
    if None in found.layers and len(found.layers) > 1:  # a gap beside what is in no layer
        ratios = np.insert(ratios, 1, math.nan, axis=1)
    rows, columns = ratios.shape
    figure, axes = _figure(max(0.27 * rows + 1.0, 1.7))
    top = float(np.nanmax(ratios)) or 1.0
    small = rows * columns <= _MAX_VECTOR_CELLS
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(ratios), cmap="cividis", vmin=0, vmax=top, edgecolors=COLOURS["surface"],
        linewidth=0.7 if small else 0, rasterized=not small,
    )  # fmt: skip
    if columns <= 12:
        for row, column in np.argwhere(~np.isnan(ratios)):
            value = ratios[row, column]
            # Colours of the map are the same in light and in dark: the numbers on it, too.
            ink = "white" if value < 0.55 * top else "black"
            axes.text(
                column + 0.5, row + 0.5, f"{100 * value:.3g}", ha="center", va="center", fontsize=8, color=ink
            )
    names = [shortened(kind, 44) for kind in without_common_prefix(found.kinds)]
    axes.set_yticks([row + 0.5 for row in range(rows)], names)
    step = max(-(-columns // 24), 1)
    gap = columns - len(found.layers)
    marked = [
        (k + 0.5 + gap * (layer is not None), "none" if layer is None else str(layer))
        for k, layer in enumerate(found.layers)
        if layer is None or (k - gap) % step == 0
    ]
    axes.set_xticks(*zip(*marked, strict=True))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=max(4 * rows, 12), fraction=0.04)
    if bar.solids is not None:
        bar.solids.set(rasterized=True, edgecolor="face")
    bar.outline.set_visible(False)
    _percent_axis(bar.ax.yaxis)
    cells = [
        (found.ratios[row][column], found.kinds[row], found.layers[column])
        for row in range(rows)
        for column in range(len(found.layers))
        if found.ratios[row][column] is not None
    ]
    low, high = min(cells, key=lambda cell: cell[0] or 0), max(cells, key=lambda cell: cell[0] or 0)

    def told(cell: Any) -> str:
        where = "" if cell[2] is None else f" in layer {cell[2]}"
        return f"{percent(cell[0])} of {cell[1]}{where}"

    alternative = f"Heat map of {rows} kinds of parameter in {len(found.layers)} columns of layers. Least: {told(low)}. Most: {told(high)}."
    caption = (
        "The share of elements that agree, by layer (the first number in a tensor's name) and kind of parameter (the rest of it). "
        "Tensors without a number are in no layer."
    )
    return Picture("layers", "Consensus by layer and kind of parameter", caption, alternative, figure)


def _magnitudes(statistics: ConsensusStatistics) -> Picture:
    assert statistics.magnitudes
    edges, counts = statistics.magnitudes["edges"], statistics.magnitudes["counts"]
    whole = sum(counts)
    inner = counts[1:-1]
    filled = [k for k, count in enumerate(inner) if count] or [0, len(inner) - 1]
    begin, end = max(filled[0] - 1, 0), min(filled[-1] + 2, len(inner))
    figure, axes = _figure(3.0)
    axes.bar(
        edges[begin:end], [count / whole for count in inner[begin:end]],
        width=[edges[k + 1] - edges[k] for k in range(begin, end)], align="edge", color=COLOURS["blue"],
        edgecolor=COLOURS["surface"], linewidth=0.5,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(y=0.16)
    middle = findings.median_magnitude(statistics)
    assert middle is not None
    if edges[begin] <= middle <= edges[end]:
        axes.axvline(middle, color=COLOURS["orange"], linestyle="--", linewidth=1.6)
        axes.annotate(
            f"median {middle:.2g}", (middle, 1), (5, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
            va="top", color=COLOURS["orange"], fontweight="bold",
        )  # fmt: skip
    axes.set(
        xlabel="magnitude of the mean difference",
        ylabel="share of the consensus",
        xlim=(edges[begin], edges[end]),
    )
    _powers(axes, edges[end] / edges[begin])
    _percent_axis(axes.yaxis)
    axes.grid(axis="y")
    outside = counts[0] + counts[-1]
    alternative = f"Histogram of {whole:,} means. The median is about {middle:.2g}; the filled bins go from {edges[filled[0]]:.2g} to {edges[filled[-1] + 1]:.2g}."
    caption = (
        "Magnitudes of the means of the elements that agree, ten bins for each power of ten. λ times these is taken off the base: where "
        "that is less than half of a step of the base's storage type, rounding takes it away again."
        + (f" {outside:,} means are outside of {edges[0]:.0e} … {edges[-1]:.0e}." if outside else "")
    )
    return Picture("magnitudes", "Magnitudes of the means", caption, alternative, figure)


def _powers(axes: Axes, span: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1e3 else (1,), numticks=12))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())


def _scales(points: Sequence[Point]) -> Picture:
    figure, axes = _figure(3.4)
    series: tuple[tuple[str, Callable[[Point], float | None], str, str], ...] = (
        ("retain", lambda point: point.retain, "blue", "o"),
        ("forget", lambda point: point.forget, "orange", "s"),
    )
    told = []
    for label, value, colour, mark in series:
        found = [(p.scale, v) for p in points if (v := value(p)) is not None]
        if found:
            axes.plot(
                *zip(*found, strict=True),
                color=COLOURS[colour],
                marker=mark,
                markersize=4,
                linewidth=1.8,
                label=label,
            )
            told += [f"{label} {v:.4g} at λ = {scale:.4g}" for scale, v in _some(found, 6)]
    floor = findings.retain_floor(points)
    if floor is not None:
        axes.axhline(
            floor,
            color=COLOURS["grey"],
            linestyle=":",
            linewidth=1.4,
            label="95 % of the base's retain score",
        )
    axes.set(xlabel="λ", ylabel="score")
    axes.grid(axis="y")
    axes.legend(loc="best")
    caption = (
        "Scores of the models that were evaluated, by λ. The paper's rule takes the λ with the lowest forget score among those whose "
        "retain score is at least 95 % of the base's."
    )
    return Picture("scales", "Scores against λ", caption, "Line chart. " + "; ".join(told), figure)
