"""In memory: the CPU kernel against the limit, the blocked reference, torch.compile and the eager formula, on one large
tensor of each type and for few and many models; then a state dict of many small tensors against one tensor of their size.

Bytes counted: (n + 2) · numel · size, one reading of every input and one writing of the output. The limit is reading all
inputs once, in the same rounds. A speed is given only to a result that has the reference's bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from reference import SCALE, eager
from rows import alternate, percentiles, record

import negmerge_fast as nm
from negmerge_fast import _native, native
from negmerge_fast.rule import Batch, Rule, Segment, Signature, Stream

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def make(numel: int, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(numel, generator=generator)
    finetuned = [(base + 0.1 * torch.randn(numel, generator=generator)).to(dtype) for _ in range(models)]
    return base.to(dtype), finetuned


def read_memory(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.view(torch.int64).sum()


def batch_of(
    base: list[torch.Tensor], models: list[list[torch.Tensor]], out: list[torch.Tensor], dtype: str
) -> Batch:
    """One segment for each tensor of the base."""

    def stream(tensor: torch.Tensor) -> Stream:
        return Stream(tensor.data_ptr(), dtype, tensor)

    segments = [
        Segment(b.numel(), stream(b), [stream(m[i]) for m in models], stream(o))
        for i, (b, o) in enumerate(zip(base, out, strict=True))
    ]
    return Batch("cpu", Signature(dtype, (dtype,) * len(models), False), segments)


def large(dtype: str, models: int, numel: int, rounds: int) -> list[dict[str, Any]]:
    base, finetuned = make(numel, models, DTYPES[dtype])
    merged, out = base.clone(), torch.empty_like(base)
    in_place = batch_of([merged], [[m] for m in finetuned], [merged], dtype)
    beside = batch_of([base], [[m] for m in finetuned], [out], dtype)
    expected = nm.merge(base, finetuned, scale=SCALE, backend="torch")
    native.merge_cpu(in_place, Rule(SCALE))
    native.merge_cpu(beside, Rule(SCALE))
    assert same_bits(merged, expected) and same_bits(out, expected), "not the reference's bits"
    ways: dict[str, Callable[[], object]] = {
        "memory read": partial(read_memory, [base, *finetuned]),
        "cpu, in place": partial(native.merge_cpu, in_place, Rule(SCALE)),
        "cpu": partial(native.merge_cpu, beside, Rule(SCALE)),
    }
    if models == 8 and dtype != "F64":
        compiled = torch.compile(eager)
        compiled(base, finetuned)
        ways |= {
            "torch": partial(nm.merge_, merged, finetuned, scale=SCALE, backend="torch"),
            "torch.compile of the formula": partial(compiled, base, finetuned),
            "eager formula": partial(eager, base, finetuned),
        }
    size = base.element_size() * numel / 1e9
    moved = {way: (models + 1 if way == "memory read" else models + 2) * size for way in ways}
    timed = {way: percentiles(s) for way, s in alternate(ways, rounds, partial(fresh, merged, base)).items()}
    limit = moved["memory read"] / timed["memory read"]["p50"]
    return [
        {
            "way": way, "dtype": dtype, "n": models, "numel": numel, "state": "in memory", **spread,
            "instruction_set": native.instruction_set() if way.startswith("cpu") else None,
            "GB/s": moved[way] / spread["p50"], "of_limit": moved[way] / spread["p50"] / limit,
        }
        for way, spread in timed.items()
    ]  # fmt: skip


def fresh(merged: torch.Tensor, base: torch.Tensor) -> None:
    """Merged in place again and again, a base grows beyond its type; and torch's threads are given time to rest."""
    merged.copy_(base)
    time.sleep(0.02)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def state_dict(models: int, rounds: int, tensors: int = 2000, numel: int = 1000) -> list[dict[str, Any]]:
    """Many small tensors: the native call against one large tensor, and all of merge_ around it."""
    versions = [{f"layer.{i}.weight": torch.randn(numel) for i in range(tensors)} for _ in range(models + 1)]
    base, *finetuned = versions
    one, ones = make(tensors * numel, models, torch.float32)
    small = batch_of(list(base.values()), [list(m.values()) for m in finetuned], list(base.values()), "F32")
    big = batch_of([one], [[m] for m in ones], [one], "F32")
    ways = {
        f"cpu, one tensor of {tensors * numel:,}": call(big),
        f"cpu, {tensors:,} tensors of {numel:,}": call(small),
        f"merge_, {tensors:,} tensors of {numel:,}": partial(
            nm.merge_, base, finetuned, scale=SCALE, backend="cpu"
        ),
    }
    timed = {way: percentiles(s) for way, s in alternate(ways, rounds).items()}
    one_call, calls, whole = (spread["p50"] for spread in timed.values())
    rows = [
        {
            "way": way, "dtype": "F32", "n": models, "numel": tensors * numel, "state": "in memory", **spread,
            "GB/s": (models + 2) * tensors * numel * 4 / 1e9 / spread["p50"],
        }
        for way, spread in timed.items()
    ]  # fmt: skip
    rows[1]["of_one_tensor"] = calls / one_call
    rows[2]["us_per_tensor_and_model"] = (whole - calls) / tensors / models * 1e6
    return rows


def call(batch: Batch) -> Callable[[], None]:
    """The compiled function alone, its arguments made before."""
    table = native._table(batch)
    counts = np.zeros((len(batch.segments), 2), np.int64)
    signature = native._signature(batch, Rule(SCALE))

    def merge() -> None:
        _native.merge_cpu(
            *signature,
            table.ctypes.data,
            counts.ctypes.data,
            native.usual_threads(),
            native.instruction_set(),
        )

    return merge


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--numel", type=int, default=1 << 25, help="elements of each of 8 models; of 2, twice as many"
    )
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    rows = []
    for dtype in DTYPES:
        for models, numel in ((8, given.numel), (2, 2 * given.numel), (30, given.numel // 2)):
            rows += large(dtype, models, numel, given.rounds)
    rows += state_dict(8, 4 * given.rounds)
    record("memory.jsonl", rows)


if __name__ == "__main__":
    main()
