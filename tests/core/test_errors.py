"""Errors in one line."""

from __future__ import annotations

import pytest

from negmerge_fast.core.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no kernel image\nfor this device"), "no kernel image"),
        (ValueError("one line"), "one line"),
        (MemoryError(), "MemoryError"),
    ],
    ids=repr,
)
def test_first_line_of_an_error(error: BaseException, line: str) -> None:
    assert first_line(error) == line
