"""The table of dtypes beside torch, NumPy and the C++ kernels."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from negmerge_fast.core.dtypes import DTYPE_CODES, DTYPES, FLOAT_SIZES, TORCH_NAMES, Dtype, holds

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


@pytest.mark.parametrize("other", FLOAT_SIZES)
@pytest.mark.parametrize("dtype", FLOAT_SIZES)
def test_a_type_holds_another_if_its_hardest_numbers_survive(dtype: str, other: str) -> None:
    wide, narrow = getattr(torch, TORCH_NAMES[other]), getattr(torch, TORCH_NAMES[dtype])
    limits = torch.finfo(wide)
    hardest = torch.tensor([limits.max, 1 + limits.eps, limits.tiny * limits.eps], dtype=torch.float64)
    assert torch.equal(hardest.to(wide).double(), hardest)
    assert holds(dtype, other) == torch.equal(hardest.to(wide).to(narrow).double(), hardest)


@pytest.mark.parametrize("dtype", FLOAT_SIZES)
def test_kernels_have_numbers_of_the_same_parts(dtype: str) -> None:
    text = BATCH_H.with_name("dtypes.h").read_text(encoding="utf-8")
    parts = re.search(rf"struct {dtype} {{.*?kExponent = (\d+), kFraction = (\d+);", text, re.DOTALL)
    (found,) = [each for each in DTYPES if each.name == dtype]
    assert parts and (int(parts[1]), int(parts[2])) == (found.exponent, found.fraction)


def test_kernels_have_the_same_the_same_codes_and_sizes() -> None:
    text = BATCH_H.read_text(encoding="utf-8")
    names = re.search(r"enum Dtype : std::uint8_t \{ (.*) \};", text)
    sizes = re.search(r"kSizes\[\] = \{(.*)\};", text)
    assert names and sizes
    assert {name: code for code, name in enumerate(names[1].split(", "))} == {
        f"k{name}": code for name, code in DTYPE_CODES.items()
    }
    assert [int(size) for size in sizes[1].split(", ")] == [FLOAT_SIZES[name] for name in DTYPE_CODES]


@pytest.mark.processes
@pytest.mark.parametrize(
    "use",
    [
        "import negmerge_fast as nm; nm.merge",
        "import runpy; sys.argv = ['negmerge', 'verify', 'out']; runpy.run_module('negmerge_fast', run_name='__main__')",
    ],
)
def test_a_big_endian_machine_is_refused_in_one_line(use: str) -> None:
    code = f"import sys, numpy, torch; sys.byteorder = 'big'; {use}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "this machine is big-endian, expected a little-endian one, as the numbers in files are"
    told = done.stderr.splitlines()[-1]
    assert (done.returncode, told.partition(": ")[2]) == (1, message)
    assert ("Traceback" in done.stderr) == ("runpy" not in use)
