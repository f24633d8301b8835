"""Options of a merge of checkpoints: their bounds, and that Python's keywords are the same."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pytest

import negmerge_fast as nm
from negmerge_fast.streaming import api
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
        ({"scale": {"a": 1.0, "b": float("nan")}}, "scale of 'b': nan, expected a finite number"),
        ({"method": "mean", "min_agreement": 0.8}, "min_agreement: 0.8, expected 1.0: mean counts no signs"),
        (
            {"method": "mean", "skip_unchanged": True},
            "skip_unchanged: True, expected False: with method mean every version is read",
        ),
        (
            {"weights": "mask.pt", "skip_unchanged": True},
            "skip_unchanged: True, expected False: with weights every version is read",
        ),
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
    assert not MergeOptions(0.9, nonfinite=nonfinite, method="ties").skips
    assert not MergeOptions(0.9, nonfinite=nonfinite, weights="mask.pt").skips


class Own:
    def __repr__(self) -> str:
        return "Own()"


WRONG: dict[str, list[Any]] = {
    "scale": ["0.9", None, True, [0.9], 1j, [], {}, {"(": 1.0}, {"a": "b"}, {"a": float("inf")}, [("a", 1.0, 2.0)], ["ab"]],
    "min_agreement": ["1", None, False],
    "inputs": [None, 3, ["finetuned"], np.array(["finetuned", "x"])],
    "nonfinite": [None, True, {"error"}],
    "include": [re.compile("w"), b"w", 3, ["w"], "("],
    "exclude": [re.compile("w"), b"w", 3, ["w"], "(" * 10_000],
    "rename": [
        "ab=c", ["ab"], 3, None, [("a", 3)], [(re.compile("a"), "b")], {b"a": b"b"}, [("a", lambda match: "b")], [("a",)], [3],
        [("(", "b")], [("a", r"\1")],
    ],
    "keep": ["*.txt", None, 3, ["*.txt", 3], [b"*.txt"], b"*.txt", {"*.txt": 1}, iter(["*.txt"])],
    "drop": ["*.txt", None, 3, ["*.txt", re.compile("x")], {"*.txt"}],
    "backend": [None, 3, "gpu", ["cpu"]],
    "device": [None, 0, ["cpu"]],
    "memory_budget": [1.5, True, b"1GB", "much", [1], -1, Own()],
    "threads": [2.0, "2", True, [2], np.float32(2), 0, -1, 1025, Own()],
    "skip_unchanged": ["yes", 1, 0.0, []],
    "overwrite": ["yes", None, 1, []],
    "resume": ["yes", None, 0],
    "adapters_as": [None, "both", True, ["merged"]],
    "format": [None, 3, "bin", ["pt"], b"pt"],
    "method": [None, 3, "medium", ["mean"], b"mean"],
    "weights": [3, "", b"mask.pt", ["mask.pt"]],
    "progress": ["tqdm", True, 3],
}  # fmt: skip


def test_there_is_a_wrong_value_of_every_option() -> None:
    assert WRONG.keys() == {field.name for field in fields(MergeOptions)} | {"progress"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_is_told_before_anything_is_opened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "open_checkpoint", None)
    for value in WRONG[name]:
        options = {"scale": 0.9, name: value}
        with pytest.raises(nm.InputError, match=f"^{name}( of .*)?: ") as error:
            nm.merge_checkpoints("base", ["ft"], "out", **options)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, ["ft"], "out"), "base: None, expected a path"),
        ((b"base", ["ft"], "out"), "base: b'base', expected a path"),
        (("base", ["ft", 3], "out"), r"finetuned\[1\]: 3, expected a path"),
        (("base", b"ft", "out"), r"finetuned\[0\]: 102, expected a path"),
        (("base", ["ft"], None), "output: None, expected a path"),
        (("base", ["ft"], ""), "output: '', expected a path"),
        (("base", ["ft"], "a\0b"), r"output: 'a\\x00b', expected a path"),
        (("base", ["ft"], "a\ud800"), r"output: 'a\\ud800', expected a path"),
        (("base", "ft", "out"), "finetuned: one path, expected a list of paths"),
        (("base", None, "out"), "finetuned: None, expected a list of paths"),
    ],
)
def test_what_is_no_path(arguments: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "open_checkpoint", None)
    with pytest.raises((nm.InputError, TypeError), match=f"^{message}$"):
        nm.merge_checkpoints(*arguments, scale=0.9)


def test_numbers_of_numpy_and_pairs_that_are_read_once() -> None:
    found = MergeOptions(
        np.float32(0.5), threads=np.int64(3), memory_budget=np.uint32(1 << 30), overwrite=np.bool_(True), rename=iter([("a", "b")])
    )  # fmt: skip
    expected = MergeOptions(0.5, threads=3, memory_budget=1 << 30, overwrite=True, rename={"a": "b"})
    assert found == expected
    assert [type(each) for each in (found.threads, found.memory_budget, found.overwrite)] == [int, int, bool]
