"""The glossary in docs/design.md: every name in it stands in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Glossary")[2]
NAMES = sorted(
    {
        name
        for row in re.findall(r"^\| (.*?) \|", GLOSSARY, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", row)
    }
)
SOURCES = [
    path.read_text(encoding="utf-8")
    for folder in ("negmerge_fast", "kernels", "csrc", "tests/support")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu")
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_glossary_is_one_of_the_code(name: str) -> None:
    # `MAX_x` and `rank-N.json` stand for names that begin or continue so.
    pattern = re.escape(name).replace("_x", r"_\w+").replace("N", r"(N|\{\w+\})" if "-N" in name else "N")
    assert any(re.search(rf"(?<!\w)_?{pattern}(?!\w)", source) for source in SOURCES)


def test_there_is_a_glossary() -> None:
    assert len(NAMES) > 40
