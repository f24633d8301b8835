"""Tunes how the CPU kernel distributes a batch over threads: from how many bytes a second thread pays, and the size of chunks.

Each candidate is csrc/merge_cpu.cpp compiled with other constants. All of them are loaded into one process and take
turns on the same memory. "in memory" rotates over so many copies of the batch that none is in a cache when its turn
comes. "in cache" repeats one batch. The counted bytes are (n + 2) · numel · size. A candidate gets a speed only if
its result is the reference's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import negmerge_fast as nm
from negmerge_fast.benchmark.records import percentiles, record
from negmerge_fast.core.batch import COUNTED
from negmerge_fast.core.dtypes import DTYPE_CODES

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
RESULTS = HERE.parent / "results" / "threads.jsonl"
PAST_CACHE = 512 << 20  # bytes of all copies together
MODELS = 8
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
SIZES = {dtype: kind.itemsize for dtype, kind in DTYPES.items()}

# Switches of the compiler, as in csrc/CMakeLists.txt.
AVX2 = ["-mavx2", "-mf16c"]
X86 = {"avx2": AVX2, "avx512": [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]}

# The largest number of elements that a thread takes at once, for batches long enough to be cut into such chunks.
MAX_AT_ONCE = [1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18]
# The smallest number, for batches that would otherwise be cut into shorter chunks.
MIN_AT_ONCE = [1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14]
# Uses all threads that are asked for, however small the batch is.
EVERY_THREAD = "-DNEGMERGE_BYTES_PER_THREAD=1"


def compile_loops(folder: Path) -> list[Path]:
    """Compile the loops of merges, of low-rank models, too, for each instruction set, as csrc/CMakeLists.txt does."""
    sets = {"baseline": [], **(X86 if os.uname().machine == "x86_64" else {})}
    commands, objects = [], []
    for name, switches in sets.items():
        defined = [f"-DNEGMERGE_LOOP=merge_loop_{name}", f"-DNEGMERGE_LOW_RANK_LOOP=expand_loop_{name}"]
        for source in ("merge_loop", "low_rank_loop"):
            objects.append(folder / f"{source}-{name}.o")
            commands.append(
                [*switches, *defined, "-w", "-c", str(CSRC / f"{source}.cpp"), "-o", str(objects[-1])]
            )
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_with, commands))
    return objects


def compile_with(arguments: list[str]) -> None:
    common = ["-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread"]
    subprocess.run([os.environ.get("CXX", "c++"), *common, *arguments], check=True)


class Built:
    """merge_cpu.cpp, compiled with other constants."""

    def __init__(self, folder: Path, loops: list[Path], *flags: str) -> None:
        library = folder / f"{'-'.join(flags) or 'as built'}.so"
        compiled = [CSRC / "merge_cpu.cpp", CSRC / "low_rank_cpu.cpp", *loops]
        sources = [str(HERE / "threads.cpp"), *map(str, compiled)]
        escape = "-fvisibility=default"  # of merge_times only; the rest stays hidden in the library
        compile_with([escape, *flags, "-shared", "-Wl,-Bsymbolic", *sources, "-o", str(library)])
        self.function = ctypes.CDLL(str(library)).merge_times

    def seconds(self, workload: Workload, threads: int, calls: int) -> list[float]:
        counts = np.zeros(len(COUNTED), np.int64)
        taken = np.empty(calls)
        self.function(
            DTYPE_CODES[workload.dtype], ctypes.c_int64(MODELS), ctypes.c_int64(len(workload.tables)),
            ctypes.c_void_p(workload.tables.ctypes.data), threads, ctypes.c_int64(calls),
            ctypes.c_void_p(counts.ctypes.data), ctypes.c_void_p(taken.ctypes.data),
        )  # fmt: skip
        return taken.tolist()


class Workload:
    """Copies of a batch of one segment: a base, MODELS fine-tuned versions, and an output."""

    def __init__(self, dtype: str, numel: int, copies: int) -> None:
        self.dtype, self.numel, self.copies = dtype, numel, copies
        kind = DTYPES[dtype]
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(numel, generator=generator)
        models = [base + 0.1 * torch.randn(numel, generator=generator) for _ in range(MODELS)]
        versions = [version.to(kind) for version in (base, torch.zeros(numel), *models)]
        self.held = [[version.clone() for version in versions] for _ in range(copies)]
        rows = [[numel, *(version.data_ptr() for version in copy)] for copy in self.held]
        self.tables = np.array(rows, np.uint64).view(np.int64)
        self.bytes = (MODELS + 2) * numel * SIZES[dtype]
        self.state = "in cache" if copies == 1 and self.bytes < PAST_CACHE // 8 else "in memory"

    def check(self, built: Built, threads: int) -> None:
        base, out, *models = self.held[0]
        out.fill_(float("nan"))
        built.seconds(self, threads, 1)
        expected = nm.merge(base, models, scale=0.9, backend="torch")
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), "not the reference's bits"


def timed(workload: Workload, candidates: dict[str, tuple[Built, int]], rounds: int) -> list[dict[str, Any]]:
    """A row for each candidate: a library and a number of threads. They take turns of several calls."""
    for built, threads in candidates.values():
        workload.check(built, threads)
    # A turn takes about 2 ms, so that what the previous one left in the caches hardly matters.
    first, *_ = candidates.values()
    usual = min(first[0].seconds(workload, first[1], 3))
    calls = max(1, min(round(0.002 / usual), 200))
    seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for _ in range(rounds):
        for candidate, (built, threads) in candidates.items():
            seconds[candidate] += built.seconds(workload, threads, calls)
    rows = []
    for candidate, taken in seconds.items():
        spread = percentiles(taken)
        rows.append({
            "suite": "tune", "layout": "one tensor", "way": candidate, "dtype": workload.dtype, "n": MODELS, "numel": workload.numel,
            "bytes": workload.bytes, "state": workload.state, "rounds": len(taken), **spread,
            "GB/s": workload.bytes / spread["p50"] / 1e9,
        })  # fmt: skip
    return rows


def best(rows: list[dict[str, Any]]) -> str:
    return str(min(rows, key=lambda row: row["p50"])["way"])


def break_even(dtype: str, state: str, usual: Built, rounds: int) -> tuple[list[dict[str, Any]], str]:
    """Time batches of 64 KiB to 16 MiB on one thread, on two, and on one for each processor."""
    cores = len(os.sched_getaffinity(0))
    rows, pays = [], None
    for power in range(16, 25):
        numel = (1 << power) // (MODELS + 2) // SIZES[dtype] // 64 * 64
        workload = Workload(dtype, numel, PAST_CACHE >> power if state == "in memory" else 1)
        found = timed(
            workload, {f"{n} thread{'s' * (n > 1)}": (usual, n) for n in sorted({1, 2, cores})}, rounds
        )
        rows += found
        pays = None if best(found[:2]) == "1 thread" else pays or workload.bytes
    if pays is None:
        return rows, f"{dtype}, {state}: a second thread does not pay up to 16 MiB"
    return (
        rows,
        f"{dtype}, {state}: a second thread pays from {pays:,} bytes on, {pays // 2:,} for each thread",
    )


def partition_sizes(
    dtype: str, numel: int, libraries: dict[str, Built], rounds: int
) -> tuple[list[dict[str, Any]], str]:
    """Time one batch cut into chunks of other sizes, on all processors."""
    workload = Workload(dtype, numel, max(1, PAST_CACHE // ((MODELS + 2) * numel * SIZES[dtype])))
    cores = len(os.sched_getaffinity(0))
    found = timed(workload, {candidate: (built, cores) for candidate, built in libraries.items()}, rounds)
    return found, f"{dtype}, {numel:,} elements: {best(found)}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--largest", type=int, default=1 << 23, help="elements of the largest batch")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        print("threads: only one processor here, nothing to distribute")
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = partial(Built, folder, compile_loops(folder), EVERY_THREAD)
        usual = build()
        longest = {
            f"chunks of at most {size:,}": build(f"-DNEGMERGE_MAX_AT_ONCE={size}") for size in MAX_AT_ONCE
        }
        shortest = {
            f"chunks of at least {size:,}": build(f"-DNEGMERGE_MIN_AT_ONCE={size}") for size in MIN_AT_ONCE
        }
        for dtype in DTYPES:
            for state in ("in memory", "in cache"):
                found.append(break_even(dtype, state, usual, given.rounds))
            for numel in (1 << 15, 1 << 16, 1 << 17):
                found.append(partition_sizes(dtype, numel, shortest, given.rounds))
            for numel in (given.largest // 4, given.largest):
                found.append(partition_sizes(dtype, numel, longest, given.rounds))
    record(given.results, [row for rows, _ in found for row in rows])
    print("\n".join(line for _, line in found))


if __name__ == "__main__":
    main()
