"""Files of scores: a search goes on where it was stopped, and never with the scores of another delta."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from negmerge_fast.core.errors import InputError
from negmerge_fast.search.points import PointsFile
from negmerge_fast.search.selection import SelectOptions, select


class Stopped(Exception):
    pass


def search(path: Path, stop_at: float = 9.0, delta: str = "a", **options: Any) -> tuple[list[float], Any]:
    """What was evaluated, and found."""
    evaluated: list[float] = []

    def evaluate(scale: float, wanted: Sequence[str]) -> Mapping[str, Any]:
        if scale >= stop_at:
            raise Stopped
        evaluated.append(scale)
        values = {"forget": 1 - scale / 2, "retain": 1.0 if scale < 0.7 else 0.5}
        return {name: values[name] for name in wanted}

    try:
        with PointsFile(path, delta, "command") as file:
            return evaluated, select(evaluate, file, SelectOptions(**options), lambda done, total: None)
    except Stopped:
        return evaluated, None


@pytest.mark.parametrize("options", [{}, {"search": "bracket"}])
def test_a_search_that_was_stopped_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "points.jsonl"
    in_one, whole = search(tmp_path / "whole.jsonl", **options)
    before, _ = search(path, 0.6, **options)
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {
        "format": "negmerge-points", "version": "1", "delta": "a", "evaluated_by": "command",
    }  # fmt: skip
    assert [json.loads(line)["scale"] for line in lines[1:]] == before
    after, found = search(path, **options)
    assert before + after == in_one and before and after
    assert [(p.scale, p.forget, p.retain) for p in found.points] == [
        (p.scale, p.forget, p.retain) for p in whole.points
    ]
    assert found.scale == whole.scale
    assert f"{path}: the scores of {len(set(before))} scales are from there" in found.notes
    assert search(path, **options)[0] == []


def test_scores_that_another_search_did_not_need_are_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    search(path, search="bracket")
    held = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert {k: v for k, v in held[1].items() if k != "seconds"} == {"scale": 1.0, "retain": 0.5}
    again, chosen = search(path)
    assert 1.0 in again and 0.0 not in again
    # The points are those of this search: not the bracket's.
    assert [point.scale for point in chosen.points] == [k / 20 for k in range(21)]
    assert all(point.forget is not None and point.retain is not None for point in chosen.points)


def test_a_line_that_was_cut_short_is_evaluated_again(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    search(path, scales=[0.05, 0.1])
    whole = path.read_bytes()
    for size in range(0, len(whole), 19):
        path.write_bytes(whole[:size])
        search(path, scales=[0.05, 0.1])
        for line in path.read_text().splitlines():
            json.loads(line)
        assert path.read_bytes().endswith(b"\n")
        assert search(path, scales=[0.05, 0.1])[0] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "format None, expected negmerge-points"),
        ("notes", "expected a file of points, or none"),
        ("notes\n", "line 1"),
        ("HEAD\nnonsense\n", "line 2"),
        ('HEAD\n{"scale": 1, "retain": "x"}\n', "line 2: retain: 'x', expected a number"),
        ('HEAD\n{"scale": 1, "retain": NaN}\n', "line 2"),
        ('HEAD\n{"scale": 1, "other": 2}\n', "line 2: 'other', expected scale"),
        ('HEAD\n{"retain": 1}\n', "line 2: no scale"),
        ("HEAD\n[]\n", "line 2"),
    ],
)
def test_files_that_are_refused_stay(tmp_path: Path, content: str, message: str) -> None:
    head = json.dumps({"format": "negmerge-points", "version": "1", "delta": "a", "evaluated_by": None})
    path = tmp_path / "points.jsonl"
    content = content.replace("HEAD", head)
    path.write_text(content)
    with pytest.raises(InputError) as error:
        search(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert path.read_text() == content


def test_the_scores_of_another_delta_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    search(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="delta 'a', expected b: the scores are of another delta"):
        search(path, delta="b")
    assert path.read_bytes() == before


def test_scores_of_another_command_are_told(tmp_path: Path) -> None:
    search(tmp_path / "points.jsonl")
    with PointsFile(tmp_path / "points.jsonl", "a", "another") as file:
        assert "its scores were evaluated by 'command'" in file.notes[0]


def test_one_search_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    search(path)
    with PointsFile(path, "a"), pytest.raises(InputError, match="another search is writing it"):
        search(path)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a regular file"):
        search(tmp_path)
    with pytest.raises(InputError, match="no directory"):
        search(tmp_path / "no" / "points.jsonl")


def test_nothing_is_left_without_a_score(tmp_path: Path) -> None:
    assert search(tmp_path / "points.jsonl", 0.0) == ([], None)
    assert list(tmp_path.iterdir()) == []
