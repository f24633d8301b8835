"""Tunes the block size of the PyTorch backend on a CPU, beside the formula in as many blocks.

The counted bytes are (n + 2) · numel · size. The roofline reads memory once, in the same rounds. A result gets a
speed only if it equals the formula's bit for bit.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

import negmerge_fast as nm
from negmerge_fast.backends import pytorch
from negmerge_fast.benchmark.candidates import EAGER, eager
from negmerge_fast.benchmark.records import percentiles, record
from negmerge_fast.benchmark.timing import alternate
from negmerge_fast.benchmark.workload import SCALE

RESULTS = Path(__file__).parents[1] / "results" / "reference.jsonl"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def blocked(block: int, base: torch.Tensor, models: list[torch.Tensor]) -> None:
    pytorch.CPU_BLOCK_BYTES = block
    nm.merge_(base, models, scale=SCALE, backend="torch")


def read_memory(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.view(torch.int64).max()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--numel", type=int, default=16 * 1024 * 1024)
    options.add_argument("--models", type=int, default=8)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    given = options.parse_args()
    usual = pytorch.CPU_BLOCK_BYTES
    rows = []
    for name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(given.numel, generator=generator).to(dtype)
        models = [
            (base + torch.randn(given.numel, generator=generator)).to(dtype) for _ in range(given.models)
        ]
        merged = base.clone()
        expected = base.clone()
        eager([expected], [[model] for model in models])
        for block in (usual // 16, usual // 4, usual, usual * 4):
            merged.copy_(base)
            blocked(block, merged, models)
            assert torch.equal(merged, expected), f"{name}: the blocked result is not the formula's"
        candidates = {
            "memory read": partial(read_memory, [base, *models]),
            EAGER: partial(eager, [merged], [[model] for model in models]),
            **{
                f"reference, {block >> 10} KiB": partial(blocked, block, merged, models)
                for block in (usual // 16, usual // 4, usual, usual * 4)
            },
        }
        size = base.element_size() * given.numel / 1e9
        moved = {
            candidate: (given.models + 1 if candidate == "memory read" else given.models + 2) * size
            for candidate in candidates
        }
        timed = {candidate: percentiles(s) for candidate, s in alternate(candidates, given.rounds).items()}
        roofline = moved["memory read"] / timed["memory read"]["p50"]
        for candidate, spread in timed.items():
            speed = moved[candidate] / spread["p50"]
            rows.append({
                "way": candidate, "dtype": name, "n": given.models, "numel": given.numel, "state": "in memory",
                **spread, "GB/s": speed, "of_limit": speed / roofline,
            })  # fmt: skip
    record(given.results, rows)


if __name__ == "__main__":
    main()
