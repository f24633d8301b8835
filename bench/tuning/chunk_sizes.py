"""Tunes the chunk size of a streamed merge: merges the same files in chunks of other sizes.

The inputs are in the page cache, the output goes to a tmpfs, and all sizes take turns. The counted bytes are those of
all inputs, read once, and of the output, written once. The roofline reads and writes just those on one thread, 256
KiB at a time, in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import negmerge_fast as nm
from negmerge_fast.benchmark.records import percentiles, record, roofline_fields
from negmerge_fast.benchmark.timing import alternate
from negmerge_fast.streaming import budget

RESULTS = Path(__file__).parents[1] / "results" / "chunk_sizes.jsonl"
CHUNK_BYTES = [1 << power for power in range(18, 24)]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
ROOFLINE = "read and write"


def make(folder: Path, versions: int, dtype: torch.dtype, numel: int) -> list[Path]:
    """Write a base and its fine-tuned versions as files of 16 tensors each."""
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"{dtype}-{k}.safetensors".removeprefix("torch.") for k in range(versions)]
    for path in paths:
        tensors = {f"layer.{i}.weight": torch.randn(numel // 16, generator=generator) for i in range(16)}
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    return paths


def merge(chunk_bytes: int, paths: list[Path], out: Path) -> None:
    usual, budget.MAX_CHUNK_BYTES = budget.MAX_CHUNK_BYTES, chunk_bytes
    try:
        # A budget so large that it shortens no chunk.
        nm.merge_checkpoints(paths[0], paths[1:], out, scale=0.9, memory_budget="1TiB")
    finally:
        budget.MAX_CHUNK_BYTES = usual


def roofline(paths: list[Path], out: Path) -> None:
    buffer = bytearray(256 * 1024)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    remaining = paths[0].stat().st_size
    with open(out, "wb", buffering=0) as file:
        while remaining:
            remaining -= file.write(memoryview(buffer)[: min(remaining, len(buffer))])
        os.fsync(file.fileno())


def measure(
    dtype: str, n: int, numel: int, paths: list[Path], out: Path, rounds: int
) -> list[dict[str, Any]]:
    """A row for each size of a chunk."""
    candidates = {
        f"chunks of {chunk_bytes >> 10:,} KiB": partial(merge, chunk_bytes, paths, out)
        for chunk_bytes in CHUNK_BYTES
    }
    made = set()
    for once in candidates.values():
        once()
        made.add(out.read_bytes())
        out.unlink()
    assert len(made) == 1, "the size of chunks changes the output"
    del made
    clear = partial(out.unlink, missing_ok=True)
    seconds = alternate({ROOFLINE: partial(roofline, paths, out), **candidates}, rounds, clear)
    clear()
    moved = (n + 2) * numel * DTYPES[dtype].itemsize
    rooflines = seconds.pop(ROOFLINE)
    rows = []
    for candidate, taken in seconds.items():
        spread = percentiles(taken)
        rows.append({
            "suite": "tune", "layout": "files", "way": candidate, "dtype": dtype, "n": n, "numel": numel, "bytes": moved,
            "state": "warm, to tmpfs", "rounds": rounds, **spread, "GB/s": moved / spread["p50"] / 1e9,
            **roofline_fields(ROOFLINE, [moved / s for s in rooflines], [moved / s for s in taken]),
        })  # fmt: skip
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bytes", type=int, default=2 << 30, help="total size of all files")
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"), help="a tmpfs for the outputs")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    if not given.tmpfs.is_dir():
        print(f"chunk_sizes: no tmpfs at {given.tmpfs}; name one with --tmpfs")
        return
    most = 30
    rows, said = [], []
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as inputs,
        tempfile.TemporaryDirectory(dir=given.tmpfs) as outputs,
    ):
        for dtype, kind in DTYPES.items():
            numel = given.bytes // (most + 1) // kind.itemsize // 1024 * 1024
            paths = make(Path(inputs), most + 1, kind, numel)
            for n in (2, 8, most):
                out = Path(outputs) / "out.safetensors"
                found = measure(dtype, n, numel, paths[: n + 1], out, given.rounds)
                rows += found
                best = min(found, key=lambda row: float(row["p50"]))
                said.append(f"{dtype}, n = {n}: {best['way']}, {best['of_limit']:.2f} of {ROOFLINE}")
            for path in paths:
                path.unlink()
    record(given.results, rows)
    print("\n".join(said))


if __name__ == "__main__":
    main()
