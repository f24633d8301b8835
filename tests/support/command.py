"""A fixture that calls the command line in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from negmerge_fast.cli import main, signals

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Run negmerge in this process, in the test's folder: importing torch for each case would take minutes."""
    handlers = {number: signal.getsignal(number) for number in signals._STATUS}
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()  # what was printed before is not the command's
        monkeypatch.setattr(sys, "argv", ["negmerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
