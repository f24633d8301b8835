"""Compares `negmerge merge` with plain loops over the same files (plain_files.cpp), which differ in how they read.

The models are a base and fine-tuned versions of a small Llama in F32. Warm: the inputs are in the page cache, and the
output goes to a tmpfs. Cold: the inputs were evicted from it, the output goes to the same disk, and all are within a
memory limit. All take turns. Seconds are those from the first read to the last write, without a process's start.

The roofline reads every input byte once and writes every output byte once, and does not merge. Warm, it does so on
one thread. Cold, it is the fastest of several, which read like cat on 1, 2 or 4 threads, or past the page cache.

--before FOLDER   another checkout, whose library is compiled, takes turns with this one
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
sys.path.append(str(HERE.with_name("processes")))

import llamas  # noqa: E402
import process  # noqa: E402
from process import Ended, Failed  # noqa: E402

from negmerge_fast.benchmark.bandwidth import make_cold, read_files  # noqa: E402
from negmerge_fast.benchmark.records import percentiles, record, roofline_fields  # noqa: E402
from negmerge_fast.benchmark.workload import SCALE  # noqa: E402
from negmerge_fast.runtime.memory import parse_size  # noqa: E402

RESULTS = HERE.parent / "results" / "reads.jsonl"
MODEL = llamas.Llama(12, 768, 2048, 768, 12, 32000, "F32")
THREADS, CHUNK_BYTES = 2, 1 << 20
OURS = "negmerge merge"
# By name: the access to read, the threads, and whether it merges.
PLAIN = {
    f"{kind}, {threads} thread{'s' * (threads > 1)}": (kind.partition(",")[0], threads, "merged" in kind)
    for kind, threads in (
        ("in turn", 1), ("in turn", 2), ("in turn", 4), ("direct", 4),
        ("mapped, merged", 2), ("read, merged", 2), ("read, merged", 4), ("requested, merged", 2), ("direct, merged", 4),
    )
}  # fmt: skip
ROOFLINES = {"warm": ["in turn, 1 thread"], "cold": [name for name, kind in PLAIN.items() if not kind[2]]}


class Case:
    """Commands that merge models, from the page cache to a tmpfs or from a disk to itself."""

    def __init__(
        self,
        models: list[Path],
        state: str,
        out: Path,
        program: Path,
        limit: int | None,
        before: Path | None = None,
    ) -> None:
        self.before = before
        self.models, self.state, self.out, self.limit = models, state, out, limit
        self.files = [path for model in models for path in llamas.weights(model)]
        self.moved = sum(path.stat().st_size for path in (*self.files, self.files[0]))
        self.program = program

    def candidates(self) -> dict[str, Callable[[], float]]:
        """Functions that return the seconds of one run, by name."""
        plain = {
            name: lambda access=access, threads=threads, merges=merges: self.plain(access, threads, merges)
            for name, (access, threads, merges) in PLAIN.items()
            if merges or name in ROOFLINES[self.state]
            # Past the page cache, what is in it is not read from it.
            if self.state == "cold" or access != "direct"
        }
        before = {f"{OURS}, before": lambda: self.ours(self.before)} if self.before else {}
        return {OURS: self.ours, **before, **plain}

    def ours(self, checkout: Path | None = None) -> float:
        report = self.out / "report.json"
        self.run((
            *(("env", "-C", checkout) if checkout else ()), sys.executable, "-m", "negmerge_fast", "merge", *self.models, "--output", self.out / "merged", "--scale", SCALE,
            "--backend", "cpu", "--threads", THREADS, "--quiet", "--report", report,
        ))  # fmt: skip
        return float(json.loads(report.read_text())["seconds"])

    def plain(self, access: str, threads: int, merges: bool) -> float:
        command = (self.program, access, threads, CHUNK_BYTES, int(merges), self.out / "plain", *self.files)
        return float(self.run(command).said)

    def run(self, command: tuple[object, ...]) -> Ended:
        if self.limit is None:
            return process.done(command)
        with process.limited(self.limit) as group:
            return process.done(command, group)

    def prepare(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        read_files(self.files, THREADS) if self.state == "warm" else make_cold(self.files)

    def rows(self, model: llamas.Llama, rounds: int) -> list[dict[str, Any]]:
        found: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            for name, candidate in self.candidates().items():
                self.prepare()
                seconds = candidate()
                if number:  # the first round is not counted
                    found.setdefault(name, []).append(seconds)
        roofline = min(ROOFLINES[self.state], key=lambda name: statistics.median(found[name]))
        speeds = [self.moved / seconds for seconds in found[roofline]]
        within = "to tmpfs" if self.limit is None else f"within {self.limit >> 20} MiB"
        return [
            {
                "layout": "Llama in files", "way": name, "dtype": model.dtype, "n": len(self.models) - 1, "numel": model.numel,
                "bytes": self.moved, "state": f"{self.state}, {within}", "rounds": rounds, **percentiles(taken),
                "GB/s": self.moved / statistics.median(taken) / 1e9,
                **roofline_fields(roofline, speeds, [self.moved / seconds for seconds in taken]),
            }
            for name, taken in found.items()
        ]  # fmt: skip


def build(folder: Path) -> Path:
    """Compile the plain loops."""
    program = folder / "plain_files"
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-pthread", "-mavx2", "-mf16c", f"-I{CSRC}"]
    sources = [HERE / "plain_files.cpp", CSRC / "merge_loop.cpp"]
    command = [os.environ.get("CXX", "c++"), *flags, "-DNEGMERGE_LOOP=merge_loop", *sources, "-o", program]
    subprocess.run(command, check=True)
    return program


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--models", type=int, default=8, help="fine-tuned versions")
    options.add_argument("--layers", type=int, default=MODEL.layers)
    options.add_argument(
        "--shrink", type=int, default=1, help="what dimensions are divided by: 1, 2, 4, … 32"
    )
    options.add_argument("--states", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    options.add_argument("--limit", default="512MiB", help="of the control group of cold merges")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--before", type=Path, metavar="FOLDER")
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    options.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a tmpfs for the outputs")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    model = llamas.Llama(given.layers, *MODEL[1:]).shrunk(given.shrink)
    rows = []
    try:
        with (
            tempfile.TemporaryDirectory(dir=given.folder.absolute()) as disk,
            tempfile.TemporaryDirectory(dir=given.tmpfs) as tmpfs,
        ):
            models = llamas.make(Path(disk), model, given.models, 5 << 30)
            program = build(Path(disk))
            for state in given.states:
                warm = state == "warm"
                out = Path(tmpfs if warm else disk) / "outs"
                limit = None if warm else parse_size(given.limit)
                rows += Case(models, state, out, program, limit, given.before).rows(model, given.rounds)
    except (OSError, Failed) as error:
        sys.exit(f"reads: {error}")
    record(given.results, rows)


if __name__ == "__main__":
    main()
