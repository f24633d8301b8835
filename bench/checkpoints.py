"""Merging checkpoints from files, warm, onto a tmpfs, against reading and writing alone and against the plain formula.

Bytes counted: every input byte read once, every output byte written once. The limit does just that, on one thread, 256 KiB
at a time, in the same rounds. The command's time is that of the process less that of a tiny merge: imports and start-up.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from reference import SCALE, eager
from rows import alternate, percentiles, record
from safetensors.torch import load_file, save_file

import negmerge_fast as nm

WEIGHTS = "model.safetensors"


def make(root: Path, models: int, numel: int) -> list[Path]:
    """A base and its fine-tuned versions, each 16 tensors of fp32."""
    paths = []
    for k in range(models + 1):
        generator = torch.Generator().manual_seed(k)
        tensors = {f"layer.{i}.weight": torch.randn(numel // 16, generator=generator) for i in range(16)}
        paths.append(root / f"model-{k}")
        paths[-1].mkdir(parents=True)
        save_file(tensors, paths[-1] / WEIGHTS, metadata={"format": "pt"})
    return paths


def plain(paths: list[Path], out: Path) -> None:
    base, *models = (load_file(path / WEIGHTS) for path in paths)
    merged = {name: eager(tensor, [m[name] for m in models]) for name, tensor in base.items()}
    out.mkdir()
    save_file(merged, out / WEIGHTS, metadata={"format": "pt"})


def limit(paths: list[Path], out: Path) -> None:
    buffer = bytearray(256 * 1024)
    for path in paths:
        with open(path / WEIGHTS, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    out.mkdir()
    left = (paths[0] / WEIGHTS).stat().st_size
    with open(out / WEIGHTS, "wb", buffering=0) as file:
        while left:
            left -= file.write(memoryview(buffer)[: min(left, len(buffer))])
        os.fsync(file.fileno())


def merge(paths: list[Path], out: Path, backend: str = "auto") -> None:
    nm.merge_checkpoints(paths[0], paths[1:], out, scale=SCALE, backend=backend)


def command(paths: list[Path], out: Path) -> None:
    words = ["merge", *map(str, paths), "--output", str(out), "--scale", str(SCALE), "--quiet"]
    subprocess.run([sys.executable, "-m", "negmerge_fast", *words], check=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--numel", type=int, default=134_217_728)
    options.add_argument("--models", type=int, default=8)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--tmpfs", default="/dev/shm", help="where the outputs go")
    given = options.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as inputs,
        tempfile.TemporaryDirectory(dir=given.tmpfs) as outputs,
    ):
        out = Path(outputs) / "out"
        paths = make(Path(inputs), given.models, given.numel)
        tiny = make(Path(inputs) / "tiny", given.models, 16)
        made = []
        for way in (merge, partial(merge, backend="torch"), plain):
            way(paths, out)
            made.append((out / WEIGHTS).read_bytes())
            shutil.rmtree(out)
        assert made[0] == made[1] == made[2], "not the reference's and the formula's bytes"
        del made

        ways = {
            "read and write": partial(limit, paths, out),
            "negmerge merge, tiny": partial(command, tiny, out),
            "negmerge merge": partial(command, paths, out),
            "merge_checkpoints": partial(merge, paths, out),
        }
        slow = {
            "merge_checkpoints, torch": partial(merge, paths, out, "torch"),
            "load_file, eager formula, save_file": partial(plain, paths, out),
        }
        clear = partial(shutil.rmtree, out, ignore_errors=True)
        seconds = alternate(ways, given.rounds, clear) | alternate(slow, 3, clear)
    timed = {way: percentiles(s) for way, s in seconds.items()}
    moved = (given.models + 2) * given.numel * 4 / 1e9
    best, start = timed["read and write"]["p50"], timed["negmerge merge, tiny"]["p50"]
    rows = []
    for way, spread in timed.items():
        row = {
            "way": way,
            "dtype": "F32",
            "n": given.models,
            "numel": given.numel,
            "state": "warm, to tmpfs",
            **spread,
        }
        if way == "negmerge merge, tiny":
            rows.append({**row, "numel": 16})
            continue
        taken = spread["p50"] - (start if way == "negmerge merge" else 0)
        rows.append({**row, "seconds": taken, "GB/s": moved / taken, "of_limit": best / taken})
    record("checkpoints.jsonl", rows)


if __name__ == "__main__":
    main()
