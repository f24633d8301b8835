"""The rule in Triton, for every GPU that Triton supports: one kernel, one launch for a batch.

    d_k   = x_k - b                        (b rounded to the type of x_k; or x_k itself, of task vectors)
    agree = all d_k > 0  or  all d_k < 0
    out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b

negmerge_fast/core/rule.py says it to the bit. Numbers are loaded and stored as integers of their size. bf16 is rounded with
integers, so that Triton's interpreter gives the same bits as a GPU. All programs take the same number of consecutive tiles, so
that a batch of one large segment takes as long as one of thousands of small ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..core.batch import COUNTED, Batch, Signature
from ..core.descriptors import pack_for_device, upload
from ..core.dtypes import DTYPE_CODES, holds
from ..core.errors import first_line
from ..core.rule import Rule
from .launch import Launch, launch_for, usual_launch

# Storage types by their codes: the kernel compares and orders these.
F64 = tl.constexpr(DTYPE_CODES["F64"])
F32 = tl.constexpr(DTYPE_CODES["F32"])
F16 = tl.constexpr(DTYPE_CODES["F16"])
BF16 = tl.constexpr(DTYPE_CODES["BF16"])
MIXED = tl.constexpr(len(DTYPE_CODES))  # the models' dtypes differ, and are loaded from memory

# A bit for each pair of dtypes (a, b) where a holds every value of b: number 4 · code of a + code of b.
HOLDS = tl.constexpr(
    sum(1 << 4 * a + b for x, a in DTYPE_CODES.items() for y, b in DTYPE_CODES.items() if holds(x, y))
)

MAX_TILES_PER_PROGRAM = 32

# The most models whose number _quotient divides by: for these it was held against the division.
MAX_QUICK = 1 << 20

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Before 3.6, tl.div_rn flushed subnormals to zero on NVIDIA's GPUs.
DIV_RN_FLUSHES = tl.constexpr(VERSION < (3, 6))

# All counts in one integer: elements that agreed, plus NONFINITE for each that was not finite, plus VETOED for each that was
# vetoed by zero. A lane counts one element of each tile, or of each part of a tile: less than NONFINITE in all.
NONFINITE = tl.constexpr(1 << 10)
COUNTS = tl.constexpr(len(COUNTED))
VETOED = tl.constexpr(1 << 20)


@triton.jit
def _load(address, start, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load a block of elements from the one at start on as integers. ALIGNED: the address is a multiple of 16; else it may be any."""
    if DTYPE == F64:
        size: tl.constexpr = 8
        kind: tl.constexpr = tl.int64
    elif DTYPE == F32:
        size: tl.constexpr = 4
        kind: tl.constexpr = tl.int32
    else:
        size: tl.constexpr = 2
        kind: tl.constexpr = tl.int16
    lanes = tl.arange(0, mask.shape[0])
    address += start * size
    # Nothing is read twice, so that nothing needs to stay in a cache.
    if ALIGNED:
        first = tl.multiple_of(address.to(tl.pointer_type(kind)), 16)
        bits = tl.load(first + lanes, mask=mask, other=0, eviction_policy="evict_first")
    elif address % size == 0:
        bits = tl.load(address.to(tl.pointer_type(kind)) + lanes, mask=mask, other=0)
    else:
        bytes = address.to(tl.pointer_type(tl.uint8)) + lanes * size
        bits = tl.load(bytes, mask=mask, other=0).to(kind)
        for i in tl.static_range(1, size):
            bits |= tl.load(bytes + i, mask=mask, other=0).to(kind) << (8 * i)
    return bits


@triton.jit
def _store(address, start, mask, bits, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if DTYPE == F64:
        size: tl.constexpr = 8
        kind: tl.constexpr = tl.int64
    elif DTYPE == F32:
        size: tl.constexpr = 4
        kind: tl.constexpr = tl.int32
    else:
        size: tl.constexpr = 2
        kind: tl.constexpr = tl.int16
    lanes = tl.arange(0, mask.shape[0])
    address += start * size
    if ALIGNED:
        first = tl.multiple_of(address.to(tl.pointer_type(kind)), 16)
        tl.store(first + lanes, bits, mask=mask, eviction_policy="evict_first")
    elif address % size == 0:
        tl.store(address.to(tl.pointer_type(kind)) + lanes, bits, mask=mask)
    else:
        bytes = address.to(tl.pointer_type(tl.uint8)) + lanes * size
        for i in tl.static_range(size):
            tl.store(bytes + i, (bits >> (8 * i)).to(tl.uint8), mask=mask)


# Whether Triton runs kernels in Python, on the CPU: TRITON_INTERPRET=1.
INTERPRETED = tl.constexpr(not isinstance(_load, triton.JITFunction))


@triton.jit
def _widen(bits, DTYPE: tl.constexpr, T: tl.constexpr):
    """Convert the bits of a dtype to the arithmetic type, exactly."""
    if DTYPE == F64:
        x = bits.to(tl.float64, bitcast=True)
    elif DTYPE == F32:
        x = bits.to(tl.float32, bitcast=True)
    elif DTYPE == F16:
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif INTERPRETED:  # which flushes subnormals
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # half of the instructions of a shift
        x = bits.to(tl.bfloat16, bitcast=True).to(tl.float32)
    return x.to(T)


@triton.jit
def _numbers(address, start, mask, DTYPE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    return _widen(_load(address, start, mask, DTYPE, ALIGNED), DTYPE, T)


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    """Round to a dtype: the bits to store, and whether they are finite. From float64 to 16 bits by way of float32."""
    if DTYPE == F64:
        bits = x.to(tl.int64, bitcast=True)
        finite = x - x == 0
    elif DTYPE == F32:
        narrow = x.to(tl.float32)
        bits = narrow.to(tl.int32, bitcast=True)
        finite = narrow - narrow == 0
    elif DTYPE == F16:
        narrow = x.to(tl.float32)
        bits = narrow.to(tl.float16).to(tl.int16, bitcast=True)
        finite = tl.abs(narrow) < 65520.0
    else:
        narrow = x.to(tl.float32)
        u = narrow.to(tl.uint32, bitcast=True)
        bits = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.int16)
        finite = tl.abs(narrow) < 3.3961775292304957e38  # half-way from the largest bf16 to 2^128
    return bits, finite


@triton.jit
def _origin(b, DTYPE: tl.constexpr, T: tl.constexpr, RESULT: tl.constexpr, TASK_VECTORS: tl.constexpr):
    """What d_k of a model of a dtype subtracts: b, or b rounded where the dtype does not hold every value of RESULT."""
    if TASK_VECTORS:
        origin = tl.zeros_like(b)
    elif HOLDS >> (4 * DTYPE + RESULT) & 1:
        origin = b
    else:
        bits, _ = _round(b, DTYPE)  # to infinity if it overflows; a NaN is found in b
        origin = _widen(bits, DTYPE, T)
    return origin


@triton.jit
def _divide(a, b, T: tl.constexpr):
    if T == tl.float64:
        return a / b
    elif DIV_RN_FLUSHES:
        # 53 bits are enough for a second rounding to be right.
        return (a.to(tl.float64) / b.to(tl.float64)).to(tl.float32)
    else:
        return tl.div_rn(a, b)  # "/" is an approximation


@triton.jit
def _quotient(total, n, reciprocal, T: tl.constexpr):
    """total / n as IEEE rounds it, but for a total of -0: four operations without a branch. n is whole and at most MAX_QUICK.

    The first quotient is wrong by one unit at most, and its remainder is exact. Exactly between two numbers lie only quotients
    that are subnormal: there the remainder is half of n units, and its product, scaled up, is rounded to half a unit, whatever the
    reciprocal lacks.
    """
    scaled: tl.constexpr = 1 << 52 if T == tl.float64 else 1 << 23
    quotient = total * reciprocal
    remainder = tl.math.fma(-quotient, n, total)
    return tl.math.fma(remainder * (reciprocal * scaled), tl.zeros_like(quotient) + 1 / scaled, quotient)


# Minimum and maximum are one instruction for float32 only. If x is NaN the known one stays.
@triton.jit
def _lesser(x, known):
    return tl.where(x < known, x, known) if x.dtype == tl.float64 else tl.minimum(x, known)


@triton.jit
def _greater(x, known):
    return tl.where(x > known, x, known) if x.dtype == tl.float64 else tl.maximum(x, known)


@triton.jit
def _accumulate(
    d, total, least, greatest, negative, n_positive, n_negative, UNANIMOUS: tl.constexpr, BEGIN: tl.constexpr
):
    """Add d_k of one model to the running values, or begin them. total propagates NaN; for a majority it has the positive d_k only."""
    if BEGIN:
        least, greatest = d, d
    else:
        least, greatest = _lesser(d, least), _greater(d, greatest)
    if not UNANIMOUS:
        # Adding +0 for a model of the other sign changes no bit of a sum that started at +0.
        total += tl.where(d < 0, 0.0, d)
        negative += tl.where(d < 0, d, 0.0)
        n_positive += tl.where(d > 0, 1.0, 0.0)
        n_negative += tl.where(d < 0, 1.0, 0.0)
    elif BEGIN:
        total = d  # the sum of models that agree is no zero, so that -0 does no harm
    else:
        total += d
    return total, least, greatest, negative, n_positive, n_negative


@triton.jit
def _difference(
    row, dtypes, k, b, start, mask, KIND: tl.constexpr, T: tl.constexpr, RESULT: tl.constexpr,
    TASK_VECTORS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the elements of model k and return d_k. Its dtype is KIND, or is loaded from memory if that is MIXED."""
    address = tl.load(row + 3 + k)
    if KIND < MIXED:
        d = _numbers(address, start, mask, KIND, T, ALIGNED) - _origin(b, KIND, T, RESULT, TASK_VECTORS)
    else:
        dtype = tl.load(dtypes + k)
        if dtype == F32:
            d = _numbers(address, start, mask, F32, T, ALIGNED) - _origin(b, F32, T, RESULT, TASK_VECTORS)
        elif dtype == F16:
            d = _numbers(address, start, mask, F16, T, ALIGNED) - _origin(b, F16, T, RESULT, TASK_VECTORS)
        elif dtype == BF16:
            d = _numbers(address, start, mask, BF16, T, ALIGNED) - _origin(b, BF16, T, RESULT, TASK_VECTORS)
        elif T == tl.float64:
            d = _numbers(address, start, mask, F64, T, ALIGNED) - _origin(b, F64, T, RESULT, TASK_VECTORS)
        else:
            d = tl.zeros([BLOCK], T)
    return d


@triton.jit
def _merge(
    row, base, out, dtypes, n, required, scale, reciprocal, start, left,
    T: tl.constexpr, RESULT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
    FIRST_KINDS: tl.constexpr, TASK_VECTORS: tl.constexpr, UNANIMOUS: tl.constexpr, QUICK: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the first `left` elements of a block that begins at `start`; returns what each adds to the counts."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < left
    stored = _load(base, start, lanes < tl.where(base != 0, left, 0), RESULT, ALIGNED)
    b = _widen(stored, RESULT, T)
    zero = tl.zeros([BLOCK], T)
    total, least, greatest = zero, zero + float("inf"), zero - float("inf")
    negative, n_positive, n_negative = zero, zero, zero
    for k in tl.static_range(FIRST):
        d = _difference(
            row, dtypes, k, b, start, mask, (FIRST_KINDS >> (4 * k)) & 15, T, RESULT, TASK_VECTORS, ALIGNED, BLOCK
        )  # fmt: skip
        total, least, greatest, negative, n_positive, n_negative = _accumulate(
            d, total, least, greatest, negative, n_positive, n_negative, UNANIMOUS, k == 0
        )
    # All loads of a group are under way at once.
    if GROUP > 0:
        for done in range(FIRST, n, GROUP):
            for k in tl.static_range(GROUP):
                d = _difference(
                    row, dtypes, done + k, b, start, mask, KIND, T, RESULT, TASK_VECTORS, ALIGNED, BLOCK
                )
                total, least, greatest, negative, n_positive, n_negative = _accumulate(
                    d, total, least, greatest, negative, n_positive, n_negative, UNANIMOUS, False
                )

    # 0, or NaN if one of them is not finite. A NaN that least and greatest ignore is in the total.
    product = tl.math.fma(b, zero, tl.math.fma(least, zero, greatest * 0))
    finite = (product == product) & (total == total)
    if UNANIMOUS:
        # Above zero if all d_k have one sign, zero if some are zero and the others have one sign.
        unity = _greater(least, -greatest)
        agree, zeros = unity > 0, unity == 0
        mean = _quotient(total, zero + n, zero + reciprocal, T) if QUICK else _divide(total, zero + n, T)
    else:
        up = n_positive >= required
        agree = up | (n_negative >= required)
        # It would agree if zeros had the sign of the majority.
        zeros = tl.minimum(n_positive, n_negative) <= n - required
        mean = _divide(tl.where(up, total, negative), tl.where(up, n_positive, n_negative), T)
    result, in_range = _round(b + scale * -mean, RESULT)
    agreed = agree & in_range
    if not UNANIMOUS:  # if all agree, no finite result comes of what is not finite
        agreed = agreed & finite
    _store(out, start, lanes < tl.where(out != 0, left, 0), tl.where(agreed, result, stored), RESULT, ALIGNED)
    counted = tl.where(agreed, 1, tl.where(agree | (finite == 0), NONFINITE, tl.where(zeros, VETOED, 0)))
    return tl.where(mask, counted, 0)


@triton.jit
def _segment_of(before, STRIDE: tl.constexpr, segments, tile):
    """Binary search for the segment that a tile is of. before: the number of tiles before each segment, STRIDE numbers apart."""
    segment = tl.zeros([], tl.int64)
    high = segment + segments
    while high - segment > 1:
        middle = (segment + high) // 2
        started = tl.load(before + STRIDE * middle) <= tile
        segment = tl.where(started, middle, segment)
        high = tl.where(started, high, middle)
    return segment


@triton.jit
def _add(counts, counted):
    tl.atomic_add(counts, tl.sum(counted % NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(counted // NONFINITE % NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 2, tl.sum(counted // VETOED).to(tl.int64), sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "memory", "counts", "numbers", "segments", "tiles", "tiles_per_program", "n", "required"
    ]
)  # fmt: skip
def merge_tiles(
    memory, counts, numbers, segments, tiles, tiles_per_program, n, required,
    T: tl.constexpr, RESULT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
    FIRST_KINDS: tl.constexpr, TASK_VECTORS: tl.constexpr, UNANIMOUS: tl.constexpr, QUICK: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Merge `tiles_per_program` consecutive tiles of BLOCK elements, which may be of several segments.

    memory: what pack_for_device of negmerge_fast/core/descriptors.py packs. counts: int64[segments, 3], to which is
    added. numbers: λ and 1 / n, both float64. T: the arithmetic type. RESULT: the dtype of base and output. KIND: the dtype of all
    models, or MIXED. The first FIRST models are unrolled, and the others taken GROUP at a time (0: there are no others). FIRST_KINDS: the
    dtypes of the first, four bits each. QUICK: n is at most MAX_QUICK.
    """
    tile = tl.program_id(0).to(tl.int64) * tiles_per_program
    end = tl.minimum(tile + tiles_per_program, tiles)
    descriptors = memory + 2 * (segments + 1)
    dtypes = (descriptors + segments.to(tl.int64) * (3 + n)).to(tl.pointer_type(tl.uint8))
    scale = tl.load(numbers).to(T)
    reciprocal = tl.load(numbers + 1).to(T)

    segment = _segment_of(memory, 2, segments, tile)
    while tile < end:
        first = tl.load(memory + 2 * segment)
        last = tl.minimum(tl.load(memory + 2 * segment + 2), end)
        row = descriptors + segment * (3 + n)
        numel, base, out = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        start = (tile - first) * BLOCK
        stop = tl.minimum((last - first) * BLOCK, numel)
        aligned = tl.where(tl.load(memory + 2 * segment + 1) != 0, stop, start)
        counted = tl.zeros([BLOCK], tl.int32)
        while start + BLOCK <= aligned:
            counted += _merge(
                row, base, out, dtypes, n, required, scale, reciprocal, start, BLOCK,
                T, RESULT, KIND, GROUP, FIRST, FIRST_KINDS, TASK_VECTORS, UNANIMOUS, QUICK, True, BLOCK,
            )  # fmt: skip
            start += BLOCK
        _add(counts + COUNTS * segment, counted)
        # Tiles that are not whole, or not aligned: an element of each thread at a time, which takes few registers.
        if start < stop:
            few = tl.zeros([THREADS], tl.int32)
            while start < aligned:
                few += _merge(
                    row, base, out, dtypes, n, required, scale, reciprocal, start,
                    tl.minimum(stop - start, THREADS).to(tl.int32),
                    T, RESULT, KIND, GROUP, FIRST, FIRST_KINDS, TASK_VECTORS, UNANIMOUS, QUICK, True, THREADS,
                )  # fmt: skip
                start += THREADS
            while start < stop:
                few += _merge(
                    row, base, out, dtypes, n, required, scale, reciprocal, start,
                    tl.minimum(stop - start, THREADS).to(tl.int32),
                    T, RESULT, KIND, 1, 0, 0, TASK_VECTORS, UNANIMOUS, QUICK, False, THREADS,
                )  # fmt: skip
                start += THREADS
            _add(counts + COUNTS * segment, few)
        tile = last
        segment += 1


def constants(signature: Signature, unanimous: bool, launch: Launch) -> dict[str, Any]:
    """The constants that merge_tiles is specialised on."""
    models = [DTYPE_CODES[dtype] for dtype in signature.models]
    kind = models[0] if len(set(models)) == 1 else MIXED.value
    first = models
    if len(models) > launch.group:
        first = [kind] * (len(models) % launch.group or launch.group)
    return {
        "T": tl.float64 if signature.arithmetic == "F64" else tl.float32,
        "RESULT": DTYPE_CODES[signature.result],
        "KIND": kind,
        "GROUP": 0 if len(first) == len(models) else launch.group,
        "FIRST": len(first),
        "FIRST_KINDS": sum(dtype << 4 * k for k, dtype in enumerate(first)),
        "TASK_VECTORS": signature.task_vectors,
        "UNANIMOUS": unanimous,
        "QUICK": quick(len(models)),
        "BLOCK": launch.tile,
        "THREADS": launch.threads,
    }


def quick(models: int) -> bool:
    """Whether _quotient divides by this number of models. Triton's interpreter rounded fused operations twice before 3.9."""
    return models <= MAX_QUICK and not (interpreted() and VERSION < (3, 9))


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU: TRITON_INTERPRET=1."""
    return bool(INTERPRETED.value)


def why_not(device: str) -> str | None:
    """Tell why the kernel cannot run on a device here; None if it can."""
    if VERSION < (3, 2):
        return f"Triton {triton.__version__}, expected 3.2 or newer"
    if interpreted():
        return None if device == "cpu" else f"Triton's interpreter is for tensors on cpu, not on {device}"
    if device == "cpu":
        return "is for tensors on a GPU (on the CPU with TRITON_INTERPRET=1, to test it)"
    try:
        backend = triton.runtime.driver.active.get_current_target().backend
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:
        return f"Triton finds no device {device!r} here: {first_line(error)}"
    reached = "cuda" if backend == "hip" else backend  # torch's name for AMD's GPUs, too
    return None if torch.device(device).type == reached else f"Triton is for {reached} here, not for {device}"


def merge(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """Launch a merge on the current stream of the batch's device; returns int64[segments, len(COUNTED)] there without waiting."""
    if rule.choices is not None:
        from . import family

        return family.merge(batch, rule, rule.choices)
    return launch_merge(batch, rule, _launch(batch, rule))


def merge_in_few_programs(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """merge with several tiles for each program however small the batch is, as in large batches: for the self-test."""
    if rule.choices is not None:
        from . import family

        return family.merge_in_few_programs(batch, rule, rule.choices)
    return launch_merge(batch, rule, _launch(batch, rule)._replace(programs=3))


def _launch(batch: Batch, rule: Rule) -> Launch:
    unanimous = rule.required(len(batch.signature.models)) == len(batch.signature.models)
    if interpreted():  # programs run one after another, so that few and large ones are faster
        return usual_launch(batch.signature, unanimous)._replace(threads=1024, programs=3)
    return launch_for(batch.signature, unanimous, batch.device, launch_merge)


def launch_merge(batch: Batch, rule: Rule, launch: Launch) -> torch.Tensor:
    """Launch a merge with these parameters; bench/tuning/tune_gpu.py and the search call it with others than merge does."""
    models = len(batch.signature.models)
    required = rule.required(models)
    memory, tiles = pack_for_device(batch, launch.tile)
    reciprocal = 1 / models if batch.signature.arithmetic == "F64" else np.float32(1) / np.float32(models)
    numbers = np.array([rule.scale, reciprocal], np.float64).view(np.int64)
    counted = np.zeros(len(batch.segments) * len(COUNTED), np.int64)  # in the same copy
    with on(torch.device(batch.device)):
        on_device = upload(np.concatenate([memory, numbers, counted]), batch.device)
        numbers_on_device = on_device[len(memory) : len(memory) + 2].view(torch.float64)
        counts = on_device[len(memory) + 2 :].view(-1, len(COUNTED))
        # Enough programs for every processor first; then several tiles each, which share one search for the first segment.
        tiles_per_program = max(1, min(MAX_TILES_PER_PROGRAM, tiles // launch.programs))
        if tiles:
            merge_tiles[(-(tiles // -tiles_per_program),)](
                on_device, counts, numbers_on_device, len(batch.segments), tiles, tiles_per_program,
                models, required,
                **constants(batch.signature, required == models, launch),
                **({} if interpreted() else options(launch, triton.runtime.driver.active.get_current_target())),
            )  # fmt: skip
    return counts


def options(launch: Launch, target: Any) -> dict[str, Any]:
    """The compiler's options for a GPUTarget: no fused multiply-add, no copies through shared memory."""
    chosen = {"num_warps": launch.threads // target.warp_size, "num_stages": 1, "enable_fp_fusion": False}
    if target.backend == "cuda" and launch.registers:
        chosen["maxnreg"] = launch.registers
    return chosen


def on(device: torch.device) -> Any:
    """A context in which a device is the current one: Triton launches on its current stream."""
    if device.type == "cpu":
        return np.errstate(all="ignore")  # the interpreter computes with NumPy
    return getattr(torch, device.type).device(device)
