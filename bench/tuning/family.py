"""Times every method on the CPU kernel beside NegMerge: in the second-level cache on one thread, and in memory.

The methods take turns. The counted bytes are (n + 2) · numel · size; bounds are given, not searched.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from negmerge_fast.backends import native
from negmerge_fast.benchmark.records import percentiles, record
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.choices import Terms
from negmerge_fast.core.rule import Rule
from negmerge_fast.methods import catalogue

RESULTS = Path(__file__).parents[1] / "results" / "family.jsonl"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", type=int, default=8)
    options.add_argument("--elements", type=int, nargs="+", default=[16384, 1 << 24])
    options.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    options.add_argument("--methods", nargs="+", default=catalogue.NAMES)
    options.add_argument("--rounds", type=int, default=31)
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in given.dtypes:
        for numel in given.elements:
            rows += measured(dtype, given.models, numel, given.methods, given.rounds)
    record(given.results, rows)


def measured(dtype: str, n: int, numel: int, names: list[str], rounds: int) -> list[dict[str, Any]]:
    base, out = torch.randn(numel).to(DTYPES[dtype]), torch.empty(numel, dtype=DTYPES[dtype])
    models = [(base.float() * (1 + 0.01 * torch.randn(numel))).to(base.dtype) for _ in range(n)]
    operands = [Operand(each.data_ptr(), dtype, each) for each in (base, *models, out)]
    segment = Segment(numel, operands[0], operands[1:-1], operands[-1])
    # About the bounds of TIES' usual density.
    low = [float((m[:4096] - base[:4096]).float().abs().quantile(0.8)) for m in models]
    terms = Terms(0, 1, None, low, [float("inf")] * n)
    plain = Batch("cpu", Signature(dtype, (dtype,) * n, False), [segment])
    batch = Batch("cpu", plain.signature, [segment], [terms])
    in_cache = (n + 2) * numel * base.element_size() <= 1 << 21
    threads, repeats = (1, max(1, (1 << 18) // numel // n)) if in_cache else (2, 1)

    def run(name: str) -> Callable[[], object]:
        rule = Rule(0.9, 1.0, catalogue.method(name).choices(n))
        return lambda: native.merge_cpu(batch if rule.choices else plain, rule, threads)

    calls, seconds = {name: run(name) for name in names}, {name: [] for name in names}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - began) / repeats)
    rows = []
    for name, found in seconds.items():
        spread = percentiles(found)
        rows.append({
            "way": name, "dtype": dtype, "n": n, "numel": numel, "state": "in cache" if in_cache else "in memory",
            "instruction_set": native.instruction_set(), **spread, "GB/s": (n + 2) * numel * base.element_size() / 1e9 / spread["p50"],
            "rate_of_negmerge": min(seconds[names[0]]) / min(found),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
