"""Merges that are killed, find a full disk or a broken one, are interrupted, or lose power, at every call that changes the file system.

Afterwards OUT is the old or the new one, whole. The same command succeeds, and nothing of negmerge's stays behind. After a loss of
power a merge with --resume may also be refused in one line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty import CASES, KINDS
from under_faults import quick_folder, run_under_faults, wanted  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def found(quick_folder: Path, request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What did not hold, of all tests that will run."""
    return run_under_faults(
        "faulty.py", quick_folder, wanted(request, "test_at_every_call", "case", "action")
    )


@pytest.mark.parametrize("action", KINDS)
@pytest.mark.parametrize("case", [str(case) for case in CASES])
def test_at_every_call(found: dict[str, list[str]], case: str, action: str) -> None:
    lines = found[f"{case}: {action}"]
    assert not lines, "\n".join(lines)
