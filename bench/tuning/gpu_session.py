"""Measures launch parameters of both kernels, deltas, low-rank models and other methods within a few minutes of a GPU, and prints a table.

Each variant runs in a process of its own with a time limit, so that one that hangs or crashes costs no other its numbers. It is
timed as it is called, by the host's clock until the device is done, and by the device's events ("kernel"); each round beside a
device copy. The bits are compared before and in the last round. What the time did not suffice for is printed.

python bench/tuning/gpu_session.py [--minutes 8] [--only TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotReady
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_deltas
import gpu_family
import gpu_low_rank
import torch
from tune_gpu import CUDA, Built, build, compiler, measure

from negmerge_fast.backends import native, registry
from negmerge_fast.benchmark.records import Row, record
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timers import Clock, wall
from negmerge_fast.benchmark.workload import Lacking, release, shared_workload
from negmerge_fast.core.batch import Batch, Merge
from negmerge_fast.core.dtypes import FLOAT_SIZES
from negmerge_fast.core.errors import first_line
from negmerge_fast.core.rule import Rule

RESULTS = Path(__file__).parents[1] / "results" / "gpu_session.jsonl"

# Few models first, which differ the most; 3 and 30 beside powers of two, by which the quotient is easier.
MODELS = (2, 3, 8, 30, 32)
ROUNDS = 10
LIMIT_S = 120.0  # of one variant

# Changes of Triton's usual launch.
TRITON: dict[str, dict[str, int]] = {
    "usual": {},
    "65,536 programs": {"programs": 65536},
    "40 registers": {"registers": 40},
    "32 registers": {"registers": 32},
    "64 registers": {"registers": 64},
    "any registers": {"registers": 0},
    "256 threads": {"threads": 256},
    "8 elements of 16 bits": {"elements": 8, "registers": 96},
    "4 models at once": {"group": 4},
}

# The most promising first: the time may not suffice for all.
VARIANTS = [
    "cuda, as built", "triton, usual",
    *(f"{kernel}, {task}" for task in (gpu_deltas.LIVE, gpu_deltas.APPLIED) for kernel in ("cuda", "triton")),
    *(f"{kernel}, {task}" for task in gpu_low_rank.TASKS for kernel in ("cuda", "triton")),
    *(f"{kernel}, {task}" for task in gpu_family.TASKS for kernel in ("cuda", "triton")),
    *(f"triton, {name}" for name in list(TRITON)[1:]), *(f"cuda, {name}" for name in list(CUDA)[1:]),
]  # fmt: skip


class Result(NamedTuple):
    """What a variant's process printed, and why it printed no more, if so."""

    rows: list[Row]
    reason: str | None


# What starts a variant, or NotReady if that is not known within so many seconds.
Command = Callable[[float], list[str]]


def merge_of(variant: str, library: str) -> Merge:
    """The merge function of a variant. library: the CUDA kernel compiled with its constants, if it is one."""
    kernel, _, name = variant.partition(", ")
    if kernel == "cuda":
        return Built(library).merge if library else native.merge_cuda
    from negmerge_fast.kernels.launch import usual_launch
    from negmerge_fast.kernels.merge import launch_merge

    def merge(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        changed = dict(TRITON[name])
        if FLOAT_SIZES[batch.signature.result] > 2:
            changed.pop("elements", None)
        return launch_merge(batch, rule, usual_launch(batch.signature, True)._replace(**changed))

    return merge


def measure_variant(
    variant: str, merge: Merge, device: str, numel: int, rounds: int, clocks: dict[str, Clock | None]
) -> None:
    """Print a line of JSON for each dtype, number of models and clock."""
    for n in MODELS:
        for dtype in FLOAT_SIZES:
            try:
                workload = shared_workload("one tensor", one_tensor(numel), dtype, n, device, rotate=False)
                for state, now in clocks.items():
                    for row in measure(workload, {variant: merge}, rounds, now):
                        print(json.dumps({**row, "state": state}), flush=True)
                del workload  # the next may not fit beside it
            except (Lacking, torch.cuda.OutOfMemoryError) as error:
                print(f"{variant}, {dtype}, n = {n}: {first_line(error)}", flush=True)
    release()


def run(command: list[str], limit_s: float) -> Result:
    """Run a variant's process; it is killed when its time is up, and what it has printed counts."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        reason = None
        try:
            if status := process.wait(limit_s):
                errors.seek(0)
                last = [line for line in errors.read().splitlines() if line.strip()][-1:]
                reason = ": ".join([f"ended with exit status {status}", *last])
        except subprocess.TimeoutExpired:
            reason = f"took more than {limit_s:.0f} s"
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        lines = out.read().splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    said = [line for line in lines if line and not line.startswith("{")]
    return Result(rows, "; ".join(filter(None, [*said, reason])) or None)


def session(
    commands: dict[str, Command], seconds: float, limit_s: float = LIMIT_S,
    on_rows: Callable[[list[Row]], None] = lambda rows: None, now: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, Result], list[str]]:  # fmt: skip
    """Run variants one after the other until the time is up; returns their results, and the variants not measured."""
    end, results, remaining = now() + seconds, {}, []
    for variant, command in commands.items():
        if (left := end - now()) < 1:
            remaining.append(variant)
            continue
        try:
            line = command(left)
        except NotReady:
            remaining.append(variant)
            continue
        except (OSError, RuntimeError) as error:  # of a compiler
            results[variant] = Result([], first_line(error))
        else:
            results[variant] = run(line, max(1.0, min(limit_s, end - now())))
        on_rows(results[variant].rows)
        print(f"{variant}: {len(results[variant].rows)} rows", results[variant].reason or "", flush=True)
    return results, remaining


def table(results: dict[str, Result], remaining: list[str]) -> str:
    """Shares of a device copy: the geometric mean over dtypes and n, and the least; where not all was measured, of how many."""
    cells = max((len(result.rows) for result in results.values()), default=0) // 2
    lines = [
        "| share of a device copy | kernel: mean | least | as called: mean | cells |",
        "|---|---|---|---|---|",
    ]
    for variant, result in results.items():
        kernel, called = (
            [row["of_limit"] for row in result.rows if row["state"] == state]
            for state in ("kernel", "as called")
        )
        mean = [f"{statistics.geometric_mean(found):.3f}" if found else "–" for found in (kernel, called)]
        least = min(
            (row for row in result.rows if row["state"] == "kernel"),
            key=lambda row: row["of_limit"],
            default=None,
        )
        worst = f"{least['of_limit']:.3f} ({least['dtype']}, n = {least['n']})" if least else "–"
        lines.append(f"| {variant} | {mean[0]} | {worst} | {mean[1]} | {len(kernel)} of {cells} |")
    for variant, result in results.items():
        if of_merge := [
            row["of_merge"] for row in result.rows if "of_merge" in row and row["state"] == "kernel"
        ]:
            mean, most = statistics.geometric_mean(of_merge), max(of_merge)
            models = " or ".join(map(str, sorted({row["n"] for row in result.rows})))
            lines.append(
                f"{variant}: {mean:.3f} of the time of a merge of {models} models, at most {most:.3f}"
            )
        if of_rate := [row["of_arithmetic"] for row in result.rows if row.get("of_arithmetic")]:
            mean = statistics.geometric_mean(of_rate)
            lines.append(f"{variant}: {mean:.3f} of the rate of unfused operations of float32")
    lines += [f"{variant}: {result.reason}" for variant, result in results.items() if result.reason]
    return "\n".join([*lines, *(f"{variant}: not measured, the time is up" for variant in remaining)])


def commands_of(given: argparse.Namespace, folder: str) -> dict[str, Command]:
    """The commands of all variants. CUDA's are compiled meanwhile."""
    this = [sys.executable, __file__, "--device", given.device, "--numel", str(given.numel)]
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))

    def command(variant: str, built: Future[str] | None, seconds: float) -> list[str]:
        return [*this, "--variant", variant, "--library", built.result(seconds) if built else ""]

    found: dict[str, Command] = {}
    for number, variant in enumerate(name for name in VARIANTS if given.only in name):
        kernel, _, name = variant.partition(", ")
        if (reason := registry.why_not(kernel, given.device)) is not None and (
            kernel == "triton" or not CUDA.get(name)
        ):
            print(f"{variant}: {reason}")
            continue
        built = None
        if kernel == "cuda" and CUDA.get(name):
            built = pool.submit(
                lambda number=number, name=name: build(
                    compiler(given.device), f"{folder}/{number}.so", CUDA[name]
                )
            )
        found[variant] = partial(command, variant, built)
    pool.shutdown(wait=False)
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--minutes", type=float, default=8.0)
    options.add_argument("--numel", type=int, default=1 << 26, help="elements of each version")
    options.add_argument("--only", default="", help="variants with this text in their name")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    options.add_argument("--variant", help=argparse.SUPPRESS)
    options.add_argument("--library", help=argparse.SUPPRESS)
    given = options.parse_args()
    began = time.monotonic()
    if not torch.cuda.is_available():
        print("gpu_session: torch finds no GPU here, nothing was measured")
        return
    torch.cuda.set_device(given.device)
    if given.variant:
        clocks = {"kernel": None, "as called": wall(given.device)}
        kernel, _, name = given.variant.partition(", ")
        tasks = dict.fromkeys((gpu_deltas.LIVE, gpu_deltas.APPLIED), gpu_deltas.measure_variant)
        tasks |= dict.fromkeys(gpu_low_rank.TASKS, gpu_low_rank.measure_variant)
        tasks |= dict.fromkeys(gpu_family.TASKS, gpu_family.measure_variant)
        if name in tasks:
            tasks[name](kernel, name, given.device, given.numel, ROUNDS, clocks)
            return
        merge = merge_of(given.variant, given.library)
        measure_variant(given.variant, merge, given.device, given.numel, ROUNDS, clocks)
        return
    with tempfile.TemporaryDirectory() as folder:
        results, remaining = session(
            commands_of(given, folder), 60 * given.minutes - (time.monotonic() - began),
            on_rows=lambda rows: record(given.results, rows, given.device) if rows else None,
        )  # fmt: skip
    print(table(results, remaining))


if __name__ == "__main__":
    main()
