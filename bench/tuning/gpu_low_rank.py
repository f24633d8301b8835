"""Measures low-rank differences on a GPU: adapters merged, and one written as a dense tensor, for gpu_session.py.

Each round is beside a device copy, and beside a merge of as many full models. A row also has the share of the GPU's rate of
unfused operations of float32, which bounds this for many adapters or high ranks: 2 · n · rank operations an element. The bits are
compared with those of PyTorch before and in the last round.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tune_gpu import row_of

from negmerge_fast.backends import low_rank, pytorch, registry
from negmerge_fast.benchmark.bandwidth import device_copy, flush
from negmerge_fast.benchmark.records import Row
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timers import Clock, clock
from negmerge_fast.benchmark.workload import RULE, Lacking, Workload, release, shared_workload
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature
from negmerge_fast.core.errors import InputError, first_line
from negmerge_fast.core.low_rank import ExpandBatch, ExpandSegment, Expansion, LowRank, expand_signature

MERGED = "low-rank models merged"
EXPANDED = "low-rank difference written"
TASKS = (MERGED, EXPANDED)

COLUMNS = 4096
RANK = 16
DTYPES = ("BF16", "F32")
MODELS = (8, 30)


class LowRankWorkload:
    """Random adapters of a workload's base, and where their merge, or the first of them, is written.

    Attributes:
        bytes: What has to be read and written: the factors, and base and output, or the dense difference.
        operations: Products and sums.
    """

    def __init__(self, workload: Workload, task: str) -> None:
        base, n, device = workload.versions[0], workload.n if task == MERGED else 1, workload.device
        rows, generator = len(base) // COLUMNS, torch.Generator(workload.device).manual_seed(0)
        sizes = ((rows, RANK), (RANK, COLUMNS))
        factors = [
            [0.01 * torch.randn(*size, generator=generator, device=device) for size in sizes]
            for _ in range(n)
        ]
        models = [
            Expansion(
                LowRank(left.data_ptr(), right.data_ptr(), 1, rows, COLUMNS, RANK, 0.5, (left, right)), 0
            )
            for left, right in factors
        ]
        self.signature = Signature(workload.dtype, ("F32",) * n, True)
        stored = workload.dtype if task == MERGED else "F32"
        self.out = torch.empty(len(base), dtype=pytorch.TORCH_DTYPES[stored], device=device)
        written = Operand(self.out.data_ptr(), stored, self.out)
        operand = Operand(base.data_ptr(), workload.dtype, base)
        self.batch = Batch(device, self.signature, [Segment(len(base), operand, models, written)])  # type: ignore[arg-type]
        self.expanded = ExpandBatch(device, "F32", None, [ExpandSegment(len(base), models[0], None, written)])
        dense = base.nbytes if task == MERGED else 0
        self.bytes = sum(each.nbytes for pair in factors for each in pair) + dense + self.out.nbytes
        self.operations = 2 * n * RANK * len(base)
        self.task = task
        self.counts = self.run(partial(low_rank.merge, pytorch.merge, low_rank.expand), low_rank.expand)
        self.expected = self.out.clone()

    def run(self, merge: Any, expand: Any) -> torch.Tensor:
        """The counts of a merge; none of an expansion."""
        if self.task == MERGED:
            counts: torch.Tensor = merge(self.batch, RULE)
            return counts
        expand(self.expanded)
        return torch.zeros(0)

    def prepare(self) -> None:
        """Make what is not written differ from what is expected."""
        self.out.view(torch.uint8).fill_(0xA5)

    def fault(self, counts: torch.Tensor) -> str | None:
        """Why a result gets no speed; None if it is PyTorch's."""
        if not torch.equal(self.out.view(torch.uint8), self.expected.view(torch.uint8)):
            return "other bits than PyTorch's"
        return None if counts.tolist() == self.counts.tolist() else "other counts than PyTorch's"


def float32_rate(device: str) -> float | None:
    """Unfused operations of float32 a second at the highest clock; None if torch does not know the clock."""
    found = torch.cuda.get_device_properties(device)
    units = 64 if (found.major, found.minor) == (8, 0) else 128  # of a processor
    kilohertz = getattr(found, "clock_rate", None)
    return kilohertz and 1000.0 * kilohertz * units * found.multi_processor_count


def measure(backend: str, task: str, workload: Workload, rounds: int, now: Clock, rate: float | None) -> Row:
    """The row of a backend. Raises InputError if it cannot run, or is wrong."""
    adapters = LowRankWorkload(workload, task)
    [merged] = workload.batches(in_place=False)
    _, low_rank_merge = registry.choose_low_rank(backend, workload.device, RULE, [adapters.signature])
    _, expand = registry.choose_expand(backend, workload.device, [expand_signature(adapters.signature)])
    _, merge = registry.choose(backend, workload.device, RULE, [merged.signature])
    roofline = device_copy(workload.device, adapters.bytes)
    taken: list[tuple[float, float, float]] = []

    def seconds(task: Callable[[], Any]) -> tuple[Any, Any, Any]:
        flush(workload.device)  # takes longer than the host's launches of what follows
        began = now()
        found = task()
        return began, now(), found

    for _ in range(1 + rounds):  # the first one compiles, and is not counted
        adapters.prepare()
        copy = seconds(roofline.task)
        done = seconds(lambda: adapters.run(low_rank_merge, expand))
        direct = seconds(lambda: merge(merged, RULE))
        taken.append(tuple(ended - began for began, ended, _ in (copy, done, direct)))  # type: ignore[arg-type]
        if len(taken) in (1, 1 + rounds) and (reason := adapters.fault(done[2])) is not None:
            raise InputError(f"no speed, {reason}")
    copies, times, merges = zip(*taken[1:], strict=True)
    row = {
        **workload.row("tune", f"{backend}, {task}"),
        "bytes": adapters.bytes,
        "rank": RANK,
        "of_arithmetic": rate and adapters.operations / statistics.median(times) / rate,
    }
    of_merge = statistics.median(a / m for a, m in zip(times, merges, strict=True))
    return {**row_of(row, roofline, copies, times), "of_merge": of_merge}


def measure_variant(
    backend: str, task: str, device: str, numel: int, rounds: int, clocks: dict[str, Clock | None]
) -> None:
    """Print a line of JSON for each dtype, number of models and clock."""
    rate = float32_rate(device) if device.startswith("cuda") else None
    numel = max(1, numel // 4 // COLUMNS) * COLUMNS  # 4096 × 4096 of what all variants are given
    for n in MODELS if task == MERGED else MODELS[:1]:
        for dtype in DTYPES:
            try:
                workload = shared_workload("one tensor", one_tensor(numel), dtype, n, device, rotate=False)
                for state, now in clocks.items():
                    row = measure(backend, task, workload, rounds, now or clock(device), rate)
                    print(json.dumps({**row, "state": state}), flush=True)
                del workload  # the next may not fit beside it
            except (InputError, Lacking, torch.cuda.OutOfMemoryError) as error:
                print(f"{backend}, {task}, {dtype}, n = {n}: {first_line(error)}", flush=True)
    release()
