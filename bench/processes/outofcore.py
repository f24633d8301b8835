"""Merges models larger than memory: a sharded Llama and 8 fine-tuned versions, within 1 GiB, from a cold disk.

`negmerge merge` takes turns with floor.py, which reads the same files and writes and syncs as many bytes, in the same
kind of control group. Each is a process whose whole time is measured, and the files are evicted from the page cache
before each. All elements are compared with the reference before anything is timed. The counted bytes are those of all
inputs, read once, and of the output, written once.

--partial   only every third tensor was fine-tuned: with and without --skip-unchanged, and the fraction of the bytes that is read
--ranks     two processes of torchrun with one thread each, beside one process with two threads
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import llamas
import process
from process import Ended

from negmerge_fast.benchmark.bandwidth import make_cold
from negmerge_fast.benchmark.records import percentiles, record, roofline_fields
from negmerge_fast.benchmark.workload import SCALE
from negmerge_fast.runtime.memory import parse_size

RESULTS = Path(__file__).parents[1] / "results" / "outofcore.jsonl"
MODEL = llamas.Llama(22, 2048, 5632, 256, 32, 32000, "BF16")  # TinyLlama's layout
ROOFLINE = "read and write, synced"
THREADS = 2
MERGE = (sys.executable, "-m", "negmerge_fast", "merge")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    2,
    "-m",
    "negmerge_fast",
    "merge",
)


class Case:
    """Commands that merge models in a folder, within a memory limit unless it is None."""

    def __init__(self, folder: Path, models: list[Path], limit: int | None, budget: str) -> None:
        self.models, self.limit, self.budget = models, limit, budget
        self.outs, self.report = folder / "out", folder / "report.json"
        self.files = [path for model in models for path in llamas.weights(model)]
        self.moved = sum(path.stat().st_size for path in (*self.files, *llamas.weights(models[0])))
        self.peaks: dict[str, list[int | None]] = {}
        self.reports: dict[str, list[dict[str, Any]]] = {}

    def out(self, candidate: str) -> Path:
        return self.outs / candidate.replace(" ", "_")

    def prepare(self) -> None:
        shutil.rmtree(self.outs, ignore_errors=True)
        self.outs.mkdir()
        make_cold(self.files)

    def floor(self) -> Ended:
        floor = Path(__file__).with_name("floor.py")
        command = (
            sys.executable,
            floor,
            self.outs / "floor",
            *self.models,
            "--threads",
            THREADS,
            "--release",
        )
        return self.run(ROOFLINE, command)

    def merge(self, candidate: str, command: Sequence[object], *options: object) -> Ended:
        done = self.run(candidate, (
            *command, *self.models, "--output", self.out(candidate), "--scale", SCALE, "--backend", "cpu", "--quiet",
            "--memory-budget", self.budget, "--report", self.report, *options,
        ))  # fmt: skip
        self.reports.setdefault(candidate, []).append(json.loads(self.report.read_text()))
        return done

    def run(self, candidate: str, command: Sequence[object]) -> Ended:
        with self.group() as group:
            done = process.done(command, group)
            self.peaks.setdefault(candidate, []).append(group.peak() if group else None)
        return done

    @contextmanager
    def group(self) -> Iterator[process.Group | None]:
        if self.limit is None:
            yield None
            return
        with process.limited(self.limit) as group:
            yield group

    def check(self, candidates: dict[str, Callable[[], Ended]]) -> None:
        """Compare the first candidate's output with the reference, and the others' files with those of the first."""
        self.prepare()
        for candidate in candidates.values():
            candidate()
        first, *others = map(self.out, candidates)
        if wrong := llamas.differing(first, self.models[0], self.models[1:]):
            raise process.Failed(f"{wrong:,} elements differ from the reference's, no speed")
        for other in others:
            for path in llamas.weights(first):
                if not filecmp.cmp(path, other / path.name, shallow=False):
                    raise process.Failed(
                        f"{other.name}: {path.name} differs from that of {first.name}, no speed"
                    )

    def rows(
        self, model: llamas.Llama, candidates: dict[str, Callable[[], Ended]], rounds: int
    ) -> list[dict[str, Any]]:
        self.check(candidates)
        found = process.alternate({ROOFLINE: self.floor, **candidates}, rounds, self.prepare)
        rooflines = [done.seconds for done in found[ROOFLINE]]
        within = "no limit" if self.limit is None else f"within {self.limit:,} bytes"
        return [
            {
                "suite": "out of core", "layout": "Llama in sharded files", "way": candidate, "dtype": model.dtype,
                "n": len(self.models) - 1, "numel": model.numel, "bytes": self.moved, "state": f"cold, {within}",
                "rounds": rounds, **percentiles(taken), "GB/s": self.moved / statistics.median(taken) / 1e9,
                **roofline_fields(ROOFLINE, [self.moved / s for s in rooflines], [self.moved / s for s in taken]),
                "budget": self.budget, "peak MB": max(done.peak for done in of_candidate) / 1e6,
                "group's peak MB": self._peak(candidate), **self._told(candidate),
            }
            for candidate, of_candidate in found.items()
            for taken in [[done.seconds for done in of_candidate]]
        ]  # fmt: skip

    def _peak(self, candidate: str) -> float | None:
        peaks = [peak for peak in self.peaks[candidate] if peak is not None]
        return max(peaks) / 1e6 if peaks else None

    def _told(self, candidate: str) -> dict[str, Any]:
        """From the reports of a candidate: seconds without the process's start and end, and the fraction that was read."""
        if candidate not in self.reports:
            return {"own seconds": None, "read": None}
        reports = self.reports[candidate]
        inputs = sum(path.stat().st_size for path in self.files)
        return {
            "own seconds": statistics.median(report["seconds"] for report in reports[1:]),
            "read": reports[0]["bytes_read"] / inputs,
        }


def candidates_of(given: argparse.Namespace, case: Case) -> dict[str, Callable[[], Ended]]:
    """The candidates that take turns with floor.py. The first is compared with the reference, the others with the first."""
    if given.partial:
        return {
            "negmerge": partial(case.merge, "negmerge", MERGE, "--threads", THREADS),
            "negmerge, skipping": partial(
                case.merge, "negmerge, skipping", MERGE, "--threads", THREADS, "--skip-unchanged"
            ),
        }
    one = {"negmerge": partial(case.merge, "negmerge", MERGE, "--threads", THREADS)}
    if given.ranks:
        return {
            **one,
            "negmerge, 2 ranks": partial(case.merge, "negmerge, 2 ranks", TORCHRUN, "--threads", 1),
        }
    return one


def lacking(given: argparse.Namespace) -> str | None:
    """Why a case cannot be measured here; None if it can."""
    if given.ranks and not importlib.util.find_spec("negmerge_fast.runtime.distributed"):
        return "negmerge_fast has no ranks here"
    if given.partial and "--skip-unchanged" not in process.done((*MERGE, "--help")).said:
        return "`negmerge merge` has no --skip-unchanged here"
    return None


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--models", type=int, default=8, help="fine-tuned versions")
    options.add_argument("--layers", type=int, default=MODEL.layers)
    options.add_argument(
        "--shrink", type=int, default=1, help="what dimensions are divided by: 1, 2, 4, … 32"
    )
    options.add_argument("--shard", default="512MiB", help="size of the largest file")
    options.add_argument("--limit", default="1GiB", help="of the control group")
    options.add_argument("--budget", default="auto", help="--memory-budget of the merges")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    case_of = options.add_mutually_exclusive_group()
    case_of.add_argument("--partial", action="store_true")
    case_of.add_argument("--ranks", action="store_true")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    if reason := lacking(given):
        print(f"outofcore: {reason}")
        return
    limit: int | None = parse_size(given.limit)
    if reason := process.why_not():
        print(f"outofcore: {reason}: measured without a limit")
        limit = None
    model = llamas.Llama(given.layers, *MODEL[1:]).shrunk(given.shrink)
    try:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            models = llamas.make(Path(name), model, given.models, parse_size(given.shard), given.partial)
            case = Case(Path(name), models, limit, given.budget)
            rows = case.rows(model, candidates_of(given, case), given.rounds)
    except (OSError, process.Failed) as error:
        sys.exit(f"outofcore: {error}")
    record(given.results, rows, also=("own seconds", "read", "peak MB", "group's peak MB"))


if __name__ == "__main__":
    main()
