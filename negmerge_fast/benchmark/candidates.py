"""Code that is timed on a workload: the package's backends, its public call, and baselines in plain PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..backends import registry
from ..core.errors import InputError
from ..tensors.api import merge_
from .records import on_gpu
from .timers import wait
from .workload import RULE, SCALE, Lacking, Workload, free_memory

IN_PLACE = ", in place"
PUBLIC = "merge_"
Tensors = list[torch.Tensor]


class Refused(Exception):
    """A candidate of the package that differs from the reference. It gets no speed."""


def nothing() -> None:
    """The default of steps that few candidates need."""


@dataclass(frozen=True)
class Candidate:
    """A task to time, and how to read its result.

    Attributes:
        name: The value of "way" in its rows.
        task: What is timed.
        merged: Returns the merged tensors, given the task's result.
        counts: Returns the counts of each tensor, given the task's result. None for a baseline, which may
            differ from the reference.
        before: Done before each run, and not timed.
    """

    name: str
    task: Callable[[], Any]
    merged: Callable[[Any], Tensors]
    counts: Callable[[Any], list[list[int]]] | None = None
    before: Callable[[], object] = nothing


def backend(workload: Workload, name: str, in_place: bool = False) -> Candidate:
    """A backend of the package, called once for all tensors, as merge_ calls it."""
    batches = workload.batches(in_place)
    if reason := unusable(name, workload.device):
        raise Lacking(reason)
    try:
        _, merge = registry.choose(name, workload.device, RULE, [batches[0].signature])
    except InputError as error:  # it failed its self-test
        raise Refused(str(error)) from None

    def task() -> list[Any]:
        return [merge(batch, RULE) for batch in batches]

    return Candidate(
        name + IN_PLACE * in_place,
        task,
        merged=lambda _: workload.tensors(workload.out),
        counts=lambda counted: [row for counts in counted for row in counts.tolist()],
        before=(lambda: workload.out.copy_(workload.versions[0])) if in_place else nothing,
    )


def unusable(name: str, device: str) -> str | None:
    """Why a backend cannot be timed on a device; None if it can."""
    # Triton's interpreter would take hours.
    reason = "is for GPUs" if (name, device) == ("triton", "cpu") else registry.why_not(name, device)
    return reason and f"backend {name} on {device}: {reason}"


def public_call(workload: Workload) -> Candidate:
    """merge_ on state dicts, with all of its checks, as a user calls it."""
    per_copy = len(workload.shapes)
    versions = [
        [dict(zip(workload.shapes, tensors[i : i + per_copy], strict=True)) for i in range(0, len(tensors), per_copy)]
        for tensors in map(workload.tensors, (workload.out, *workload.versions[1:]))
    ]  # fmt: skip
    copies = [(base, list(models)) for base, *models in zip(*versions, strict=True)]

    def task() -> list[Any]:
        return [merge_(base, models, scale=SCALE) for base, models in copies]

    return Candidate(
        PUBLIC,
        task,
        merged=lambda _: workload.tensors(workload.out),
        counts=lambda done: [
            [t.agreed, t.nonfinite, t.vetoed_by_zero] for stats in done for t in stats.tensors.values()
        ],
        before=lambda: workload.out.copy_(workload.versions[0]),
    )


def min_rounds(name: str) -> int:
    """The number of rounds of a candidate at least: few for baselines and plain PyTorch, which are slow."""
    return 3 if name in (*BASELINES, "torch") else 7


def candidate(workload: Workload, name: str) -> Candidate:
    """The candidate of a name.

    Raises:
        Lacking: If it cannot be timed on this machine.
        Refused: If a backend failed its self-test.
    """
    if name in BASELINES:
        return baseline(workload, name)
    if name == PUBLIC:
        return public_call(workload)
    return backend(workload, name.removesuffix(IN_PLACE), in_place=name.endswith(IN_PLACE))


def check(workload: Workload, candidate: Candidate) -> tuple[int, float]:
    """Run a candidate once on poisoned memory, and compare its result with the reference.

    Returns:
        The number of differing elements, and seconds; 0 seconds if the run may have included a compilation.

    Raises:
        Refused: If the candidate is one of the package and differs.
    """
    workload.poison()
    candidate.before()
    wait(workload.device)
    began = time.perf_counter()
    done = candidate.task()
    wait(workload.device)
    taken = time.perf_counter() - began
    return judge(workload, candidate, done), taken if candidate.name in _EAGER else 0.0


def judge(workload: Workload, candidate: Candidate, done: Any) -> int:
    """Number of elements that differ from the reference. Raises Refused if the candidate is one of the package."""
    wrong, counts = workload.compare(candidate.merged(done))
    if candidate.counts is not None and wrong:
        what = "1 element differs" if wrong == 1 else f"{wrong:,} elements differ"
        raise Refused(f"{candidate.name}: {what} from the reference's, no speed ({workload})")
    if candidate.counts is not None and candidate.counts(done) != counts:
        raise Refused(f"{candidate.name}: counts differ from the reference's, no speed ({workload})")
    return wrong


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def eager(base: torch.Tensor, models: Tensors) -> torch.Tensor:
    """The formula as a user would write it."""
    wide = _wide(base)
    b = base.to(wide)
    d = torch.stack([x.to(wide) - b for x in models])
    agree = (d > 0).all(0) | (d < 0).all(0)
    total = torch.zeros_like(d[0])
    for difference in d:
        total = total + difference
    # Given a number instead of a tensor on the device, torch multiplies by its reciprocal on a GPU.
    mean = total / torch.full((), float(len(models)), dtype=wide, device=base.device)
    return torch.where(agree, (b + SCALE * -mean).to(base.dtype), base)


def two_step(base: torch.Tensor, models: Tensors) -> torch.Tensor:
    """The formula on all versions stacked into one dense tensor, as reductions along it."""
    wide = _wide(base)
    b = base.to(wide)
    d = torch.stack(models).to(wide) - b
    agree = (d > 0).all(0) | (d < 0).all(0)
    mean = d.sum(0) / torch.full((), float(len(models)), dtype=wide, device=base.device)
    return torch.where(agree, (b + SCALE * -mean).to(base.dtype), base)


def foreach(base: Tensors, models: Sequence[Tensors]) -> Tensors:
    """The formula in torch._foreach operations. They have no comparisons, so agreement is computed as a number, 0 or 1."""
    wide = _wide(base[0])

    def widened(tensors: Tensors) -> Tensors:
        if tensors[0].dtype == wide:
            return tensors
        into = [torch.empty_like(t, dtype=wide) for t in tensors]
        torch._foreach_copy_(into, tensors)
        return into

    b = widened(base)
    total: Tensors | None = None
    least: Tensors = []
    greatest: Tensors = []
    for x in models:
        d = list(torch._foreach_sub(widened(x), b))
        if total is None:
            total, least, greatest = d, [t.clone() for t in d], [t.clone() for t in d]
            continue
        torch._foreach_add_(total, d)
        torch._foreach_minimum_(least, d)
        torch._foreach_maximum_(greatest, d)
    assert total is not None
    torch._foreach_sign_(least)
    torch._foreach_clamp_min_(least, 0)
    torch._foreach_sign_(greatest)
    torch._foreach_clamp_max_(greatest, 0)
    torch._foreach_sub_(least, greatest)
    torch._foreach_div_(total, torch.full((), float(len(models)), dtype=wide, device=base[0].device))
    torch._foreach_mul_(total, -SCALE)
    torch._foreach_mul_(total, least)
    torch._foreach_add_(total, b)
    if total[0].dtype == base[0].dtype:
        return total
    out = [torch.empty_like(t) for t in base]
    torch._foreach_copy_(out, total)
    return out


def _each(
    formula: Callable[[torch.Tensor, Tensors], torch.Tensor], base: Tensors, models: Sequence[Tensors]
) -> Tensors:
    return [formula(b, [model[i] for model in models]) for i, b in enumerate(base)]


def _compiled(mode: str | None) -> Callable[..., Tensors]:
    torch.compiler.reset()
    return partial(_each, torch.compile(eager, dynamic=False, mode=mode))


# Factories, called once for each case, so that torch.compile starts afresh.
BASELINES: dict[str, Callable[[], Callable[..., Tensors]]] = {
    "eager formula": lambda: partial(_each, eager),
    "torch._foreach formula": lambda: foreach,
    "dense two-step": lambda: partial(_each, two_step),
    "torch.compile": lambda: _compiled(None),
    "torch.compile max-autotune": lambda: _compiled("max-autotune"),
}

_EAGER = ("eager formula", "torch._foreach formula", "dense two-step", "torch")


def baseline(workload: Workload, name: str) -> Candidate:
    """A formula in plain PyTorch, on lists of tensors. It returns new tensors."""
    needed, free = _peak_bytes(workload, name), free_memory(workload.device)
    if needed > 0.9 * free:  # on a CPU, running out of memory would end the process
        raise Lacking(
            f"{name} of {workload}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free on {workload.device}"
        )
    formula = BASELINES[name]()
    base, *models = map(workload.tensors, workload.versions)
    return Candidate(name, partial(formula, base, models), merged=lambda done: done)


def _peak_bytes(workload: Workload, name: str) -> int:
    """Roughly the peak of what a baseline allocates, its result included."""
    wide, result = max(4, workload.size), len(workload.out) * workload.size
    largest = max(map(math.prod, workload.shapes.values()))
    if name == "torch._foreach formula":
        return result + 6 * len(workload.out) * wide
    if name.startswith("torch.compile"):
        # A CUDA graph has memory of its own for all inputs.
        return result * (workload.n + 2 if name.endswith("max-autotune") and on_gpu(workload.device) else 1)
    return result + largest * (2 * workload.n * (wide + 1) + 4 * wide)


def failure(error: Exception) -> str:
    """Why a baseline has no speed, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        words in text.lower() for words in ("not enough memory", "out of memory", "outofmemory")
    ):
        return "out of memory"
    return f"{type(error).__name__}: {text}"
