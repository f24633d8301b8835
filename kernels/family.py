"""The rule of the other methods in Triton: one kernel, one launch for a batch.

    e_k = f_k · d_k  if the gate lets d_k pass,  else +0
    out = b - λ · (w · r)    if the element is chosen,   else b      (r: what the election leaves of e_1 … e_n, reduced)

negmerge_fast/core/choices.py says it to the bit. Loads, differences and rounding are those of merge.py. The kernel is compiled for each
gate, election and reduction, so that it computes no more than a method needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..core.batch import Batch, Signature
from ..core.choices import FAMILY_COUNTED, WEIGHT_CODES, Choices, Election, Gate, Reduction
from ..core.descriptors import pack_family_for_device, upload
from ..core.rule import Rule
from .launch import Launch, usual_launch
from .merge import (
    BF16,
    F16,
    F32,
    F64,
    _difference,
    _divide,
    _greater,
    _lesser,
    _load,
    _numbers,
    _round,
    _segment_of,
    _store,
    _widen,
    interpreted,
    on,
    options,
)
from .merge import constants as constants_of_merge

MAGNITUDE = tl.constexpr(int(Gate.MAGNITUDE))
RANDOM = tl.constexpr(int(Gate.RANDOM))
AGREEMENT = tl.constexpr(int(Election.AGREEMENT))
CONFLICT = tl.constexpr(int(Election.CONFLICT))
SIGN_OF_SUM = tl.constexpr(int(Election.SIGN_OF_SUM))
COUNTED = tl.constexpr(int(Election.COUNTED))
MASKS = tl.constexpr(int(Election.MASKS))
# A bit for each election that elects models of one sign, and for each that counts the models of either sign.
OF_ONE_SIGN = tl.constexpr(1 << Election.AGREEMENT | 1 << Election.SIGN_OF_SUM)
COUNTING = tl.constexpr(1 << Election.AGREEMENT | 1 << Election.CONFLICT | 1 << Election.COUNTED)
MEAN = tl.constexpr(int(Reduction.MEAN))
LARGEST = tl.constexpr(int(Reduction.LARGEST))

# All counts in one integer, as in merge.py: a lane counts at most four elements of each tile, less than NONFINITE in all.
MAX_TILES_PER_PROGRAM = 16
NONFINITE = tl.constexpr(1 << 8)
VETOED = tl.constexpr(1 << 16)
MASKED = tl.constexpr(1 << 24)
COUNTS = tl.constexpr(len(FAMILY_COUNTED))
U8 = tl.constexpr(WEIGHT_CODES["U8"])
I32 = tl.constexpr(WEIGHT_CODES["I32"])


@triton.jit
def _number(counter_low, counter_high, key, model, word, seed_low, seed_high):
    """The number of Philox4x32-10 at a counter, below 2^32: core/generator.py."""
    a, b = counter_low, counter_high
    c, d = tl.zeros_like(a) + key, tl.zeros_like(a) + model
    k, m = seed_low, seed_high
    for _ in tl.static_range(10):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (second >> 32).to(tl.uint32) ^ b ^ k, (first >> 32).to(tl.uint32) ^ d ^ m
        b, d = second.to(tl.uint32), first.to(tl.uint32)
        # The interpreter warns of sums beyond 32 bits.
        k = ((k.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        m = ((m.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))


@triton.jit
def _weights(term, start, lanes, left, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The weights of a block, 1 where a segment has none."""
    address, dtype = tl.load(term + 2), tl.load(term + 3)
    mask = lanes < tl.where(address != 0, left, 0)
    if dtype == F64:
        w = _numbers(address, start, mask, F64, T, ALIGNED)
    elif dtype == F32:
        w = _numbers(address, start, mask, F32, T, ALIGNED)
    elif dtype == F16:
        w = _numbers(address, start, mask, F16, T, ALIGNED)
    elif dtype == BF16:
        w = _numbers(address, start, mask, BF16, T, ALIGNED)
    elif dtype == U8:
        w = tl.load((address + start).to(tl.pointer_type(tl.uint8)) + lanes, mask=mask, other=0).to(T)
    elif dtype == I32:  # as large as the bits of floats
        w = _load(address, start, mask, F32, ALIGNED).to(T)
    else:
        w = _load(address, start, mask, F64, ALIGNED).to(T)
    return tl.where(address != 0, w, 1.0)


@triton.jit
def _passed(
    row, dtypes, numbers, term, n, k, b, start, mask, counter_low, counter_high, word, seed_low, seed_high,
    T: tl.constexpr, RESULT: tl.constexpr, KIND: tl.constexpr, TASK_VECTORS: tl.constexpr, GATE: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the elements of model k and return p_k and e_k. Of lanes that are not in the mask these are of x_k = 0."""
    d = _difference(row, dtypes, k, b, start, mask, KIND, T, RESULT, TASK_VECTORS, ALIGNED, BLOCK)
    product = tl.load(numbers + k).to(T) * d
    if GATE == MAGNITUDE:
        bounds = (term + 4).to(tl.pointer_type(tl.float64))
        size = tl.abs(d)
        passes = (size >= tl.load(bounds + k).to(T)) & (size <= tl.load(bounds + n + k).to(T))
        e = tl.where(passes, product, 0.0)
    elif GATE == RANDOM:
        key = tl.load(term + 1).to(tl.uint32)
        found = _number(counter_low, counter_high, key, k, word, seed_low, seed_high)
        keep = tl.load(numbers + 2 * n + k).to(tl.int64)
        e = tl.where(found.to(tl.int64) < keep, product, 0.0)
    else:
        e = product
    return product, e


@triton.jit
def _accumulate(
    product, e, vote, product_of_zero, total, up, down, n_up, n_down, v_up, v_down,
    ELECTION: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Add a model to the running values: only to those that are needed.

    product_of_zero: 0, or NaN if some p_k is not finite. total: the sum of all e_k. up, down: the sum, or the largest, of the positive and
    of the negative ones; of elections without a sign, up is the largest of all. n_up, n_down: how many are positive, and negative. v_up,
    v_down: their votes.
    """
    product_of_zero = tl.math.fma(product, tl.zeros_like(product), product_of_zero)
    is_up, is_down = e > 0, e < 0
    if ELECTION != AGREEMENT:
        total += e
    if OF_ONE_SIGN >> ELECTION & 1:
        if REDUCTION == LARGEST:
            up, down = _greater(e, up), _lesser(e, down)
        else:
            # Adding +0 for a model of the other sign changes no bit of a sum that started at +0.
            up += tl.where(is_up, e, 0.0)
            down += tl.where(is_down, e, 0.0)
        if REDUCTION == MEAN:
            v_up += tl.where(is_up, vote, 0.0)
            v_down += tl.where(is_down, vote, 0.0)
    elif REDUCTION == LARGEST:
        up = tl.where(tl.abs(e) >= tl.abs(up), e, up)
    if COUNTING >> ELECTION & 1:
        n_up += tl.where(is_up, 1.0, 0.0)
        n_down += tl.where(is_down, 1.0, 0.0)
    return product_of_zero, total, up, down, n_up, n_down, v_up, v_down


@triton.jit
def _merge(
    row, base, out, dtypes, of_models, term, n, required, scale, mask_scale, votes, seed_low, seed_high, start, left,
    T: tl.constexpr, RESULT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
    FIRST_KINDS: tl.constexpr, TASK_VECTORS: tl.constexpr, GATE: tl.constexpr, ELECTION: tl.constexpr,
    REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the first `left` elements of a block that begins at `start`; returns what each adds to the counts."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < left
    stored = _load(base, start, lanes < tl.where(base != 0, left, 0), RESULT, ALIGNED)
    b = _widen(stored, RESULT, T)
    element = tl.load(term) + start + lanes
    word = (element & 3).to(tl.int32)
    counter_low, counter_high = (element >> 2).to(tl.uint32), (element >> 34).to(tl.uint32)
    zero = tl.zeros([BLOCK], T)
    product_of_zero, total, up, down, n_up, n_down, v_up, v_down = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for k in tl.static_range(FIRST):
        product, e = _passed(
            row, dtypes, of_models, term, n, k, b, start, mask, counter_low, counter_high, word, seed_low, seed_high,
            T, RESULT, (FIRST_KINDS >> (4 * k)) & 15, TASK_VECTORS, GATE, ALIGNED, BLOCK,
        )  # fmt: skip
        product_of_zero, total, up, down, n_up, n_down, v_up, v_down = _accumulate(
            product, e, tl.load(of_models + n + k).to(T), product_of_zero, total, up, down, n_up, n_down, v_up, v_down,
            ELECTION, REDUCTION,
        )  # fmt: skip
    # All loads of a group are under way at once.
    if GROUP > 0:
        for done in range(FIRST, n, GROUP):
            for k in tl.static_range(GROUP):
                product, e = _passed(
                    row, dtypes, of_models, term, n, done + k, b, start, mask, counter_low, counter_high, word,
                    seed_low, seed_high, T, RESULT, KIND, TASK_VECTORS, GATE, ALIGNED, BLOCK,
                )  # fmt: skip
                product_of_zero, total, up, down, n_up, n_down, v_up, v_down = _accumulate(
                    product, e, tl.load(of_models + n + done + k).to(T),
                    product_of_zero, total, up, down, n_up, n_down, v_up, v_down, ELECTION, REDUCTION,
                )  # fmt: skip
    if ELECTION == MASKS:  # their sum comes first; what is loaded again is in a cache
        for k in range(n):
            _, e = _passed(
                row, dtypes, of_models, term, n, k, b, start, mask, counter_low, counter_high, word, seed_low, seed_high,
                T, RESULT, KIND, TASK_VECTORS, GATE, ALIGNED, BLOCK,
            )  # fmt: skip
            n_up += tl.where(tl.abs(e) >= mask_scale * tl.abs(total - e), 1.0, 0.0)

    if OF_ONE_SIGN >> ELECTION & 1:
        if ELECTION == AGREEMENT:
            is_up = n_up >= required
            elected = is_up | (n_down >= required)
        else:
            is_up = total >= 0
            elected = mask
        r, votes = tl.where(is_up, up, down), tl.where(is_up, v_up, v_down)
    else:
        r = up if REDUCTION == LARGEST else total
        votes += zero
        if ELECTION == CONFLICT:
            elected = (n_up < n) & (n_down < n)
        elif ELECTION == COUNTED:
            elected = ((n_up >= required) & (total > 0)) | ((n_down >= required) & (total < 0))
        elif ELECTION == MASKS:
            elected = n_up >= 2
        else:
            elected = mask
    if REDUCTION == MEAN:
        r = tl.where(votes != 0, _divide(r, votes, T), 0.0)
    r = tl.where(elected, r, 0.0)
    masked = lanes < 0
    if WEIGHTED:
        w = _weights(term, start, lanes, left, T, ALIGNED)
        masked = (r != 0) & (w == 0)
        r = w * r
    chosen = r != 0
    if ELECTION == AGREEMENT:
        # It would agree if zeros had the sign of the majority.
        vetoed = (tl.minimum(n_up, n_down) <= n - required) & (elected == 0)
    else:
        vetoed = lanes < 0

    product_of_zero = tl.math.fma(b, zero, tl.math.fma(r, zero, product_of_zero))
    result, in_range = _round(b + scale * -r, RESULT)
    finite = (product_of_zero == product_of_zero) & (in_range | (chosen == 0))
    agreed = chosen & finite
    _store(out, start, lanes < tl.where(out != 0, left, 0), tl.where(agreed, result, stored), RESULT, ALIGNED)
    kept = tl.where(masked, MASKED, tl.where(vetoed, VETOED, 0))
    counted = tl.where(finite, tl.where(chosen, 1, kept), NONFINITE)
    return tl.where(mask, counted, 0)


@triton.jit
def _add(counts, counted):
    tl.atomic_add(counts, tl.sum(counted % NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(counted // NONFINITE % NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 2, tl.sum(counted // VETOED % NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 3, tl.sum(counted // MASKED).to(tl.int64), sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "memory", "counts", "numbers", "segments", "tiles", "tiles_per_program", "n", "required"
    ]
)  # fmt: skip
def family_tiles(
    memory, counts, numbers, segments, tiles, tiles_per_program, n, required,
    T: tl.constexpr, RESULT: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
    FIRST_KINDS: tl.constexpr, TASK_VECTORS: tl.constexpr, GATE: tl.constexpr, ELECTION: tl.constexpr,
    REDUCTION: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Merge `tiles_per_program` consecutive tiles of BLOCK elements, which may be of several segments.

    memory: what pack_family_for_device of negmerge_fast/core/descriptors.py packs. counts: int64[segments, 4], to which is added. numbers:
    λ, λ_t and the sum of all votes, as float64, and the seed. GATE, ELECTION, REDUCTION: of negmerge_fast/core/choices.py. WEIGHTED:
    whether some segments have weights. The others are those of merge_tiles.
    """
    tile = tl.program_id(0).to(tl.int64) * tiles_per_program
    end = tl.minimum(tile + tiles_per_program, tiles)
    descriptors = memory + 2 * (segments + 1)
    dtypes = (descriptors + segments.to(tl.int64) * (3 + n)).to(tl.pointer_type(tl.uint8))
    of_models = (dtypes + (n + 7) // 8 * 8).to(tl.pointer_type(tl.float64))
    terms = (of_models + 3 * n).to(tl.pointer_type(tl.int64))
    scale, mask_scale, votes = tl.load(numbers).to(T), tl.load(numbers + 1).to(T), tl.load(numbers + 2).to(T)
    seed = tl.load((numbers + 3).to(tl.pointer_type(tl.int64)))
    seed_low, seed_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)

    segment = _segment_of(memory, 2, segments, tile)
    while tile < end:
        first = tl.load(memory + 2 * segment)
        last = tl.minimum(tl.load(memory + 2 * segment + 2), end)
        row, term = descriptors + segment * (3 + n), terms + segment * (4 + 2 * n)
        numel, base, out = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        start = (tile - first) * BLOCK
        stop = tl.minimum((last - first) * BLOCK, numel)
        aligned = tl.where(tl.load(memory + 2 * segment + 1) != 0, stop, start)
        counted = tl.zeros([BLOCK], tl.int32)
        while start + BLOCK <= aligned:
            counted += _merge(
                row, base, out, dtypes, of_models, term, n, required, scale, mask_scale, votes, seed_low, seed_high,
                start, BLOCK, T, RESULT, KIND, GROUP, FIRST, FIRST_KINDS, TASK_VECTORS, GATE, ELECTION, REDUCTION, WEIGHTED,
                True, BLOCK,
            )  # fmt: skip
            start += BLOCK
        _add(counts + COUNTS * segment, counted)
        # Tiles that are not whole, or not aligned: an element of each thread at a time.
        if start < stop:
            few = tl.zeros([THREADS], tl.int32)
            while start < stop:
                few += _merge(
                    row, base, out, dtypes, of_models, term, n, required, scale, mask_scale, votes, seed_low, seed_high,
                    start, tl.minimum(stop - start, THREADS).to(tl.int32), T, RESULT, KIND, 1, 0, 0, TASK_VECTORS,
                    GATE, ELECTION, REDUCTION, WEIGHTED, False, THREADS,
                )  # fmt: skip
                start += THREADS
            _add(counts + COUNTS * segment, few)
        tile = last
        segment += 1


def constants(signature: Signature, choices: Choices, weighted: bool, launch: Launch) -> dict[str, Any]:
    """The constants that family_tiles is specialised on."""
    shared = constants_of_merge(signature, True, launch)
    del shared["UNANIMOUS"], shared["QUICK"]
    return {
        **shared,
        "GATE": int(choices.gate),
        "ELECTION": int(choices.election),
        "REDUCTION": int(choices.reduction),
        "WEIGHTED": weighted,
    }


def launch_for(signature: Signature, choices: Choices) -> Launch:
    """Launch parameters, chosen by reasoning, not measured: of two random models at once, the numbers take the registers."""
    launch = usual_launch(signature, False)
    if interpreted():
        return launch._replace(threads=1024, programs=3)
    # With the limit of a majority, NVIDIA's compiler keeps some running values of an agreement in local memory.
    registers = min(launch.registers + 32, 255)
    return launch._replace(group=2 if choices.gate == Gate.RANDOM else launch.group, registers=registers)


def all_votes(choices: Choices, signature: Signature) -> float:
    """The sum of the votes of all models, in the arithmetic type."""
    with np.errstate(over="ignore"):
        votes = np.array(choices.votes, np.float64 if signature.arithmetic == "F64" else np.float32)
        return float(np.cumsum(votes)[-1])  # one after the other, which sum() is not


def merge(batch: Batch, rule: Rule, choices: Choices) -> torch.Tensor:
    """Launch a merge by a rule with choices, as merge.merge does; returns int64[segments, len(FAMILY_COUNTED)] on the device."""
    return launch_merge(batch, rule, choices, launch_for(batch.signature, choices))


def merge_in_few_programs(batch: Batch, rule: Rule, choices: Choices) -> torch.Tensor:
    """merge as merge.merge_in_few_programs, for the self-test."""
    return launch_merge(batch, rule, choices, launch_for(batch.signature, choices)._replace(programs=3))


def launch_merge(batch: Batch, rule: Rule, choices: Choices, launch: Launch) -> torch.Tensor:
    """Launch a merge with these parameters."""
    models, weighted = len(batch.signature.models), any(terms.weight for terms in batch.terms or ())
    memory, tiles = pack_family_for_device(batch, choices, launch.tile)
    votes = all_votes(choices, batch.signature)
    numbers = np.array([rule.scale, choices.mask_scale, votes], np.float64)
    seed = np.array([choices.seed], np.uint64).view(np.int64)
    counted = np.zeros(len(batch.segments) * len(FAMILY_COUNTED), np.int64)  # in the same copy
    with on(torch.device(batch.device)):
        on_device = upload(np.concatenate([memory, numbers.view(np.int64), seed, counted]), batch.device)
        numbers_on_device = on_device[len(memory) : len(memory) + 4].view(torch.float64)
        counts = on_device[len(memory) + 4 :].view(-1, len(FAMILY_COUNTED))
        tiles_per_program = max(1, min(MAX_TILES_PER_PROGRAM, tiles // launch.programs))
        if tiles:
            family_tiles[(-(tiles // -tiles_per_program),)](
                on_device, counts, numbers_on_device, len(batch.segments), tiles, tiles_per_program,
                models, rule.required(models), **constants(batch.signature, choices, weighted, launch),
                **({} if interpreted() else options(launch, triton.runtime.driver.active.get_current_target())),
            )  # fmt: skip
    return counts
