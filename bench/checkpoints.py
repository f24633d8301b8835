"""Merging checkpoints from files, warm, against the plain formula on loaded files and against reading and writing alone.

Bytes counted: every input byte read once, every output byte written once. The limit reads every input byte (256 KiB at
a time, two threads) and writes and syncs a file of the output's size, in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from reference import SCALE, eager
from rows import alternate, percentiles, record
from safetensors.torch import load_file, save_file

import negmerge_fast as nm


def make(root: Path, models: int, numel: int) -> list[Path]:
    """A base and its fine-tuned versions, each 16 tensors of fp32."""
    paths = []
    for k in range(models + 1):
        generator = torch.Generator().manual_seed(k)
        tensors = {f"layer.{i}.weight": torch.randn(numel // 16, generator=generator) for i in range(16)}
        paths.append(root / f"model-{k}")
        paths[-1].mkdir()
        save_file(tensors, paths[-1] / "model.safetensors", metadata={"format": "pt"})
    return paths


def plain(paths: list[Path], out: Path) -> None:
    base, *models = (load_file(path / "model.safetensors") for path in paths)
    merged = {name: eager(tensor, [m[name] for m in models]) for name, tensor in base.items()}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


def read_all(path: Path) -> None:
    buffer = bytearray(256 * 1024)
    with open(path / "model.safetensors", "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def limit(paths: list[Path], out: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read_all, paths))
    block = bytes(1 << 20)
    with open(out, "wb", buffering=0) as file:
        for _ in range((paths[0] / "model.safetensors").stat().st_size >> 20):
            file.write(block)
        os.fsync(file.fileno())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--numel", type=int, default=134_217_728)
    options.add_argument("--models", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        paths = make(root, given.models, given.numel)
        merge = partial(nm.merge_checkpoints, paths[0], paths[1:], root / "fast", scale=SCALE, overwrite=True)
        merge()
        plain(paths, root / "plain")
        fast, slow = (load_file(root / way / "model.safetensors") for way in ("fast", "plain"))
        assert all(torch.equal(slow[name], tensor) for name, tensor in fast.items()), "not the formula's bits"
        del fast, slow
        ways = {
            "read and write": partial(limit, paths, root / "limit"),
            "load_file, eager formula, save_file": partial(plain, paths, root / "plain"),
            "merge_checkpoints, torch": merge,
        }
        timed = {way: percentiles(s) for way, s in alternate(ways, given.rounds).items()}
    moved = (given.models + 2) * given.numel * 4 / 1e9
    best = timed["read and write"]["p50"]
    record("checkpoints.jsonl", [
        {
            "way": way, "dtype": "F32", "n": given.models, "numel": given.numel, "state": "warm", **spread,
            "GB/s": moved / spread["p50"], "of_limit": best / spread["p50"],
        }
        for way, spread in timed.items()
    ])  # fmt: skip


if __name__ == "__main__":
    main()
