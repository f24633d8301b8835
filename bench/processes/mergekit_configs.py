"""Merges the same YAML with mergekit, with mergekit through `negmerge mergekit`, and with `negmerge merge --config`.

The models are those of baselines.py: a base and 8 fine-tuned versions of a small Llama, 4.8 GB of F32 in the page cache. Outputs go to a tmpfs.
Each candidate is a process whose whole time is measured, and they take turns. Their outputs are compared with mergekit's: "differing"
has the elements of other bits, "apart" those that are more than 2^-20 apart, which no rounding explains: at a threshold of ties mergekit
keeps as many of equal differences as a sort puts first. Then NegMerge as a method of mergekit, beside `negmerge merge`, whose bits it has
to have, and other methods of `negmerge merge` beside NegMerge.

mergekit has an environment of its own in --environments FOLDER, which is made if it does not exist. It imports this package from the
checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import llamas
import process
import torch
from process import Ended, Failed

from negmerge_fast.benchmark.bandwidth import read_files
from negmerge_fast.benchmark.records import percentiles, record
from negmerge_fast.benchmark.workload import SCALE

RESULTS = baselines.ROOT / "bench" / "results" / "mergekit.jsonl"
PACKAGE = "mergekit>=0.1.5"
# Parameters of each method of mergekit; those of NegMerge are its own.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.125},
    "ties": {"weight": 1.0, "density": 0.2, "lambda": 0.8},
}
# Through `negmerge mergekit` these run the same code of mergekit's. Its ties takes minutes, for which it is not run twice.
THROUGH_PLUG_IN = ("linear", "task_arithmetic")
# Those of `negmerge merge` that are compared with NegMerge: in one read, and in two.
OTHERS = ("mean", "magmax", "ties")
# Without what costs time and is not the merge.
OPTIONS = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")
APART = 2.0**-20


class Case:
    """Commands that merge models into a folder of outputs.

    Args:
        models: The base's directory, and those of its fine-tuned versions.
        outs: A folder for outputs. One of each candidate is kept there until it was compared.
        environment: mergekit's.
    """

    def __init__(self, models: list[Path], outs: Path, environment: Path) -> None:
        self.models, self.outs, self.environment = models, outs, environment
        self.files = [path for model in models for path in llamas.weights(model)]
        self.configs = models[0].parent
        # By candidate: what its output is compared with, which comes before it; and what its time is.
        self.compared: dict[str, str | None] = {}
        self.timed_with: dict[str, str] = {}
        self.candidates: dict[str, Callable[[], Ended]] = {}
        for method, parameters in METHODS.items():
            config = self.write(method, parameters)
            theirs = self._add(f"mergekit-yaml {method}", None, partial(self.mergekit_yaml, config))
            if method in THROUGH_PLUG_IN:
                self._add(f"negmerge mergekit {method}", theirs, partial(self.negmerge_mergekit, config))
            self._add(f"negmerge merge --config {method}", theirs, partial(self.ours, "--config", config))
        config = self.write("negmerge", {"scale": SCALE})
        ours = self._add("negmerge merge", None, partial(self.ours, *models, "--scale", SCALE))
        self._add("negmerge mergekit negmerge", ours, partial(self.negmerge_mergekit, config))
        for method in OTHERS:
            arguments = (*models, "--scale", SCALE, "--method", method)
            name = self._add(f"negmerge merge --method {method}", None, partial(self.ours, *arguments))
            self.timed_with[name] = ours

    def _add(self, name: str, compared: str | None, candidate: Callable[[], Ended]) -> str:
        self.candidates[name], self.compared[name], self.timed_with[name] = (
            candidate,
            compared,
            compared or name,
        )
        return name

    def keep(self, names: Iterable[str]) -> None:
        """Leave out all other candidates."""
        self.candidates = {name: self.candidates[name] for name in names}
        self.compared = dict.fromkeys(self.candidates)

    def write(self, method: str, parameters: dict[str, Any]) -> Path:
        """The file of a method. JSON is valid YAML."""
        base, *models = map(str, self.models)
        listed = [base, *models] if method == "linear" else models
        config = self.configs / f"{method}.yml"
        config.write_text(
            json.dumps({
                "merge_method": method, "base_model": base, "models": [{"model": model} for model in listed], "parameters": parameters,
            })
        )  # fmt: skip
        return config

    @property
    def out(self) -> Path:
        return self.outs / "out"

    def prepare(self) -> None:
        """Remove the output, and read all inputs into the page cache."""
        shutil.rmtree(self.out, ignore_errors=True)
        read_files(self.files, baselines.THREADS)

    def mergekit_yaml(self, config: Path) -> Ended:
        program = self.environment / "bin" / "mergekit-yaml"
        return process.done(("env", "-u", "PYTHONPATH", program, config, self.out, *OPTIONS))

    def negmerge_mergekit(self, config: Path) -> Ended:
        path = f"PYTHONPATH={baselines.ROOT}"
        python = self.environment / "bin" / "python"
        return process.done(
            ("env", path, python, "-m", "negmerge_fast", "mergekit", config, self.out, *OPTIONS)
        )

    def ours(self, *arguments: object) -> Ended:
        return process.done(
            (sys.executable, "-m", "negmerge_fast", "merge", *arguments, "--output", self.out, "--quiet")
        )

    def compare(self) -> tuple[dict[str, tuple[int, int]], dict[str, list[Ended]]]:
        """Run each candidate once.

        Returns:
            The elements whose bits differ from those of what a candidate is compared with, and those that are apart; and the runs.
        """
        found: dict[str, tuple[int, int]] = {}
        taken = {}
        for name, candidate in self.candidates.items():
            self.prepare()
            taken[name] = [candidate()]
            if self.compared[name] is None and name not in self.compared.values():
                continue
            if self.compared[name] is not None:
                found[name] = differing(self.out, self.outs / "other")
                if name == "negmerge mergekit negmerge" and found[name] != (0, 0):
                    raise Failed(f"{name}: {found[name][0]:,} elements differ from {self.compared[name]}'s")
            else:
                shutil.rmtree(self.outs / "other", ignore_errors=True)
                self.out.rename(self.outs / "other")
        shutil.rmtree(self.outs / "other", ignore_errors=True)
        return found, taken

    def rows(self, model: llamas.Llama, rounds: int) -> list[dict[str, Any]]:
        counts, found = self.compare()
        if rounds > 1:
            more = process.alternate(self.candidates, rounds - 1, self.prepare)
            found = {name: [*done, *more[name]] for name, done in found.items()}
        seconds = {name: [done.seconds for done in taken] for name, taken in found.items()}
        moved = sum(path.stat().st_size for path in self.files) * (len(self.models) + 1) // len(self.models)
        return [
            {
                "suite": "mergekit", "layout": "Llama 134M in files", "way": name, "dtype": model.dtype, "n": len(self.models) - 1,
                "numel": model.numel, "bytes": moved, "state": "warm, to tmpfs", "rounds": rounds, **percentiles(taken),
                "GB/s": moved / statistics.median(taken) / 1e9, "compared with": self.timed_with[name] if self.timed_with[name] != name else None,
                "times the other": statistics.median(a / b for a, b in zip(taken, seconds[self.timed_with[name]], strict=True)),
                "differing": counts.get(name, (None, None))[0], "apart": counts.get(name, (None, None))[1],
                "peak MB": max(done.peak for done in found[name]) / 1e6,
            }
            for name, taken in seconds.items()
        ]  # fmt: skip


def differing(left: Path, right: Path) -> tuple[int, int]:
    """Of two models, the elements whose bits differ, and those that are more than a rounding apart."""
    one, other = llamas.opened(left), llamas.opened(right)
    if one.keys() != other.keys():
        raise Failed(f"{left}: other tensors than in {right}")
    bits = apart = 0
    for name in one:
        a, b = (files[name].get_tensor(name) for files in (one, other))
        bits += int((a.view(torch.int32) != b.view(torch.int32)).count_nonzero())
        apart += int(((a - b).abs() > APART).count_nonzero())
    return bits, apart


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--environments",
        type=Path,
        default=baselines.ROOT / ".environments",
        metavar="FOLDER",
        help="mergekit's is in it",
    )
    options.add_argument("--layers", type=int, default=baselines.MODEL.layers)
    options.add_argument(
        "--shrink", type=int, default=1, help="what dimensions are divided by: 1, 2, 4, … 32"
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--methods", action="store_true", help="only the methods of negmerge merge, beside NegMerge"
    )
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder for the models")
    options.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a tmpfs for the outputs")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    model = llamas.Llama(given.layers, *baselines.MODEL[1:]).shrunk(given.shrink)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all models are local
    try:
        folder = given.environments.absolute() / "mergekit"
        environment = folder if given.methods else baselines.environment(folder, PACKAGE)
        with (
            tempfile.TemporaryDirectory(dir=given.folder) as inputs,
            tempfile.TemporaryDirectory(dir=given.tmpfs) as outputs,
        ):
            models = llamas.make(Path(inputs), model, baselines.MODELS, shard=5 << 30)
            case = Case(models, Path(outputs), environment)
            if given.methods:
                others = ("negmerge merge", *(name for name in case.candidates if "--method" in name))
                case.keep(others)
            rows = case.rows(model, given.rounds)
    except (OSError, Failed) as error:
        sys.exit(f"mergekit_configs: {error}")
    record(given.results, rows, also=("times the other", "differing", "apart", "peak MB"))


if __name__ == "__main__":
    main()
