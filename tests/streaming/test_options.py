"""Options of a merge of checkpoints: their bounds, and that Python's keywords are the same."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

import pytest

import negmerge_fast as nm
from negmerge_fast.streaming.options import MergeOptions


def test_the_keywords_of_merge_checkpoints_are_the_options() -> None:
    parameters = inspect.signature(nm.merge_checkpoints).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"}
    options = {
        f.name: inspect.Parameter.empty if f.default is MISSING else f.default for f in fields(MergeOptions)
    }
    assert list(keywords.items()) == list(options.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale: nan, expected a finite number"),
        ({"min_agreement": 0.5}, "min_agreement: 0.5, expected more than 0.5"),
        ({"inputs": "deltas"}, "inputs: 'deltas', expected one of finetuned, task_vectors"),
        ({"nonfinite": "drop"}, "nonfinite: 'drop', expected one of keep-base, error"),
        ({"threads": 0}, "threads: 0, expected 1 … 1024"),
        ({"threads": 1025}, "threads: 1025, expected 1 … 1024"),
    ],
)
def test_options_out_of_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nm.InputError, match=message):
        MergeOptions(**{"scale": 0.9, **options})


@pytest.mark.parametrize(
    ("nonfinite", "skip_unchanged", "skips"),
    [("error", None, False), ("keep-base", None, True), ("error", True, True), ("keep-base", False, False)],
)
def test_skipping_is_the_default_where_no_nan_is_an_error(
    nonfinite: Any, skip_unchanged: bool | None, skips: bool
) -> None:
    assert MergeOptions(0.9, nonfinite=nonfinite, skip_unchanged=skip_unchanged).skips is skips
