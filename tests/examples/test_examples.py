"""Every script in examples/ runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# adapters.py needs libraries: tests/libraries/test_peft_in_memory.py runs it.
EXAMPLES = sorted(
    each for each in (Path(__file__).parents[2] / "examples").glob("*.py") if each.stem != "adapters"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.mark.processes
@pytest.mark.parametrize(
    "script",
    # inductor compiles; torchrun starts two processes
    [
        pytest.param(each, marks=pytest.mark.slow if each.stem in ("compile", "dtensor") else ())
        for each in EXAMPLES
    ],
    ids=lambda script: script.name,
)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    launcher = TORCHRUN if "torchrun" in script.read_text() else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*launcher, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "agree" in done.stdout
