"""The machine code that Triton's compiler makes of the kernel of the other methods: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from triton_code import GFX942, SM_90, compile_kernel, machine_code

from negmerge_fast.core.batch import Signature
from negmerge_fast.core.choices import Choices, Election, Gate, Reduction

pytest.importorskip("triton")

# Gate, election, reduction, and whether there are weights: TIES, DARE with weights, NegMerge with weights, consensus, MagMax.
CHOSEN = [
    (Gate.MAGNITUDE, Election.SIGN_OF_SUM, Reduction.MEAN, False),
    (Gate.RANDOM, Election.ALL, Reduction.SUM, True),
    (Gate.NONE, Election.AGREEMENT, Reduction.MEAN, True),
    (Gate.NONE, Election.MASKS, Reduction.SUM, False),
    (Gate.NONE, Election.ALL, Reduction.LARGEST, False),
]
# Compiling takes long: TIES for one target here, all others in slow tests.
QUICK = (SM_90, "BF16", CHOSEN[0])
CASES = [
    pytest.param(target, dtype, chosen, marks=[] if (target, dtype, chosen) == QUICK else pytest.mark.slow)
    for target in (SM_90, GFX942)
    for dtype in ("BF16", "F32", "F64")
    for chosen in CHOSEN
]


@pytest.mark.parametrize(("target", "dtype", "chosen"), CASES)
def test_machine_code(target: tuple[Any, ...], dtype: str, chosen: tuple[Any, ...], tmp_path: Path) -> None:
    """It uses no local memory, divides as IEEE does if it has a mean, and fuses only what tells whether all is finite."""
    from triton.backends.compiler import GPUTarget

    from negmerge_fast.kernels import family as kernel

    *choices, weighted = chosen
    n = 9
    signature = Signature(dtype, (dtype,) * n, False)
    made = Choices(*choices, factors=(1.0,) * n, votes=(1.0,) * n)
    launch = kernel.launch_for(signature, made)
    constants = kernel.constants(signature, made, weighted, launch)
    compiled = compile_kernel(
        kernel.family_tiles, constants, target, kernel.options(launch, GPUTarget(*target))
    )
    assert not re.search(r"\bcontract\b|\bllvm\.fmuladd|\bfast\b|\barcp\b", compiled.asm["llir"])
    mean = Reduction.MEAN in choices
    if target[0] == "hip":
        code = compiled.asm["amdgcn"]
        assert "scratch_" not in code and re.search(r"\.private_segment_fixed_size: 0$", code, re.MULTILINE)
        assert mean == ("v_div_fixup_f" in code)
        return
    ptx = compiled.asm["ptx"]
    assert mean == ("div.rn.f" in ptx)
    assert not re.search(r"\bmad\.\S*f\d|\bdiv\.(approx|full)|\.ftz|\brcp\.", ptx)
    assert not re.search(r"\b(LDL|STL)\b", machine_code(compiled.asm["cubin"], tmp_path)), "uses local memory"
