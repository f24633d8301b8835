"""Measures deltas of files beside merges: seconds of whole commands, and sizes.

A Llama in one file and 8 fine-tuned versions, which agree on 9.66 % of the elements, in warm files. `negmerge merge`, `negmerge delta` and
`negmerge apply` with one scale and with three take turns with `cp` of the base, which returns before anything is on the disk, and with `cp`
and `sync` of its files, as `apply` syncs them. What is applied is compared with what is merged, byte for byte, before anything is
timed. Rows are printed; with --results FILE.jsonl they are appended to it, too.
"""

from __future__ import annotations

import argparse
import filecmp
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
from process import Ended

from negmerge_fast.benchmark.records import percentiles, record

COMMAND = (sys.executable, "-m", "negmerge_fast")
THREADS, MODELS, SCALES = 2, 8, (0.5, 0.7, 0.9)
# With it the versions agree on 9.66 % of the elements.
LEAN = 0.6295
COPY = "cp, sync"


class Case:
    """Commands on models in a folder."""

    def __init__(self, folder: Path, models: list[Path]) -> None:
        self.models, self.outs = models, folder / "out"
        self.deltas = {"delta": folder / "delta", "delta --half": folder / "delta-half"}

    def prepare(self) -> None:
        shutil.rmtree(self.outs, ignore_errors=True)
        self.outs.mkdir()
        os.sync()

    def run(self, name: str, *arguments: object) -> Ended:
        return process.done((*COMMAND, name, *arguments, "--quiet", "--threads", THREADS))

    def merge(self) -> Ended:
        return self.run("merge", *self.models, "--scale", SCALES[-1], "--output", self.outs / "merged")

    def delta(self, *options: object) -> Ended:
        return self.run("delta", *self.models, "--output", self.outs / "delta", *options)

    def apply(self, *scales: float) -> Ended:
        given = [text for scale in scales for text in ("--scale", scale)]
        return self.run(
            "apply", self.models[0], self.deltas["delta"], *given, "--output", self.outs / "applied"
        )

    def copy(self, sync: str = "") -> Ended:
        copy = f'cp -r --reflink=never "$0" "$1" {sync}'
        return process.done(("sh", "-c", copy, self.models[0], self.outs / "copy"))

    def check(self) -> None:
        """Make the deltas, and compare what is applied with what is merged."""
        self.prepare()
        for name, path in self.deltas.items():
            self.delta(*name.split()[1:])
            (self.outs / "delta").rename(path)
        self.merge()
        self.apply(SCALES[-1])
        for path in llamas.weights(self.outs / "merged"):
            if not filecmp.cmp(path, self.outs / "applied" / path.name, shallow=False):
                raise process.Failed(f"{path.name}: other bytes than those of the merge, no speed")

    def candidates(self) -> dict[str, Callable[[], Ended]]:
        return {
            "merge": self.merge,
            "delta": self.delta,
            "delta --half": partial(self.delta, "--half"),
            COPY: partial(self.copy, '&& sync "$1"/*'),
            "cp": self.copy,
            "apply": partial(self.apply, SCALES[-1]),
            "apply, 3 scales": partial(self.apply, *SCALES),
        }

    def rows(self, model: llamas.Llama, rounds: int) -> list[dict[str, Any]]:
        self.check()
        found = process.alternate(self.candidates(), rounds, self.prepare)
        dense = _size(self.models[0])
        compared = {"delta": "merge", "delta --half": "merge", "apply": COPY, "apply, 3 scales": COPY}
        return [
            {
                "suite": "deltas", "layout": "Llama in a file", "way": name, "dtype": model.dtype, "n": MODELS, "numel": model.numel,
                "bytes": None, "state": "warm", "rounds": rounds, **percentiles([done.seconds for done in taken]),
                "compared with": compared.get(name), "times the other": _ratio(taken, found.get(compared.get(name, ""))),
                "of a dense model": _size(self.deltas[name]) / dense if name in self.deltas else None,
                "peak MB": max(done.peak for done in taken) / 1e6,
            }
            for name, taken in found.items()
        ]  # fmt: skip


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in llamas.weights(folder))


def _ratio(taken: list[Ended], other: list[Ended] | None) -> float | None:
    """The median of what a candidate took in each round, in what the other took in the same round."""
    if other is None:
        return None
    return statistics.median(a.seconds / b.seconds for a, b in zip(taken, other, strict=True))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--dtypes", nargs="+", default=["F32", "BF16"])
    options.add_argument("--layers", type=int, default=9)
    options.add_argument(
        "--shrink", type=int, default=1, help="what dimensions are divided by: 1, 2, 4, … 32"
    )
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    options.add_argument("--results", type=Path, default=Path(os.devnull), metavar="FILE.jsonl")
    given = options.parse_args()
    rows = []
    for dtype in given.dtypes:
        model = llamas.Llama(given.layers, 1024, 2816, 256, 16, 16384, dtype).shrunk(given.shrink)
        try:
            with tempfile.TemporaryDirectory(dir=given.folder) as name:
                models = llamas.make(Path(name), model, MODELS, 1 << 40, lean=LEAN)
                rows += Case(Path(name), models).rows(model, given.rounds)
        except (OSError, process.Failed) as error:
            sys.exit(f"deltas: {error}")
    record(given.results, rows, also=("times the other", "of a dense model", "peak MB"))


if __name__ == "__main__":
    main()
