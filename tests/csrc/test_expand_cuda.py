"""The machine code that nvcc makes of the CUDA kernel for low-rank differences: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from cuobjdump import kernel_functions
from sass import Instruction, instructions, smallest_loop

from negmerge_fast.backends.native import build_info

# Arithmetic type, and what base and output are stored as, as they stand in a mangled name.
KERNELS = {
    f"expand_tilesI{arithmetic}NS_{len(result)}{result}EE": arithmetic
    for arithmetic, results in (("f", ("F32", "F16", "BF16")), ("d", ("F64", "F32", "F16", "BF16")))
    for result in results
}


def _kernels(what: str) -> dict[tuple[str, str], str]:
    """The code of each kernel, by architecture and those of KERNELS."""
    return {
        (arch, next(kernel for kernel in KERNELS if kernel in name)): text
        for (arch, name), text in kernel_functions(what, "expand_tilesI").items()
    }


def test_every_kernel_is_there_for_every_architecture() -> None:
    architectures = [f"sm_{number}" for number in build_info()["cuda_architectures"]]
    for what in ("sass", "ptx"):
        assert set(_kernels(what)) == {(arch, name) for arch in architectures for name in KERNELS}


def test_nothing_is_kept_in_local_memory_and_registers_suffice_for_the_blocks_of_a_processor() -> None:
    for (arch, name), text in _kernels("res-usage").items():
        used = {what: int(count) for what, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        most = 128 if KERNELS[name] == "d" else 96
        assert used["REG"] <= most and used["STACK"] == used["LOCAL"] == 0, f"{name} for {arch}: {used}"
    for (arch, name), text in _kernels("sass").items():
        names = {instruction.name for instruction in instructions(text).values()}
        assert not [each for each in names if each.startswith(("LDL", "STL"))], f"{name} for {arch}"


# nvcc 13.0 needs 75 to 83 on sm_80 to sm_120.
def test_most_instructions_of_the_loop_are_the_products_and_sums() -> None:
    """Of a thread's 32 elements, with four loads of the right factor, and of the left one eight numbers from shared memory."""
    for (arch, name), text in _kernels("sass").items():
        if "F16" in name:  # it is the same loop as with F32
            continue
        kind = KERNELS[name].upper()
        product, total = f"{kind}MUL", f"{kind}ADD"
        loop = smallest_loop(instructions(text), lambda path, product=product: _names(path)[product] == 32)
        assert loop, f"{name} for {arch}"
        found = _names(loop)
        found.subtract({"NOP": found["NOP"]})  # of sm_120, beside arithmetic of double
        assert found[total] == 32 and found["LDG"] == 4, f"{name} for {arch}: {found}"
        assert found["LDS"] == (2 if kind == "F" else 4), f"{name} for {arch}: {found}"
        assert found.total() <= 88, f"{name} for {arch}: {found}"


def _names(path: list[Instruction]) -> Counter[str]:
    return Counter(instruction.name.partition(".")[0] for instruction in path)


def test_nothing_is_fused() -> None:
    for (arch, name), code in _kernels("ptx").items():
        assert not re.search(r"\bfma\.|\.ftz|\bmad\.\S*f(32|64)", code), f"{name} for {arch}"
        assert "mul.rn.f" in code and "add.rn.f" in code, f"{name} for {arch}"
    for (arch, name), text in _kernels("sass").items():
        names = {instruction.name.partition(".")[0] for instruction in instructions(text).values()}
        assert not names & {"FFMA", "DFMA"}, f"{name} for {arch}"


@pytest.mark.slow
def test_nvcc_warns_of_nothing(tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on PATH")
    source = Path(__file__).parents[2] / "csrc" / "expand_cuda.cu"
    command = [nvcc, "-std=c++17", "--fmad=false", "-arch=sm_80", "-Xcompiler=-Wall,-Wextra", "-ptx"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "ptx")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
