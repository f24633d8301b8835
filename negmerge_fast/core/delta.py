"""The consensus delta: what the rule takes off the base, apart from λ.

For the elements of one tensor, with agree and d_k of rule.py:

    mask  = agree                          (one bit for each element)
    means = (d_1 + … + d_n) / n            (of the elements in the mask, one after the other)
    out   = b - λ · mean    if mask,   else b

To the bit, so that applying gives the bits of a merge, for every λ:

- An element is in the mask if it agrees, and b, every d_k and its mean are finite. Its mean is then not zero.
- Means are in the arithmetic type. The last line is that of rule.py: t = λ · (-mean), rounded; then b + t, rounded; then to storage.
- An element in the mask whose result is not finite after rounding to storage keeps the base's bits, and is counted as non-finite.
- Means may be stored in BF16 for size: rounded to nearest even, and widened to the arithmetic type when they are applied. Those that
  become zero or infinite are not in the mask. The bits are then others than those of a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .batch import Counts, Signature

# Elements for each rank. A GPU's thread counts the bits from there on; the ranks take 1/4096 of the bytes of F32.
RANK_BLOCK = 1024

# What the metadata of a delta's files calls them.
FORMAT = "negmerge-delta"

# A mask is padded with zeros to whole words of so many bits, so that it can be read in words and what follows it in a file is aligned.
MASK_WORD = 64


class DeltaSignature(NamedTuple):
    """What a kernel that applies a delta is specialised on.

    Attributes:
        result: The storage type of the base and of the output.
        means: The storage type of the means.
        arithmetic: F64 or F32.
    """

    result: str
    means: str
    arithmetic: str


class DeltaSegment(NamedTuple):
    """One tensor, or whole blocks of one, and its delta. All but numel and owners are addresses.

    Attributes:
        numel: The number of elements.
        mask: Bit i % 64 of the little-endian 64-bit word i // 64 is that of element i. Those behind the last element are zero.
        means: Of the elements in the mask, aligned to their size.
        ranks: int64[ceil(numel / RANK_BLOCK)]: how many elements before each block are in the mask.
        base: The base's elements, at any alignment; 0 if there are none, and `saved` is used.
        saved: The base's elements that are in the mask, one after the other, aligned to their size; 0 if `base` is used.
        out: Where the result is written, at any alignment; it may be the base. 0: elements are only counted.
        owners: What keeps the addresses valid. On a device that is not the CPU it is a contiguous torch tensor or a sequence that
            has them, and these cover all of the addresses.
    """

    numel: int
    mask: int
    means: int
    ranks: int
    base: int
    saved: int
    out: int
    owners: Any


@dataclass(frozen=True)
class DeltaBatch:
    """Segments of one device and one signature, applied by one call of a backend."""

    device: str
    signature: DeltaSignature
    segments: Sequence[DeltaSegment]


# What is counted of a segment when it is applied: elements whose stored bits differ from the base's, and elements in the mask whose
# result is not finite.
APPLIED = ("changed", "nonfinite")


class Apply(Protocol):
    """A backend's function for deltas. It returns int64[segments, len(APPLIED)], without waiting for a device.

    With `saved`, only elements in the mask are written. With `base`, the others are copied if out is not the base. With scale None
    the elements of `saved` are written to out as they are, and nothing is counted.
    """

    def __call__(self, batch: DeltaBatch, scale: float | None, threads: int | None = None) -> Counts: ...


class Save(Protocol):
    """A backend's function that writes the base's elements in the mask to `saved`, of segments that have both addresses.

    Nothing else is read or written: means, ranks' beginnings apart, and out may be 0.
    """

    def __call__(self, batch: DeltaBatch, threads: int | None = None) -> None: ...


def differences_of(signature: Signature) -> Signature:
    """The signature of the differences of a merge, as task vectors of the arithmetic type."""
    return Signature(signature.arithmetic, (signature.arithmetic,) * len(signature.models), True)


def mask_bytes(numel: int) -> int:
    """The size of a mask."""
    return -(numel // -MASK_WORD) * (MASK_WORD // 8)
