"""Compares the loop of the CPU kernel, in cache and on one thread, with plain loops over elements: its floor.

plain_loop.cpp has the floor in AVX2, and says what it leaves out. It and csrc/merge_loop.cpp, compiled for each instruction
set of this machine as csrc/CMakeLists.txt does, take turns in one process on the same memory, which fits the second-level
cache. The counted bytes are (n + 2) · numel · size. Speeds are of the fastest fifth of the rounds (p20), since other work on
the machine only ever slows a round. A loop gets a speed only if its bits
and counts are the floor's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from threads import AVX2, CSRC, HERE, X86, compile_with

from negmerge_fast import _native
from negmerge_fast.benchmark.records import percentiles, record

RESULTS = HERE.parent / "results" / "plain_loop.jsonl"
DTYPES = {"F64": (0, 8), "F32": (1, 4), "F16": (2, 2), "BF16": (3, 2)}
MODELS = [2, 3, 8, 16, 30]


def build(folder: str, instruction_set: str) -> str:
    """Compile the floor with one instruction set's loop."""
    loop, program = f"{folder}/{instruction_set}.o", f"{folder}/{instruction_set}"
    flags = X86.get(instruction_set, [])
    compile_with([*flags, "-DNEGMERGE_LOOP=merge_loop", "-c", str(CSRC / "merge_loop.cpp"), "-o", loop])
    compile_with([*AVX2, str(HERE / "plain_loop.cpp"), loop, "-o", program])
    return program


def seconds_of(
    program: str, dtype: str, n: int, numel: int, in_place: bool, rounds: int
) -> list[dict[str, float]]:
    """Return the percentiles of the seconds that a call of the floor and one of the loop take."""
    calls = max(1, 3_000_000 // ((n + 2) * numel))
    command = [program, *map(str, (n, DTYPES[dtype][0], numel, int(in_place), rounds, calls))]
    check, *lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if check != "same":
        raise SystemExit(f"{dtype}, n = {n}: {check}")
    return [
        percentiles(seconds) for seconds in zip(*(map(float, line.split()) for line in lines), strict=True)
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--bytes", type=int, default=320 << 10, help="of all streams, to fit the second-level cache"
    )
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    if os.uname().machine != "x86_64" or "avx2" not in _native.instruction_sets:
        sys.exit("plain_loop: the floor is written for AVX2, which is not here")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        programs = {name: build(folder, name) for name in _native.instruction_sets}
        for dtype, (_, size) in DTYPES.items():
            for n in MODELS:
                numel = given.bytes // (n + 2) // size // 64 * 64
                for place, in_place in (("", False), (", in place", True)):
                    for name, program in programs.items():
                        floor, found = seconds_of(program, dtype, n, numel, in_place, given.rounds)
                        moved = (n + 2) * numel * size
                        rows.append({
                            "suite": "tune", "layout": "one tensor", "way": name + place, "dtype": dtype, "n": n, "numel": numel,
                            "bytes": moved, "state": "in cache", "rounds": given.rounds, **found, "GB/s": moved / found["p20"] / 1e9,
                            "limit": "plain loop", "limit GB/s": moved / floor["p20"] / 1e9, "of_limit": floor["p20"] / found["p20"],
                        })  # fmt: skip
    record(given.results, rows)


if __name__ == "__main__":
    main()
