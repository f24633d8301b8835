"""The search of λ: which scales are evaluated, and which of them is chosen.

Two rules: the lowest forget score, or the first scale whose forget score reaches a target; both among scales that keep the retain score
above a floor. Two searches: every scale of a grid; or a bracket, which doubles λ until the floor breaks (or the target is reached),
and bisects from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from ..core.errors import InputError, require_choice, short_repr
from ..core.rule import Rule
from .points import Evaluate, PointsFile, ScalePoint, Scores
from .progress import OnProgress
from .result import NoScaleError, SelectedScale

# The paper's: 0, 0.05 … 1.
PAPER_SCALES = tuple(k / 20 for k in range(21))

# Where a bracket search begins, and how far it halves and doubles.
_BEGIN, _MIN, _MAX = 1.0, 2.0**-10, 2.0**10
# The resolution of a bracket is this part of its upper end unless told otherwise: as fine as the paper's grid where that ends.
_STEPS = 20
# Scales that a bracket search evaluates on most curves, for the time left: a doubling or two, four bisections, two neighbours, the base.
_EXPECTED = 10


@dataclass(frozen=True)
class SelectOptions:
    """What to search for, and how.

    Attributes:
        scales: The grid, by default the paper's 21 values from 0 to 1. A bracket search tries none beyond the largest, if given.
        search: "grid" or "bracket".
        retain_floor: The part of the base's retain score that must be kept; 0 allows every score.
        forget_target: The forget score to be reached; None for the lowest one.
        resolution: How close a bracket search comes to the floor; None for a twentieth of λ.

    Raises:
        InputError: If a value is out of range, or they contradict each other.
        TypeError: If a value is no number.
    """

    scales: Iterable[float] | None = None
    search: str = "grid"
    retain_floor: float = 0.95
    forget_target: float | None = None
    resolution: float | None = None

    def __post_init__(self) -> None:
        require_choice("search", self.search, ("grid", "bracket"))
        for name in ("retain_floor", "forget_target", "resolution"):
            if (value := getattr(self, name)) is not None or name == "retain_floor":
                object.__setattr__(self, name, _number(name, value))
        if not 0 <= self.retain_floor <= 1:
            raise InputError(
                f"retain_floor: {self.retain_floor:g}, expected 0 … 1, a part of the base's score"
            )
        if self.scales is not None:
            object.__setattr__(self, "scales", _scales(self.scales))
        if self.search == "grid" and self.resolution is not None:
            raise InputError("resolution: is of search='bracket'; the scales of a grid are `scales`")
        if self.resolution is not None and self.resolution <= 0:
            raise InputError(f"resolution: {self.resolution:g}, expected more than 0")
        if self.search == "bracket" and self.retain_floor == 0 and self.forget_target is None:
            raise InputError(
                "retain_floor: 0, expected more, or a forget_target: a bracket search ends at one of these"
            )
        if self.search == "bracket" and self.scales is not None and max(self.scales) <= 0:
            raise InputError("scales: none above 0, expected one: a bracket search goes up from 0")

    @property
    def grid(self) -> tuple[float, ...]:
        """The scales of the grid but 0, from 0 away."""
        scales = PAPER_SCALES if self.scales is None else self.scales
        return tuple(sorted({scale for scale in scales if scale}, key=lambda scale: (abs(scale), -scale)))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {short_repr(value)}, expected a number")
    number = float(value)
    if number - number:  # infinite, or not a number
        raise InputError(f"{name}: {number}, expected a finite number")
    return number


def _scales(values: Iterable[float]) -> tuple[float, ...]:
    try:
        scales = tuple(Rule(value).scale + 0.0 for value in values)
    except (TypeError, InputError) as error:
        raise type(error)(f"scales: {error}") from None
    if not any(scales):
        raise InputError("scales: none but 0, expected some others: 0 is the base itself")
    return scales


class _Goal:
    """Which scores qualify, by those of the base."""

    def __init__(self, options: SelectOptions, base: ScalePoint) -> None:
        assert base.forget is not None and base.retain is not None
        self.forget_target, self.base_forget, self.base_retain = (
            options.forget_target,
            base.forget,
            base.retain,
        )
        self.fraction = options.retain_floor
        if self.fraction and base.retain <= 0:
            raise InputError(
                f"retain at λ 0: {base.retain:g}, expected more than 0 as retain_floor is a part of it; 0 allows every score"
            )
        self.floor = self.fraction * base.retain if self.fraction else None
        if self.forget_target is not None and base.forget <= self.forget_target:
            raise InputError(
                f"forget_target: {self.forget_target:g}, expected less than the base's score of {base.forget:g}"
            )

    def keeps(self, retain: float | None) -> bool:
        """Whether a retain score is allowed."""
        assert retain is not None
        return self.floor is None or retain >= self.floor

    def qualifies(self, point: ScalePoint) -> bool:
        if point.scale == 0 or point.forget is None or not self.keeps(point.retain):
            return False
        return (
            point.forget < self.base_forget
            if self.forget_target is None
            else point.forget <= self.forget_target
        )

    def rank(self, point: ScalePoint) -> tuple[float, ...]:
        """The lowest is chosen."""
        if self.forget_target is not None:
            return (abs(point.scale),)
        assert point.forget is not None and point.retain is not None
        return point.forget, -point.retain, abs(point.scale)

    def best(self, points: Iterable[ScalePoint]) -> ScalePoint | None:
        return min(filter(self.qualifies, points), key=self.rank, default=None)

    @property
    def floor_text(self) -> str:
        if self.floor is None:
            return ""
        return f"a retain score ≥ {self.floor:.4g} ({self.fraction:g} of the base's {self.base_retain:.4g})"

    @property
    def text(self) -> str:
        if self.forget_target is None:
            text, joint = "the lowest forget score", "with"
        else:
            text, joint = f"the first scale with a forget score ≤ {self.forget_target:g}", "and"
        return f"{text} {joint} {self.floor_text}" if self.floor_text else text


def select(
    evaluate: Evaluate, file: PointsFile | None, options: SelectOptions, on_progress: OnProgress
) -> SelectedScale:
    """Search λ.

    Args:
        evaluate: Evaluates a scale: it is told which scores are wanted, and returns these or both.
        file: Where scores are kept, and were kept before.
        options: What to search for, and how.
        on_progress: Called with the number of scales that have been evaluated, and of all.

    Returns:
        What was found.

    Raises:
        InputError: If a score is no finite number, or the base's do not fit the options.
        NoScaleError: If no scale qualifies.
    """
    total = len(options.grid) + 1 if options.search == "grid" else _EXPECTED

    def on_point(done: int) -> None:
        on_progress(done, max(done, total))

    on_point(0)
    scores = Scores(evaluate, file, on_point)
    goal = _Goal(options, scores.both(0.0))
    notes = list(file.notes if file else ())
    notes += _grid(scores, goal, options) if options.search == "grid" else _bracket(scores, goal, options)
    points = tuple(scores.points)
    notes += _not_monotone(points)
    if (best := goal.best(points)) is None:
        raise NoScaleError(_why_none(goal, points), points, notes)
    assert best.forget is not None and best.retain is not None
    return SelectedScale(
        best.scale, best.forget, best.retain, goal.text, goal.floor, goal.forget_target, options.search, points, tuple(notes)
    )  # fmt: skip


def _grid(scores: Scores, goal: _Goal, options: SelectOptions) -> list[str]:
    """Evaluate every scale, or those up to the first that reaches the target."""
    for scale in options.grid:
        point = scores.both(scale)
        if goal.forget_target is not None and goal.qualifies(point):
            return []
    best = goal.best(scores.points)
    ends = max(0.0, *options.grid), min(0.0, *options.grid)
    return _ends_there(best.scale) if best and best.scale in ends else []


def _ends_there(scale: float) -> list[str]:
    end, beyond = ("largest", "larger") if scale > 0 else ("lowest", "lower")
    return [f"the {end} scale, {scale:g}, was chosen: {beyond} ones may forget more"]


def _bracket(scores: Scores, goal: _Goal, options: SelectOptions) -> list[str]:
    """Find where the floor breaks, or the target is reached; then the best scale before that."""

    def is_past(scale: float) -> bool:
        if not goal.keeps(scores.retain(scale)):
            return True
        return goal.forget_target is not None and scores.forget(scale) <= goal.forget_target

    end = _MAX if options.scales is None else max(options.scales)
    low, high = _enclose(is_past, end, options.resolution or _MIN)
    step = options.resolution or (high or low) / _STEPS
    while high is not None and high - low > step:
        middle = (low + high) / 2
        low, high = (low, middle) if is_past(middle) else (middle, high)
    if goal.forget_target is None:
        _descend(scores, goal, step)
        _climb(scores, goal, step, end)
    best = goal.best(scores.points)
    return _ends_there(end) if high is None and best and best.scale == end else []


def _enclose(is_past: Callable[[float], bool], end: float, least: float) -> tuple[float, float | None]:
    """Two scales between which a curve gets past something: the upper is twice the lower, or the lower is 0.

    Returns None as the upper one if that is beyond the end.
    """
    scale = min(_BEGIN, end)
    if is_past(scale):
        while scale > least:
            if not is_past(scale / 2):
                return scale / 2, scale
            scale /= 2
        return 0.0, scale
    while scale < end:
        low, scale = scale, min(2 * scale, end)
        if is_past(scale):
            return low, scale
    return scale, None


def _descend(scores: Scores, goal: _Goal, step: float) -> None:
    """Ask for forget scores, from the largest scale that keeps the floor down, as long as they are not worse than the lowest so far.

    A smaller scale with the same forget score has a better retain score.
    """
    lowest: float | None = None
    for point in reversed(scores.points):
        if point.scale > 0 and goal.keeps(point.retain):
            forget = scores.forget(point.scale)
            if lowest is not None and forget > lowest:
                return
            lowest = forget


def _climb(scores: Scores, goal: _Goal, step: float, end: float) -> None:
    """Check a neighbour on each side of the best scale, and go on as long as one of them forgets more."""
    best = goal.best(scores.points)
    while best is not None:
        for neighbour in _neighbours(best.scale, step, [point.scale for point in scores.points]):
            if neighbour <= end and goal.keeps(scores.retain(neighbour)):
                scores.forget(neighbour)
        found = goal.best(scores.points)
        assert found is not None
        if found.forget == best.forget:
            return
        best = found


def _neighbours(scale: float, step: float, evaluated: Sequence[float]) -> Iterator[float]:
    """The scales a step below and above, but where one is evaluated that is as near."""
    for low, high, neighbour in ((scale - step, scale, scale - step), (scale, scale + step, scale + step)):
        if neighbour > 0 and not any(low <= other <= high and other != scale for other in evaluated):
            yield neighbour


def _not_monotone(points: Sequence[ScalePoint]) -> Iterator[str]:
    """Notes on curves that rise away from λ = 0: then the best scale may be another one than those evaluated."""
    for name in ("forget", "retain"):
        rises: list[tuple[float, float, float]] = []
        for side in (1, -1):
            held = [(p.scale, getattr(p, name)) for p in points if side * p.scale >= 0]
            held = sorted(((s, v) for s, v in held if v is not None), key=lambda each: abs(each[0]))
            rises += [(v - u, s, t) for (s, u), (t, v) in pairwise(held) if v > u]
        if rises:
            most, low, high = max(rises)
            times = "once" if len(rises) == 1 else f"{len(rises)} times"
            yield f"{name} is not monotone: as λ grows it rises {times}, most from λ {low:g} to {high:g}, by {most:.3g}"


def _why_none(goal: _Goal, points: Sequence[ScalePoint]) -> str:
    """Why no scale qualifies, in one line."""
    evaluated = [point for point in points if point.scale]
    kept = [point for point in evaluated if goal.keeps(point.retain) and point.forget is not None]
    found = f"no scale of {len(evaluated)}"
    if not kept:
        best = max(evaluated, key=lambda point: point.retain or 0.0)
        return f"{found} has {goal.floor_text}: the highest is {best.retain:.4g}, at λ {best.scale:g}"
    best = min(kept, key=lambda point: point.forget or 0.0)
    lowest = f"the lowest is {best.forget:.4g}, at λ {best.scale:g}"
    having = f" that has {goal.floor_text}" if goal.floor_text else ""
    if goal.forget_target is None:
        return f"{found}{having} has a forget score below the base's {goal.base_forget:.4g}: {lowest}"
    return f"{found}{having} has a forget score ≤ {goal.forget_target:g}: {lowest}"
