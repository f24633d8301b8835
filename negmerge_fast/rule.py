"""The rule of NegMerge, and the words every backend speaks. No torch, no files, no names of tensors.

For one element, with base weight b, fine-tuned weights x_1 ... x_n and scale λ (arXiv 2410.05583, section 4):

    d_k   = x_k - b                        (or x_k itself, when the inputs are task vectors)
    agree = all d_k > 0  or  all d_k < 0
    out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b

To the bit, so that every backend gives the same bits:

- Arithmetic type: float64 if the base or any fine-tuned version is stored as F64, else float32; λ is rounded to it once.
- The sum starts at +0 and adds d_1, d_2, … in the order the models were given; the mean is one IEEE division by n;
  then t = λ · (-mean), rounded; then b + t, rounded; no fused multiply-add; subnormals are kept. Then
  round-to-nearest-even to the base's storage type (from float64 to F16 or BF16 by way of float32).
- A zero difference is no agreement. An element that does not agree keeps the base's bits, NaN payloads included.
- An element is non-finite when b, any d_k, or the result after rounding to storage is not finite: it keeps the
  base's bits, and is counted as non-finite and not as agreed.
- min_agreement t > 0.5: agree when the larger of #(d>0) and #(d<0) is at least ceil(t·n - 1e-9); the mean is then over
  the agreeing models only, added in the same order, divided by their number.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol

Inputs = Literal["finetuned", "task_vectors"]
NonFinite = Literal["keep-base", "error"]

# Storage types that are merged, spelled as safetensors spells them, with their size in bytes.
FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def visible(text: str) -> str:
    """Text in one line, and nothing in it that a terminal obeys: what is not printable is written as in a literal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200
_BRIEF.maxlist = _BRIEF.maxtuple = 8


def brief(value: object) -> str:
    """The repr of what a file says, which may be a name of a megabyte or a thousand lists in each other."""
    return _BRIEF.repr(value)


class InputError(ValueError):
    """A user's mistake, in one line: where, what was found, what was expected."""

    def __str__(self) -> str:
        return visible(super().__str__())


@dataclass(frozen=True)
class Rule:
    """What to compute, apart from the data.

    scale: λ, any finite number (the paper searches 0 … 1). One that overflows the arithmetic type makes every element
        that agrees non-finite.
    min_agreement: the share of models, in (0.5, 1], that must agree on the sign; 1.0 is the paper's unanimity.
    """

    scale: float
    min_agreement: float = 1.0

    def __post_init__(self) -> None:
        # As floats from here on: -scale of an unsigned or of an int would be another number, or another zero.
        for name in ("scale", "min_agreement"):
            object.__setattr__(self, name, _as_float(name, getattr(self, name)))
        if not math.isfinite(self.scale):
            raise InputError(f"scale: {self.scale}, expected a finite number")
        if not 0.5 < self.min_agreement <= 1.0:
            raise InputError(f"min_agreement: {self.min_agreement}, expected more than 0.5 and at most 1")

    def required(self, models: int) -> int:
        """How many of the models must agree on the sign of an element."""
        # Never half of them: for a min_agreement within rounding of 0.5 both signs could reach that.
        return max(math.ceil(self.min_agreement * models - 1e-9), models // 2 + 1)


def _as_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {value!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name}: too large for a float, expected a finite number") from None


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a keyword that is none of its choices."""
    if value not in (allowed := tuple(choices)):
        raise InputError(f"{name}: {value!r}, expected one of {', '.join(allowed)}")


class Stream(NamedTuple):
    """A run of elements of one model's version of one tensor, contiguous in memory.

    address: of the first element, in bytes; any alignment.
    dtype: storage type, a key of FLOAT_SIZES.
    owner: keeps the address valid for as long as work on it may run: a contiguous torch
        tensor, of any shape, that covers the run (on a device, the only way to reach it), or anything with a
        writable buffer.
    """

    address: int
    dtype: str
    owner: Any


class Segment(NamedTuple):
    """A run of elements of one tensor, with one stream per model.

    base None means zeros; out None means count only; out may be the base.
    """

    numel: int
    base: Stream | None
    models: Sequence[Stream]
    out: Stream | None


class Signature(NamedTuple):
    """What a kernel is specialised on: every segment of a batch has the same.

    result: storage type of the base and of the output.
    models: storage type of each model's stream.
    task_vectors: the models' streams hold d_k, not x_k.
    """

    result: str
    models: tuple[str, ...]
    task_vectors: bool

    @property
    def arithmetic(self) -> str:
        """F64 if anything is stored as F64, else F32."""
        return "F64" if "F64" in (self.result, *self.models) else "F32"


@dataclass(frozen=True)
class Batch:
    """All segments of one device and one signature: one call of a backend, whatever their number."""

    device: str
    signature: Signature
    segments: Sequence[Segment]


class Counts(Protocol):
    """int64[segments, 2]: agreed and non-finite elements, an array of numpy or a tensor on its device."""

    def tolist(self) -> Any: ...


class Merge(Protocol):
    """The one function of a backend. It writes the outputs and returns the counts, without waiting for a device.

    threads: how many may work on it, where they are the CPU's; None: as many as usual.
    """

    def __call__(self, batch: Batch, rule: Rule, threads: int | None = None) -> Counts: ...


@dataclass(frozen=True)
class TensorStats:
    """elements: of the tensor. agreed: those that were changed by the rule. nonfinite: those kept because not finite."""

    elements: int = 0
    agreed: int = 0
    nonfinite: int = 0

    def __add__(self, other: TensorStats) -> TensorStats:
        return TensorStats(
            self.elements + other.elements, self.agreed + other.agreed, self.nonfinite + other.nonfinite
        )


class Stats:
    """What a merge counted, per tensor and in all. Counts stay on their device until one of the numbers is read."""

    def __init__(self) -> None:
        self._counted: dict[str, TensorStats] = {}
        self._pending: list[tuple[Sequence[tuple[str, int]], Counts]] = []

    def add(self, runs: Sequence[tuple[str, int]], counts: Counts) -> None:
        """Take the counts of one batch; runs: the tensor's name and the number of elements of each of its segments."""
        self._pending.append((runs, counts))
        if len(self._pending) >= 1024:  # so that a long job's counts don't pile up
            self._count()

    def include(self, tensors: Mapping[str, TensorStats]) -> None:
        """Take what was counted elsewhere."""
        self._count()
        for name, counted in tensors.items():
            before = self._counted.get(name)
            self._counted[name] = before + counted if before else counted

    def _count(self) -> None:
        for runs, counts in self._pending:
            for (name, numel), (agreed, nonfinite) in zip(runs, counts.tolist(), strict=True):
                before = self._counted.get(name, TensorStats())
                self._counted[name] = before + TensorStats(numel, agreed, nonfinite)
        self._pending.clear()

    @property
    def tensors(self) -> Mapping[str, TensorStats]:
        """Per tensor, in the order they were merged. Integer and bool tensors are not in it."""
        self._count()
        return self._counted

    @property
    def elements(self) -> int:
        return sum(t.elements for t in self.tensors.values())

    @property
    def agreed(self) -> int:
        return sum(t.agreed for t in self.tensors.values())

    @property
    def nonfinite(self) -> int:
        return sum(t.nonfinite for t in self.tensors.values())

    @property
    def consensus_ratio(self) -> float:
        """agreed / elements; 0 when there is nothing to merge."""
        return self.agreed / self.elements if self.elements else 0.0

    def __repr__(self) -> str:
        return (
            f"Stats(elements={self.elements}, agreed={self.agreed}, nonfinite={self.nonfinite}, "
            f"consensus_ratio={self.consensus_ratio:.4f})"
        )
