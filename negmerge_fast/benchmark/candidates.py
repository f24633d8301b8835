"""Code that is timed on a workload: the package's backends, its public call, and baselines in plain PyTorch."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from ..backends import registry
from ..core.errors import InputError
from ..tensors.api import merge_
from .records import COMPILED
from .timers import wait
from .workload import RULE, SCALE, Lacking, Workload, free_memory

IN_PLACE = ", in place"
PUBLIC = "merge_"
Tensors = list[torch.Tensor]

# Elements of a block of formulas that write in between: few enough for a CPU's cache, enough for launches on a GPU.
_BLOCK_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 22}
# A call of a compiled formula takes longer than copying as many elements of each model.
_SHORT_NUMEL = 1 << 16


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
    versions = [
        [dict(zip(workload.shapes, tensors, strict=True)) for tensors in _by_copy(workload, version)]
        for version in (workload.out, *workload.versions[1:])
    ]
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
    """The number of rounds of a candidate at least: few for plain PyTorch, which is slow."""
    return 3 if name in _SLOW else 7


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
        The number of differing elements, and the seconds of this first run. What torch.compile compiles is compiled in it,
        without what earlier processes left.

    Raises:
        Refused: If the candidate is one of the package and differs.
    """
    workload.poison()
    candidate.before()
    wait(workload.device)
    with _fresh_cache() if candidate.name.startswith(COMPILED) else nullcontext():
        began = time.perf_counter()
        done = candidate.task()
        wait(workload.device)
        taken = time.perf_counter() - began
    return judge(workload, candidate, done), taken


def without_compilation(name: str, first_call: float) -> float:
    """Seconds of a first call, 0 if it may have included a compilation."""
    return first_call if name in _SLOW else 0.0


def _fresh_cache() -> AbstractContextManager[object]:
    """An empty cache of torch.compile, in place of that on the disk."""
    inductor: Any = importlib.import_module("torch._inductor.utils")
    fresh = (
        getattr(inductor, "fresh_cache", None) or inductor.fresh_inductor_cache
    )  # its name before torch 2.8
    return cast("AbstractContextManager[object]", fresh())


def judge(workload: Workload, candidate: Candidate, done: Any) -> int:
    """Number of elements that differ from the reference. Raises Refused if the candidate is one of the package."""
    wrong, counts = workload.compare(candidate.merged(done))
    if candidate.counts is not None and wrong:
        what = "1 element differs" if wrong == 1 else f"{wrong:,} elements differ"
        raise Refused(f"{candidate.name}: {what} from the reference's, no speed ({workload})")
    if candidate.counts is not None and candidate.counts(done) != counts:
        raise Refused(f"{candidate.name}: counts differ from the reference's, no speed ({workload})")
    return wrong


# The formula in plain PyTorch, as fast as it can be written: in place, with running sums, each model read once. All differences
# have one sign if the least of them is above zero, each multiplied by the sign of the first one.


def _divisor(base: torch.Tensor, models: Sequence[object]) -> torch.Tensor:
    """The number of models, as a tensor: by a number, torch divides on a GPU with the number's reciprocal."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return torch.full((), float(len(models)), dtype=wide, device=base.device)


def _blocks(
    base: Tensors, models: Sequence[Tensors], max_numel: int
) -> Iterator[tuple[torch.Tensor, Tensors]]:
    """Blocks of the base's tensors as flat views, each with those of the models."""
    for versions in zip(base, *models, strict=True):
        for block, *of_models in zip(*(tensor.view(-1).split(max_numel) for tensor in versions), strict=True):
            yield block, of_models


def eager(base: Tensors, models: Sequence[Tensors]) -> None:
    """The formula in blocks that stay in the cache, with the same few buffers for all of them."""
    n = _divisor(base[0], models)
    max_numel = min(_BLOCK_NUMEL[n.device.type], max(tensor.numel() for tensor in base))
    buffers = torch.empty(5, max_numel, dtype=n.dtype, device=n.device)
    for stored, versions in _blocks(base, models, max_numel):
        total, sign, least, d, b = buffers[:, : len(stored)]
        b = stored if stored.dtype == n.dtype else b.copy_(stored)
        torch.sub(versions[0], b, out=total)
        torch.sign(total, out=sign)
        torch.abs(total, out=least)
        for x in versions[1:]:
            total.add_(torch.sub(x, b, out=d))
            torch.minimum(least, d.mul_(sign), out=least)
        total.div_(n).mul_(-SCALE).add_(b)
        torch.where(least > 0, total.to(stored.dtype), stored, out=stored)


def foreach(base: Tensors, models: Sequence[Tensors]) -> None:
    """The formula in torch._foreach operations, on as many blocks at a time as stay in the cache.

    They have no comparisons, so agreement is computed as a number, 0 or 1.
    """
    n = _divisor(base[0], models)
    max_numel = _BLOCK_NUMEL[n.device.type]

    def widened(tensors: Tensors) -> Tensors:
        if tensors[0].dtype == n.dtype:
            return tensors
        into = [torch.empty_like(tensor, dtype=n.dtype) for tensor in tensors]
        torch._foreach_copy_(into, tensors)
        return into

    blocks = list(_blocks(base, models, max_numel))
    group: list[tuple[torch.Tensor, Tensors]] = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        group.append(block)
        numel = sum(len(stored) for stored, _ in group)
        if following is not None and numel + len(following[0]) <= max_numel:
            continue
        stored = [stored for stored, _ in group]
        first, *others = (list(version) for version in zip(*(versions for _, versions in group), strict=True))
        group = []
        b = widened(stored)
        total = list(torch._foreach_sub(widened(first), b))
        sign, least = torch._foreach_sign(total), torch._foreach_abs(total)
        for x in others:
            d = torch._foreach_sub(widened(x), b)
            torch._foreach_add_(total, d)
            torch._foreach_mul_(d, sign)
            torch._foreach_minimum_(least, d)
        torch._foreach_sign_(least)
        torch._foreach_clamp_min_(least, 0)
        torch._foreach_div_(total, n)
        torch._foreach_mul_(total, -SCALE)
        torch._foreach_mul_(total, least)
        torch._foreach_add_(total, b)
        torch._foreach_copy_(stored, total)


def fused(base: torch.Tensor, models: Tensors) -> None:
    """The formula on one tensor, for torch.compile: one loop that writes nothing but the base."""
    n = _divisor(base, models)
    b = base.to(n.dtype)
    total = models[0].to(n.dtype) - b
    sign, least = torch.where(total > 0, 1.0, -1.0), total.abs()
    for x in models[1:]:
        d = x.to(n.dtype) - b
        total = total + d
        least = torch.minimum(least, d * sign)
    base.copy_(torch.where(least > 0, (b + -SCALE * (total / n)).to(base.dtype), base))


def _each(formula: Callable[[torch.Tensor, Tensors], None], base: Tensors, models: Sequence[Tensors]) -> None:
    for stored, *versions in zip(base, *models, strict=True):
        formula(stored.view(-1), [x.view(-1) for x in versions])


def _gathered(
    formula: Callable[[torch.Tensor, Tensors], None], base: Tensors, models: Sequence[Tensors]
) -> None:
    """Apply a formula to each long tensor, and to all short ones copied into one: a call for each would take longer."""
    long, short = (
        [[t.view(-1) for t in version if (t.numel() < _SHORT_NUMEL) is kind] for version in (base, *models)]
        for kind in (False, True)
    )
    _each(formula, long[0], long[1:])
    if short[0]:
        flat, *versions = map(torch.cat, short)
        formula(flat, versions)
        torch._foreach_copy_(short[0], torch.split(flat, [len(tensor) for tensor in short[0]]))


def _compiled(over: Callable[..., None], **options: Any) -> Callable[..., None]:
    torch.compiler.reset()
    dynamo: Any = torch._dynamo
    dynamo.config.recompile_limit = 64  # a model has more shapes than 8
    return partial(over, torch.compile(fused, **options))


def _one_graph() -> Callable[..., None]:
    torch.compiler.reset()
    return torch.compile(partial(_each, fused), dynamic=False)


EAGER, FOREACH = "blocked eager formula", "foreach formula"
ONE_GRAPH, MAX_AUTOTUNE = f"{COMPILED}, one graph", f"{COMPILED}, max-autotune"
# Factories, called once for each case, so that torch.compile starts afresh.
BASELINES: dict[str, Callable[[], Callable[[Tensors, Sequence[Tensors]], None]]] = {
    EAGER: lambda: eager,
    FOREACH: lambda: foreach,
    COMPILED: lambda: _compiled(_each, dynamic=False),
    f"{COMPILED}, dynamic": lambda: _compiled(_gathered, dynamic=True),
    ONE_GRAPH: _one_graph,
    # A CUDA graph would copy all inputs first.
    MAX_AUTOTUNE: lambda: _compiled(_each, dynamic=False, mode="max-autotune-no-cudagraphs"),
}
_SLOW = (EAGER, FOREACH, "torch")


def baseline(workload: Workload, name: str) -> Candidate:
    """A formula in plain PyTorch, in place on lists of tensors."""
    needed, free = _peak_bytes(workload, name), free_memory(workload.device)
    if needed > 0.9 * free:  # on a CPU, running out of memory would end the process
        raise Lacking(
            f"{name} of {workload}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free on {workload.device}"
        )
    formula = BASELINES[name]()
    copies = list(
        zip(*(_by_copy(workload, version) for version in (workload.out, *workload.versions[1:])), strict=True)
    )

    def task() -> None:
        for base, *models in copies:
            formula(base, models)

    return Candidate(
        name,
        task,
        merged=lambda _: workload.tensors(workload.out),
        before=lambda: workload.out.copy_(workload.versions[0]),
    )


def _by_copy(workload: Workload, version: torch.Tensor) -> list[Tensors]:
    """A version's tensors, in a list for each copy."""
    tensors, per_copy = workload.tensors(version), len(workload.shapes)
    return [tensors[i : i + per_copy] for i in range(0, len(tensors), per_copy)]


def _peak_bytes(workload: Workload, name: str) -> int:
    """Roughly the peak of what a baseline allocates."""
    if name.startswith(COMPILED):
        numels = map(math.prod, workload.shapes.values())
        short = sum(numel for numel in numels if numel < _SHORT_NUMEL)
        return short * (workload.n + 1) * workload.size if name.endswith("dynamic") else 0
    block = min(_BLOCK_NUMEL[torch.device(workload.device).type], workload.numel)
    return 8 * block * max(4, workload.size)


def failure(error: Exception) -> str:
    """Why a baseline has no speed, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        words in text.lower() for words in ("not enough memory", "out of memory", "outofmemory")
    ):
        return "out of memory"
    return f"{type(error).__name__}: {text}"
