"""The README's Python runs as it stands; its commands are run by .ci/run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 1


def test_its_numbers_are_those_of_the_latest_rows() -> None:
    command = [sys.executable, str(README.with_name("bench") / "readme.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run bench/readme.py, or drop the rows"
