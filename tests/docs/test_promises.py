"""docs/promises.md: no sentence without the tests that hold it, and all of these exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
NOT_PROMISED = "What is not promised"
PROMISES = [
    (promise, cited)
    for section, text in SECTIONS.items()
    if section != NOT_PROMISED
    for promise, cited in re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    if promise != "promise"
]


def test_there_is_a_section_for_each_subject() -> None:
    assert [*SECTIONS] == [
        "OUT is whole", "Power loss", "Permissions and other users", "Signals", "Several processes",
        "What verify notices", "What is copied", NOT_PROMISED,
    ]  # fmt: skip


@pytest.mark.parametrize("section", [each for each in SECTIONS if each != NOT_PROMISED])
def test_a_section_has_nothing_beside_its_table(section: str) -> None:
    lines = SECTIONS[section].strip().splitlines()
    assert lines[:2] == ["| promise | held by |", "|---|---|"] and len(lines) > 2
    for line in lines[2:]:
        assert re.fullmatch(r"\| [^|]+ \| [^|]+ \|", line), line


@pytest.mark.parametrize(("promise", "cited"), PROMISES, ids=[promise[:50] for promise, _ in PROMISES])
def test_a_promise_is_one_sentence_with_its_tests(promise: str, cited: str) -> None:
    assert promise.endswith(".") and not re.search(r"\.\s+[A-Z`]", promise)
    names = cited.split(", ")
    assert all(re.fullmatch(r"`[\w/]+\.py::test_\w+`", name) for name in names), cited
    for path, _, test in (name.strip("`").partition("::") for name in names):
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        tests = {each.name for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)}
        assert test in tests, f"{path} has no {test}"
