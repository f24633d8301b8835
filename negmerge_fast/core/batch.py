"""The vocabulary of every backend: operands, segments, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .rule import Rule


class Operand(NamedTuple):
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
    base: Operand | None
    models: Sequence[Operand]
    out: Operand | None


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


def segment_at(numel: int, signature: Signature, addresses: Sequence[int], owners: Sequence[Any]) -> Segment:
    """A segment that is merged into its base, from the addresses and owners of the base and of each model."""
    dtypes = (signature.result, *signature.models)
    base, *models = [Operand(*each) for each in zip(addresses, dtypes, owners, strict=True)]
    return Segment(numel, base, models, base)


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
