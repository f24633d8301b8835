"""The machine code that Triton's compiler makes of the kernel for deltas: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from triton_code import GFX942, SM_80, SM_90, SM_100, compile_kernel, machine_code

from negmerge_fast.core.delta import DeltaSignature
from negmerge_fast.core.descriptors import Act
from negmerge_fast.core.dtypes import FLOAT_SIZES

pytest.importorskip("triton")

# What base and means are stored as, and the arithmetic type.
SIGNATURES = [
    DeltaSignature("F64", "F64", "F64"), DeltaSignature("F32", "F32", "F32"), DeltaSignature("F16", "F32", "F32"),
    DeltaSignature("BF16", "F32", "F32"), DeltaSignature("BF16", "BF16", "F32"), DeltaSignature("BF16", "F64", "F64"),
]  # fmt: skip
COMPILED = [
    (SM_90, SIGNATURES[0], Act.APPLY),
    (SM_100, SIGNATURES[3], Act.APPLY),
    (GFX942, SIGNATURES[3], Act.APPLY),
]
RARER = [
    (target, signature, act)
    for target in (SM_80, SM_90, SM_100, GFX942)
    for signature in SIGNATURES
    for act in Act
]
CASES = COMPILED + [pytest.param(*case, marks=pytest.mark.slow) for case in RARER if case not in COMPILED]


@pytest.mark.parametrize(("target", "signature", "act"), CASES, ids=str)
def test_machine_code(target: tuple[Any, ...], signature: DeltaSignature, act: Act, tmp_path: Path) -> None:
    """It copies 16 bytes at a time, uses no local memory and fuses nothing."""
    from triton.backends.compiler import GPUTarget

    from negmerge_fast.kernels import apply

    constants, options = apply.constants(signature, act), apply.options(GPUTarget(*target))
    kernel = compile_kernel(apply.apply_tiles, constants, target, options)
    # Only an apply copies the base. A thread has 8 of 1,024 elements.
    at_once = 8 * FLOAT_SIZES[signature.result] // 16 if act == Act.APPLY else 0
    assert not re.search(r"\bcontract\b|\bllvm\.fma|\bfast\b|\barcp\b", kernel.asm["llir"])
    if target[0] == "hip":
        code = kernel.asm["amdgcn"]
        assert len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)) >= at_once
        assert "scratch_" not in code and re.search(r"\.private_segment_fixed_size: 0$", code, re.MULTILINE)
        return
    ptx = kernel.asm["ptx"]
    assert not re.search(r"\bfma\.|\bmad\.\S*f\d|\bdiv\.\S*f\d|\.ftz", ptx)
    wide = r"\b%s\.global\S*?\.(?:v4\.b32|v2\.b64) "
    assert len(re.findall(wide % "ld", ptx)) == len(re.findall(wide % "st", ptx)) == at_once
    assert not re.search(r"\b(LDL|STL)\b", machine_code(kernel.asm["cubin"], tmp_path)), "uses local memory"


def test_several_tiles_of_a_program_do_not_overflow_a_count() -> None:
    from negmerge_fast.kernels import apply as kernel

    assert kernel.NONFINITE.value > kernel.MAX_TILES_PER_PROGRAM
