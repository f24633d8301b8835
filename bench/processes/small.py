"""Measures what small merges cost beside the merge: a call, tensors by the hundred, and a whole command.

    python bench/processes/small.py [CHECKOUT...]

This checkout and all that are named, each with its compiled library, take turns in processes of their own, so that what else the
machine does falls on all of them. Modules are compiled before, as in an installed package. "python", "import numpy" and "import click" are the floors of a command. Seconds are those of
one call, or of one process. Rows are printed; with --results FILE.jsonl they are appended to it, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from negmerge_fast.benchmark.records import percentiles, record

HERE = Path(__file__).parents[2]
MODELS = 8
# Run in a process of each checkout: the seconds of calls, as JSON.
CALLS = """
import json, sys, time
import torch
import negmerge_fast as nm
from negmerge_fast.backends import native
from negmerge_fast.core.batch import Batch, Signature, segment_at
from negmerge_fast.core.rule import Rule

def timed(call, calls):
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return sorted(found[calls // 2 :])  # warm

torch.set_num_threads(1)
models, rule, counts = int(sys.argv[1]), Rule(0.5), map(int, sys.argv[2:])
held = [torch.randn(16) for _ in range(1 + models)]
signature = Signature("F32", ("F32",) * models, False)
segment = segment_at(16, signature, [t.data_ptr() for t in held], held)
batch = Batch("cpu", signature, [segment])
seconds = {"kernel call": timed(lambda: native.merge_cpu(batch, rule, 1), 2000)}
for count in counts:
    base = {f"layers.{i}.weight": torch.randn(1000) for i in range(count)}
    finetuned = [{n: t + 1e-3 * torch.randn(1000) for n, t in base.items()} for _ in range(models)]
    calls = max(20, 600 // count)
    seconds[f"merge_ of {count} x 1000"] = timed(lambda: nm.merge_(base, finetuned, scale=0.5), calls)
print(json.dumps({name: found[len(found) // 5] for name, found in seconds.items()}))
"""


def run(checkout: Path, compiled: Path, *arguments: str) -> tuple[float, str]:
    """Run Python on a checkout, with compiled modules in a folder; returns the seconds of the process and what it printed."""
    own = {"PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": str(compiled)}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], env={**inherited, **own},
        check=True, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    return time.perf_counter() - began, done.stdout


def tiny_models(folder: Path) -> list[str]:
    """Make a base and two fine-tuned models of four small tensors; returns their paths."""
    random = np.random.default_rng(0)
    paths = [folder / name for name in ("base", "ft-0", "ft-1")]
    for path in paths:
        path.mkdir()
        tensors = {f"w{i}": random.standard_normal((16, 16)).astype(np.float32) for i in range(4)}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text("{}")
    return list(map(str, paths))


def measure(
    checkouts: Sequence[Path], rounds: int, counts: Sequence[int], folder: Path
) -> dict[tuple[str, str], list[float]]:
    """Measure all checkouts in turn; returns seconds by what was measured and by checkout."""
    merge = ["-m", "negmerge_fast", "merge", *tiny_models(folder), "--scale", "0.5", "--output"]
    found: dict[tuple[str, str], list[float]] = {}
    for turn in range(-1, rounds):  # the first one fills caches
        for at, checkout in enumerate(checkouts):
            out = str(folder / f"out-{turn}-{at}")
            commands = {
                "python": ["-c", "pass"], "import numpy": ["-c", "import numpy"], "import click": ["-c", "import click"],
                "import negmerge_fast": ["-c", "import negmerge_fast"], "tiny merge": [*merge, out],
            }  # fmt: skip
            seconds = {name: run(checkout, folder, *command)[0] for name, command in commands.items()}
            seconds |= json.loads(run(checkout, folder, "-c", CALLS, *map(str, (MODELS, *counts)))[1])
            for name, each in seconds.items() if turn >= 0 else ():
                found.setdefault((name, str(checkout)), []).append(each)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path(os.devnull), metavar="FILE.jsonl")
    parser.add_argument("--folder", type=Path, help="for the models; the usual one for temporary files")
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 300, 2000])
    given = parser.parse_args()
    checkouts = [HERE, *(each.resolve() for each in given.checkouts)]
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        found = measure(checkouts, given.rounds, given.tensors, Path(name))
    rows: list[dict[str, Any]] = [
        {"layout": "small", "way": name, "n": MODELS, "checkout": checkout, "rounds": given.rounds, **percentiles(seconds)}
        for (name, checkout), seconds in sorted(found.items())
    ]  # fmt: skip
    record(given.results, rows, also=("checkout",))


if __name__ == "__main__":
    main()
