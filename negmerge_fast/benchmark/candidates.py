"""What is timed on a work: our backends, the public call, and peers in plain PyTorch."""

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
from .workload import RULE, SCALE, Lacking, Work, free_memory

IN_PLACE = ", in place"
PUBLIC = "merge_"
Tensors = list[torch.Tensor]


class Refused(Exception):
    """A result of ours that is not the reference's: it gets no speed."""


def nothing() -> None:
    """Of those that need it."""


@dataclass(frozen=True)
class Way:
    """run: what is timed. before: what each run needs first. merged, counts: what a run has returned, as tensors and as
    agreed and non-finite of each tensor; counts None: a peer, which may differ from the reference."""

    name: str
    run: Callable[[], Any]
    merged: Callable[[Any], Tensors]
    counts: Callable[[Any], list[list[int]]] | None = None
    before: Callable[[], object] = nothing


def backend(work: Work, name: str, in_place: bool = False) -> Way:
    """One of our backends, called as the engine calls it: once for all tensors."""
    batches = work.batches(in_place)
    if reason := unusable(name, work.device):
        raise Lacking(reason)
    try:
        _, merge = registry.choose(name, work.device, RULE, [batches[0].signature])
    except InputError as error:  # it was tried, and is wrong
        raise Refused(str(error)) from None

    def run() -> list[Any]:
        return [merge(batch, RULE) for batch in batches]

    return Way(
        name + IN_PLACE * in_place,
        run,
        merged=lambda _: work.tensors(work.out),
        counts=lambda counted: [pair for counts in counted for pair in counts.tolist()],
        before=(lambda: work.out.copy_(work.versions[0])) if in_place else nothing,
    )


def unusable(name: str, device: str) -> str | None:
    """Why a backend is not timed on a device."""
    # Under Triton's interpreter it would be, for ever.
    reason = "is for GPUs" if (name, device) == ("triton", "cpu") else registry.why_not(name, device)
    return reason and f"backend {name} on {device}: {reason}"


def public_call(work: Work) -> Way:
    """merge_ on state dicts, with all it checks: what a user's call takes."""
    per_copy = len(work.shapes)
    versions = [
        [dict(zip(work.shapes, tensors[i : i + per_copy], strict=True)) for i in range(0, len(tensors), per_copy)]
        for tensors in map(work.tensors, (work.out, *work.versions[1:]))
    ]  # fmt: skip
    copies = [(base, list(models)) for base, *models in zip(*versions, strict=True)]

    def run() -> list[Any]:
        return [merge_(base, models, scale=SCALE) for base, models in copies]

    return Way(
        PUBLIC,
        run,
        merged=lambda _: work.tensors(work.out),
        counts=lambda done: [[t.agreed, t.nonfinite] for stats in done for t in stats.tensors.values()],
        before=lambda: work.out.copy_(work.versions[0]),
    )


def least_rounds(name: str) -> int:
    """What is slow, and no kernel of ours, has few."""
    return 3 if name in (*PEERS, "torch") else 7


def way(work: Work, name: str) -> Way:
    """What is timed under a name. Raises Lacking where it cannot be."""
    if name in PEERS:
        return peer(work, name)
    if name == PUBLIC:
        return public_call(work)
    return backend(work, name.removesuffix(IN_PLACE), in_place=name.endswith(IN_PLACE))


def check(work: Work, way: Way) -> tuple[int, float]:
    """Run a way once; how many elements differ from the reference's, and the seconds, 0 where it may have compiled first.

    Raises Refused for one of ours.
    """
    work.poison()
    way.before()
    wait(work.device)
    began = time.perf_counter()
    done = way.run()
    wait(work.device)
    taken = time.perf_counter() - began
    return judge(work, way, done), taken if way.name in _EAGER else 0.0


def judge(work: Work, way: Way, done: Any) -> int:
    """How many elements of what a run has returned differ from the reference's; raises Refused for one of ours."""
    wrong, counts = work.compare(way.merged(done))
    if way.counts is not None and wrong:
        what = "1 element differs" if wrong == 1 else f"{wrong:,} elements differ"
        raise Refused(f"{way.name}: {what} from the reference's, no speed ({work})")
    if way.counts is not None and way.counts(done) != counts:
        raise Refused(f"{way.name}: counts differ from the reference's, no speed ({work})")
    return wrong


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def eager(base: torch.Tensor, models: Tensors) -> torch.Tensor:
    """The formula as one writes it."""
    wide = _wide(base)
    b = base.to(wide)
    d = torch.stack([x.to(wide) - b for x in models])
    agree = (d > 0).all(0) | (d < 0).all(0)
    total = torch.zeros_like(d[0])
    for difference in d:
        total = total + difference
    # A tensor, and on the device: a GPU would multiply by a number's reciprocal.
    mean = total / torch.full((), float(len(models)), dtype=wide, device=base.device)
    return torch.where(agree, (b + SCALE * -mean).to(base.dtype), base)


def two_step(base: torch.Tensor, models: Tensors) -> torch.Tensor:
    """All versions in one dense tensor first, then reductions along it."""
    wide = _wide(base)
    b = base.to(wide)
    d = torch.stack(models).to(wide) - b
    agree = (d > 0).all(0) | (d < 0).all(0)
    mean = d.sum(0) / torch.full((), float(len(models)), dtype=wide, device=base.device)
    return torch.where(agree, (b + SCALE * -mean).to(base.dtype), base)


def foreach(base: Tensors, models: Sequence[Tensors]) -> Tensors:
    """The formula in operations on lists of tensors, which have no comparisons: agree is a number, 0 or 1."""
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


# Each is made anew for a case.
PEERS: dict[str, Callable[[], Callable[..., Tensors]]] = {
    "eager formula": lambda: partial(_each, eager),
    "torch._foreach formula": lambda: foreach,
    "dense two-step": lambda: partial(_each, two_step),
    "torch.compile": lambda: _compiled(None),
    "torch.compile max-autotune": lambda: _compiled("max-autotune"),
}

_EAGER = ("eager formula", "torch._foreach formula", "dense two-step", "torch")


def peer(work: Work, name: str) -> Way:
    """A formula in plain PyTorch, on lists of tensors; it returns new ones."""
    needed, free = _needed(work, name), free_memory(work.device)
    if needed > 0.9 * free:  # a CPU's memory runs out by the end of the process
        raise Lacking(
            f"{name} of {work}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free on {work.device}"
        )
    formula = PEERS[name]()
    base, *models = map(work.tensors, work.versions)
    return Way(name, partial(formula, base, models), merged=lambda done: done)


def _needed(work: Work, name: str) -> int:
    """Roughly the most that a peer allocates at a time, its result included."""
    wide, result = max(4, work.size), len(work.out) * work.size
    largest = max(map(math.prod, work.shapes.values()))
    if name == "torch._foreach formula":
        return result + 6 * len(work.out) * wide
    if name.startswith("torch.compile"):
        # A CUDA graph has memory of its own for all inputs.
        return result * (work.n + 2 if name.endswith("max-autotune") and on_gpu(work.device) else 1)
    return result + largest * (2 * work.n * (wide + 1) + 4 * wide)


def failure(error: Exception) -> str:
    """Why a peer has no speed."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        words in text.lower() for words in ("not enough memory", "out of memory", "outofmemory")
    ):
        return "out of memory"
    return f"{type(error).__name__}: {text}"
