"""Measures consensus deltas on a GPU: a live model's move to another λ, and a delta applied to a copy, for gpu_session.py.

Each round is beside a device copy, the roofline, and beside a merge of eight models to the same elements. The bits are compared with
those of PyTorch before and in the last round.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tune_gpu import row_of

from negmerge_fast.backends import pytorch_delta, registry
from negmerge_fast.backends.pytorch import TORCH_DTYPES
from negmerge_fast.benchmark.bandwidth import device_copy, flush
from negmerge_fast.benchmark.records import Row
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timers import Clock, clock
from negmerge_fast.benchmark.workload import RULE, SCALE, Lacking, Workload, release, shared_workload
from negmerge_fast.core.delta import RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature
from negmerge_fast.core.dtypes import FLOAT_SIZES
from negmerge_fast.core.errors import InputError, first_line

LIVE = "live move of a delta"
APPLIED = "delta applied to a copy"

# As many models are merged beside, and so large a part of the elements is in the mask.
MODELS = 8
FRACTION = 0.1

# What a GPU's memory is written in.
SECTOR = 32


class DeltaWorkload:
    """A random delta of a workload's base, and what it is applied to.

    Attributes:
        bytes: What has to be read and written: all of mask, ranks and means, and for a live move the saved elements and those sectors
            that have an element in the mask; for a copy the base and the output.
    """

    def __init__(self, workload: Workload, task: str) -> None:
        base, arithmetic = workload.versions[0], "F64" if workload.dtype == "F64" else "F32"
        numel, generator = len(base), torch.Generator(workload.device).manual_seed(0)
        flags = torch.rand(numel, generator=generator, device=workload.device) < FRACTION
        weights = 2 ** torch.arange(8, dtype=torch.uint8, device=workload.device)
        mask = (flags.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
        blocks = flags.view(-1, RANK_BLOCK).sum(1)
        ranks = blocks.cumsum(0) - blocks
        drawn = torch.randn(int(blocks.sum()), generator=generator, device=workload.device)
        means, saved = drawn.mul_(0.01).to(TORCH_DTYPES[arithmetic]), base[flags]
        self.base, self.out, self.is_live = base, torch.empty_like(base), task == LIVE
        at_base, at_saved = (0, saved.data_ptr()) if self.is_live else (base.data_ptr(), 0)
        owners = [mask, means, ranks, base, saved, self.out]
        addresses = (mask.data_ptr(), means.data_ptr(), ranks.data_ptr(), at_base, at_saved)
        segment = DeltaSegment(numel, *addresses, self.out.data_ptr(), owners)
        signature = DeltaSignature(workload.dtype, arithmetic, arithmetic)
        self.batch = DeltaBatch(workload.device, signature, [segment])
        sectors = SECTOR * int(flags.view(-1, SECTOR // base.itemsize).any(1).sum())
        moved = saved.nbytes + sectors if self.is_live else 2 * base.nbytes
        self.bytes = mask.nbytes + ranks.nbytes + means.nbytes + moved
        self.prepare()
        self.counts = pytorch_delta.apply(self.batch, SCALE).tolist()
        self.expected = self.out.clone()

    def prepare(self) -> None:
        """Make what is not written differ from what is expected."""
        if self.is_live:
            self.out.copy_(self.base)
        else:
            self.out.view(torch.uint8).fill_(0xA5)

    def fault(self, counts: Any) -> str | None:
        """Why the result of an apply gets no speed; None if it is PyTorch's."""
        if not torch.equal(self.out.view(torch.uint8), self.expected.view(torch.uint8)):
            return "other bits than PyTorch's"
        return None if counts.tolist() == self.counts else "other counts than PyTorch's"


def measure(backend: str, task: str, workload: Workload, rounds: int, now: Clock) -> Row:
    """The row of a backend. Raises InputError if it cannot run, or is wrong."""
    delta = DeltaWorkload(workload, task)
    [merged] = workload.batches(in_place=False)
    _, apply = registry.choose_apply(backend, workload.device, [delta.batch.signature])
    _, merge = registry.choose(backend, workload.device, RULE, [merged.signature])
    roofline = device_copy(workload.device, delta.bytes)
    taken: list[tuple[float, float, float]] = []

    def seconds(task: Callable[[], Any]) -> tuple[Any, Any, Any]:
        flush(workload.device)  # takes longer than the host's launches of what follows
        began = now()
        found = task()
        return began, now(), found

    for _ in range(1 + rounds):  # the first one compiles, and is not counted
        delta.prepare()
        copy = seconds(roofline.task)
        applied = seconds(lambda: apply(delta.batch, SCALE))
        direct = seconds(lambda: merge(merged, RULE))
        taken.append(tuple(ended - began for began, ended, _ in (copy, applied, direct)))  # type: ignore[arg-type]
        if len(taken) in (1, 1 + rounds) and (reason := delta.fault(applied[2])) is not None:
            raise InputError(f"no speed, {reason}")
    copies, applies, merges = zip(*taken[1:], strict=True)
    row = {**workload.row("tune", f"{backend}, {task}"), "bytes": delta.bytes}
    of_merge = statistics.median(a / m for a, m in zip(applies, merges, strict=True))
    return {**row_of(row, roofline, copies, applies), "of_merge": of_merge}


def measure_variant(
    backend: str, task: str, device: str, numel: int, rounds: int, clocks: dict[str, Clock | None]
) -> None:
    """Print a line of JSON for each dtype and clock."""
    for dtype in FLOAT_SIZES:
        try:
            workload = shared_workload("one tensor", one_tensor(numel), dtype, MODELS, device, rotate=False)
            for state, now in clocks.items():
                row = measure(backend, task, workload, rounds, now or clock(device))
                print(json.dumps({**row, "state": state}), flush=True)
            del workload  # the next may not fit beside it
        except (InputError, Lacking, torch.cuda.OutOfMemoryError) as error:
            print(f"{backend}, {task}, {dtype}: {first_line(error)}", flush=True)
    release()
