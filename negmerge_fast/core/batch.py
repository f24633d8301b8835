"""What a backend is called with: operands, segments, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

from .choices import FAMILY_COUNTED, Terms
from .dtypes import holds
from .rule import Rule


class Operand(NamedTuple):
    """Consecutive elements of one version of one tensor.

    Attributes:
        address: Of the first element, in bytes; any alignment.
        dtype: The storage type, a key of FLOAT_SIZES.
        owner: What keeps the address valid while a kernel may use it: a contiguous torch tensor of any shape that
            covers the elements, or on the CPU anything with a writable buffer.
    """

    address: int
    dtype: str
    owner: Any


class Operands(Sequence[Operand]):
    """The operands of a segment's models, in columns: thousands of small tensors are batched in a fraction of the time.

    Attributes:
        addresses, dtypes, owners: As of Operand, an item for each model.
    """

    __slots__ = ("addresses", "dtypes", "owners")

    def __init__(self, addresses: Sequence[int], dtypes: tuple[str, ...], owners: Sequence[Any]) -> None:
        self.addresses, self.dtypes, self.owners = addresses, dtypes, owners

    def __len__(self) -> int:
        return len(self.dtypes)

    def __iter__(self) -> Iterator[Operand]:
        return map(Operand, self.addresses, self.dtypes, self.owners)

    @overload
    def __getitem__(self, index: int) -> Operand: ...
    @overload
    def __getitem__(self, index: slice) -> list[Operand]: ...
    def __getitem__(self, index: int | slice) -> Operand | list[Operand]:
        return list(self)[index]


class Segment(NamedTuple):
    """Consecutive elements of one tensor, in all versions.

    Attributes:
        numel: The number of elements.
        base: The base's elements; None means zeros.
        models: One operand for each model; an Expansion of core/low_rank.py where a backend takes these.
        out: Where the result is written, which may be the base; None means that elements are counted only.
    """

    numel: int
    base: Operand | None
    models: Sequence[Operand]
    out: Operand | None


class Signature(NamedTuple):
    """What a kernel is specialised on. All segments of a batch have the same signature.

    Attributes:
        result: The storage type of the base and of the output.
        models: The storage type of each model.
        task_vectors: Whether the models' operands hold d_k, not x_k.
    """

    result: str
    models: tuple[str, ...]
    task_vectors: bool

    @property
    def arithmetic(self) -> str:
        """The dtype of the arithmetic: F64 if anything is stored as F64, else F32."""
        return "F64" if "F64" in (self.result, *self.models) else "F32"

    def rounds_base(self, model: str) -> bool:
        """Whether d_k of a model of this storage type subtracts the base rounded to that type."""
        return not self.task_vectors and not holds(model, self.result)


def segment_at(numel: int, signature: Signature, addresses: Sequence[int], owners: Sequence[Any]) -> Segment:
    """Build a segment that is merged into its base.

    Args:
        numel: The number of elements.
        signature: The storage types of the base and of each model.
        addresses: Where the base and each model lie.
        owners: What keeps each of these addresses valid.
    """
    if not len(addresses) == len(owners) == 1 + len(signature.models):
        raise ValueError(f"{len(addresses)} addresses, {len(owners)} owners for {signature}")
    base = Operand(addresses[0], signature.result, owners[0])
    return Segment(numel, base, Operands(addresses[1:], signature.models, owners[1:]), base)


@dataclass(frozen=True)
class Batch:
    """Segments of one device and one signature, merged by one call of a backend.

    terms: of each segment, where the rule has choices (choices.py).
    """

    device: str
    signature: Signature
    segments: Sequence[Segment]
    terms: Sequence[Terms] | None = None


# What is counted of a segment, in this order. rule.py defines it.
COUNTED = ("agreed", "nonfinite", "vetoed_by_zero")


def counted_by(rule: Rule) -> tuple[str, ...]:
    """The columns of the counts of a merge by a rule."""
    return COUNTED if rule.choices is None else FAMILY_COUNTED


class Counts(Protocol):
    """int64[segments, len(counted_by(rule))]: a buffer of two dimensions in main memory, or a tensor on the batch's device."""

    def tolist(self) -> Any: ...


class Rows(list[list[int]]):
    """Counts that are in main memory: a list for each segment."""

    def tolist(self) -> list[list[int]]:
        return self


class Merge(Protocol):
    """The one function of a backend. It writes the outputs and returns the counts, without waiting for a device.

    threads is the number of CPU threads to use; None means the usual number.
    """

    def __call__(self, batch: Batch, rule: Rule, threads: int | None = None) -> Counts: ...
