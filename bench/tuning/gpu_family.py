"""Measures other methods on a GPU beside NegMerge's own kernel and a device copy, for gpu_session.py.

Each round is beside both. The bits are compared with those of PyTorch before and in the last round.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tune_gpu import row_of

from negmerge_fast.backends import pytorch, registry
from negmerge_fast.benchmark.bandwidth import device_copy, flush
from negmerge_fast.benchmark.records import Row
from negmerge_fast.benchmark.shapes import one_tensor
from negmerge_fast.benchmark.timers import Clock, clock
from negmerge_fast.benchmark.workload import RULE, SCALE, Lacking, Workload, release, shared_workload
from negmerge_fast.core.batch import Batch
from negmerge_fast.core.choices import Terms, key_of
from negmerge_fast.core.errors import InputError, first_line
from negmerge_fast.core.rule import Rule
from negmerge_fast.methods import catalogue

METHODS = ("mean", "ties", "dare")
TASKS = tuple(f"merged by {name}" for name in METHODS)

MODELS = 8
DTYPES = ("F32", "BF16")

# Of ties: about a fifth of a workload's differences are larger.
BOUND = 0.18


def method_batch(workload: Workload, task: str) -> tuple[Batch, Rule]:
    """A workload as a method merges it: with bounds that take no time here."""
    choices = catalogue.method(task.rpartition(" ")[2]).choices(workload.n)
    [batch] = workload.batches(in_place=False)
    low, high = ((x,) * workload.n if "ties" in task else () for x in (BOUND, math.inf))
    terms = [Terms(0, key_of(str(k)), None, low, high) for k in range(len(batch.segments))]
    return replace(batch, terms=terms), Rule(SCALE, choices=choices)


def measure(backend: str, task: str, workload: Workload, rounds: int, now: Clock) -> Row:
    """The row of a backend. Raises InputError if it cannot run, or is wrong."""
    batch, rule = method_batch(workload, task)
    _, merge = registry.choose(backend, workload.device, rule, [batch.signature])
    registry.choose(backend, workload.device, RULE, [batch.signature])
    roofline = device_copy(workload.device, workload.bytes)
    workload.poison()
    counts = pytorch.merge(batch, rule).tolist()
    expected = workload.out.clone()
    taken: list[tuple[float, float, float]] = []

    def seconds(task: Callable[[], Any]) -> tuple[float, Any]:
        flush(workload.device)  # takes longer than the host's launches of what follows
        began = now()
        found = task()
        return now() - began, found

    for _ in range(1 + rounds):  # the first one compiles, and is not counted
        copy, _ = seconds(roofline.task)
        direct, _ = seconds(lambda: merge(batch, RULE))
        workload.poison()
        merging, counted = seconds(lambda: merge(batch, rule))
        taken.append((copy, merging, direct))
        if len(taken) in (1, 1 + rounds):
            same = torch.equal(workload.out.view(torch.uint8), expected.view(torch.uint8))
            if not same or counted.tolist() != counts:
                raise InputError(f"no speed, other {'counts' if same else 'bits'} than PyTorch's")
    copies, merges, directs = zip(*taken[1:], strict=True)
    row = workload.row("tune", f"{backend}, {task}")
    of_merge = statistics.median(m / d for m, d in zip(merges, directs, strict=True))
    return {**row_of(row, roofline, copies, merges), "of_merge": of_merge}


def measure_variant(
    backend: str, task: str, device: str, numel: int, rounds: int, clocks: dict[str, Clock | None]
) -> None:
    """Print a line of JSON for each dtype and clock."""
    for dtype in DTYPES:
        try:
            workload = shared_workload("one tensor", one_tensor(numel), dtype, MODELS, device, rotate=False)
            for state, now in clocks.items():
                row = measure(backend, task, workload, rounds, now or clock(device))
                print(json.dumps({**row, "state": state}), flush=True)
            del workload  # the next may not fit beside it
        except (InputError, Lacking, torch.cuda.OutOfMemoryError) as error:
            print(f"{backend}, {task}, {dtype}: {first_line(error)}", flush=True)
    release()
