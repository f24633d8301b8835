"""Programs that run under tests/support/faults.c, two beside each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parent
_TIMEOUT_S = 1200


@pytest.fixture(scope="module")
def quick_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where syncing takes no time, if there is one, and that all users can enter."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def wanted(request: pytest.FixtureRequest, test: str, *names: str) -> list[list[Any]]:
    """The parameters of a test, in all its runs that were selected."""
    return [
        [item.callspec.params[name] for name in names]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test
    ]


def run_under_faults(program: str, folder: Path, wanted: Sequence[Any]) -> dict[str, list[str]]:
    """Run a program for all that is wanted; returns what it found."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    library = folder / "faults.so"
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", "-o", library, SUPPORT / "faults.c", "-ldl"], check=True
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    processes = []
    for half in range(2):
        (folder / str(half)).mkdir()
        arguments = [str(folder / str(half)), json.dumps(wanted[half::2]), str(folder / f"{half}.json")]
        processes.append(subprocess.Popen([sys.executable, SUPPORT / program, *arguments], env=environment))
    try:
        assert [process.wait(timeout=_TIMEOUT_S) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = {}
    for half in range(2):
        if (folder / f"{half}.json").exists():  # one of them may have had nothing to do
            found.update(json.loads((folder / f"{half}.json").read_text()))
    return found
