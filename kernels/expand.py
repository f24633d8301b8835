"""Low-rank differences in Triton: one kernel writes a batch in one launch.

    d[i, m] = s · Σ_r left[i, r] · right[r, m]

negmerge_fast/core/low_rank.py says it to the bit. A tile is a part of a matrix. A number of either factor is loaded once for several
elements of a thread.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.descriptors import pack_expand_for_device, upload
from ..core.dtypes import DTYPE_CODES, FLOAT_SIZES
from ..core.low_rank import ExpandBatch, ExpandSegment
from .merge import BF16, F32, F64, MAX_TILES_PER_PROGRAM, _round, _segment_of, _widen, interpreted, on

THREADS = 128

# As of usual_launch; not measured for this kernel.
PROGRAMS = 16384

# Of a tile. A thread of 128 has all rows of four columns, in float64 of two: twelve loads for 64 operations. Of 32 rows it would have
# one column, and 33 loads.
ROWS = tl.constexpr(8)
COLUMNS = {"F32": 512, "F64": 256}

FIELDS = tl.constexpr(9)  # of pack_expand_for_device


@triton.jit
def _load_tile(address, offsets, mask, DTYPE: tl.constexpr, NATURAL: tl.constexpr):
    """Load the elements at offsets from an address as integers. NATURAL: it is a multiple of an element's size; else it may be any."""
    if DTYPE == F64:
        size: tl.constexpr = 8
        kind: tl.constexpr = tl.int64
    elif DTYPE == F32:
        size: tl.constexpr = 4
        kind: tl.constexpr = tl.int32
    else:
        size: tl.constexpr = 2
        kind: tl.constexpr = tl.int16
    if NATURAL:
        bits = tl.load(address.to(tl.pointer_type(kind)) + offsets, mask=mask, other=0)
    else:
        bytes = address.to(tl.pointer_type(tl.uint8)) + offsets * size
        bits = tl.load(bytes, mask=mask, other=0).to(kind)
        for i in tl.static_range(1, size):
            bits |= tl.load(bytes + i, mask=mask, other=0).to(kind) << (8 * i)
    return bits


@triton.jit
def _store_tile(address, offsets, mask, bits, DTYPE: tl.constexpr, NATURAL: tl.constexpr):
    if DTYPE == F64:
        size: tl.constexpr = 8
        kind: tl.constexpr = tl.int64
    elif DTYPE == F32:
        size: tl.constexpr = 4
        kind: tl.constexpr = tl.int32
    else:
        size: tl.constexpr = 2
        kind: tl.constexpr = tl.int16
    if NATURAL:
        tl.store(address.to(tl.pointer_type(kind)) + offsets, bits, mask=mask)
    else:
        bytes = address.to(tl.pointer_type(tl.uint8)) + offsets * size
        for i in tl.static_range(size):
            tl.store(bytes + i, (bits >> (8 * i)).to(tl.uint8), mask=mask)


@triton.jit
def _round_any(x, DTYPE: tl.constexpr):
    """Round to a dtype: the bits to store. Beyond its range to infinity, and NaN stays NaN."""
    bits, _ = _round(x, DTYPE)
    if DTYPE == BF16:  # rounded as an integer, a NaN may become zero
        bits = tl.where(x == x, bits, tl.full(bits.shape, 0x7FC0, tl.int16))
    return bits


@triton.jit
def _expand(
    box,
    tile,
    T: tl.constexpr,
    RESULT: tl.constexpr,
    WITH_BASE: tl.constexpr,
    NATURAL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of a box. Tiles of the same columns follow each other."""
    left, right, base, out = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    rows, columns, stride = tl.load(box + 4), tl.load(box + 5), tl.load(box + 6)
    rank = tl.load(box + 7)
    scale = tl.load((box + 8).to(tl.pointer_type(tl.float64))).to(T)

    # Fewer than 2^31, as all tiles: 64-bit divisions are calls of functions.
    down = ((rows + ROWS - 1) // ROWS).to(tl.int32)
    across = ((columns + COLUMNS - 1) // COLUMNS).to(tl.int32)
    band = tile // down
    matrix = (band // across).to(tl.int64)
    row = (tile % down).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (band % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the edge of a box its last row and column are computed again, and not stored.
    of_left = left.to(tl.pointer_type(T)) + (matrix * rows + tl.minimum(row, rows - 1)) * rank
    of_right = right.to(tl.pointer_type(T)) + matrix * rank * stride + tl.minimum(column, columns - 1)

    total = tl.zeros([ROWS, COLUMNS], T)
    r = tl.zeros([], tl.int64)
    while r < rank:
        x, y = tl.load(of_left), tl.load(of_right)
        total += x[:, None] * y[None, :]
        of_left += 1
        of_right += stride
        r += 1
    d = scale * total

    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = (matrix * rows + row)[:, None] * stride + column[None, :]
    if WITH_BASE:
        d = _widen(_load_tile(base, offsets, mask, RESULT, NATURAL), RESULT, T) + d
    _store_tile(out, offsets, mask, _round_any(d, RESULT), RESULT, NATURAL)


@triton.jit(do_not_specialize=["memory", "boxes", "tiles", "tiles_per_program"])
def expand_tiles(
    memory, boxes, tiles, tiles_per_program,
    T: tl.constexpr, RESULT: tl.constexpr, WITH_BASE: tl.constexpr, NATURAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write `tiles_per_program` consecutive tiles, which may be of several boxes.

    memory: what pack_expand_for_device of negmerge_fast/core/descriptors.py packs. T: the arithmetic type. RESULT: the dtype of base
    and output; that of T if there is no base. NATURAL: their addresses are multiples of an element's size; what is not takes twice as
    many registers.
    """
    tile = tl.program_id(0).to(tl.int64) * tiles_per_program
    end = tl.minimum(tile + tiles_per_program, tiles)
    descriptors = memory + boxes + 1

    box = _segment_of(memory, 1, boxes, tile)  # none is empty
    while tile < end:
        first = tl.load(memory + box)
        last = tl.minimum(tl.load(memory + box + 1), end)
        while tile < last:
            _expand(
                descriptors + FIELDS * box,
                (tile - first).to(tl.int32),
                T,
                RESULT,
                WITH_BASE,
                NATURAL,
                COLUMNS,
            )
            tile += 1
        box += 1


def constants(arithmetic: str, result: str | None, natural: bool = True) -> dict[str, Any]:
    """The constants that expand_tiles is specialised on."""
    return {
        "T": tl.float64 if arithmetic == "F64" else tl.float32,
        "RESULT": DTYPE_CODES[result or arithmetic],
        "WITH_BASE": result is not None,
        "NATURAL": natural,
        "COLUMNS": COLUMNS[arithmetic],
    }


def options(target: Any) -> dict[str, Any]:
    """The compiler's options for a GPUTarget: no fused multiply-add."""
    return {"num_warps": THREADS // target.warp_size, "num_stages": 1, "enable_fp_fusion": False}


def expand(batch: ExpandBatch, threads: int | None = None) -> None:
    """Launch the writing of low-rank differences on the current stream of their device, without waiting."""
    _launch(batch, 3 if interpreted() else PROGRAMS)


def in_few_programs(batch: ExpandBatch, uploaded: bool) -> None:
    """expand with several tiles for each program however small the batch is, as in large batches: for the self-test.

    The table is uploaded always.
    """
    _launch(batch, 3)


def _launch(batch: ExpandBatch, programs: int) -> None:
    natural = all(_is_natural(segment) for segment in batch.segments)
    memory, boxes, tiles = pack_expand_for_device(batch, ROWS.value, COLUMNS[batch.arithmetic])
    tiles_per_program = max(1, min(MAX_TILES_PER_PROGRAM, tiles // programs))
    if not tiles:
        return
    if tiles >= 2**31:
        raise ValueError(f"{tiles:,} tiles of low-rank differences, expected fewer than 2^31 in a launch")
    with on(torch.device(batch.device)):
        expand_tiles[(-(tiles // -tiles_per_program),)](
            upload(memory, batch.device), boxes, tiles, tiles_per_program,
            **constants(batch.arithmetic, batch.result, natural),
            **({} if interpreted() else options(triton.runtime.driver.active.get_current_target())),
        )  # fmt: skip


def _is_natural(segment: ExpandSegment) -> bool:
    addresses = segment.out.address | (segment.base.address if segment.base else 0)
    return addresses % FLOAT_SIZES[segment.out.dtype] == 0
