"""Tunes the loop of the CPU kernel: sizes of tiles and groups, prefetching, and stores past the cache.

Each candidate is csrc/merge_loop.cpp compiled with other constants. A run of it times, in each round, reading all
inputs and then merging them, on two threads. The candidates take turns. The counted bytes are (n + 2) · numel · size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from negmerge_fast.benchmark.records import percentiles, record

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
RESULTS = HERE.parent / "results" / "loop.jsonl"
AVX2 = ["-mavx2", "-mf16c"]
CANDIDATES = {
    "as built": [],
    "all models at once (tiles of one step)": ["-DNEGMERGE_TILE_BYTES=64"],
    "one model at a time": ["-DNEGMERGE_GROUP=1"],
    "4 models at a time": ["-DNEGMERGE_GROUP=4"],
    "tile of 2 KiB": ["-DNEGMERGE_TILE_BYTES=2048"],
    "tile of 8 KiB": ["-DNEGMERGE_TILE_BYTES=8192"],
    "no prefetching": ["-DNEGMERGE_PREFETCH=0"],
    "no stores past the cache": ["-DNEGMERGE_PAST_CACHE=0"],
}
DTYPES = {"F32": 1, "F16": 2, "BF16": 3}


def build(folder: str, candidate: str) -> str:
    program = f"{folder}/{candidate}"
    flags = [
        "-O3",
        "-std=c++17",
        "-ffp-contract=off",
        "-pthread",
        "-DNEGMERGE_LOOP=merge_loop",
        *AVX2,
        *CANDIDATES[candidate],
    ]
    sources = [str(HERE / "loop.cpp"), str(CSRC / "merge_loop.cpp")]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, *sources, "-o", program], check=True)
    return program


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bytes", type=int, default=400_000_000, help="of all models together")
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        programs = {candidate: build(folder, candidate) for candidate in CANDIDATES}
        for dtype, number in DTYPES.items():
            for n in (2, 8, 30):
                numel = given.bytes // n // (4 if dtype == "F32" else 2) // 4096 * 4096
                places = dict.fromkeys(CANDIDATES, 0) | {"as built, streams 320 bytes apart": 320}
                rounds: dict[str, list[list[float]]] = {candidate: [] for candidate in places}
                for _ in range(given.runs):
                    for candidate, skew in places.items():
                        program = programs[candidate.partition(",")[0] if skew else candidate]
                        command = [program, *map(str, (n, number, numel, skew, 5))]
                        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                        rounds[candidate] += [
                            [float(word) for word in line.split()] for line in text.splitlines()
                        ]
                rows += described(rounds, dtype, n, numel)
    record(given.results, rows)


def described(rounds: dict[str, list[list[float]]], dtype: str, n: int, numel: int) -> list[dict[str, Any]]:
    size = (4 if dtype == "F32" else 2) * numel / 1e9
    rows = []
    for candidate, lines in rounds.items():
        reading, out_of_place, in_place = ([line[i] for line in lines] for i in range(3))
        for place, seconds in (("", out_of_place), (", in place", in_place)):
            # Each round has a roofline of its own, because the machine drifts.
            fractions = [
                (n + 2) / (n + 1) * read / merge for read, merge in zip(reading, seconds, strict=True)
            ]
            spread = percentiles(seconds)
            rows.append({
                "way": candidate + place, "dtype": dtype, "n": n, "numel": numel, "state": "in memory", **spread,
                "GB/s": (n + 2) * size / spread["p50"], "of_limit": percentiles(fractions)["p50"],
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
