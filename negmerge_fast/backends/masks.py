"""Masks of consensus deltas and their packed means, in main memory: compiled, or with NumPy where nothing is.

core/delta.py defines both. Addresses are integers, at any alignment.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from ..core.delta import RANK_BLOCK, mask_bytes
from ..core.dtypes import DTYPE_CODES, FLOAT_SIZES
from . import native

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# Elements at a time with NumPy: its temporaries stay in cache. A multiple of RANK_BLOCK.
BLOCK = 1 << 18

# NumPy's integers that hold the bits of a number.
_BITS = {"F64": "<u8", "F32": "<u4", "BF16": "<u2"}


def pack(dense: int, numel: int, arithmetic: str, means_dtype: str, mask: int, means: int) -> int:
    """Pack a dense array of means, zero where there is none, to a mask and the means that are set.

    An element is set if it is finite and not zero as it is stored.

    Args:
        dense: The address of the array.
        numel: Its number of elements.
        arithmetic: Its storage type: F32 or F64.
        means_dtype: How the means are stored: as `arithmetic`, or as BF16.
        mask: Where the mask is written: mask_bytes(numel) bytes.
        means: Where the means are written. There must be memory for numel of them; it may be the dense array.

    Returns:
        The number of elements that are set.
    """
    _check(arithmetic, means_dtype)
    if _is_native():
        codes = DTYPE_CODES[arithmetic], DTYPE_CODES[means_dtype]
        return int(native.library().pack_mask(dense, numel, *codes, mask, means, native.instruction_set()))
    import numpy as np

    packed, count = _view(mask, mask_bytes(numel), "u1"), 0
    packed[:] = 0
    for start in range(0, numel, BLOCK):
        size = min(BLOCK, numel - start)
        bits = _view(dense + start * FLOAT_SIZES[arithmetic], size, _BITS[arithmetic])
        if means_dtype != arithmetic:
            bits = _to_bf16(bits)
        magnitude = bits & np.iinfo(bits.dtype).max >> 1
        flags = (magnitude > 0) & (magnitude < _INFINITY[means_dtype])
        stored = bits[flags]
        _view(means + count * FLOAT_SIZES[means_dtype], len(stored), _BITS[means_dtype])[:] = stored
        count += len(stored)
        packed[start // 8 : start // 8 - (size // -8)] = np.packbits(flags, bitorder="little")
    return count


def expand(
    mask: int, begin: int, numel: int, means: int, means_dtype: str, arithmetic: str, dense: int
) -> None:
    """Write the means of elements begin … begin + numel, and +0 where none is set.

    Args:
        mask: The address of the whole mask.
        begin: The first element.
        numel: The number of elements.
        means: The address of the first mean that is set in this range.
        means_dtype: How the means are stored.
        arithmetic: The storage type that is written, which holds every value of means_dtype.
        dense: Where it is written.
    """
    _check(arithmetic, means_dtype)
    if _is_native():
        codes = DTYPE_CODES[means_dtype], DTYPE_CODES[arithmetic]
        native.library().expand_mask(mask, begin, numel, means, *codes, dense, native.instruction_set())
        return
    for start in range(begin, begin + numel, BLOCK):
        flags = _flags(mask, start, min(BLOCK, begin + numel - start))
        count = int(flags.sum())
        bits = _view(means, count, _BITS[means_dtype])
        out = _view(dense + (start - begin) * FLOAT_SIZES[arithmetic], len(flags), _BITS[arithmetic])
        out[:] = 0
        out[flags] = bits if means_dtype == arithmetic else _from_bf16(bits, arithmetic)
        means += count * FLOAT_SIZES[means_dtype]


def rank(mask: int, begin: int, end: int) -> int:
    """Count the elements begin … end that are set."""
    if _is_native():
        return int(native.library().rank_mask(mask, begin, end, native.instruction_set()))
    return sum(int(_flags(mask, start, min(BLOCK, end - start)).sum()) for start in range(begin, end, BLOCK))


def ranks(mask: int, numel: int, ranks: int) -> int:
    """Write how many elements are set before each RANK_BLOCK, as int64; returns how many are in all."""
    if _is_native():
        return int(native.library().rank_blocks(mask, numel, ranks, native.instruction_set()))
    import numpy as np

    written, total = _view(ranks, -(numel // -RANK_BLOCK), "<i8"), 0
    for start in range(0, numel, BLOCK):
        flags = _flags(mask, start, min(BLOCK, numel - start))
        counts = np.add.reduceat(flags, np.arange(0, len(flags), RANK_BLOCK), dtype=np.int64)
        first = start // RANK_BLOCK
        written[first : first + len(counts)] = total + np.cumsum(counts) - counts
        total += int(counts.sum())
    return total


# The bits of infinity, which are less than those of every NaN.
_INFINITY = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "BF16": 0xFF << 7}


def _is_native() -> bool:
    return native.why_not("cpu", "cpu") is None


def _check(arithmetic: str, means_dtype: str) -> None:
    if arithmetic not in ("F32", "F64") or means_dtype not in (arithmetic, "BF16"):
        raise ValueError(
            f"means: {means_dtype} in {arithmetic}, expected F32 or F64, and the same or BF16 as means"
        )


def _view(address: int, count: int, dtype: str) -> Array:
    import numpy as np

    size = count * int(dtype[-1])
    if not size:  # an address of nothing may be null
        return np.empty(0, dtype)
    memory: Any = (ctypes.c_char * size).from_address(address)
    return np.ndarray(count, dtype, memory)


def _flags(mask: int, begin: int, size: int) -> Array:
    """The elements begin … begin + size of a mask, as bools."""
    import numpy as np

    first, offset = begin // 8, begin % 8
    held = _view(mask + first, -((offset + size) // -8), "u1")
    return np.unpackbits(held, bitorder="little")[offset : offset + size].view(bool)


def _to_bf16(bits: Array) -> Array:
    """Round the bits of F32 or F64 to BF16. With integers: the caller's floating-point mode may flush subnormals."""
    import numpy as np

    wide = bits
    if bits.itemsize == 8:
        # By way of float32, as everywhere. Below its normal numbers its bits are a number of steps.
        numbers = bits.view("<f8")
        with np.errstate(all="ignore"):
            wide = numbers.astype("<f4").view("<u4")
            steps = np.rint(np.abs(numbers) * 2.0**149)
            small = steps <= 1 << 23
        sign = (bits >> np.uint64(32)).astype("<u4") & np.uint32(1 << 31)
        wide = np.where(small, np.where(small, steps, 0).astype("<u4") | sign, wide)
    is_nan = wide & np.uint32(0x7FFFFFFF) > np.uint32(_INFINITY["F32"])
    rounded = (wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(is_nan, 0x7FC0, rounded).astype("<u2")


def _from_bf16(bits: Array, arithmetic: str) -> Array:
    import numpy as np

    wide = bits.astype("<u4") << np.uint32(16)
    if arithmetic == "F32":
        return wide
    # With integers, as in _to_bf16: a subnormal of BF16 is a number of steps.
    numbers = wide.view("<f4").astype("<f8")
    steps = (wide & np.uint32(0x7FFFFFFF)).astype("<f8") * 2.0**-149
    small = np.copysign(steps, numbers)
    return np.where(wide & np.uint32(0x7F800000) == 0, small, numbers).view("<u8")
