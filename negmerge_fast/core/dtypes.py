"""Storage types: names, sizes, codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

# Storage types that are merged, spelled as safetensors spells them, with their size in bytes.
FLOAT_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

# Storage types as the kernels number them (csrc/batch.h, kernels/merge.py).
DTYPE_CODES = {"F64": 0, "F32": 1, "F16": 2, "BF16": 3}
