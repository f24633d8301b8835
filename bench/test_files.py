"""Merges of files in less memory than they need, beside plain PyTorch and beside reading and writing alone.

The counted bytes are those of all inputs, read once, and of the output, written once. The roofline reads and writes
as many.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import pytest
import torch
from cases import CPU, GPU, PLAIN, SIZES, Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import negmerge_fast as nm
from negmerge_fast.benchmark import machine
from negmerge_fast.benchmark.bandwidth import Roofline, make_cold, read_files
from negmerge_fast.benchmark.candidates import eager, unusable
from negmerge_fast.benchmark.timers import wall
from negmerge_fast.benchmark.timing import Timing
from negmerge_fast.benchmark.workload import SCALE, Lacking, Workload
from negmerge_fast.runtime.buffers import Timeline
from negmerge_fast.streaming.api import prepare
from negmerge_fast.streaming.options import MergeOptions

WEIGHTS, MODELS, TENSORS = "model.safetensors", 8, 16
CHUNK = os.urandom(256 << 10)  # random, so that no disk can compress it
# Far less than the models. Through a GPU each worker needs buffers on both sides.
MEMORY_BUDGET = {CPU: "128MiB", GPU: "512MiB"}


class Files:
    """A base and its fine-tuned versions in directories, and the expected result of merging them."""

    def __init__(self, folder: Path, numel: int) -> None:
        shapes = {f"layers.{i}.weight": (numel // TENSORS,) for i in range(TENSORS)}
        workload = Workload("files", shapes, "F32", MODELS, CPU)
        versions = [
            dict(zip(shapes, workload.tensors(version), strict=False)) for version in workload.versions
        ]
        self.paths = [folder / f"model-{k}" / WEIGHTS for k in range(MODELS + 1)]
        for path, tensors in zip(self.paths, versions, strict=True):
            path.parent.mkdir()
            save_file(
                {name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
            )
        base, *models = versions
        self.merged = {name: tensor.clone() for name, tensor in base.items()}
        self.stats = nm.merge_(self.merged, models, scale=SCALE, backend="torch")
        self.numel = workload.numel
        self.bytes = (MODELS + 2) * self.paths[0].stat().st_size

    def differing(self, out: Path) -> int:
        found = load_file(out / WEIGHTS)
        return sum(
            int((found[name].view(torch.int32) != tensor.view(torch.int32)).count_nonzero())
            for name, tensor in self.merged.items()
        )


@pytest.fixture(scope="module")
def files(build: Path, pytestconfig: pytest.Config) -> Iterator[Files]:
    numel = SIZES[pytestconfig.getoption("--size")].file_elements
    needed, free = (MODELS + 2) * numel * 4, shutil.disk_usage(build).free
    if needed > free:
        pytest.skip(f"files: {needed / 1e9:.2g} GB needed, {free / 1e9:.2g} GB free in {build}")
    with tempfile.TemporaryDirectory(dir=build) as folder:
        try:
            files = Files(Path(folder), numel)
        except Lacking as error:
            pytest.skip(str(error))
        yield files


def test_files(case: Case, files: Files, time: Callable[..., None], build: Path, results: Path) -> None:
    if case.candidate != PLAIN and (reason := unusable(case.candidate, case.device)):
        pytest.skip(reason)
    # A warm case writes to memory, a cold one to the disk.
    place = Path("/dev/shm") if case.state == "warm" else build
    if not os.access(place, os.W_OK) or shutil.disk_usage(place).free < 2 * files.numel * 4:
        pytest.skip(f"files, {case.state}: no room in {place}")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        out = Path(folder) / "out"
        differing = _judge(case, files, out, _merge(case, files.paths, out))
        before = partial(_prepare, files.paths, out, case.state == "cold")
        threads = max(4 if case.state == "cold" else 1, torch.get_num_threads())
        roofline = Roofline(
            "reading and writing", files.bytes, partial(_read_and_write, files.paths, out, threads)
        )
        row = {
            "suite": "files", "layout": case.layout, "way": case.candidate, "dtype": case.dtype, "n": case.n,
            "numel": files.numel, "bytes": files.bytes, "state": case.state,
        }  # fmt: skip
        timing = Timing(
            partial(_merge, case, files.paths, out),
            row,
            roofline,
            case.device,
            now=wall(case.device),
            before=before,
            between=before,
            verify=partial(_judge, case, files, out),
            roofline_clock=perf_counter,
        )
        time(
            timing,
            3 if case.candidate in (PLAIN, "torch") or case.state == "cold" else 7,
            differing=differing,
        )
        if case.state == "warm" and case.candidate not in (PLAIN, "torch"):
            _draw(case, partial(_merge, case, files.paths, out), before, results)


def _merge(case: Case, paths: list[Path], out: Path, timeline: Timeline | None = None) -> nm.Report | None:
    if case.candidate != PLAIN:
        budget = MEMORY_BUDGET[case.device]
        options = MergeOptions(SCALE, backend=case.candidate, device=case.device, memory_budget=budget)
        base, *models = [path.parent for path in paths]
        return prepare(base, models, out, options).run(timeline=timeline)
    base, *models = [safe_open(path, "pt") for path in paths]
    merged = {}
    for name in base.keys():  # noqa: SIM118
        merged[name] = base.get_tensor(name)  # a private copy of what it writes to
        eager([merged[name]], [[model.get_tensor(name)] for model in models])
    out.mkdir()
    save_file(merged, out / WEIGHTS, metadata={"format": "pt"})
    return None


def _draw(case: Case, merge: Callable[..., object], before: Callable[[], object], results: Path) -> None:
    """Merge three more times, and write the timeline of the fastest merge's workers to timeline-CANDIDATE.json for the plots."""
    timelines = [Timeline() for _ in range(3)]
    for timeline in timelines:
        before()
        merge(timeline=timeline)
    fastest = min(timelines, key=lambda timeline: max(ended for *_, ended in timeline.spans))
    spans = [[*what, round(began, 6), round(ended, 6)] for *what, began, ended in fastest.spans]
    found = {"machine": machine(case.device), "way": case.candidate, "spans": spans}
    results.with_name(f"timeline-{case.candidate}.json").write_text(json.dumps(found) + "\n")


def _judge(case: Case, files: Files, out: Path, report: nm.Report | None) -> int:
    """Number of elements that differ from the reference. A backend of the package fails if there are any."""
    differing = files.differing(out)
    if report is not None and differing:
        pytest.fail(
            f"{case.candidate}: {differing:,} elements differ from the reference's, no speed (files)",
            pytrace=False,
        )
    if report is not None and (report.agreed, report.nonfinite) != (
        files.stats.agreed,
        files.stats.nonfinite,
    ):
        pytest.fail(f"{case.candidate}: counts differ from the reference's, no speed (files)", pytrace=False)
    return differing


def _prepare(paths: list[Path], out: Path, cold: bool) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if cold:
        make_cold(paths)


def _read_and_write(paths: list[Path], out: Path, threads: int) -> None:
    read_files(paths, threads)
    out.mkdir()
    remaining = paths[0].stat().st_size
    with open(out / WEIGHTS, "wb", buffering=0) as file:
        while remaining:
            remaining -= file.write(CHUNK[: min(remaining, len(CHUNK))])
        os.fsync(file.fileno())
