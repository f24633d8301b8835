"""Batches of the methods of the family, what is expected of them, and the rule of core/choices.py for whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from backend_cases import BackendCase, to_device
from bits import STORAGE
from hostile import random_models

from negmerge_fast.core.batch import Batch, Merge, Operand, Segment, Signature
from negmerge_fast.core.choices import Choices, Election, Gate, Reduction, Terms, key_of
from negmerge_fast.core.generator import number
from negmerge_fast.core.reference import _differences, plain_family, plain_family_consensus, plain_merge
from negmerge_fast.core.rule import Rule
from negmerge_fast.methods import catalogue
from negmerge_fast.methods.base import Method

POISON = 0xA5
Reduce = Callable[[torch.Tensor], torch.Tensor]

# Storage types of weights, as the operand names them.
WEIGHTS = {**STORAGE, "U8": torch.uint8, "BOOL": torch.bool, "I32": torch.int32, "I64": torch.int64}
SPELLED = {dtype: name for name, dtype in WEIGHTS.items()}

# Every method by its name, with its usual numbers, and with others.
METHODS = {name: catalogue.method(name) for name in catalogue.NAMES} | {
    "ties-0.7": catalogue.method("ties", density=0.7),
    "breadcrumbs-0.3": catalogue.method("breadcrumbs", density=0.3, gamma=0.2),
    "dare-0.3": catalogue.method("dare", drop=0.3, seed=(1 << 63) + 5),
    "consensus-0.8": catalogue.method("consensus", mask_scale=0.8),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors this short several threads take several times as long, where others compute, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rule_of(method: Method, models: int, scale: float = 0.9, min_agreement: float = 1.0) -> Rule:
    """A rule that has choices, as if there were weights."""
    return Rule(scale, min_agreement, method.choices(models, weighted=True))


def naive_of(method: Method, required: int, key: int) -> Reduce:
    """A method's own naive version, with its numbers and those of a tensor."""
    naive = import_module(f"negmerge_fast.methods.{method.name.replace('-', '_')}").naive
    numbers = {"required": required, "key": key}
    names = naive.__code__.co_varnames[1 : naive.__code__.co_argcount]
    return lambda d: naive(d, **{name: numbers.get(name, getattr(method, name, None)) for name in names})


class PlainChoices(NamedTuple):
    """The words of choices.py, of any choices."""

    choices: Choices
    required: int
    key: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    def e(self, d: torch.Tensor) -> torch.Tensor:
        n, elements = d.shape
        f, low, high = (
            torch.tensor(x, dtype=torch.float64).to(d.dtype)[:, None]
            for x in (self.choices.factors, self.low or [0.0] * n, self.high or [math.inf] * n)
        )
        passes = torch.ones_like(d, dtype=torch.bool)
        if self.choices.gate == Gate.MAGNITUDE:
            passes = (low <= d.abs()) & (d.abs() <= high)
        if self.choices.gate == Gate.RANDOM:
            seed = self.choices.seed
            drawn = [[number(seed, self.key, k, i) for i in range(elements)] for k in range(n)]
            passes = torch.tensor(drawn).view(n, elements) < torch.tensor(self.choices.keep)[:, None]
        return torch.where(passes, d * f, torch.zeros_like(d))

    def elected(self, e: torch.Tensor) -> torch.Tensor:
        total, positive, negative = _in_order(e), (e > 0).sum(0), (e < 0).sum(0)
        if self.choices.election == Election.AGREEMENT:
            return ((e > 0) & (positive >= self.required)) | ((e < 0) & (negative >= self.required))
        if self.choices.election == Election.SIGN_OF_SUM:
            return ((e > 0) & (total >= 0)) | ((e < 0) & (total < 0))
        whole = torch.ones_like(total, dtype=torch.bool)
        if self.choices.election == Election.CONFLICT:
            whole = ~((positive == len(e)) | (negative == len(e)))
        if self.choices.election == Election.COUNTED:
            whole = ((positive >= self.required) & (total > 0)) | ((negative >= self.required) & (total < 0))
        if self.choices.election == Election.MASKS:
            scale = torch.tensor(self.choices.mask_scale, dtype=torch.float64).to(e.dtype)
            whole = (e.abs() >= scale * (total - e).abs()).sum(0) >= 2
        return whole.expand(e.shape)

    def reduce(self, d: torch.Tensor) -> torch.Tensor:
        e = self.e(d)
        elected, zero = self.elected(e), torch.zeros_like(d[0])
        if self.choices.reduction == Reduction.LARGEST:
            largest = zero
            for flags, each in zip(elected, e, strict=True):
                largest = torch.where(flags & (each.abs() >= largest.abs()), each, largest)
            return largest
        total = _in_order(torch.where(elected, e, zero))
        if self.choices.reduction == Reduction.SUM:
            return total
        votes = torch.tensor(self.choices.votes, dtype=torch.float64).to(d.dtype)[:, None].expand(d.shape)
        if self.choices.election in (Election.AGREEMENT, Election.SIGN_OF_SUM):
            votes = torch.where(elected, votes, zero)
        divisor = _in_order(votes)
        return torch.where(elected.any(0) & (divisor != 0), total / divisor, zero)


def _in_order(numbers: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(numbers[0])
    for each in numbers:
        total = total + each
    return total


class Sample(NamedTuple):
    """One tensor in all versions, and what the rule needs to know of it."""

    key: int
    base: torch.Tensor
    models: list[torch.Tensor]
    weight: torch.Tensor | None
    low: Sequence[float]
    high: Sequence[float]


def sample(
    method: Method,
    base: torch.Tensor,
    models: list[torch.Tensor],
    task_vectors: bool,
    weight: torch.Tensor | None = None,
    name: str = "w",
) -> Sample:
    """A tensor with its bounds, which are those of all of its differences sorted."""
    low: list[float] = []
    high: list[float] = []
    if method.needs_bounds and len(base):
        _, d = _differences(base, models, task_vectors)
        ascending = d.double().abs().nan_to_num(math.inf).sort(1).values
        for k, (bottom, top) in enumerate(method.ranks(len(models), len(base))):
            low.append(float(ascending[k, bottom]) if bottom else 0.0)
            high.append(float(ascending[k, len(base) - 1 - top]) if top else math.inf)
    return Sample(key_of(name), base, models, weight, low, high)


def samples(
    method: Method,
    n: int,
    lengths: Sequence[int],
    types: Sequence[str],
    task_vectors: bool,
    weights: str | None,
) -> list[Sample]:
    """Hostile tensors of some lengths. types: of the base, then of models in turn. weights: their type."""
    made = []
    for seed, length in enumerate(lengths):
        base, models = random_models(n, length, STORAGE[types[0]], [STORAGE[t] for t in types[1:]], seed)
        weight = None if weights is None else hostile_weights(length, weights, seed)
        made.append(sample(method, base, models, task_vectors, weight, f"layer.{seed}"))
    return made


def hostile_weights(length: int, dtype: str, seed: int) -> torch.Tensor:
    """Zeros of both signs, ones, numbers below, between and above these, and some that are not finite or that underflow."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in ("U8", "BOOL"):
        return torch.randint(4, (length,), generator=generator).to(WEIGHTS[dtype])
    if dtype in ("I32", "I64"):  # some between two numbers of float32, or of float64, which are rounded once
        odd = torch.tensor(
            [
                0,
                1,
                2,
                -3,
                2**24 + 1,
                2**31 - 1,
                -(2**31),
                *((2**62 + 2**38 + 1, -(2**63)) if dtype == "I64" else ()),
            ]
        )
        return odd[torch.randint(len(odd), (length,), generator=generator)].to(WEIGHTS[dtype])
    values = torch.randn(length, generator=generator, dtype=torch.float64)
    odd = torch.tensor(
        [0.0, -0.0, 1.0, 0.0, 1e-45, 6e-8, 1e-30, math.inf, math.nan, 3e38], dtype=torch.float64
    )
    chosen = torch.randint(2 * len(odd), (length,), generator=generator)
    return torch.where(chosen < len(odd), odd[chosen % len(odd)], values).to(WEIGHTS[dtype])


class Expected(NamedTuple):
    """The result of a merge, that for a delta, and the counts of both."""

    out: torch.Tensor
    dense: torch.Tensor
    counts: list[int]
    of_delta: list[int]


def expected_of(rule: Rule, reduce: Reduce, each: Sample, task_vectors: bool) -> Expected:
    """What a merge of a sample gives, by what computes its r."""
    assert rule.choices
    once = cache(
        lambda: reduce(_differences(each.base, each.models, task_vectors)[1])
    )  # the naive versions may take long
    rest: Any = rule.choices.factors, each.weight, task_vectors
    out, *counted = plain_family(each.base, each.models, rule.scale, lambda d: once(), *rest)
    dense, *of_delta = plain_family_consensus(each.base, each.models, lambda d: once(), *rest)
    vetoed = _vetoed(rule, each, task_vectors) if rule.choices.election == Election.AGREEMENT else 0
    return Expected(out, dense, [*counted[:2], vetoed, counted[2]], [*of_delta[:2], vetoed, of_delta[2]])


def _vetoed(rule: Rule, each: Sample, task_vectors: bool) -> int:
    """What zeros veto among the e_k, of elements where all is finite."""
    assert rule.choices
    n = len(each.models)
    _, d = _differences(each.base, each.models, task_vectors)
    plain = PlainChoices(rule.choices, rule.required(n), each.key, each.low, each.high)
    e, p = plain.e(d), plain._replace(choices=replace(rule.choices, gate=Gate.NONE)).e(d)
    finite = p.isfinite().all(0)
    if each.weight is not None:
        finite &= each.weight.isfinite()
    return plain_merge(each.base[finite], list(e[:, finite]), 0.0, rule.min_agreement, True)[3]


def placed(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> Operand:
    """Copy a tensor into memory, at an offset in bytes."""
    memory[offset : offset + tensor.nbytes] = tensor.view(torch.uint8).to(memory.device)
    return Operand(memory.data_ptr() + offset, SPELLED[tensor.dtype], memory)


class Placed:
    """Samples in the memory of a device, each cut in two, with bytes between them that nothing writes.

    Attributes:
        out: "new", "base" or "none": where results are written; "delta": to new memory, in the arithmetic type.
        offset: Of the first tensor in its memory, in bytes; the others are at odd addresses, too.
        with_base: Whether segments have a base; else it is zeros.
        whole: The samples' segments before they are cut.
    """

    def __init__(
        self,
        case: BackendCase,
        made: Sequence[Sample],
        task_vectors: bool,
        out: str = "new",
        offset: int = 0,
        with_base: bool = True,
    ) -> None:
        types = [SPELLED[t.dtype] for t in (made[0].base, *made[0].models)]
        self.signature = Signature(types[0], tuple(types[1:]), task_vectors)
        size = 9 * sum(len(each.base) + 9 for each in made) + offset
        memory = [torch.full((size,), POISON, dtype=torch.uint8) for _ in range(len(types) + 2)]
        memory = [to_device(each, case) for each in memory]
        self.written = memory[0] if out == "base" else memory[1]
        self.positions: list[int] = []
        self.whole: list[Segment] = []
        segments, terms, at = [], [], offset
        for each in made:
            base = placed(each.base, memory[0], at)
            models = [placed(t, m, at) for t, m in zip(each.models, memory[3:], strict=True)]
            weight = None if each.weight is None else placed(each.weight, memory[2], at)
            stored = self.signature.arithmetic if out == "delta" else types[0]
            new = Operand(memory[1].data_ptr() + at, stored, memory[1])
            to = {"base": base, "none": None}.get(out, new)
            whole = Segment(len(each.base), base if with_base else None, models, to)
            self.whole.append(whole)
            of_whole = Terms(0, each.key, weight, each.low, each.high)
            half = len(each.base) // 3
            for start, end in ((0, half), (half, len(each.base))):
                segments.append(part_of(whole, start, end))
                terms.append(of_whole.at(start))
            self.positions.append(at)
            at += 8 * len(each.base) + 1 + len(each.base) % 3
        self.batch = Batch(str(memory[0].device), self.signature, segments, terms)

    def merged(self, merge: Merge, rule: Rule) -> list[list[int]]:
        """Merge; returns the counts of the samples, of which each is two segments."""
        rows = [list(row) for row in merge(self.batch, rule).tolist()]
        return [[a + b for a, b in zip(*rows[k : k + 2], strict=True)] for k in range(0, len(rows), 2)]

    def with_results(self, results: Sequence[torch.Tensor]) -> torch.Tensor:
        """The memory of the results as it is now, but for these: one for each sample, or none."""
        memory = self.written.cpu().clone()
        for result, at in zip(results, self.positions, strict=False):
            memory[at : at + result.nbytes] = result.view(torch.uint8)
        return memory


def part_of(segment: Segment, start: int, end: int) -> Segment:
    """Elements start … end of a segment."""

    def moved(operand: Operand) -> Operand:
        return operand._replace(address=operand.address + start * WEIGHTS[operand.dtype].itemsize)

    _, base, models, out = segment
    return Segment(end - start, base and moved(base), [moved(m) for m in models], out and moved(out))
