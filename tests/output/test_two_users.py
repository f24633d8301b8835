"""Two users of one directory: whatever the other makes or moves there, a merge writes to no other file of the user who merges.

It ends with the right OUT, or in one line. It does not hang.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from two_users import CASES, KINDS
from under_faults import quick_folder, run_under_faults, wanted  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(os.geteuid() != 0, reason="root plays both users"),
]


@pytest.fixture(scope="module")
def found(quick_folder: Path, request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What did not hold, of all tests that will run."""
    quick_folder.chmod(0o755)
    chosen = wanted(request, "test_of_another_user", "case", "moment", "sticky")
    return run_under_faults("two_users.py", quick_folder, chosen)


@pytest.mark.parametrize("sticky", [True, False], ids=["sticky", "not-sticky"])
@pytest.mark.parametrize("moment", KINDS)
@pytest.mark.parametrize("case", [str(case) for case in CASES])
def test_of_another_user(found: dict[str, list[str]], case: str, moment: str, sticky: bool) -> None:
    lines = found[f"{case}: {moment}, {'sticky' if sticky else 'not sticky'}"]
    assert not lines, "\n".join(lines)
