"""Tunes the launch parameters of the CUDA and the Triton kernel on a GPU.

Candidates for CUDA are csrc/merge_cuda.cu compiled with other constants. Candidates for Triton are those of
kernels/launch.py. They take turns on the same memory, timed by device events, each beside a device copy, the
roofline. A candidate gets a speed only if its bits and counts are the reference's: on hostile numbers, on the timed
ones, and in its last round.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from negmerge_fast.backends import native, registry, selftest
from negmerge_fast.benchmark.bandwidth import Roofline, device_copy, flush
from negmerge_fast.benchmark.records import Row, device_name, record, roofline_fields, speed
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timers import Clock, clock
from negmerge_fast.benchmark.workload import RULE, Lacking, Workload, release, shared_workload
from negmerge_fast.core.batch import COUNTED, Batch, Merge, Signature
from negmerge_fast.core.descriptors import pack_for_device
from negmerge_fast.core.dtypes import FLOAT_SIZES
from negmerge_fast.core.rule import Rule

SOURCE = Path(__file__).with_name("tune_gpu.cu")
RESULTS = Path(__file__).parents[1] / "results" / "tune_gpu.jsonl"

# Numbers of models: less than a group, one group, and several.
MODELS = (2, 8, 32)

# For sm_90 all compile without local memory, except 4 blocks of 256 threads.
CUDA = {
    "as built": [],
    "64 waves of blocks": ["WAVES=64"],
    "7 blocks of 128 threads at a time": ["THREADS=128", "BLOCKS=7"],
    "4 blocks at a time": ["BLOCKS=4"],
    "8 models at once": ["GROUP=8"],
    "an uploaded table": ["TABLE=1"],
    "1 wave of blocks": ["WAVES=1"],
    "4 waves of blocks": ["WAVES=4"],
    "tiles of 1,024": ["TILE=1024"],
    "tiles of 4,096": ["TILE=4096"],
    "2 blocks at a time": ["BLOCKS=2"],
    "7 blocks of 128 threads at a time, tiles of 1,024": ["THREADS=128", "BLOCKS=7", "TILE=1024"],
    "blocks of 512 threads, tiles of 8,192": ["THREADS=512", "BLOCKS=1", "TILE=8192"],
}


def compiler(device: str) -> list[str]:
    """The command that compiles SOURCE for a device's architecture, as csrc/CMakeLists.txt does."""
    if torch.version.cuda is None:
        raise RuntimeError("this torch is not built for CUDA")
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if not (nvcc := shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(folders))):
        raise RuntimeError("no nvcc in CUDACXX, CUDA_HOME or CUDA_PATH, on PATH or in /usr/local/cuda/bin")
    major, minor = torch.cuda.get_device_capability(device)
    return [
        nvcc, "-O3", "--fmad=false", f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}",
        "-Xcompiler=-fPIC,-ffp-contract=off,-fno-fast-math", "-cudart=static", "-Xlinker=-Bsymbolic",
    ]  # fmt: skip


def build(command: list[str], library: str, constants: Iterable[str]) -> str:
    """Compile the CUDA kernel with other constants."""
    flags = [f"-DNEGMERGE_CUDA_{constant}" for constant in constants]
    arguments = [*command, "-std=c++17", "-shared", *flags, str(SOURCE), "-o", library]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
        raise RuntimeError((errors or [f"{command[0]} ended with exit status {done.returncode}"])[0])
    return library


class Built:
    """The CUDA kernel, compiled with other constants."""

    def __init__(self, library: str) -> None:
        loaded = ctypes.CDLL(library)
        loaded.tile.restype = loaded.table.restype = ctypes.c_int64
        self.tile, self.table = loaded.tile(), loaded.table()
        self.function = loaded.merge_launch
        long, address = ctypes.c_int64, ctypes.c_void_p
        self.function.argtypes = [
            ctypes.c_int, ctypes.c_char_p, long, ctypes.c_bool, ctypes.c_double, long, long, address, long,
            address, long, ctypes.c_int, ctypes.c_uint64,
        ]  # fmt: skip
        self.function.restype = ctypes.c_char_p

    def merge(self, batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
        """Merge a batch as native.merge_cuda does."""
        table, tiles = pack_for_device(batch, self.tile)
        size = len(batch.segments), len(COUNTED)
        counts, address, words = native.place_table(table, size, batch.device, len(table) > self.table)
        result, dtypes, *others = native.kernel_arguments(batch, rule)
        index = torch.device(batch.device).index or 0
        stream = torch.cuda.current_stream().cuda_stream
        placed = address, words, counts.data_ptr()
        why = self.function(result, dtypes, len(dtypes), *others, *placed, tiles, index, stream)
        if why:
            raise RuntimeError(why.decode())
        return counts


def cuda_candidates(device: str, folder: str) -> dict[str, Merge]:
    """The CUDA kernel with each choice of constants."""
    command = compiler(device)

    def built_with(number: int, constants: list[str]) -> Built:
        return Built(build(command, f"{folder}/{number}.so", constants))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = pool.map(built_with, range(len(CUDA)), CUDA.values())
        return {f"cuda, {candidate}": one.merge for candidate, one in zip(CUDA, built, strict=True)}


def triton_candidates(signature: Signature) -> tuple[dict[str, Merge], dict[str, Any]]:
    """The Triton kernel with each candidate of kernels/launch.py, the default first; and their launch parameters."""
    from negmerge_fast.kernels.launch import candidates
    from negmerge_fast.kernels.merge import launch_merge

    launches = {
        f"triton, {launch.elements} x {launch.threads} elements, {launch.group} models at once, {launch.programs} programs": launch
        for launch in candidates(signature, unanimous=True)
    }
    return {name: partial(launch_merge, launch=launch) for name, launch in launches.items()}, launches


def time_round(
    workload: Workload, batch: Batch, merge: Merge, roofline: Roofline, now: Clock
) -> tuple[float, float, Any]:
    """Seconds of the roofline and of a merge, and the merge's counts. Everything is launched before anything waits."""
    workload.poison()
    flush(workload.device)  # takes longer than the host's launches of what follows
    began = now()
    roofline.task()
    copied = now()
    flush(workload.device)
    asked = now()
    counts = merge(batch, RULE)
    ended = now()
    return copied - began, ended - asked, counts


def fault(workload: Workload, counts: Any) -> str | None:
    """Why the output of a merge gets no speed; None if it is the reference's."""
    wrong, expected = workload.compare(workload.tensors(workload.out))
    if wrong:
        return f"elements that differ from the reference's: {wrong:,}"
    return None if counts.tolist() == expected else "counts differ from the reference's"


def measure(
    workload: Workload, candidates: dict[str, Merge], rounds: int, now: Clock | None = None
) -> list[Row]:
    """A row for each candidate that is right before its rounds and in the last one. now: a clock, the device's if None."""
    [batch] = workload.batches(in_place=False)
    roofline, now = device_copy(workload.device, workload.bytes), now or clock(workload.device)
    taken: dict[str, list[tuple[float, float]]] = {candidate: [] for candidate in candidates}

    def refuse(candidate: str, reason: str) -> None:
        del taken[candidate]
        print(f"{candidate}, {workload.dtype}, n = {workload.n}: no speed, {reason}", flush=True)

    for candidate, merge in candidates.items():
        if (reason := selftest.failure(candidate, merge, workload.device, batch.signature, RULE)) is None:
            workload.poison()
            reason = fault(workload, merge(batch, RULE))
        if reason is not None:
            refuse(candidate, reason)
    for left in reversed(range(rounds)):
        for candidate in list(taken):
            copy, merging, counts = time_round(workload, batch, candidates[candidate], roofline, now)
            taken[candidate].append((copy, merging))
            if not left and (reason := fault(workload, counts)) is not None:
                refuse(candidate, reason)
    return [
        row_of(workload.row("tune", candidate), roofline, *zip(*pairs, strict=True))
        for candidate, pairs in taken.items()
    ]


def row_of(workload: Row, roofline: Roofline, copies: tuple[float, ...], merges: tuple[float, ...]) -> Row:
    rooflines = [roofline.bytes / seconds for seconds in copies]
    speeds = [workload["bytes"] / seconds for seconds in merges]
    return {
        **speed(workload, merges),
        **roofline_fields(roofline.name, rooflines, speeds),
        "differing": 0,
    }


def winner(rows: list[Row], usual: str) -> tuple[str, str] | None:
    """The candidate with the largest geometric mean of the shares of the limit, and a line that compares it with the usual one.

    Candidates without a row for some number of models cannot win.
    """
    fractions: dict[str, list[float]] = {}
    for row in rows:
        fractions.setdefault(row["way"], []).append(row["of_limit"])
    max_rows = max(map(len, fractions.values()), default=0)
    found = {
        candidate: statistics.geometric_mean(each)
        for candidate, each in fractions.items()
        if len(each) == max_rows
    }
    if not found:
        return None
    best = max(found, key=lambda candidate: found[candidate])
    compared = f"{found[usual]:.3f}" if usual in found else "no speed"
    return best, f"{best}: {found[best]:.3f} of a device copy; {usual}: {compared}"


def tune(
    device: str, cuda: dict[str, Merge], triton: bool, total: int, rounds: int, results: Path
) -> list[str]:
    """Measure all candidates and append their rows. Returns lines: the winners, and entries for kernels/launch.py."""
    said, found, of_cuda = [], [], []
    for dtype, size in FLOAT_SIZES.items():
        rows: list[Row] = []
        launches: dict[str, Any] = {}
        for n in MODELS:
            candidates = dict(cuda)
            if triton:
                of_triton, launches = triton_candidates(Signature(dtype, (dtype,) * n, False))
                candidates |= of_triton
            numel = max(4096, total // (n + 2) // size // 4096 * 4096)
            try:
                # No variable refers to the workload, because the next one may not fit beside it.
                measured = measure(
                    shared_workload("one tensor", one_tensor(numel), dtype, n, device, rotate=False),
                    candidates,
                    rounds,
                )
            except (Lacking, torch.cuda.OutOfMemoryError) as error:
                print(f"{dtype}, n = {n}: {str(error).splitlines()[0]}")
                continue
            if measured:
                record(results, measured, device)
            rows += measured
        mine = [row for row in rows if row["way"] in cuda]
        of_cuda += mine
        if best := winner(mine, "cuda, as built"):
            said.append(f"{dtype}: {best[1]}")
        if launches and (best := winner([r for r in rows if r["way"] in launches], next(iter(launches)))):
            said.append(f"{dtype}: {best[1]}")
            key = device_name(device), dtype, dtype, True
            found.append(f"    {key!r}: {launches[best[0]]!r},  # for FOUND in kernels/launch.py")
    release()
    if best := winner(of_cuda, "cuda, as built"):
        said.append(f"all types: {best[1]}")
    return said + found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--bytes", type=int, default=1 << 30, help="bytes that a merge reads and writes")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("tune_gpu: torch finds no GPU here, nothing was measured")
        return
    torch.cuda.set_device(given.device)
    if (no_triton := registry.why_not("triton", given.device)) is not None:
        print(f"triton: {no_triton}")
    with tempfile.TemporaryDirectory() as folder:
        candidates: dict[str, Merge] = {}
        try:
            candidates = cuda_candidates(given.device, folder)
        except (OSError, RuntimeError) as error:
            print(f"cuda: {error}")
        for line in tune(
            given.device, candidates, no_triton is None, given.bytes, given.rounds, given.results
        ):
            print(line)


if __name__ == "__main__":
    main()
