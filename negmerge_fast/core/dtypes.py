"""The table of storage types: names, sizes, codes of the kernels, names in NumPy and PyTorch."""

from __future__ import annotations

import sys
from typing import NamedTuple

# Asked here and nowhere else: whoever merges or reads anything imports this module.
if sys.byteorder != "little":
    raise ImportError("this machine is big-endian, expected a little-endian one, as the numbers in files are")


class Dtype(NamedTuple):
    """A storage type of the safetensors format.

    Attributes:
        name: As safetensors spells it. A dtype is this string everywhere else in the package.
        bits: Of one element.
        torch: The name of PyTorch's dtype; None if tensors of this type are neither merged nor copied.
        numpy: The dtype string of a .npy file; None if such files are not merged.
        code: The number that stands for it in the kernels (csrc/batch.h, kernels/merge.py); None if it is not merged.
        exponent, fraction: Bits of these two parts of a number, of the types that are merged.
    """

    name: str
    bits: int
    torch: str | None = None
    numpy: str | None = None
    code: int | None = None
    exponent: int = 0
    fraction: int = 0

    @property
    def is_float(self) -> bool:
        """Whether tensors of this type are merged."""
        return self.code is not None

    @property
    def is_integer(self) -> bool:
        """Whether tensors of this type are copied from the base."""
        return self.torch is not None and not self.is_float


DTYPES = (
    Dtype("F64", 64, "float64", "<f8", code=0, exponent=11, fraction=52),
    Dtype("F32", 32, "float32", "<f4", code=1, exponent=8, fraction=23),
    Dtype("F16", 16, "float16", "<f2", code=2, exponent=5, fraction=10),
    Dtype("BF16", 16, "bfloat16", code=3, exponent=8, fraction=7),
    Dtype("BOOL", 8, "bool"),
    Dtype("U8", 8, "uint8"),
    Dtype("I8", 8, "int8"),
    Dtype("U16", 16, "uint16"),
    Dtype("I16", 16, "int16"),
    Dtype("U32", 32, "uint32"),
    Dtype("I32", 32, "int32"),
    Dtype("U64", 64, "uint64"),
    Dtype("I64", 64, "int64"),
    # Known only so that a header is checked: these are neither merged nor copied.
    Dtype("F8_E5M2", 8),
    Dtype("F8_E4M3", 8),
    Dtype("F8_E8M0", 8),
    Dtype("F8_E4M3FNUZ", 8),
    Dtype("F8_E5M2FNUZ", 8),
    Dtype("C64", 64),
    Dtype("F4", 4),
    Dtype("F6_E2M3", 6),
    Dtype("F6_E3M2", 6),
)

# Bits of an element, of every type that a safetensors file may hold.
DTYPE_BITS = {dtype.name: dtype.bits for dtype in DTYPES}

# Bytes of an element, of the types that are merged.
FLOAT_SIZES = {dtype.name: dtype.bits // 8 for dtype in DTYPES if dtype.is_float}

# Pairs of merged types (a, b) where a holds every value of b.
_HOLDS = frozenset(
    (a.name, b.name)
    for a in DTYPES
    for b in DTYPES
    if a.is_float and b.is_float and a.exponent >= b.exponent and a.fraction >= b.fraction
)

INTEGER_DTYPES = frozenset(dtype.name for dtype in DTYPES if dtype.is_integer)

# Names of PyTorch's dtypes. backends/pytorch.py has the dtypes themselves: core imports no torch.
TORCH_NAMES = {dtype.name: dtype.torch for dtype in DTYPES if dtype.torch is not None}

# Names by the dtype string of a .npy file.
NUMPY_DTYPES = {dtype.numpy: dtype.name for dtype in DTYPES if dtype.numpy is not None}

# Numbers that stand for dtypes in the kernels.
DTYPE_CODES = {dtype.name: dtype.code for dtype in DTYPES if dtype.code is not None}


def holds(dtype: str, other: str) -> bool:
    """Whether a merged type holds every value of another one."""
    return (dtype, other) in _HOLDS
