"""The table of dtypes beside torch, NumPy and the C++ kernels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from negmerge_fast.core.dtypes import DTYPE_CODES, DTYPES, FLOAT_SIZES, Dtype

BATCH_H = Path(__file__).parents[2] / "csrc" / "batch.h"


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.torch], ids=lambda dtype: dtype.name)
def test_torch_has_the_same_sizes_and_kinds(dtype: Dtype) -> None:
    in_torch = getattr(torch, dtype.torch or "")
    assert in_torch.itemsize * 8 == dtype.bits
    assert in_torch.is_floating_point == dtype.is_float != dtype.is_integer


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.numpy], ids=lambda dtype: dtype.name)
def test_numpy_has_the_same_sizes(dtype: Dtype) -> None:
    in_numpy = np.dtype(dtype.numpy)
    assert in_numpy.itemsize * 8 == dtype.bits and in_numpy.kind == "f" and dtype.is_float


def test_kernels_have_the_same_codes_and_sizes() -> None:
    text = BATCH_H.read_text(encoding="utf-8")
    names = re.search(r"enum Dtype : std::uint8_t \{ (.*) \};", text)
    sizes = re.search(r"kSizes\[\] = \{(.*)\};", text)
    assert names and sizes
    assert {name: code for code, name in enumerate(names[1].split(", "))} == {
        f"k{name}": code for name, code in DTYPE_CODES.items()
    }
    assert [int(size) for size in sizes[1].split(", ")] == [FLOAT_SIZES[name] for name in DTYPE_CODES]
