"""Low-rank differences with PyTorch: the fallback on every torch device; and merging them by any backend's functions.

core/low_rank.py says what is computed, to the bit. A compiled backend may do both in one pass instead (registry.choose_low_rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..core.batch import Batch, Merge, Operand, Segment, Signature, counted_by
from ..core.descriptors import check_expansion
from ..core.dtypes import FLOAT_SIZES
from ..core.low_rank import Expand, ExpandBatch, ExpandSegment, Expansion, LowRank
from ..core.rule import Rule
from .pytorch import (
    CPU_BLOCK_BYTES,
    DEVICE_BLOCK_BYTES,
    FLOAT_NAMES,
    TORCH_DTYPES,
    aligned,
    compute_alone_if_flushing,
    load,
    memory_at,
    plain_arithmetic,
    rounded,
    store,
)

# Bytes of expanded elements between expanding and merging, of all models. On a GPU more than its second-level cache holds: two launches
# take the host about 0.2 ms for 30 models, in which a GPU writes and reads 256 MiB. Computed, not measured.
CPU_SCRATCH_BYTES = 4 * CPU_BLOCK_BYTES
DEVICE_SCRATCH_BYTES = 4 * DEVICE_BLOCK_BYTES


class Rectangle(NamedTuple):
    """Elements of one matrix that are consecutive in memory: whole rows, or a part of one.

    Attributes:
        start: How many elements are before it.
        matrix, row, column: Its first element.
        rows, columns: How many there are.
    """

    start: int
    matrix: int
    row: int
    column: int
    rows: int
    columns: int


def rectangles(factors: LowRank, begin: int, numel: int, block: int) -> Iterator[Rectangle]:
    """Cut elements begin … begin + numel into rectangles of at most so many elements."""
    at, end = begin, begin + numel
    while at < end:
        row, column = divmod(at, factors.columns)
        matrix, row = divmod(row, factors.rows)
        rows = min(factors.rows - row, (end - at) // factors.columns, block // factors.columns)
        if column or not rows:
            rows, columns = 1, min(factors.columns - column, end - at, block)
        else:
            columns = factors.columns
        yield Rectangle(at - begin, matrix, row, column, rows, columns)
        at += rows * columns


def expand(batch: ExpandBatch, threads: int | None = None) -> None:
    """Write low-rank differences: the Expand of PyTorch."""
    device, dtype = torch.device(batch.device), TORCH_DTYPES[batch.arithmetic]
    block = (CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES) // dtype.itemsize
    block = min(block, max((segment.numel for segment in batch.segments), default=0)) or 1
    with plain_arithmetic(threads):
        d, product = torch.empty(2, block, dtype=dtype, device=device)
        compute_alone_if_flushing(d)
        for segment in batch.segments:
            factors = segment.expansion.factors
            left, right = _factors(factors, device, dtype)
            for part in rectangles(factors, segment.expansion.begin, segment.numel, block):
                size = part.rows * part.columns
                rows = left[part.matrix, part.row : part.row + part.rows]
                columns = right[part.matrix, :, part.column : part.column + part.columns]
                _expand(rows, columns, factors.scale, d[:size], product[:size])
                _write(segment, part.start, d[:size], batch.result)


def _factors(factors: LowRank, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    matrices, rows, columns, rank = factors[2:6]
    left, right = (
        aligned(memory_at(device, factors.owner, address, numel * dtype.itemsize), dtype.itemsize).view(dtype)
        for address, numel in ((factors.left, matrices * rows * rank), (factors.right, matrices * rank * columns))
    )  # fmt: skip
    return left.view(matrices, rows, rank), right.view(matrices, rank, columns)


def _expand(
    left: torch.Tensor, right: torch.Tensor, scale: float, d: torch.Tensor, product: torch.Tensor
) -> None:
    # No matrix product, and no addcmul: they add in another order, and fuse.
    rows, columns = len(left), right.shape[1]
    d.zero_()
    for r in range(len(right)):
        torch.mul(left[:, r : r + 1], right[r], out=product.view(rows, columns))
        d.add_(product)
    d.mul_(scale)


def _write(segment: ExpandSegment, start: int, d: torch.Tensor, result: str | None) -> None:
    if segment.base is None or result is None:
        store(segment.out, start, d)
        return
    d.add_(load(segment.base, start, len(d)))
    store(segment.out, start, rounded(d, TORCH_DTYPES[result]))


def subtract(x: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write d = x - b of the rule, in the type of out: b is rounded to the type of x where that cannot hold it."""
    dtypes = FLOAT_NAMES[b.dtype], FLOAT_NAMES[x.dtype]
    if Signature(dtypes[0], dtypes[1:], False).rounds_base(dtypes[1]):
        b = rounded(b, x.dtype)
    torch.sub(x.to(out.dtype), b.to(out.dtype), out=out)


def merge(merge: Merge, expand: Expand, batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """Merge a batch in which some models are an Expansion, by a backend's merge function and its Expand.

    As many elements as fit some scratch memory are expanded at a time: two launches and one to add counts, which wait for nothing. The
    memory is the allocator's of the current stream, in whose order it is used.

    Returns:
        int64[segments, len(counted_by(rule))] on the batch's device.
    """
    device = torch.device(batch.device)
    counts = torch.zeros(len(batch.segments), len(counted_by(rule)), dtype=torch.int64, device=device)
    longest = max((segment.numel for segment in batch.segments), default=0)
    scratch = _Scratch(batch, device, longest)
    for parts in scratch.fill():
        dense = scratch.expand(parts, expand, threads)
        terms = batch.terms and [batch.terms[part.row].at(part.start) for part in parts]
        counted = merge(Batch(batch.device, batch.signature, dense, terms), rule, threads)
        if not isinstance(counted, torch.Tensor):
            counted = torch.tensor(counted.tolist(), device=device)
        _add(counts, [part.row for part in parts], counted)
    return counts


def expanded(batch: Batch, expand: Expand, threads: int | None = None) -> Iterator[list[Segment]]:
    """Cut a batch to segments in which no model is an Expansion: as many at a time as fit the scratch memory, which is used again."""
    longest = max((segment.numel for segment in batch.segments), default=0)
    scratch = _Scratch(batch, torch.device(batch.device), longest)
    for parts in scratch.fill():
        yield scratch.expand(parts, expand, threads)


def _add(counts: torch.Tensor, rows: list[int], counted: torch.Tensor) -> None:
    """Add to ascending rows of counts. On a device each addition is a launch, and most rows follow each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        counts[rows[0] : rows[-1] + 1] += counted
        return
    for row, found in zip(rows, counted, strict=True):
        counts[row] += found


class _Part(NamedTuple):
    """Elements start … start + size of segment number `row`; in the scratch memory they are at `offset`."""

    row: int
    start: int
    size: int
    offset: int


class _Scratch:
    """Memory for as many elements of every model as are expanded at a time."""

    def __init__(self, batch: Batch, device: torch.device, longest: int) -> None:
        self._batch = batch
        models, arithmetic = batch.signature.models, batch.signature.arithmetic
        low_rank = {
            k for _, _, held, _ in batch.segments for k, m in enumerate(held) if isinstance(m, Expansion)
        }
        sizes = {k: FLOAT_SIZES[models[k]] for k in sorted(low_rank)}
        nbytes = CPU_SCRATCH_BYTES if device.type == "cpu" else DEVICE_SCRATCH_BYTES
        total = sum(segment.numel for segment in batch.segments)
        self.elements = min(total, nbytes // (sum(sizes.values()) or 1) // 64 * 64) or 1
        self._arithmetic = arithmetic
        self._memory = {
            k: torch.empty(self.elements * size, dtype=torch.uint8, device=device)
            for k, size in sizes.items()
        }

    def fill(self) -> Iterator[list[_Part]]:
        """Cut the segments into parts; yields as many as fit."""
        parts: list[_Part] = []
        used = 0
        for row, segment in enumerate(self._batch.segments):
            start = 0
            while start < segment.numel:
                size = min(segment.numel - start, self.elements - used)
                parts.append(_Part(row, start, size, used))
                used, start = used + size, start + size
                if used == self.elements:
                    yield parts
                    parts, used = [], 0
        if parts:
            yield parts

    def expand(self, parts: list[_Part], expand: Expand, threads: int | None) -> list[Segment]:
        """Expand what parts have of low-rank models; returns them as ordinary segments."""
        task_vectors = self._batch.signature.task_vectors
        expanded: list[ExpandSegment] = []
        dense = []
        for part in parts:
            _, base, models, out = self._batch.segments[part.row]
            base, out = _at(base, part.start), _at(out, part.start)
            operands = []
            for k, model in enumerate(models):
                if isinstance(model, Expansion):
                    scratch = self._destination(k, part)
                    check_expansion(self._batch.signature, scratch.dtype, base)
                    moved = model._replace(begin=model.begin + part.start)
                    expanded.append(ExpandSegment(part.size, moved, None if task_vectors else base, scratch))
                    operands.append(scratch)
                else:
                    operands.append(
                        model._replace(address=model.address + part.start * FLOAT_SIZES[model.dtype])
                    )
            dense.append(Segment(part.size, base, operands, out))
        if expanded:
            result = None if task_vectors else self._batch.signature.result
            expand(ExpandBatch(self._batch.device, self._arithmetic, result, expanded), threads)
        return dense

    def _destination(self, k: int, part: _Part) -> Operand:
        dtype, memory = self._batch.signature.models[k], self._memory[k]
        return Operand(memory.data_ptr() + part.offset * FLOAT_SIZES[dtype], dtype, memory)


def _at(operand: Operand | None, start: int) -> Operand | None:
    return operand and operand._replace(address=operand.address + start * FLOAT_SIZES[operand.dtype])
