"""Merges that are killed, find a full disk or a broken one, are interrupted, or lose power, at every call that changes the file system.

Afterwards OUT is the old or the new one, whole. The same command succeeds, and nothing of negmerge's stays behind. After a loss of
power a merge with --resume may also be refused in one line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from faulty import CASES, KINDS

pytestmark = [pytest.mark.slow, pytest.mark.processes]

SUPPORT = Path(__file__).parents[1] / "support"
Found = dict[str, list[str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Found:
    """What did not hold, of all tests that will run: in two processes beside each other."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("faults")
    if os.access("/dev/shm", os.W_OK):  # where syncing takes no time
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        request.addfinalizer(lambda: shutil.rmtree(folder))
    library = folder / "faults.so"
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", "-o", library, SUPPORT / "faults.c", "-ldl"], check=True
    )
    wanted = [
        (item.callspec.params["case"], item.callspec.params["action"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_at_every_call.__name__
    ]
    processes = []
    for half in range(2):
        (folder / str(half)).mkdir()
        arguments = [folder / str(half), json.dumps(wanted[half::2]), folder / f"{half}.json"]
        environment = {**os.environ, "LD_PRELOAD": str(library), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        processes.append(
            subprocess.Popen([sys.executable, SUPPORT / "faulty.py", *arguments], env=environment)
        )
    try:
        assert [process.wait(timeout=1200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return {k: v for half in range(2) for k, v in json.loads((folder / f"{half}.json").read_text()).items()}


@pytest.mark.parametrize("action", KINDS)
@pytest.mark.parametrize("case", [str(case) for case in CASES])
def test_at_every_call(found: Found, case: str, action: str) -> None:
    assert found[f"{case}: {action}"] == []
