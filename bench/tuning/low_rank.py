"""Measures merging low-rank differences on the CPU, on one thread, beside the least that it could take.

low_rank.cpp says what is timed. Its candidates are csrc/low_rank_cpu.cpp compiled with other constants; they take turns. Speeds are of the
fastest fifth of the rounds (p20) of CPU time, since other work on the machine only ever slows a round. A row's limit is the arithmetic:
2 · n · rank operations an element in registers, and merging as many dense differences that are in the cache. It says at which n · rank
this takes longer than reading the base and writing the result, from warm files (at the speed of a copy in memory) and from a disk.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from threads import CSRC, HERE, X86, compile_loops, compile_with

from negmerge_fast import _native
from negmerge_fast.benchmark.records import percentiles, record
from negmerge_fast.core.low_rank import PANEL

RESULTS = HERE.parent / "results" / "low_rank.jsonl"
DTYPES = {"F32": (1, 4), "F16": (2, 2), "BF16": (3, 2)}
TIMED = ("arithmetic", "expanding", "low-rank", "dense, in memory", "dense, in cache", "copying")

# Models, rank, rows, columns, and how many elements are merged at once: chunks, of factors in panels, as files are merged; or all, of
# factors as they are, as tensors in memory are.
MATRICES = [
    *((n, rank, 4096, 4096) for n in (8, 30) for rank in (8, 16, 64)),
    (8, 16, 1031, 5003), (8, 256, 1024, 4096), (8, 16, 1 << 22, 1), (8, 16, 1 << 18, 9), (8, 16, 1, 1 << 22),
]  # fmt: skip
SHAPES = [
    *((*shape, shape[2] * shape[3]) for shape in MATRICES),
    *(
        (n, rank, 4096, 4096, chunk)
        for n, rank in ((8, 16), (30, 16), (8, 64))
        for chunk in (1 << 18, 1 << 20)
    ),
]

# Bytes a second that the disk of the comparison reads or writes.
DISK = 2e9

# Constants of low_rank_cpu.cpp: bytes of expanded tiles, of right factors beside them, panels of a tile's columns and of a block's.
CANDIDATES = {
    "as built": [],
    **{f"tiles of {size >> 10} KiB": [f"-DNEGMERGE_EXPANDED_BYTES={size}"] for size in (1 << 17, 1 << 18, 1 << 20)},
    **{f"factors of {size >> 10} KiB": [f"-DNEGMERGE_FACTOR_BYTES={size}"] for size in (1 << 17, 1 << 19)},
    **{f"{count} panels": [f"-DNEGMERGE_MAX_PANELS={count}"] for count in (4, 16)},
    **{f"blocks of {count}": [f"-DNEGMERGE_BLOCK_PANELS={count}"] for count in (1, 16)},
}  # fmt: skip


def build(folder: Path, loops: list[Path], driver: Path, name: str, flags: list[str]) -> Path:
    program = folder / name.replace(" ", "-")
    sources = [CSRC / "low_rank_cpu.cpp", CSRC / "merge_cpu.cpp", driver, *loops]
    compile_with([*flags, *map(str, sources), "-o", str(program)])
    return program


def seconds_of(
    program: Path, shape: tuple[int, ...], dtype: str, merged: bool, rounds: int
) -> list[list[float]]:
    """The seconds of all that is timed, a list for each round."""
    code, _ = DTYPES[dtype]
    columns, in_chunk = shape[3:]
    in_panels = columns * 4 >= 4 * PANEL and in_chunk < shape[2] * columns
    numbers = (*shape, int(in_panels), code, int(merged))
    command = [str(program), *map(str, numbers), _native.instruction_sets[0], str(rounds)]
    check, *lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if check != "same":
        raise SystemExit(f"{shape}, {dtype}: {check}")
    return [list(map(float, line.split())) for line in lines]


def rows_of(
    programs: dict[str, Path], shape: tuple[int, ...], dtype: str, merged: bool, rounds: int
) -> list[dict[str, Any]]:
    turns: dict[str, list[list[float]]] = {name: [] for name in programs}
    for _ in range(3):
        for name, program in programs.items():
            turns[name] += seconds_of(program, shape, dtype, merged, rounds)
    n, rank, rows, columns, in_chunk = shape
    numel, size = rows * columns, DTYPES[dtype][1]
    found = []
    for name, lines in turns.items():
        times = {
            what: percentiles(taken) for what, taken in zip(TIMED, zip(*lines, strict=True), strict=True)
        }
        fastest = {what: spread["p20"] / numel * 1e9 for what, spread in times.items()}
        arithmetic = fastest["arithmetic"] + fastest["dense, in cache"]
        # A copy in memory reads and writes as many bytes as a merge from warm files does.
        warm, disk = fastest["copying"], 2 * size / DISK * 1e9
        per_rank = fastest["arithmetic"] / (n * rank)
        limits = {place: max(0, round((limit - fastest["dense, in cache"]) / per_rank)) for place, limit in (("warm", warm), ("disk", disk))}  # fmt: skip
        models = "merged models" if merged else "differences"
        found.append({
            "suite": "tune", "layout": f"{rows} x {columns}, {in_chunk:,} at once", "way": f"{models}, {name}", "dtype": dtype, "n": n, "rank": rank,
            "numel": numel, "bytes": 2 * numel * size, "state": "in memory", "rounds": len(lines), **times["low-rank"],
            "GB/s": 2 * numel * size / times["low-rank"]["p20"] / 1e9, "ns": {what: round(ns, 4) for what, ns in fastest.items()},
            "limit": "arithmetic in registers, and a merge in cache", "of_limit": arithmetic / fastest["low-rank"],
            "n_rank_of_warm": limits["warm"], "n_rank_of_disk": limits["disk"],
        })  # fmt: skip
        print(
            f"{dtype} {models}, {name}, n = {n}, rank {rank}, {rows} x {columns}, {in_chunk:,} at once: {fastest['low-rank']:.2f} ns an element, "
            f"{fastest['low-rank'] / arithmetic:.2f} of arithmetic ({arithmetic:.2f}), {fastest['low-rank'] / fastest['dense, in memory']:.2f} of "
            f"dense in memory; expanding {fastest['expanding'] * n / fastest['arithmetic']:.2f} of its arithmetic; "
            f"more than reading and writing from n · rank = {limits['warm']} (warm), {limits['disk']} (disk of 2 GB/s)"
        )
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["BF16"])
    options.add_argument("--merged", action="store_true", help="models of the base's type, as well")
    options.add_argument(
        "--candidates", action="store_true", help="other constants than those that are built, too"
    )
    options.add_argument("--quick", action="store_true", help="small matrices: for tests")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    shapes = [(2, 3, 70, 130, 9100), (2, 3, 70, 300, 1000)] if given.quick else SHAPES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loops, driver = compile_loops(folder), folder / "driver.o"
        best = X86.get(_native.instruction_sets[0], [])
        compile_with([*best, "-w", "-c", str(HERE / "low_rank.cpp"), "-o", str(driver)])
        candidates = CANDIDATES if given.candidates else {"as built": []}
        programs = {each: build(folder, loops, driver, each, flags) for each, flags in candidates.items()}
        for dtype in given.dtypes:
            for merged in (False, True)[: 1 + given.merged]:
                rows = [
                    row for shape in shapes for row in rows_of(programs, shape, dtype, merged, given.rounds)
                ]
                record(given.results, rows)


if __name__ == "__main__":
    main()
