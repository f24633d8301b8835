"""Compares moving a live model to another λ with a merge, with eager PyTorch and with what memory allows.

A tenth of the elements, at random, are in the delta of 8 models. All candidates take turns in one process on the same memory, which is
larger than any cache. A candidate gets a speed only if its result has the bits of the merge.

The counted bytes of a move are those that it must read and write: the mask, the means, the base's elements in the mask, and each
cache line of the model that has an element in the mask, once in and once out. Of F32 that is 81 % of the lines, of BF16 97 %. The limit reads
and writes as many bytes one after the other. Those of a merge are (n + 2) · numel · size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from negmerge_fast.backends import masks, registry
from negmerge_fast.benchmark.records import percentiles, record
from negmerge_fast.core.batch import Batch, Operand, Signature, segment_at
from negmerge_fast.core.delta import RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature, mask_bytes
from negmerge_fast.core.rule import Rule

RESULTS = Path(__file__).resolve().parents[1] / "results" / "delta.jsonl"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
MODELS = 8
IN_MASK = 0.1
LINE_BYTES = 64
SCALE = 0.7
EAGER = ("eager, by index", "eager, index_copy_", "eager, by mask")


class Workload:
    """A base and models that agree on a tenth of the elements, and their delta."""

    def __init__(self, dtype: str, numel: int) -> None:
        self.dtype, self.numel = dtype, numel
        generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(numel, generator=generator).to(DTYPES[dtype])
        changed = torch.rand(numel, generator=generator) < IN_MASK
        # The first model leaves all other elements alone.
        step = torch.where(changed, 0.25 * torch.randn(numel, generator=generator), torch.zeros(()))
        self.models = []
        for _ in range(MODELS):
            self.models.append((self.base + step).to(self.base.dtype))
            step *= 1.125
        self.merged, self.live = self.base.clone(), self.base.clone()
        self.merge_batch = self._batch(self.merged, dtype)
        self._pack()

    def _batch(self, out: torch.Tensor, dtype: str) -> Batch:
        signature = Signature(self.dtype, (self.dtype,) * MODELS, False)
        operands = [self.base, *self.models]
        segment = segment_at(self.numel, signature, [t.data_ptr() for t in operands], operands)
        return Batch("cpu", signature, [segment._replace(out=Operand(out.data_ptr(), dtype, out))])

    def _pack(self) -> None:
        dense = torch.empty(self.numel)
        registry.consensus("cpu")(self._batch(dense, "F32"), Rule(SCALE))
        self.mask = torch.empty(mask_bytes(self.numel), dtype=torch.uint8)
        at = dense.data_ptr()
        count = masks.pack(at, self.numel, "F32", "F32", self.mask.data_ptr(), at)
        self.means = dense[:count].clone()
        self.ranks = torch.empty(-(self.numel // -RANK_BLOCK), dtype=torch.int64)
        masks.ranks(self.mask.data_ptr(), self.numel, self.ranks.data_ptr())
        bits = self.mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
        self.flags = bits.view(-1)[: self.numel].bool()
        self.index = self.flags.nonzero().view(-1)
        self.saved = self.base[self.flags]
        held = (self.mask, self.means, self.ranks, self.saved, self.live)
        mask, means, ranks, saved, live = (t.data_ptr() for t in held)
        segment = DeltaSegment(self.numel, mask, means, ranks, 0, saved, live, held)
        self.moving = DeltaBatch("cpu", DeltaSignature(self.dtype, "F32", "F32"), [segment])

    @property
    def packed_bytes(self) -> int:
        return self.mask.nbytes + self.means.nbytes + self.saved.nbytes

    @property
    def touched_bytes(self) -> int:
        """Of the cache lines of the model that have an element in the mask."""
        of_line = LINE_BYTES // self.base.itemsize
        rest = self.numel // of_line * of_line
        return LINE_BYTES * int(self.flags[:rest].view(-1, of_line).any(1).sum())

    def candidates(self, threads: int) -> dict[str, tuple[Callable[[], object], int]]:
        """What is timed, and the bytes that it reads and writes."""
        _, apply = registry.choose_apply("cpu", "cpu")
        _, merge = registry.choose("cpu", "cpu", Rule(SCALE))
        moved = self.packed_bytes + 2 * self.touched_bytes
        merged = (MODELS + 2) * self.base.nbytes
        index, mask = self.index, self.flags
        tasks: dict[str, Callable[[], object]] = {
            "live move": partial(apply, self.moving, SCALE, threads),
            "live restore": partial(apply, self.moving, None, threads),
            EAGER[0]: lambda: self.live.__setitem__(index, self.results()),
            EAGER[1]: lambda: self.live.index_copy_(0, index, self.results()),
            EAGER[2]: lambda: self.live.masked_scatter_(mask, self.results()),
            "memory, as many bytes": self.limit(),
        }
        found = {name: (task, moved) for name, task in tasks.items()}
        return {"merge": (partial(merge, self.merge_batch, Rule(SCALE), threads), merged), **found}

    def results(self) -> torch.Tensor:
        return (self.saved - SCALE * self.means).to(self.saved.dtype)

    def limit(self) -> Callable[[], object]:
        """Read what is packed, and read and write as many bytes in place as the lines that are touched have."""
        integers = [
            t.view(torch.uint8)[: t.nbytes // 8 * 8].view(torch.int64)
            for t in (self.mask, self.means, self.saved)
        ]
        written = torch.zeros(self.touched_bytes // 8, dtype=torch.int64)

        def task() -> None:
            for each in integers:
                each.sum()
            written.bitwise_not_()

        return task

    def check(self, name: str, task: Callable[[], object]) -> None:
        self.live.copy_(self.base)
        task()
        expected = self.base if name == "live restore" else self.merged
        assert torch.equal(self.live.view(torch.uint8), expected.view(torch.uint8)), (
            f"{name}: not the merge's bits"
        )


def measure(dtype: str, numel: int, rounds: int) -> list[dict[str, Any]]:
    workload = Workload(dtype, numel)
    candidates = workload.candidates(torch.get_num_threads())
    for name, (task, _) in candidates.items():
        if name in ("merge", "memory, as many bytes"):
            task()
        else:
            workload.check(name, task)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (task, _) in candidates.items():
            began = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - began)
    spread = {name: percentiles(taken) for name, taken in seconds.items()}
    limit, merge = spread["memory, as many bytes"]["p50"], spread["merge"]["p50"]
    rows = []
    for name, (_, nbytes) in candidates.items():
        row = {
            "layout": "one tensor", "way": name, "dtype": dtype, "n": MODELS, "numel": numel, "bytes": nbytes, "state": "in memory",
            "rounds": rounds, **spread[name], "GB/s": nbytes / spread[name]["p50"] / 1e9, "of_merge": spread[name]["p50"] / merge,
        }  # fmt: skip
        if name != "merge":
            row |= {"limit": "memory, as many bytes", "of_limit": limit / spread[name]["p50"]}
        rows.append(row)
    best = min(spread[name]["p50"] for name in EAGER)
    live = spread["live move"]["p50"]
    print(f"{dtype}: a move takes {live / merge:.2f} of a merge, reaches {limit / live:.2f} of the limit, and takes {live / best:.2f} of eager PyTorch")  # fmt: skip
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--numel", type=int, default=1 << 27)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    for dtype in given.dtypes:
        record(given.results, measure(dtype, given.numel, given.rounds), also=["of_merge"])


if __name__ == "__main__":
    main()
