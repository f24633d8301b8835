"""Merges models in files with other tools: the formula in plain PyTorch, and mergekit's task_arithmetic and ties.

The models are a base and 8 fine-tuned versions of a small Llama, 4.8 GB of F32 in the page cache. Outputs go to a
tmpfs. Each candidate is a process whose whole time is measured, and they take turns. The outputs of the formula and
of this package are compared with the reference first, bit for bit. mergekit has no such method. Its two methods read
and write as much, and compute less (task_arithmetic) or about as much (ties). The roofline reads every input byte
once, 256 KiB at a time, and writes every output byte once. Those bytes are counted.

mergekit pins its dependencies and needs an environment of its own. --mergekit FOLDER names one, which is made if it
does not exist.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llamas
import process
from process import Ended, Failed

from negmerge_fast.benchmark.bandwidth import read_files
from negmerge_fast.benchmark.records import percentiles, record, roofline_fields
from negmerge_fast.benchmark.workload import SCALE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "peers.jsonl"
MODEL = llamas.Llama(12, 768, 2048, 768, 12, 32000, "F32")
MODELS, THREADS = 8, 2
ROOFLINE, OURS, PLAIN = "read and write", "negmerge merge", "load_file, formula, save_file"
METHODS = {"task_arithmetic": {}, "ties": {"density": 1.0}}


class Case:
    """Commands that merge models into a folder of outputs."""

    def __init__(self, models: list[Path], outs: Path, mergekit: Path | None) -> None:
        self.models, self.outs = models, outs
        self.files = [path for model in models for path in llamas.weights(model)]
        self.size = sum(path.stat().st_size for path in llamas.weights(models[0]))
        self.report = models[0].parent / "report.json"
        self.own_seconds: list[float] = []
        self.candidates: dict[str, Callable[[], Ended]] = {
            ROOFLINE: self.floor,
            OURS: self.ours,
            PLAIN: self.plain,
        }
        if mergekit:
            self.candidates |= {
                f"mergekit {method}": partial(self.mergekit, mergekit, method) for method in METHODS
            }

    def prepare(self) -> None:
        """Remove all outputs, and read all inputs into the page cache."""
        shutil.rmtree(self.outs, ignore_errors=True)
        self.outs.mkdir()
        read_files(self.files, THREADS)

    def floor(self) -> Ended:
        floor = Path(__file__).with_name("floor.py")
        options = ("--chunk-bytes", 256 << 10, "--threads", THREADS)
        return process.done((sys.executable, floor, self.outs / "floor", *self.models, *options))

    def ours(self) -> Ended:
        options = ("--output", self.outs / "ours", "--scale", SCALE, "--report", self.report, "--quiet")
        done = process.done((sys.executable, "-m", "negmerge_fast", "merge", *self.models, *options))
        self.own_seconds.append(json.loads(self.report.read_text())["seconds"])
        return done

    def plain(self) -> Ended:
        formula = Path(__file__).with_name("formula.py")
        return process.done((sys.executable, formula, self.outs / "plain", *self.models))

    def mergekit(self, environment: Path, method: str) -> Ended:
        base, *models = map(str, self.models)
        # JSON is valid YAML.
        recipe = {
            "merge_method": method, "base_model": base, "dtype": "float32",
            "models": [{"model": model, "parameters": {"weight": 1.0, **METHODS[method]}} for model in models],
            "parameters": {"normalize": True, "lambda": -SCALE},
        }  # fmt: skip
        config = self.outs / f"{method}.yaml"
        config.write_text(json.dumps(recipe))
        out = self.outs / method
        done = process.done((environment / "bin" / "mergekit-yaml", config, out, "--quiet"))
        if (written := sum(path.stat().st_size for path in llamas.weights(out))) < self.size:
            raise Failed(f"mergekit {method}: {written:,} bytes written, expected at least {self.size:,}")
        return done

    def check(self) -> None:
        """Run each candidate once, and compare this package's output and the formula's with the reference."""
        self.prepare()
        for candidate in self.candidates.values():
            candidate()
        for name, out in ((OURS, "ours"), (PLAIN, "plain")):
            if wrong := llamas.differing(self.outs / out, self.models[0], self.models[1:]):
                raise Failed(f"{name}: {wrong:,} elements differ from the reference's, no speed")

    def rows(self, model: llamas.Llama, rounds: int) -> list[dict[str, Any]]:
        self.check()
        self.own_seconds.clear()
        found = process.alternate(self.candidates, rounds, self.prepare)
        seconds = {
            candidate: [done.seconds for done in of_candidate] for candidate, of_candidate in found.items()
        }
        moved = (len(self.models) + 1) * self.size
        return [
            {
                "suite": "peers", "layout": "Llama 134M in files", "way": candidate, "dtype": model.dtype,
                "n": len(self.models) - 1, "numel": model.numel, "bytes": moved, "state": "warm, to tmpfs",
                "rounds": rounds, **percentiles(taken), "GB/s": moved / statistics.median(taken) / 1e9,
                **roofline_fields(ROOFLINE, [moved / s for s in seconds[ROOFLINE]], [moved / s for s in taken]),
                "times ours": statistics.median(a / b for a, b in zip(taken, seconds[OURS], strict=True)),
                "own seconds": statistics.median(self.own_seconds) if candidate == OURS else None,
                "peak MB": max(done.peak for done in found[candidate]) / 1e6,
                "differing": 0 if candidate in (OURS, PLAIN) else None,
            }
            for candidate, taken in seconds.items()
        ]  # fmt: skip


def environment(folder: Path) -> Path:
    """The environment that has mergekit, made if it does not exist. Raises Failed if it cannot be made."""
    program = folder / "bin" / "mergekit-yaml"
    if not folder.exists():
        print(f"baselines: mergekit is installed into {folder}", flush=True)
        # Without the constraints, pip would download another torch and gigabytes of CUDA libraries.
        constraint = ("-c", ROOT / "constraints.txt")
        try:
            process.done((sys.executable, "-m", "venv", folder))
            pip = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install")
            process.done((*pip, *constraint, "mergekit>=0.1.4"))
        except Failed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if not program.is_file():
        raise Failed(f"{program}: no such file")
    return folder


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--mergekit", type=Path, default=ROOT / ".mergekit", metavar="FOLDER")
    options.add_argument("--without-mergekit", action="store_true")
    options.add_argument("--layers", type=int, default=MODEL.layers)
    options.add_argument(
        "--shrink", type=int, default=1, help="what dimensions are divided by: 1, 2, 4, … 32"
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder for the models")
    options.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a tmpfs for the outputs")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    model = llamas.Llama(given.layers, *MODEL[1:]).shrunk(given.shrink)
    if not os.access(given.tmpfs, os.W_OK):
        sys.exit(f"baselines: {given.tmpfs} cannot be written; name a tmpfs with --tmpfs")
    mergekit = None
    try:
        if given.without_mergekit:
            print("baselines: mergekit is not measured, as asked for")
        else:
            mergekit = environment(given.mergekit.absolute())
    except Failed as error:
        print(f"baselines: mergekit is not measured: {error}")
    # All models are local.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with (
            tempfile.TemporaryDirectory(dir=given.folder) as inputs,
            tempfile.TemporaryDirectory(dir=given.tmpfs) as outputs,
        ):
            models = llamas.make(Path(inputs), model, MODELS, shard=5 << 30)
            rows = Case(models, Path(outputs) / "outs", mergekit).rows(model, given.rounds)
    except (OSError, Failed) as error:
        sys.exit(f"baselines: {error}")
    record(given.results, rows, also=("times ours", "own seconds", "peak MB"))


if __name__ == "__main__":
    main()
