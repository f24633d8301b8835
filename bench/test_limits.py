"""Rooflines of this machine: what no merge can exceed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case, Size

from negmerge_fast.benchmark.bandwidth import Roofline, file_read, flush, in_memory, make_cold
from negmerge_fast.benchmark.candidates import nothing
from negmerge_fast.benchmark.records import on_gpu
from negmerge_fast.benchmark.timing import Timing


def test_limit(case: Case, size: Size, time: Callable[..., None], build: Path) -> None:
    with tempfile.TemporaryDirectory(dir=build) as folder:
        try:
            roofline, before = _roofline(case, size.limit_bytes, Path(folder) / "file")
        except OSError as error:
            pytest.skip(f"{case.candidate}: {build}: {error.strerror}")
        row = {"suite": "limits", "way": roofline.name, "bytes": roofline.bytes, "state": case.state}
        time(
            Timing(roofline.task, row, None, case.device, before=before),
            7 if case.state == "in memory" else 3,
        )


def _roofline(case: Case, size: int, file: Path) -> tuple[Roofline, Callable[[], object]]:
    """The roofline of a case, and what is done before each round."""
    if case.candidate == "disk read":
        chunk = os.urandom(1 << 20)  # random, so that no disk can compress it
        with open(file, "wb") as out:
            for _ in range(0, size, len(chunk)):
                out.write(chunk)
        cold = case.state == "cold"
        roofline = file_read([file], max(4, torch.get_num_threads()), f"disk read, {case.state}")
        return roofline, (lambda: make_cold([file])) if cold else nothing
    before = (lambda: flush(case.device)) if on_gpu(case.device) else nothing
    return in_memory(case.candidate, case.device, size), before
