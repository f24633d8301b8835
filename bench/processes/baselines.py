"""Merges models in files with everything else that can: scripts in plain PyTorch, and other tools.

The models are a base and 8 fine-tuned versions of a small Llama, 4.8 GB of F32 in the page cache. Outputs go to a
tmpfs. Each candidate is a process whose whole time is measured, and they take turns. methods/ has the scripts, and
NegMerge as a method of mergekit, sd-mecha and fusion_bench, each as fast as it can be written there. What merges as
NegMerge does is compared with the reference first, bit for bit; this package gets no speed if it differs. mergekit's
own methods read and write as much, and compute less (linear, task_arithmetic) or about as much (ties). The roofline
reads every input byte once, 256 KiB at a time, and writes every output byte once. Those bytes are counted.

Each tool has an environment of its own in --environments FOLDER, which is made if it does not exist. A tool that
cannot be installed or run is skipped, with a line that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
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
ROOFLINE, OURS = "read and write", "negmerge merge"
SCRIPTS = Path(__file__).with_name("methods")
# By candidate: a script that merges as NegMerge does, and its flags.
PLAIN = {
    "plain script": ("plain.py",),
    "compiled script": ("plain.py", "--compile"),
    "released loops": ("released.py",),
}
# By tool: what pip installs, and the script of its method.
TOOLS = {
    "mergekit": ("mergekit>=0.1.4", "with_mergekit.py"),
    "sd-mecha": ("sd-mecha>=1.1", "with_sd_mecha.py"),
    "fusion-bench": ("fusion-bench>=0.2.30", "with_fusion_bench.py"),
}
# Methods of mergekit, and parameters of each model.
METHODS: dict[str, dict[str, float]] = {"linear": {}, "task_arithmetic": {}, "ties": {"density": 1.0}}


class Case:
    """Commands that merge models into a folder of outputs.

    Args:
        models: The base's directory, and those of its fine-tuned versions.
        outs: A folder for outputs, which is removed and made again before each command.
        environments: The environment of each tool that is measured.
    """

    def __init__(self, models: list[Path], outs: Path, environments: dict[str, Path]) -> None:
        self.models, self.outs = models, outs
        self.files = [path for model in models for path in llamas.weights(model)]
        self.size = sum(path.stat().st_size for path in llamas.weights(models[0]))
        self.report = models[0].parent / "report.json"
        self.own_seconds: list[float] = []
        self.differing: dict[str, int] = {}
        self.candidates: dict[str, Callable[[], Ended]] = {
            ROOFLINE: self.floor,
            OURS: self.ours,
            **{name: partial(self.script, Path(sys.executable), *flags) for name, flags in PLAIN.items()},
        }
        if found := environments.get("mergekit"):
            self.candidates |= {
                f"mergekit {method}": partial(self.mergekit, found, method) for method in METHODS
            }
        for tool, found in environments.items():
            self.candidates[f"{tool} negmerge"] = partial(
                self.script, found / "bin" / "python", TOOLS[tool][1]
            )

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
        options = ("--output", self.outs / "out", "--scale", SCALE, "--report", self.report, "--quiet")
        done = process.done((sys.executable, "-m", "negmerge_fast", "merge", *self.models, *options))
        self.own_seconds.append(json.loads(self.report.read_text())["seconds"])
        return done

    def script(self, python: Path, name: str, *flags: str) -> Ended:
        return self.written(
            (python, SCRIPTS / name, "--scale", SCALE, *flags, self.outs / "out", *self.models)
        )

    def mergekit(self, environment: Path, method: str) -> Ended:
        base, *models = map(str, self.models)
        if method == "linear":  # it has no base, and would not read it
            models.insert(0, base)
        given: dict[str, Any] = {"normalize": True}
        if method != "linear":
            given["lambda"] = -SCALE
        # JSON is valid YAML.
        recipe = {
            "merge_method": method, "base_model": base, "dtype": "float32", "parameters": given,
            "models": [{"model": model, "parameters": {"weight": 1.0, **METHODS[method]}} for model in models],
        }  # fmt: skip
        config = self.outs / "recipe.yaml"
        config.write_text(json.dumps(recipe))
        options = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")
        return self.written((environment / "bin" / "mergekit-yaml", config, self.outs / "out", *options))

    def written(self, command: Sequence[object]) -> Ended:
        """Run a command of another tool or environment, and look at the size of what it wrote."""
        done = process.done(("env", "-u", "PYTHONPATH", *command))
        if (written := sum(path.stat().st_size for path in llamas.weights(self.outs / "out"))) < self.size:
            raise Failed(f"{written:,} bytes written, expected at least {self.size:,}")
        return done

    def check(self) -> None:
        """Run each candidate once, and compare what merges as NegMerge does with the reference.

        Another tool or script that fails is skipped. Raises Failed if this package does, or if its output differs.
        """
        for name, candidate in list(self.candidates.items()):
            self.prepare()
            try:
                candidate()
            except Failed as error:
                if name in (ROOFLINE, OURS):
                    raise
                print(f"baselines: {name} is not measured: {error}", flush=True)
                del self.candidates[name]
                continue
            if name == OURS or name in PLAIN or name.endswith(" negmerge"):
                self.differing[name] = llamas.differing(self.outs / "out", self.models[0], self.models[1:])
        if wrong := self.differing[OURS]:
            raise Failed(f"{OURS}: {wrong:,} elements differ from the reference's, no speed")

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
                "differing": self.differing.get(candidate),
            }
            for candidate, taken in seconds.items()
        ]  # fmt: skip


def environment(folder: Path, package: str) -> Path:
    """The environment of a tool, made if it does not exist. Raises Failed if it cannot be made."""
    if not folder.exists():
        print(f"baselines: {package} is installed into {folder}", flush=True)
        # Without the constraints, pip would download another torch and gigabytes of CUDA libraries.
        constraint = ("-c", ROOT / "constraints.txt")
        try:
            process.done((sys.executable, "-m", "venv", folder))
            pip = (folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install")
            process.done((*pip, *constraint, package))
        except Failed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if not (python := folder / "bin" / "python").is_file():
        raise Failed(f"{python}: no such file")
    return folder


def environments(folder: Path) -> dict[str, Path]:
    """The environments of all tools that can be measured, by tool. The others get a line."""
    found = {}
    for tool, (package, _) in TOOLS.items():
        try:
            found[tool] = environment(folder / tool, package)
        except (Failed, OSError) as error:
            print(f"baselines: {tool} is not measured: {error}", flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--environments",
        type=Path,
        default=ROOT / ".environments",
        metavar="FOLDER",
        help="one for each tool",
    )
    options.add_argument("--without-tools", action="store_true", help="measure the scripts only")
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
    if given.without_tools:
        print("baselines: no tools are measured, as asked for")
    tools = {} if given.without_tools else environments(given.environments.absolute())
    # All models are local.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with (
            tempfile.TemporaryDirectory(dir=given.folder) as inputs,
            tempfile.TemporaryDirectory(dir=given.tmpfs) as outputs,
        ):
            models = llamas.make(Path(inputs), model, MODELS, shard=5 << 30)
            rows = Case(models, Path(outputs) / "outs", tools).rows(model, given.rounds)
    except (OSError, Failed) as error:
        sys.exit(f"baselines: {error}")
    record(given.results, rows, also=("times ours", "own seconds", "peak MB", "differing"))


if __name__ == "__main__":
    main()
