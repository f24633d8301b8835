"""The machine code that nvcc makes of the CUDA kernel: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuobjdump import kernel_functions
from sass import Code, instructions, loads_before_use, loop_with_loads

from negmerge_fast.backends.native import build_info

# Arithmetic and storage type, whether models are stored as the base, and rule, as they stand in a mangled name.
KERNELS = [
    f"merge_tilesI{arithmetic}NS_{len(storage)}{storage}ELb{same_dtype}ENS_{len(rule)}{rule}E"
    for arithmetic, storages in (("f", ("F32", "F16", "BF16")), ("d", ("F64", "F32", "F16", "BF16")))
    for storage in storages
    for same_dtype in ((0, 1) if arithmetic == "f" or storage == "F64" else (0,))
    for rule in ("Unanimous", "Majority")
]


def _kernels(what: str) -> dict[tuple[str, str], str]:
    """The code of each kernel, by architecture and those of KERNELS."""
    return {
        (arch, next(kernel for kernel in KERNELS if kernel in name)): text
        for (arch, name), text in kernel_functions(what, "merge_tilesI").items()
    }


def test_every_kernel_is_there_for_every_architecture() -> None:
    architectures = [f"sm_{number}" for number in build_info()["cuda_architectures"]]
    for what in ("sass", "ptx"):
        assert set(_kernels(what)) == {(arch, name) for arch in architectures for name in KERNELS}


# Arithmetic and storage type: elements of a thread at a time, and at most so many instructions for an element of 2 and of 8
# models, from one store to the next. nvcc 13.0 needs 28.9 to 30.0 and 59.2 to 63.4 for BF16 on sm_80 to sm_120. For doubles
# sm_110 and sm_120 have few units, and twice as many instructions.
LOOPS = {
    "fNS_4BF16": (8, 32, 66),
    "fNS_3F16": (8, 33, 69),
    "fNS_3F32": (4, 36, 68),
    "dNS_3F64": (2, 62, 126),
}


@pytest.mark.parametrize("types", LOOPS)
def test_the_loop_of_equal_types_has_few_instructions(types: str) -> None:
    for arch, code in _same_type_loops(types):
        if types == "dNS_3F64" and arch.startswith(("sm_11", "sm_12")):
            continue
        elements, *most = LOOPS[types]
        for n, bound in zip((2, 8), most, strict=True):
            loop = loop_with_loads(code, n + 1)
            assert loop and len(loop) <= bound * elements, f"{arch}, {n} models: {len(loop or [])}"


@pytest.mark.parametrize("types", LOOPS)
def test_all_loads_of_a_group_are_under_way_at_once(types: str) -> None:
    """16 bytes of the base and of each model, for each of 768 threads: 36 KiB of a processor with 2 models, 60 with 4."""
    for arch, code in _same_type_loops(types):
        for n in (1, 2, 3, 4):
            loop = loop_with_loads(code, n + 1)
            assert loop and loads_before_use(loop) == n + 1, f"{arch}, {n} models"


def _same_type_loops(types: str) -> Iterator[tuple[str, Code]]:
    for (arch, name), text in _kernels("sass").items():
        if name == f"merge_tilesI{types}ELb1ENS_9UnanimousE":
            yield arch, instructions(text)


def test_nothing_is_kept_in_local_memory_and_registers_suffice_for_several_blocks() -> None:
    for (arch, name), text in _kernels("res-usage").items():
        used = {what: int(count) for what, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        # Of 65,536, for 3 blocks of 256 threads; for 2 with a majority or mixed types.
        most = 80 if "ELb1ENS_9Unanimous" in name else 128
        assert used["REG"] <= most and used["STACK"] == used["LOCAL"] == 0, f"{name} for {arch}: {used}"
    for (arch, name), text in _kernels("sass").items():
        names = {instruction.name for instruction in instructions(text).values()}
        assert not [each for each in names if each.startswith(("LDL", "STL"))], f"{name} for {arch}"


def test_intermediate_code_divides_as_ieee_does_and_fuses_nothing_else() -> None:
    for (arch, name), code in _kernels("ptx").items():
        width = 64 if "merge_tilesId" in name else 32
        assert not re.search(r"\bdiv\.(approx|full)|\.ftz|\brcp\.|\bmad\.\S*f(32|64)", code), (
            f"{name} for {arch}"
        )
        fused = re.findall(r"\bfma\.rn\.f\d+ \t?%\w+, (%\w+), ([%\w]+), ([%\w]+);", code)
        assert fused and len(fused) == len(re.findall(r"\bfma\.", code)), f"{name} for {arch}"
        # x - 1 · b, or of task vectors x - 0 · b, is rounded as the difference is. The quick quotient has two: the remainder,
        # and what 2^-22 of the remainder's quotient adds.
        parameters = re.findall(r"ld\.param\.f\d+ \t?(%\w+),", code)
        negated = dict(re.findall(r"\bneg\.f\d+ \t?(%\w+), (%\w+);", code))
        others = [factors for *factors, _ in fused if negated.get(factors[0]) not in parameters]
        last = "0d3E90000000000000" if width == 64 else "0f34800000"
        constants = dict(re.findall(r"\bmov\.\S+ \t?(%\w+), (0[df]\w+);", code))
        quotients = [factors for factors in others if constants.get(factors[1], factors[1]) == last]
        assert len(others) == 2 * len(quotients), f"{name} for {arch}"
        assert bool(quotients) == ("Unanimous" in name), f"{name} for {arch}"
        assert ("Majority" in name) == (f"div.rn.f{width}" in code), f"{name} for {arch}"
    for (arch, name), code in kernel_functions("ptx", "merge_one_by_oneI").items():
        assert "div.rn.f" in code and "fma." not in code, f"{name} for {arch}"


@pytest.mark.slow
def test_nvcc_warns_of_nothing(tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on PATH")
    source = Path(__file__).parents[2] / "csrc" / "merge_cuda.cu"
    command = [nvcc, "-std=c++17", "--fmad=false", "-arch=sm_80", "-Xcompiler=-Wall,-Wextra", "-ptx"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "ptx")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
