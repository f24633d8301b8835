"""The machine code that Triton's compiler makes of the kernel for low-rank differences: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sass import instructions, smallest_loop
from triton_code import GFX942, SM_80, SM_90, SM_100, SM_120, compile_kernel, machine_code

from negmerge_fast.core.low_rank import ExpandSignature

pytest.importorskip("triton")

SIGNATURES = [
    ExpandSignature(arithmetic, result)
    for arithmetic, results in (("F32", (None, "F32", "F16", "BF16")), ("F64", (None, "F64", "F32", "F16", "BF16")))
    for result in results
]  # fmt: skip
COMPILED = [(SM_90, SIGNATURES[3]), (SM_100, SIGNATURES[0]), (GFX942, SIGNATURES[3])]
RARER = [(target, signature) for target in (SM_80, SM_90, SM_100, SM_120, GFX942) for signature in SIGNATURES]
CASES = COMPILED + [pytest.param(*case, marks=pytest.mark.slow) for case in RARER if case not in COMPILED]


def _compiled(target: tuple[Any, ...], signature: ExpandSignature, natural: bool = True) -> Any:
    from triton.backends.compiler import GPUTarget

    from negmerge_fast.kernels import expand

    constants, options = expand.constants(*signature, natural), expand.options(GPUTarget(*target))
    return compile_kernel(expand.expand_tiles, constants, target, options)


@pytest.mark.parametrize(("target", "signature"), CASES, ids=str)
def test_machine_code(target: tuple[Any, ...], signature: ExpandSignature, tmp_path: Path) -> None:
    """It fuses nothing, and most instructions of the loop over the rank are the products and sums."""
    kernel = _compiled(target, signature)
    assert not re.search(r"\bcontract\b|\bllvm\.fma|\bfast\b|\barcp\b", kernel.asm["llir"])
    if target[0] == "hip":
        code = kernel.asm["amdgcn"]
        assert "scratch_" not in code and re.search(r"\.private_segment_fixed_size: 0$", code, re.MULTILINE)
        return
    assert not re.search(r"\bfma\.|\bmad\.\S*f\d|\.ftz", kernel.asm["ptx"])
    code = instructions(machine_code(kernel.asm["cubin"], tmp_path))
    assert not [each for each in code.values() if each.name.startswith(("FFMA", "DFMA"))]
    # A thread has 32 elements, in float64 16. On sm_100 two sums are one instruction.
    kind, of_thread = ("D", 16) if signature.arithmetic == "F64" else ("F", 32)

    def is_it(loop: list[Any]) -> bool:
        return sum(each.name.startswith(f"{kind}MUL") for each in loop) >= of_thread

    loop = smallest_loop(code, is_it)
    assert loop and len(loop) <= 2 * of_thread + 45, len(loop or [])
    assert sum(each.name.startswith("LDG") for each in loop) <= 12
    assert not [each for each in loop if each.name.startswith(("LDL", "STL"))], "uses local memory"


@pytest.mark.slow
@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, SM_120, GFX942], ids=str)
@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_misaligned_addresses_are_compiled_for(target: tuple[Any, ...], signature: ExpandSignature) -> None:
    kernel = _compiled(target, signature, natural=False)
    assert not re.search(r"\bcontract\b|\bllvm\.fma|\bfast\b|\barcp\b", kernel.asm["llir"])
