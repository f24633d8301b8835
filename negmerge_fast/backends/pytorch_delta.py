"""Consensus deltas with PyTorch: the fallback on every torch device, and what the other backends are compared with.

core/delta.py says what is computed, to the bit. It is done block by block, as in pytorch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..core.batch import Batch, Merge, Operand, Segment, Signature, counted_by
from ..core.delta import APPLIED, RANK_BLOCK, DeltaBatch, DeltaSegment, differences_of
from ..core.descriptors import Act, act_of
from ..core.dtypes import FLOAT_SIZES
from ..core.rule import Rule
from .pytorch import (
    CPU_BLOCK_BYTES,
    DEVICE_BLOCK_BYTES,
    TORCH_DTYPES,
    aligned,
    bits_of,
    compute_alone_if_flushing,
    load,
    memory_at,
    plain_arithmetic,
    rounded,
    terms_of,
)


def consensus(merge: Merge, batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """Merge a batch to the means of core/delta.py, by the merge function of any backend.

    The differences are computed here, block by block, and merged as task vectors with a scale of -1.
    """
    signature, device = batch.signature, torch.device(batch.device)
    arithmetic, n = signature.arithmetic, len(signature.models)
    dtype = TORCH_DTYPES[arithmetic]
    merged = differences_of(signature)
    counts = torch.zeros(len(batch.segments), len(counted_by(rule)), dtype=torch.int64, device=device)
    longest = max((segment.numel for segment in batch.segments), default=0)
    block = min(longest, max(_block_bytes(device) // dtype.itemsize // n, RANK_BLOCK)) or 1
    with plain_arithmetic():  # torch's number of threads is the process's, and other workers may be here, too
        memory = torch.empty(n, block, dtype=dtype, device=device)
        compute_alone_if_flushing(memory.view(-1))
        models = [Operand(row.data_ptr(), arithmetic, memory) for row in memory]
        for row, (segment, terms) in enumerate(zip(batch.segments, terms_of(batch), strict=True)):
            for start in range(0, segment.numel, block):
                size = min(block, segment.numel - start)
                _subtract(segment, signature, start, memory[:, :size])
                out = segment.out and segment.out._replace(
                    address=segment.out.address + start * FLOAT_SIZES[arithmetic]
                )
                of_block = None if terms is None else [terms.at(start)]
                part = Batch(batch.device, merged, [Segment(size, None, models, out)], of_block)
                counted = merge(part, replace(rule, scale=-1.0), threads)
                if isinstance(counted, torch.Tensor):
                    counts[row] += counted[0]
                else:
                    counts[row] += torch.tensor(counted.tolist()[0], device=device)
    return counts


def _subtract(segment: Segment, signature: Signature, start: int, differences: torch.Tensor) -> None:
    """Compute every d_k of a block. Where the base is not finite, the first one is not either."""
    size = differences.shape[1]
    if segment.base is None:
        stored = torch.zeros(size, dtype=TORCH_DTYPES[signature.result], device=differences.device)
    else:
        stored = load(segment.base, start, size)
    b = stored.to(differences.dtype)
    for operand, d in zip(segment.models, differences, strict=True):
        d.copy_(load(operand, start, size))
        if signature.rounds_base(operand.dtype):
            d.sub_(rounded(b, TORCH_DTYPES[operand.dtype]).to(d.dtype))
        elif not signature.task_vectors:
            d.sub_(b)
    if signature.task_vectors and segment.base is not None:
        differences[0].add_(b - b)


def apply(batch: DeltaBatch, scale: float | None, threads: int | None = None) -> torch.Tensor:
    """Apply a batch of deltas; returns int64[segments, len(APPLIED)] on the batch's device."""
    device, dtype = torch.device(batch.device), TORCH_DTYPES[batch.signature.arithmetic]
    counts = torch.zeros(len(batch.segments), len(APPLIED), dtype=torch.int64, device=device)
    act, number = act_of(batch, scale)
    with plain_arithmetic(threads):
        compute_alone_if_flushing(torch.empty(_block(batch), dtype=dtype, device=device))
        # A tensor on the device, rounded once from float64.
        minus_scale = torch.tensor(-number, dtype=torch.float64, device="cpu").to(dtype).to(device)
        for row, segment in enumerate(batch.segments):
            for block in _blocks(batch, segment):
                kept = block.kept()
                if act == Act.RESTORE:
                    block.write(kept)
                    continue
                t = block.means().to(dtype) * minus_scale
                result = rounded(t.add_(kept), kept.dtype)
                finite = result.isfinite()
                chosen = torch.where(finite, bits_of(result), bits_of(kept))
                block.write(chosen.view(kept.dtype))
                changed = torch.count_nonzero(chosen != bits_of(kept))
                counts[row] += torch.stack([changed, torch.count_nonzero(~finite)])
    return counts


def save(batch: DeltaBatch, threads: int | None = None) -> None:
    """Copy the base's elements that are in the mask to `saved`."""
    with plain_arithmetic(threads):
        for segment in batch.segments:
            for block in _blocks(batch, segment):
                block.save()


def _blocks(batch: DeltaBatch, segment: DeltaSegment) -> Iterator[_Block]:
    """Cut a segment into blocks of whole RANK_BLOCKs, the last one shorter."""
    block, numel, ranks = _block(batch), segment.numel, -(segment.numel // -RANK_BLOCK)
    device = torch.device(batch.device)
    firsts = _elements(device, segment, segment.ranks, ranks, torch.int64).tolist()
    for start in range(0, numel, block):
        size = min(block, numel - start)
        held = memory_at(device, segment.owners, segment.mask + start // 8, -(size // -8))
        shifts = torch.arange(8, dtype=torch.uint8, device=device)
        flags = (held.unsqueeze(1) >> shifts & 1).view(-1)[:size]
        yield _Block(
            device, batch, segment, start, size, firsts[start // RANK_BLOCK], flags.nonzero().view(-1)
        )


@dataclass(frozen=True)
class _Block:
    """Elements start … start + size of a segment.

    Attributes:
        first: How many elements before them are in the mask.
        index: Which of them are in the mask.
    """

    device: torch.device
    batch: DeltaBatch
    segment: DeltaSegment
    start: int
    size: int
    first: int
    index: torch.Tensor

    def means(self) -> torch.Tensor:
        return self._packed(self.segment.means, self.batch.signature.means)

    def kept(self) -> torch.Tensor:
        """The base's elements that are in the mask."""
        if self.segment.base:
            return self._whole(self.segment.base)[self.index]
        return self._packed(self.segment.saved, self.batch.signature.result)

    def write(self, values: torch.Tensor) -> None:
        """Write elements that are in the mask; the others are the base's."""
        base, out, size = self.segment.base, self.segment.out, values.itemsize
        if not out:
            return
        written = self._bytes(out + self.start * size, self.size * size)
        if base not in (0, out):
            written.copy_(self._bytes(base + self.start * size, self.size * size))
        held = aligned(written, size)
        bits_of(held.view(values.dtype))[self.index] = bits_of(values)
        if held is not written:
            written.copy_(held)

    def save(self) -> None:
        kept = self._whole(self.segment.base)[self.index]
        saved = self.segment.saved + self.first * kept.itemsize
        self._bytes(saved, kept.nbytes).copy_(kept.view(torch.uint8))

    def _bytes(self, address: int, size: int) -> torch.Tensor:
        return memory_at(self.device, self.segment.owners, address, size)

    def _whole(self, address: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[self.batch.signature.result]
        return _elements(self.device, self.segment, address + self.start * dtype.itemsize, self.size, dtype)

    def _packed(self, address: int, name: str) -> torch.Tensor:
        dtype = TORCH_DTYPES[name]
        address += self.first * dtype.itemsize
        return _elements(self.device, self.segment, address, len(self.index), dtype)


def _block(batch: DeltaBatch) -> int:
    """Elements of a block."""
    size = _block_bytes(torch.device(batch.device)) // TORCH_DTYPES[batch.signature.arithmetic].itemsize
    longest = max((segment.numel for segment in batch.segments), default=0)
    return min(size, -(longest // -RANK_BLOCK) * RANK_BLOCK) or RANK_BLOCK


def _block_bytes(device: torch.device) -> int:
    return CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES


def _elements(
    device: torch.device, segment: DeltaSegment, address: int, count: int, dtype: torch.dtype
) -> torch.Tensor:
    """Elements at an address: a view, or a copy if they are not aligned."""
    memory = memory_at(device, segment.owners, address, count * dtype.itemsize)
    return aligned(memory, dtype.itemsize).view(dtype)
