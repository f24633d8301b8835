"""What a search of λ finds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError, escape
from .points import ScalePoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SelectedScale:
    """The scale that a search chose, and what it was chosen from.

    Attributes:
        scale: The chosen λ.
        forget: Its score on what is to be forgotten.
        retain: Its score on the rest.
        rule: By which rule it was chosen, in words.
        floor: The lowest retain score allowed; None if every one was.
        forget_target: The forget score that was to be reached; None for the lowest one.
        search: "grid" or "bracket".
        points: What was evaluated, by scale; the base is at λ = 0.
        notes: What a user should know, such as that a curve is not monotone.
    """

    scale: float
    forget: float
    retain: float
    rule: str
    floor: float | None
    forget_target: float | None
    search: str
    points: tuple[ScalePoint, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw both scores against λ, with the floor and the chosen scale.

        Args:
            path: Where the picture is saved, such as "scales.png"; None: nowhere.

        Returns:
            The figure of matplotlib.

        Raises:
            InputError: If matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure  # pyplot would keep figures for the whole process
        except ImportError:
            raise InputError("plot: needs matplotlib: pip install 'negmerge_fast[plot]'") from None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes: Any = figure.subplots()
        for name, marker, label in (("forget", "o", "forget (lower is better)"), ("retain", "s", "retain (higher is better)")):  # fmt: skip
            held = [(p.scale, getattr(p, name)) for p in self.points if getattr(p, name) is not None]
            axes.plot(*zip(*held, strict=True), marker=marker, markersize=4, label=label)
        if self.floor is not None:
            axes.axhline(
                self.floor, color="0.4", linestyle="--", linewidth=1, label="lowest retain score allowed"
            )
        if self.forget_target is not None:
            axes.axhline(self.forget_target, color="0.4", linestyle=":", linewidth=1, label="forget target")
        axes.axvline(self.scale, color="black", linewidth=1, label=f"chosen: λ = {self.scale:g}")
        axes.set(xlabel="λ", ylabel="score", title=self.rule)
        axes.title.set_size(9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure


class NoScaleError(RuntimeError):
    """No scale that a search evaluated qualifies.

    Attributes:
        points: What was evaluated, by scale; the base is at λ = 0.
        notes: What a user should know, such as that a curve is not monotone.
    """

    def __init__(self, message: str, points: Sequence[ScalePoint], notes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.points, self.notes = tuple(points), tuple(notes)

    def __str__(self) -> str:
        return escape(str(self.args[0]))
