"""The machine code that nvcc makes of the CUDA kernel of the other methods: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuobjdump import kernel_functions
from sass import instructions

from negmerge_fast.backends.native import build_info

# Arithmetic and storage type, and what is tallied, as they stand in a mangled name: few, since each takes time to compile.
KERNELS = [
    f"family_tilesI{arithmetic}NS_{len(storage)}{storage}ELi{tallied}E"
    for arithmetic, storages, totals in (
        ("f", ("F32", "F16", "BF16"), (0, 2, 4, 8, 15)), ("d", ("F64", "F32", "F16", "BF16"), (15,)),
    )
    for storage in storages
    for tallied in totals
]  # fmt: skip


def _kernels(what: str) -> dict[tuple[str, str], str]:
    """The code of each kernel, by architecture and those of KERNELS."""
    return {
        (arch, next(kernel for kernel in KERNELS if kernel in name)): text
        for (arch, name), text in kernel_functions(what, "family_tilesI").items()
    }


def test_every_kernel_is_there_for_every_architecture() -> None:
    architectures = [f"sm_{number}" for number in build_info()["cuda_architectures"]]
    for what in ("sass", "ptx"):
        assert set(_kernels(what)) == {(arch, name) for arch in architectures for name in KERNELS}


def test_nothing_is_kept_in_local_memory_and_registers_suffice_for_several_blocks() -> None:
    for (arch, name), text in _kernels("res-usage").items():
        used = {what: int(count) for what, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        # Of 65,536, for 2 blocks of 256 threads; for one with doubles.
        most = 128 if "family_tilesIf" in name else 255
        assert used["REG"] <= most and used["STACK"] == used["LOCAL"] == 0, f"{name} for {arch}: {used}"
    for (arch, name), text in _kernels("sass").items():
        names = {instruction.name for instruction in instructions(text).values()}
        assert not [each for each in names if each.startswith(("LDL", "STL"))], f"{name} for {arch}"


def test_intermediate_code_divides_as_ieee_does_and_fuses_only_products_of_zero() -> None:
    for (arch, name), code in _kernels("ptx").items():
        width = 64 if "family_tilesId" in name else 32
        assert not re.search(r"\bdiv\.(approx|full)|\.ftz|\brcp\.|\bmad\.\S*f(32|64)", code), (
            f"{name} for {arch}"
        )
        assert ("ELi8E" in name) != (f"div.rn.f{width}" in code), (
            f"{name} for {arch}"
        )  # of the largest alone there is no mean
        zero = "0d0000000000000000" if width == 64 else "0f00000000"
        constants = dict(re.findall(r"\bmov\.\S+ \t?(%\w+), (0[df]\w+);", code))
        factors = re.findall(r"\bfma\.rn\.f\d+ \t?%\w+, (%?\w+), (%?\w+), %?\w+;", code)
        assert factors and len(factors) == len(re.findall(r"\bfma\.", code)), f"{name} for {arch}"
        assert all(zero in [constants.get(each, each) for each in pair] for pair in factors), (
            f"{name} for {arch}"
        )


@pytest.mark.slow
def test_nvcc_warns_of_nothing(tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on PATH")
    source = Path(__file__).parents[2] / "csrc" / "family_cuda.cu"
    command = [nvcc, "-std=c++17", "--fmad=false", "-arch=sm_80", "-Xcompiler=-Wall,-Wextra", "-ptx"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "ptx")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
