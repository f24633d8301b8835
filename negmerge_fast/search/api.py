"""Choosing λ on a live model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from ..core.errors import InputError, MergeWarning, short_repr, stacklevel
from ..core.pairing import Rename
from ..deltas.memory import Delta
from ..tensors.names import Model
from .identity import identity_of
from .points import PointsFile
from .progress import OnProgress, on_progress_of
from .result import NoScaleError, SelectedScale
from .selection import SelectOptions, select

Score = Callable[[Any], Any]


def select_scale(
    model: Model,
    delta: Delta,
    *,
    forget: Score | None = None,
    retain: Score | None = None,
    evaluate: Score | None = None,
    scales: Iterable[float] | None = None,
    search: Literal["grid", "bracket"] = "grid",
    retain_floor: float = 0.95,
    forget_target: float | None = None,
    resolution: float | None = None,
    points: str | os.PathLike[str] | None = None,
    progress: bool | OnProgress = True,
    rename: Rename = (),
    backend: str = "auto",
) -> SelectedScale:
    """Choose λ by scores on validation data, on the model itself.

    The model is moved from λ to λ as Delta.live does, one sweep each, and has its former bits at the end, also after an exception and
    Ctrl-C. It is evaluated by your functions, which are given the model: either `forget` and `retain`, or `evaluate`, which returns both.
    Forget scores are better the lower they are, retain scores the higher, such as accuracies. λ = 0, the base, is evaluated first.

    By the paper's rule the scale is chosen that has the lowest forget score among those that keep the retain score of the base up to
    retain_floor; among equals, the one with the highest retain score. With forget_target it is the smallest scale whose forget
    score is at or below the target, and which keeps the floor as well. λ = 0 is never chosen.

    Args:
        model: The base that the delta is of, as Delta.live takes it.
        delta: The delta.
        forget: Returns the score on what is to be forgotten.
        retain: Returns the score on the rest.
        evaluate: Returns both in one call: (forget, retain), or a mapping with these names.
        scales: The grid; by default the paper's 21 values 0, 0.05 … 1. A bracket search tries none beyond the largest, if given.
        search: "grid": both scores of every scale, from 0 away; with forget_target, up to the first that qualifies. "bracket": λ is
            doubled (or halved) from 1 until the floor breaks or the target is reached, bisected to the resolution, and a neighbour
            on each side is checked; forget is only called where it matters.
        retain_floor: The part of the base's retain score that must be kept, 0 … 1. 0 allows every score.
        forget_target: A forget score to be reached, such as that of a model retrained without the data.
        resolution: How close a bracket search comes, as a difference of scales; by default a twentieth of the scale where the floor breaks.
        points: A file of JSON lines to which each score is appended. If it has scores already, these are used: a search that was
            stopped goes on. Scores of another delta are refused.
        progress: Whether a terminal shows a bar with the time left; or a function that is called with (scales done, scales in all).
        rename: As of Delta.live.
        backend: As of Delta.live.

    Returns:
        The chosen scale, every point, and notes. On several ranks, as of FSDP2, your functions must return the same scores on
            each, and each has a file of points of its own.

    Warns:
        MergeWarning: If a curve is not monotone, the largest scale was chosen, or scores of a file are used; these are the notes.

    Raises:
        NoScaleError: If no scale qualifies; it has every point.
        InputError: If a score is no finite number, an option is bad, the file of points is of another delta, or the model is not
            the base.
        TypeError: If an argument is of the wrong kind.
    """
    options = SelectOptions(scales, search, retain_floor, forget_target, resolution)
    call = _function_of(forget, retain, evaluate)
    if not isinstance(delta, Delta):
        raise TypeError(
            f"delta: {type(delta).__name__}, expected a Delta, as of consensus_delta or load_delta"
        )
    file = nullcontext() if points is None else PointsFile(points, identity_of(delta))
    with (
        delta.live(model, rename=rename, backend=backend) as live,
        file as kept,
        on_progress_of(progress) as on_progress,
    ):

        def at_scale(scale: float, wanted: Sequence[str]) -> Mapping[str, Any]:
            live.scale = scale or None  # the base's own bits
            return call(model, wanted)

        try:
            found = select(at_scale, kept, options, on_progress)
        except NoScaleError as error:
            _warn(error.notes)
            raise
    _warn(found.notes)
    return found


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(note, MergeWarning, stacklevel=stacklevel())


def _function_of(
    forget: Score | None, retain: Score | None, evaluate: Score | None
) -> Callable[[Any, Sequence[str]], Mapping[str, Any]]:
    """One function of the model and the wanted scores, of those that a user gives."""
    for name, each in (("forget", forget), ("retain", retain), ("evaluate", evaluate)):
        if each is not None and not callable(each):
            raise TypeError(f"{name}: {short_repr(each)}, expected a function of the model")
    if evaluate is not None and forget is None and retain is None:
        return lambda model, wanted: _both(evaluate(model))
    if evaluate is not None or forget is None or retain is None:
        raise InputError("expected forget and retain, or evaluate, which returns both")
    functions = {"forget": forget, "retain": retain}
    return lambda model, wanted: {name: functions[name](model) for name in wanted}


def _both(found: Any) -> Mapping[str, Any]:
    if isinstance(found, Mapping) and {"forget", "retain"} <= found.keys():
        return found
    if isinstance(found, Sequence) and not isinstance(found, str) and len(found) == 2:
        return {"forget": found[0], "retain": found[1]}
    raise InputError(
        f"evaluate: returned {short_repr(found)}, expected (forget, retain), or a mapping with these names"
    )
