"""The machine code that Triton's compiler makes of the kernel: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from triton_code import GFX942, SM_80, SM_90, SM_100, compile_kernel, machine_code

from negmerge_fast.core.batch import Signature

triton = pytest.importorskip("triton")

UNIFORM = [("F64", "F64"), ("F32", "F32"), ("F16", "F16"), ("BF16", "BF16")]
MIXED = [("F32", "BF16"), ("BF16", "F32"), ("F64", "BF16"), ("F64", "F32"), ("F16", "F64")]

# Target, dtypes of base and models, number of models: all in one group, or a group in a loop and one more. Compiling takes
# long, so that only each dtype on one target and each target with one dtype is not marked slow.
COMPILED = [(SM_90, *types, 9) for types in UNIFORM] + [
    (target, "F32", "F32", 9) for target in (SM_80, SM_100, GFX942)
]
RARER = [(SM_90, *types, n) for types in UNIFORM + MIXED for n in (2, 9)]
RARER += [(target, *types, 9) for types in UNIFORM for target in (SM_80, SM_100, GFX942)]
COMPILED += [pytest.param(*case, marks=pytest.mark.slow) for case in RARER if case not in COMPILED]


@cache
def compiled(target: tuple[Any, ...], result: str, model: str, n: int, unanimous: bool) -> Any:
    from triton.backends.compiler import GPUTarget

    from negmerge_fast.kernels import merge as kernel

    signature = Signature(result, (model,) * n, False)
    launch = kernel.usual_launch(signature, unanimous)
    constants = kernel.constants(signature, unanimous, launch)
    return compile_kernel(kernel.merge_tiles, constants, target, kernel.options(launch, GPUTarget(*target)))


@pytest.mark.parametrize("unanimous", [True, False], ids=["unanimous", "majority"])
@pytest.mark.parametrize(
    ("target", "result", "model", "n"), COMPILED, ids=lambda v: str(v[1]) if isinstance(v, tuple) else str(v)
)
def test_machine_code(
    target: tuple[Any, ...], result: str, model: str, n: int, unanimous: bool, tmp_path: Path
) -> None:
    """It loads 16 bytes at a time of every operand (8 of four elements of 16 bits), uses no local memory, divides as IEEE does and fuses nothing else."""
    kernel = compiled(target, result, model, n, unanimous)
    launch, models, loads = wide_loads(result, model, n, unanimous)
    narrow = launch.elements * min(SIZES[result], SIZES[model]) < 16
    double = "F64" in (result, model) or divides_in_double()
    # For each element of a thread, and once more in each of two loops for the rest: two to see what is finite, two for the quotient.
    fused = (launch.elements + 2) * (4 if unanimous else 2)
    calls = re.findall(r" = (?:tail )?call (?:<(\d) x )?(?:float|double)>? @llvm\.fma\.", kernel.asm["llir"])
    assert sum(int(width or 1) for width in calls) == fused
    assert not re.search(r"\bcontract\b|\bllvm\.fmuladd|\bfast\b|\barcp\b", kernel.asm["llir"])
    if target[0] == "hip":
        code = kernel.asm["amdgcn"]
        wide = r"\b(?:global|buffer)_load_dwordx[24]\b" if narrow else r"\b(?:global|buffer)_load_dwordx4\b"
        assert len(re.findall(wide, code)) >= loads
        assert "scratch_" not in code and re.search(r"\.private_segment_fixed_size: 0$", code, re.MULTILINE)
        assert unanimous != (f"v_div_fixup_f{64 if double else 32}" in code)
        return
    ptx = kernel.asm["ptx"]
    assert unanimous != (f"div.rn.f{64 if double else 32}" in ptx)
    assert sum(int(width or 1) for width in re.findall(r"\bfma\.rn\.f\d\d(?:x(\d))?", ptx)) == fused
    assert not re.search(r"\bmad\.\S*f\d|\bdiv\.(approx|full)|\.ftz|\brcp\.", ptx)
    # Only loads of aligned segments are marked evict_first: those of whole tiles, and of an element of each thread in the rest.
    widths = re.findall(r"\bld\.global\S*?evict_first\S*?\.((?:v\d\.)?b\d+) ", ptx)
    at_once = {"v4.b32", "v2.b64"} | ({"v2.b32"} if narrow else set())
    assert sum(width in at_once for width in widths) == loads
    assert sum(width not in at_once for width in widths) == 1 + models
    assert not re.search(r"\b(LDL|STL)\b", machine_code(kernel.asm["cubin"], tmp_path)), "uses local memory"


@pytest.mark.parametrize(
    ("dtype", "most"), [("F64", 54), ("F32", 39), ("F16", 41), ("BF16", 45)]
)  # 50, 36, 37 and 41 with Triton 3.9; at least 88, 54, 58 and 62 with a branch for the division
def test_instructions_an_element(dtype: str, most: int, tmp_path: Path) -> None:
    """Of two models, in the loop over whole tiles."""
    from negmerge_fast.kernels import merge as kernel

    if kernel.VERSION < (3, 6):
        pytest.skip("the division is another before Triton 3.6, and so was the compiler")
    launch, _, loads = wide_loads(dtype, dtype, 2, True)
    code = machine_code(compiled(SM_90, dtype, dtype, 2, True).asm["cubin"], tmp_path)
    loop = loop_over_tiles(
        re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);", code), launch.elements * SIZES[dtype] * 8
    )
    assert len(loop) <= most * launch.elements
    assert not any("CALL" in line or ".RCP" in line for line in loop)
    loaded = [line for line in loop if "LDG.E.EF" in line]
    assert len(loaded) == loads


def loop_over_tiles(code: list[tuple[str, str]], bits: int) -> list[str]:
    """The instructions of the smallest loop with the loads and the store of so many bits at a time."""
    wide = [i for i, (_, line) in enumerate(code) if re.search(rf"(LDG|STG)\.E\.EF\.{bits}\b", line)]
    loops = []
    for i, (_, line) in enumerate(code):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", line)
        begin = next((j for j, (at, _) in enumerate(code) if target and int(at, 16) == int(target[1], 16)), i)
        if begin <= min(wide) and i >= max(wide):
            loops.append((i - begin, begin, i))
    _, begin, end = min(loops)
    return [line for _, line in code[begin : end + 1]]


def divides_in_double() -> bool:
    """Whether float32 is divided as float64, as it is before Triton 3.6."""
    from negmerge_fast.kernels import merge as kernel

    return bool(kernel.DIV_RN_FLUSHES.value)


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def wide_loads(result: str, model: str, n: int, unanimous: bool) -> tuple[Any, int, int]:
    """The launch parameters, the models in the code of a tile, and the loads of 16 bytes, or of all there is, of these and the base."""
    from negmerge_fast.kernels.launch import usual_launch

    launch = usual_launch(Signature(result, (model,) * n, False), unanimous)
    models = n if n <= launch.group else launch.group + (n % launch.group or launch.group)
    at_once = [max(1, launch.elements * SIZES[dtype] // 16) for dtype in (result, model)]
    return launch, models, at_once[0] + models * at_once[1]
