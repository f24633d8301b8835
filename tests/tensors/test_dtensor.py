"""DTensors on 2 and on 4 ranks against the plain merge of the full tensors. The cases are in dtensor_ranks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import dtensor_ranks as ranks
import pytest

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, ranks.__file__, str(folder)]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo"
    }  # the address of the machine's name may be unreachable
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=2 * ranks.SECONDS + 60
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("world", ranks.WORLDS)
@pytest.mark.parametrize("case", ranks.CASES)
def test_on_every_rank(case: str, world: int, folder: Path) -> None:
    for rank in range(world):
        outcome = folder / f"{world}-{rank}.json"
        assert outcome.exists(), f"rank {rank} of {world} did not finish"
        assert case not in (failed := json.loads(outcome.read_text())), f"rank {rank}: {failed[case]}"
