"""Consensus deltas in Triton: one kernel applies a batch in one launch.

    out = b - λ · mean    if the element is in the mask,   else b

negmerge_fast/core/delta.py says it to the bit. A tile is a block of ranks. The rank of an element is that of its block and the
elements in the mask before it, a running sum. Elements that are not in the mask are neither loaded nor stored, unless the base is
copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..core.delta import APPLIED, RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature
from ..core.descriptors import Act, act_of, pack_delta_for_device, upload
from ..core.dtypes import DTYPE_CODES
from .merge import (
    F32,
    F64,
    MAX_TILES_PER_PROGRAM,
    NONFINITE,
    _load,
    _round,
    _segment_of,
    _store,
    _widen,
    interpreted,
    on,
)

THREADS = 128

# As of usual_launch; not measured for this kernel.
PROGRAMS = 16384

BLOCK = tl.constexpr(RANK_BLOCK)
COUNTS = tl.constexpr(len(APPLIED))
RESTORE = tl.constexpr(int(Act.RESTORE))
SAVE = tl.constexpr(int(Act.SAVE))
FIELDS = tl.constexpr(len(DeltaSegment._fields) - 1)


@triton.jit
def _packed(address, DTYPE: tl.constexpr):
    """The pointer to elements that are aligned to their size."""
    if DTYPE == F64:
        kind: tl.constexpr = tl.int64
    elif DTYPE == F32:
        kind: tl.constexpr = tl.int32
    else:
        kind: tl.constexpr = tl.int16
    return address.to(tl.pointer_type(kind))


@triton.jit
def _apply(
    row, tile, aligned, scale, T: tl.constexpr, RESULT: tl.constexpr, MEANS: tl.constexpr, ACT: tl.constexpr
):
    """Apply a tile of a segment; returns what each element adds to the counts."""
    numel, mask, means, ranks = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    base, saved, out = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    start = tile * BLOCK
    lanes = tl.arange(0, BLOCK)
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    inside = lanes < left
    words = tl.load((mask + start // 8).to(tl.pointer_type(tl.int32)) + lanes // 32, mask=inside, other=0)
    bit = (words >> (lanes % 32)) & 1
    chosen = bit != 0
    rank = tl.load(ranks.to(tl.pointer_type(tl.int64)) + tile) + (tl.cumsum(bit, 0) - bit)
    counted = tl.zeros([BLOCK], tl.int32)
    if ACT == SAVE:
        tl.store(_packed(saved, RESULT) + rank, _load(base, start, chosen, RESULT, False), mask=chosen)
    elif ACT == RESTORE:
        if out != 0:
            kept = tl.load(_packed(saved, RESULT) + rank, mask=chosen, other=0)
            _store(out, start, chosen, kept, RESULT, False)
    else:
        copied = (base != 0) & (out != 0) & (base != out)
        whole = copied & (aligned != 0) & (left == BLOCK)  # so that 16 bytes are loaded and stored at a time
        single = tl.where(copied, inside, chosen)
        if base == 0:
            stored = tl.load(_packed(saved, RESULT) + rank, mask=chosen, other=0)
        elif whole:
            stored = _load(base, start, lanes < BLOCK, RESULT, True)
        else:
            stored = _load(base, start, single, RESULT, False)
        mean = _widen(tl.load(_packed(means, MEANS) + rank, mask=chosen, other=0), MEANS, T)
        result, in_range = _round(_widen(stored, RESULT, T) + scale * -mean, RESULT)
        bits = tl.where(chosen & in_range, result, stored)
        counted = tl.where(bits != stored, 1, 0) + tl.where(chosen & (in_range == 0), NONFINITE, 0)
        if whole:
            _store(out, start, lanes < BLOCK, bits, RESULT, True)
        elif out != 0:
            _store(out, start, single, bits, RESULT, False)
    return counted


@triton.jit
def _add(counts, counted):
    tl.atomic_add(counts, tl.sum(counted % NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(counted // NONFINITE).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["memory", "counts", "numbers", "segments", "tiles", "tiles_per_program"])
def apply_tiles(
    memory, counts, numbers, segments, tiles, tiles_per_program,
    T: tl.constexpr, RESULT: tl.constexpr, MEANS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Apply `tiles_per_program` consecutive tiles, which may be of several segments.

    memory: what pack_delta_for_device of negmerge_fast/core/descriptors.py packs. counts: int64[segments, 2], to which is added.
    numbers: λ, as float64. T: the arithmetic type. RESULT, MEANS: the dtypes of the base and of the means. ACT: of
    negmerge_fast/core/descriptors.py.
    """
    tile = tl.program_id(0).to(tl.int64) * tiles_per_program
    end = tl.minimum(tile + tiles_per_program, tiles)
    descriptors = memory + 2 * (segments + 1)
    scale = tl.load(numbers).to(T)

    segment = _segment_of(memory, 2, segments, tile)
    while tile < end:
        first = tl.load(memory + 2 * segment)
        last = tl.minimum(tl.load(memory + 2 * segment + 2), end)
        aligned = tl.load(memory + 2 * segment + 1)
        counted = tl.zeros([BLOCK], tl.int32)
        while tile < last:
            counted += _apply(
                descriptors + FIELDS * segment, tile - first, aligned, scale, T, RESULT, MEANS, ACT
            )
            tile += 1
        _add(counts + COUNTS * segment, counted)
        segment += 1


def constants(signature: DeltaSignature, act: Act) -> dict[str, Any]:
    """The constants that apply_tiles is specialised on."""
    return {
        "T": tl.float64 if signature.arithmetic == "F64" else tl.float32,
        "RESULT": DTYPE_CODES[signature.result],
        "MEANS": DTYPE_CODES[signature.means],
        "ACT": int(act),
    }


def options(target: Any) -> dict[str, Any]:
    """The compiler's options for a GPUTarget: no fused multiply-add."""
    return {"num_warps": THREADS // target.warp_size, "num_stages": 1, "enable_fp_fusion": False}


def apply(batch: DeltaBatch, scale: float | None, threads: int | None = None) -> torch.Tensor:
    """Launch the applying of deltas on the current stream of their device; returns int64[segments, len(APPLIED)] there without waiting."""
    return _launch(batch, *act_of(batch, scale), 3 if interpreted() else PROGRAMS)


def save(batch: DeltaBatch, threads: int | None = None) -> None:
    """Launch the copying of the base's elements that are in the mask to `saved`."""
    _launch(batch, Act.SAVE, 0.0, 3 if interpreted() else PROGRAMS)


def in_few_programs(batch: DeltaBatch, act: Act, scale: float) -> torch.Tensor:
    """Apply or save with several tiles for each program however small the batch is, as in large batches: for the self-test."""
    return _launch(batch, act, scale, 3)


def _launch(batch: DeltaBatch, act: Act, scale: float, programs: int) -> torch.Tensor:
    memory, tiles = pack_delta_for_device(batch, RANK_BLOCK)
    numbers = np.array([scale], np.float64).view(np.int64)
    counted = np.zeros(len(batch.segments) * len(APPLIED), np.int64)  # in the same copy
    with on(torch.device(batch.device)):
        on_device = upload(np.concatenate([memory, numbers, counted]), batch.device)
        numbers_on_device = on_device[len(memory) : len(memory) + 1].view(torch.float64)
        counts = on_device[len(memory) + 1 :].view(-1, len(APPLIED))
        tiles_per_program = max(1, min(MAX_TILES_PER_PROGRAM, tiles // programs))
        if tiles:
            apply_tiles[(-(tiles // -tiles_per_program),)](
                on_device, counts, numbers_on_device, len(batch.segments), tiles, tiles_per_program,
                **constants(batch.signature, act),
                **({} if interpreted() else options(triton.runtime.driver.active.get_current_target())),
            )  # fmt: skip
    return counts
