"""What no merge can be faster than, on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case, Size

from negmerge_fast.benchmark.bandwidth import Limit, file_read, flush, in_memory, make_cold
from negmerge_fast.benchmark.candidates import nothing
from negmerge_fast.benchmark.records import on_gpu
from negmerge_fast.benchmark.timing import Trial


def test_limit(case: Case, size: Size, time: Callable[..., None], build: Path) -> None:
    with tempfile.TemporaryDirectory(dir=build) as folder:
        try:
            limit, before = _limit(case, size.limit_bytes, Path(folder) / "file")
        except OSError as error:
            pytest.skip(f"{case.way}: {build}: {error.strerror}")
        row = {"suite": "limits", "way": limit.name, "bytes": limit.bytes, "state": case.state}
        time(Trial(limit.run, row, None, case.device, before=before), 7 if case.state == "in memory" else 3)


def _limit(case: Case, size: int, file: Path) -> tuple[Limit, Callable[[], object]]:
    """A limit, and what comes before each round."""
    if case.way == "disk read":
        stroke = os.urandom(1 << 20)  # which no disk can compress
        with open(file, "wb") as out:
            for _ in range(0, size, len(stroke)):
                out.write(stroke)
        cold = case.state == "cold"
        limit = file_read([file], max(4, torch.get_num_threads()), f"disk read, {case.state}")
        return limit, (lambda: make_cold([file])) if cold else nothing
    before = (lambda: flush(case.device)) if on_gpu(case.device) else nothing
    return in_memory(case.way, case.device, size), before
