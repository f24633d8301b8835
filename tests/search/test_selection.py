"""Searches of λ on curves that are known."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from negmerge_fast.core.errors import InputError
from negmerge_fast.search.progress import on_progress_of
from negmerge_fast.search.result import NoScaleError, SelectedScale
from negmerge_fast.search.selection import PAPER_SCALES, SelectOptions, select

Curve = Callable[[float], float]


class Curves:
    """Scores of λ, counted."""

    def __init__(self, forget: Curve, retain: Curve) -> None:
        self.curves = {"forget": forget, "retain": retain}
        self.counts: Counter[str] = Counter()

    def __call__(self, scale: float, wanted: Sequence[str]) -> Mapping[str, Any]:
        self.counts.update(wanted)
        return {name: self.curves[name](scale) for name in wanted}


def found(curves: Curves, **options: Any) -> SelectedScale:
    return select(curves, None, SelectOptions(**options), lambda done, total: None)


def ramp(end: float) -> Curves:
    """Forgets more and more, and breaks the floor beyond `end`."""
    return Curves(lambda s: 1 - s / (2 * end), lambda s: 0.9 if s <= end else 0.5)


def test_the_default_grid_is_the_papers() -> None:
    assert tuple(round(0.05 * k, 2) for k in range(21)) == PAPER_SCALES
    curves = ramp(0.72)
    chosen = found(curves)
    assert chosen.scale == 0.7 and chosen.floor == 0.95 * 0.9
    assert (chosen.forget, chosen.retain) == (1 - 0.7 / 1.44, 0.9)
    assert tuple(point.scale for point in chosen.points) == PAPER_SCALES
    assert curves.counts == {"forget": 21, "retain": 21}
    assert chosen.notes == ()


def test_the_lowest_forget_score_then_the_highest_retain_score_then_the_smallest_scale() -> None:
    forget = {0: 0.9, 1: 0.5, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.0}
    retain = {0: 1.0, 1: 0.96, 2: 0.95, 3: 0.97, 4: 0.97, 5: 0.94}
    chosen = found(Curves(forget.__getitem__, retain.__getitem__), scales=[5, 4, 3, 2, 1])
    assert chosen.scale == 3
    assert [point.scale for point in chosen.points] == [0, 1, 2, 3, 4, 5]
    assert chosen.rule == "the lowest forget score with a retain score ≥ 0.95 (0.95 of the base's 1)"


def test_the_first_scale_that_reaches_a_target_ends_the_grid() -> None:
    curves = Curves(lambda s: 0.9 - 0.8 * s, lambda s: 1 - 0.01 * s)
    chosen = found(curves, forget_target=0.5)
    assert chosen.scale == 0.5 and chosen.forget_target == 0.5
    assert curves.counts["forget"] == 11


def test_a_target_heeds_the_floor_unless_there_is_none() -> None:
    def curves() -> Curves:
        return Curves(lambda s: 0.9 - 0.8 * s, lambda s: 1 - s)

    with pytest.raises(
        NoScaleError, match=r"has a forget score ≤ 0.5: the lowest is 0.86, at λ 0.05"
    ) as error:
        found(curves(), forget_target=0.5)
    assert len(error.value.points) == 21 and error.value.points[10].forget == 0.5
    chosen = found(curves(), forget_target=0.5, retain_floor=0)
    assert chosen.scale == 0.5 and chosen.floor is None


@pytest.mark.parametrize("search", ["grid", "bracket"])
def test_nothing_qualifies(search: Any) -> None:
    with pytest.raises(
        NoScaleError, match=r"^no scale of \d+ has a retain score ≥ 0.95 .*: the highest is 0.5, at λ "
    ) as error:
        found(Curves(lambda s: 1 - s, lambda s: 1.0 if s == 0 else 0.5), search=search)
    assert error.value.points[0].scale == 0 and "\n" not in str(error.value)
    with pytest.raises(
        NoScaleError, match=r"has a forget score below the base's 0.9: the lowest is 0.9, at λ "
    ):
        found(Curves(lambda s: 0.9, lambda s: 1.0 if s < 3 else 0), search=search)


@pytest.mark.parametrize("end", [0.004, 0.03, 0.3, 0.5, 0.72, 0.99, 1.0, 1.7, 2.4, 3.99, 15.0, 100.0])
def test_a_bracket_comes_close_to_the_floor_in_a_few_evaluations(end: float) -> None:
    curves = ramp(end)
    chosen = found(curves, search="bracket")
    assert chosen.retain == 0.9 and 0.9 * end < chosen.scale <= end
    # The base, doublings or halvings, four bisections, and two neighbours at most.
    doublings = 1 + math.ceil(abs(math.log2(end)) + 1e-9)
    assert curves.counts["retain"] <= 1 + doublings + 1 + 4 + 2
    assert curves.counts["forget"] <= 4


def test_a_bracket_takes_about_nine_evaluations_where_papers_have_their_scales() -> None:
    for end in (0.55, 0.95, 1.5, 2.82):
        curves = ramp(end)
        found(curves, search="bracket")
        assert curves.counts["retain"] <= 10
        assert curves.counts["forget"] < curves.counts["retain"]


def test_a_resolution() -> None:
    chosen = found(ramp(2.7182), search="bracket", resolution=0.001)
    assert 2.7172 < chosen.scale <= 2.7182
    assert found(ramp(2.7182), search="bracket", resolution=2).scale == 2


def test_a_bracket_goes_down_to_the_best_retain_score_of_equals() -> None:
    curves = Curves(lambda s: max(0.9 - s, 0), lambda s: 1 - 0.01 * s)
    chosen = found(curves, search="bracket")
    assert chosen.forget == 0 and chosen.retain >= 0.98


def test_a_bracket_goes_on_where_a_neighbour_forgets_more() -> None:
    """A model that is broken forgets less: it says one class of those to forget."""
    curves = Curves(lambda s: 0.1 + abs(s - 2.5), lambda s: 1.0 if s < 4 else 0.0)
    chosen = found(curves, search="bracket")
    assert abs(chosen.scale - 2.5) <= 0.2
    assert any(note.startswith("forget is not monotone: as λ grows it rises ") for note in chosen.notes)


def test_a_bracket_finds_the_first_scale_that_reaches_a_target() -> None:
    for reached in (0.02, 0.6, 1.0, 1.3, 6.1):
        curves = Curves(lambda s, at=reached: 0.9 if s < at else 0.1, lambda s: 1.0)  # type: ignore[misc]
        chosen = found(curves, search="bracket", forget_target=0.2)
        assert reached <= chosen.scale <= 1.11 * reached
    curves = Curves(lambda s: 0.9 if s < 1.3 else 0.1, lambda s: 1.0 if s < 1.2 else 0.0)
    with pytest.raises(NoScaleError, match=r"has a forget score ≤ 0.2: the lowest is 0.9"):
        found(curves, search="bracket", forget_target=0.2)


def test_a_bracket_tries_none_beyond_the_largest_scale() -> None:
    chosen = found(ramp(1000), search="bracket", scales=[1, 6])
    assert chosen.scale == 6 and max(point.scale for point in chosen.points) == 6
    assert chosen.notes == ("the largest scale, 6, was chosen: larger ones may forget more",)
    assert found(ramp(100), scales=[1, 6]).notes == chosen.notes


def test_curves_that_are_not_monotone_are_told() -> None:
    retain = {0: 1.0, 1: 0.96, 2: 0.98, 3: 0.95}
    forget = {0: 0.9, 1: 0.5, 2: 0.4, 3: 0.45}
    chosen = found(Curves(forget.__getitem__, retain.__getitem__), scales=[1, 2, 3])
    assert chosen.notes == (
        "forget is not monotone: as λ grows it rises once, most from λ 2 to 3, by 0.05",
        "retain is not monotone: as λ grows it rises once, most from λ 1 to 2, by 0.02",
    )


def test_the_end_of_negative_scales_is_told() -> None:
    chosen = found(Curves(lambda s: 0.8 + s / 10, lambda s: 1.0), scales=[-1, -0.5])
    assert chosen.notes == ("the lowest scale, -1, was chosen: lower ones may forget more",)
    assert found(Curves(lambda s: abs(s + 0.5), lambda s: 1.0), scales=[-1, -0.5]).notes == (
        "forget is not monotone: as λ grows it rises once, most from λ -0.5 to -1, by 0.5",
    )


def test_negative_scales_go_away_from_zero() -> None:
    chosen = found(Curves(lambda s: 1 + s, lambda s: 1.0), scales=[-0.5, -0.25, 0])
    assert chosen.scale == -0.5 and chosen.notes == (
        "the lowest scale, -0.5, was chosen: lower ones may forget more",
    )


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "0.5", None, True, [1.0, 2.0], object()])
def test_a_score_that_is_no_finite_number(score: Any) -> None:
    with pytest.raises(InputError, match=r"^retain at λ 0.05: .*, expected a (finite )?number$"):
        found(Curves(lambda s: 0.5, lambda s: 1.0 if s == 0 else score))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "random"}, "search: 'random', expected one of grid, bracket"),
        ({"retain_floor": 1.5}, "retain_floor: 1.5, expected 0 … 1"),
        ({"retain_floor": float("nan")}, "retain_floor: nan, expected a finite number"),
        ({"resolution": 0.1}, "resolution: is of search='bracket'"),
        ({"search": "bracket", "resolution": 0}, "resolution: 0, expected more than 0"),
        ({"search": "bracket", "retain_floor": 0}, "retain_floor: 0, expected more, or a forget_target"),
        ({"search": "bracket", "scales": [-1]}, "scales: none above 0"),
        ({"scales": []}, "scales: none but 0"),
        ({"scales": [0]}, "scales: none but 0"),
        ({"scales": [float("inf")]}, "scales: scale: inf, expected a finite number"),
        ({"forget_target": 0.9}, "forget_target: 0.9, expected less than the base's score of 0.8"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        found(Curves(lambda s: 0.8 - s / 10, lambda s: 1.0), **options)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("options", [{"scales": ["1"]}, {"scales": 3}, {"retain_floor": "1"}, {"retain_floor": None}, {"forget_target": True}])  # fmt: skip
def test_options_of_a_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        SelectOptions(**options)


def test_a_floor_is_a_part_of_a_positive_score() -> None:
    with pytest.raises(InputError, match=r"retain at λ 0: -2, expected more than 0"):
        found(Curves(lambda s: -s, lambda s: -2.0))
    assert found(Curves(lambda s: -s, lambda s: -2.0), retain_floor=0).scale == 1


def test_progress() -> None:
    told: list[tuple[int, int]] = []
    select(ramp(0.7), None, SelectOptions(), lambda done, total: told.append((done, total)))
    assert told[0] == (0, 21) and told[-1] == (21, 21) and told == sorted(told)
    told.clear()
    select(ramp(900), None, SelectOptions(search="bracket"), lambda done, total: told.append((done, total)))
    assert all(done <= total for done, total in told) and told[-1][0] == told[-1][1] > 10


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, progress in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with on_progress_of(progress) as on_progress:
            on_progress(0, 21)
            on_progress(21, 21)
        shown = isinstance(stream, Terminal) and progress
        assert ("of 21 scales" in stream.getvalue() and " left" in stream.getvalue()) == shown
        assert bool(stream.getvalue()) == shown
