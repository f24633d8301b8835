"""Low-rank differences: what an adapter (LoRA, arXiv 2106.09685) adds to a weight, to the bit.

For element (i, m) of a matrix with the factors B (rows, rank) and A (rank, columns) and the scale s:

    d[i, m] = s · Σ_r B[i, r] · A[r, m]

All is in the arithmetic type. The sum starts at +0 and r ascends; each product and each sum is rounded (no fused multiply-add); one
multiplication by s follows. s is alpha / r, or alpha / √r, computed in float64 and rounded once. A NaN has no fixed sign and payload:
where d or b + d is one, which NaN is written differs between processors and backends. A merge keeps the base's bits there.

An adapter is a task vector: d is d_k of rule.py. Merged, as other tools do it, the model is x = b + d, rounded to the arithmetic type and
then to the base's: then d_k is x - b.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from .batch import Operand, Signature

# What adapters are: task vectors, or models that they are merged into.
AdaptersAs: TypeAlias = Literal["difference", "merged"]


# Bytes of a row of right factors that a kernel multiplies at once.
PANEL = 256

# What copies an array to a device: it returns the address there, and the owner of the memory.
Upload: TypeAlias = Callable[[Any], tuple[int, Any]]


class LowRank(NamedTuple):
    """A low-rank difference of a whole tensor: matrices one after the other, each a product of factors in the arithmetic type.

    Element (g, i, m), in row-major order, is scale · Σ_r left[g, i, r] · right[g, r, m].

    Attributes:
        left: The address of left, (matrices, rows, rank) in row-major order, aligned to its elements.
        right: The address of right, (matrices, rank, columns).
        matrices: How many matrices; the experts of a fused tensor. All sizes are at least 1.
        rows: Of each matrix.
        columns: Of each matrix.
        rank: The number of products that are added.
        scale: s, rounded to the arithmetic type.
        owner: What keeps the addresses valid: on a device contiguous torch tensors that cover them, or a sequence that has these.
        panels: The address of right once more, in panels, or 0. The CPU kernel would pack them for each chunk: from row to row of
            a large matrix it is too far for a cache. In (matrices, columns, rank) are PANEL bytes each, zeros behind the last
            column; aligned to 64.
    """

    left: int
    right: int
    matrices: int
    rows: int
    columns: int
    rank: int
    scale: float
    owner: Any
    panels: int = 0

    @property
    def numel(self) -> int:
        return self.matrices * self.rows * self.columns


def in_panels(right: Any) -> Any:
    """An array (matrices, rank, columns) of NumPy as LowRank.panels has it."""
    import numpy as np

    (matrices, rank, columns), width = right.shape, PANEL // right.itemsize
    whole, rest = divmod(columns, width)
    shape = matrices, whole + (rest > 0), rank, width
    memory = np.zeros(math.prod(shape) * right.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    panels = memory[start : start + memory.size - 64].view(right.dtype).reshape(shape)
    panels[:, :whole] = right[:, :, : whole * width].reshape(matrices, rank, whole, width).swapaxes(1, 2)
    if rest:
        panels[:, whole, :, :rest] = right[:, :, whole * width :]
    return panels


class Expansion(NamedTuple):
    """Consecutive elements of a low-rank difference, in place of an Operand in the models of a Segment.

    They are of the type that the signature has for the model: the arithmetic type if models are task vectors (d); else the
    base's type (the merged model, b + d rounded to it).

    Attributes:
        factors: The difference of the whole tensor.
        begin: The first element.
    """

    factors: LowRank
    begin: int


class ExpandSegment(NamedTuple):
    """Elements to write.

    Attributes:
        numel: How many.
        expansion: Where they begin in which difference.
        base: None: d is written. Else the base's elements, of any storage type: b + d is written, rounded to that.
        out: Where they are written, at any alignment: of the arithmetic type, or the base's type. It may be the base.
    """

    numel: int
    expansion: Expansion
    base: Operand | None
    out: Operand


class ExpandSignature(NamedTuple):
    """What a kernel is specialised on: the types of an ExpandBatch."""

    arithmetic: str
    result: str | None


@dataclass(frozen=True)
class ExpandBatch:
    """Segments of one device.

    Attributes:
        device: As of Batch.
        arithmetic: F32 or F64: the type of factors and of d.
        result: The storage type of all bases and outputs; None if there are no bases, and d is written.
        segments: The segments.
    """

    device: str
    arithmetic: str
    result: str | None
    segments: Sequence[ExpandSegment]


def expand_signature(signature: Signature) -> ExpandSignature:
    """What is written of low-rank models where a batch of this signature is merged."""
    return ExpandSignature(signature.arithmetic, None if signature.task_vectors else signature.result)


class Expand(Protocol):
    """A backend's function that writes low-rank differences, without waiting for a device."""

    def __call__(self, batch: ExpandBatch, threads: int | None = None) -> None: ...


def rounded_scale(scale: float, arithmetic: str) -> float:
    """s, rounded to the arithmetic type."""
    import numpy as np

    return float(np.float32(scale)) if arithmetic == "F32" else scale


# Kinds of modules that a phrase names.
_MAX_KINDS = 12


def lacking(touched: Sequence[Collection[str]], merged: Collection[str]) -> list[str]:
    """Say what is merged and only some adapters change: the others have a difference of zero, which agrees with no sign.

    Args:
        touched: The base's names of the tensors that each adapter changes.
        merged: The names of the tensors that are merged: what any adapter changes, or a full model beside them has.

    Returns:
        A line for each number of adapters: `3 of 8 adapters have no k_proj, v_proj: zeros, …`. Kinds of modules that they lack in some
        places only have lines of their own, which say in how many.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(merged):
        kinds.setdefault(_kind(name), []).append(name)
    found: dict[tuple[int, str], list[str]] = {}
    for kind, names in kinds.items():
        counts = Counter(sum(name not in each for each in touched) for name in names)
        del counts[0]
        for count, tensors in counts.items():
            where = f" in {tensors} of {len(names)} places" if tensors < len(names) else ""
            found.setdefault((count, where), []).append(kind)
    phrases = []
    for (count, where), lacked in found.items():
        have = "has" if count == 1 else "have"
        named, more = ", ".join(lacked[:_MAX_KINDS]), len(lacked) - _MAX_KINDS
        named += f" and {more} more" if more > 0 else ""
        phrases.append(
            f"{count} of {len(touched)} adapters {have} no {named}{where}: zeros, which agree with no sign"
        )
    return phrases


def _kind(name: str) -> str:
    """What a module is called, wherever it is: k_proj of layers.0.self_attn.k_proj.weight; a bias is told from a weight."""
    *parts, last = name.replace("/", ".").split(".")
    if not parts:
        return last
    return parts[-1] if last == "weight" else f"{parts[-1]}.{last}"
