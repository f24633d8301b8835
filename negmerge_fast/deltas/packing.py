"""Packing of dense means to a mask and the means that are set, on any device, and back.

In main memory backends/masks.py does it. On other devices it is done by torch operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..backends import masks
from ..backends.pytorch import DTYPE_NAMES, TORCH_DTYPES, rounded
from ..checkpoints.delta import TensorInfo
from ..core.delta import MASK_WORD, RANK_BLOCK, mask_bytes
from ..tensors.dtensor import Box


class Packed(NamedTuple):
    """The delta of one tensor (core/delta.py), in row-major order.

    Attributes:
        mask: uint8[mask_bytes(numel)].
        means: Of the elements in the mask.
        ranks: int64[ceil(numel / RANK_BLOCK)].
    """

    mask: torch.Tensor
    means: torch.Tensor
    ranks: torch.Tensor


class Packer:
    """Packs the dense means of one tensor, which come block by block.

    Args:
        numel: The number of elements of the tensor.
        means: The dtype in which means are stored.
        device: Where they lie.
    """

    def __init__(self, numel: int, means: torch.dtype, device: torch.device) -> None:
        self._numel, self._dtype, self._done = numel, means, 0
        self._mask = torch.zeros(mask_bytes(numel), dtype=torch.uint8, device=device)
        self._means: list[torch.Tensor] = []

    def add(self, dense: torch.Tensor) -> None:
        """Pack a block, which is overwritten. Each block but the last has a multiple of MASK_WORD elements."""
        mask = self._mask[self._done // 8 :]
        self._done += len(dense)
        pack = _pack if dense.device.type == "cpu" else pack_by_torch
        self._means.append(pack(dense, mask, self._dtype))

    def packed(self) -> Packed:
        """The delta of all blocks."""
        means = self._means or [torch.empty(0, dtype=self._dtype, device=self._mask.device)]
        whole = means[0] if len(means) == 1 else torch.cat(means)
        return Packed(self._mask, whole, ranks_of(self._mask, self._numel))


def _pack(dense: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    address, names = dense.data_ptr(), (DTYPE_NAMES[dense.dtype], DTYPE_NAMES[dtype])
    count = masks.pack(address, len(dense), *names, mask.data_ptr(), address)
    return dense.view(dtype)[:count].clone()


def pack_by_torch(dense: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Write the mask of a block, and return the means that are set."""
    stored = rounded(dense, dtype) if dtype != dense.dtype else dense
    flags = stored.isfinite() & (stored != 0)
    bits = torch.nn.functional.pad(flags, (0, -len(flags) % MASK_WORD)).view(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=dense.device)
    mask[: len(bits)] = (bits * weights).sum(1, dtype=torch.uint8)
    return stored[flags]


def ranks_of(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """How many elements before each block are in the mask."""
    ranks = torch.empty(-(numel // -RANK_BLOCK), dtype=torch.int64, device=mask.device)
    if mask.device.type != "cpu":
        return ranks_by_torch(mask, ranks)
    masks.ranks(mask.data_ptr(), numel, ranks.data_ptr())
    return ranks


# Bits that are set in each byte.
_POPULATION = bytes(k.bit_count() for k in range(256))
# Ranks at a time: the temporaries take some 60 MB.
_RANKS_AT_ONCE = 1 << 16


def ranks_by_torch(mask: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Fill the ranks of a mask."""
    population = torch.tensor(list(_POPULATION), dtype=torch.uint8, device=mask.device)
    before = torch.zeros((), dtype=torch.int64, device=mask.device)
    for first in range(0, len(ranks), _RANKS_AT_ONCE):
        part = mask[first * RANK_BLOCK // 8 :][: _RANKS_AT_ONCE * RANK_BLOCK // 8]
        padded = torch.nn.functional.pad(part, (0, -len(part) % (RANK_BLOCK // 8)))
        counts = population[padded.int()].view(-1, RANK_BLOCK // 8).sum(1, dtype=torch.int64)
        sums = counts.cumsum(0)
        ranks[first : first + len(counts)] = before + sums - counts
        before = before + sums[-1]
    return ranks


def expand(packed: Packed, begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """The means of elements begin … begin + size in a dtype, dense: +0 where none is set."""
    dense = torch.empty(size, dtype=dtype, device=packed.mask.device)
    if not size:
        return dense
    if dense.device.type != "cpu":
        return expand_by_torch(packed, begin, dense)
    first = int(packed.ranks[begin // RANK_BLOCK])
    first += masks.rank(packed.mask.data_ptr(), begin // RANK_BLOCK * RANK_BLOCK, begin)
    means = packed.means.data_ptr() + first * packed.means.itemsize
    names = DTYPE_NAMES[packed.means.dtype], DTYPE_NAMES[dtype]
    masks.expand(packed.mask.data_ptr(), begin, size, means, *names, dense.data_ptr())
    return dense


def expand_by_torch(packed: Packed, begin: int, dense: torch.Tensor) -> torch.Tensor:
    """Fill dense with the means from element begin on."""
    start, end = begin // RANK_BLOCK * RANK_BLOCK, begin + len(dense)
    held = packed.mask[start // 8 : -(end // -8)]
    shifts = torch.arange(8, dtype=torch.uint8, device=held.device)
    flags = (held.unsqueeze(1) >> shifts & 1).view(-1)[: end - start].bool()
    first = int(packed.ranks[begin // RANK_BLOCK] + torch.count_nonzero(flags[: begin - start]))
    flags = flags[begin - start :]
    means = packed.means[first : first + int(torch.count_nonzero(flags))]
    return dense.zero_().masked_scatter_(flags, means.to(dense.dtype))


class TensorDelta(NamedTuple):
    """The delta of one tensor of a base.

    Attributes:
        info: What is recorded of the base's tensor: dtype and shape, type of the arithmetic, counts, sample.
        packed: Its mask, means and ranks.
        box: The part of the tensor that this is, of a DTensor's shard; None if it is all of it.
    """

    info: TensorInfo
    packed: Packed
    box: Box | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the mask covers."""
        return self.info.spec.shape if self.box is None else self.box.shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def agreed(self) -> int:
        """How many elements are in the mask."""
        return len(self.packed.means)

    @property
    def arithmetic(self) -> torch.dtype:
        return TORCH_DTYPES[self.info.arithmetic]


# Elements at a time when a shard's part is cut out.
_CUT_AT_ONCE = 1 << 22


def cut(whole: TensorDelta, box: Box) -> TensorDelta:
    """The part of a delta that belongs to a shard. What was not finite, vetoed by zero or masked is known of the whole only: 0 of the part."""
    shape, packed = whole.info.spec.shape, whole.packed
    dense = torch.empty(box.shape, dtype=whole.arithmetic, device=packed.mask.device)
    row = math.prod(shape[1:])
    rows = max(_CUT_AT_ONCE // max(row, 1), 1)
    for first in range(0, box.shape[0] if dense.numel() else 0, rows):
        count = min(rows, box.shape[0] - first)
        held = expand(packed, (box.offset[0] + first) * row, count * row, whole.arithmetic)
        held = held.view(count, *shape[1:])
        for dimension in range(1, len(shape)):
            held = held.narrow(dimension, box.offset[dimension], box.shape[dimension])
        dense[first : first + count] = held
    packer = Packer(dense.numel(), packed.means.dtype, dense.device)
    packer.add(dense.view(-1))
    masked = None if whole.info.masked is None else 0
    info = whole.info._replace(nonfinite=0, vetoed_by_zero=0, masked=masked)
    return TensorDelta(info, packer.packed(), box)
