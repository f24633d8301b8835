"""The machine code that nvcc makes of the CUDA kernel for deltas: read, not run, so that no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuobjdump import kernel_functions
from sass import Instruction, instructions, smallest_loop

from negmerge_fast.backends.native import build_info

# Arithmetic type, and what base and means are stored as, as they stand in a mangled name: a type that was named before is a
# back-reference, S2_ for the base's.
KERNELS = [
    f"apply_tilesI{arithmetic}NS_{len(base)}{base}E{'S2_' if means == base else f'NS_{len(means)}{means}E'}E"
    for arithmetic, wide, bases in (("f", "F32", ("F32", "F16", "BF16")), ("d", "F64", ("F64", "F32", "F16", "BF16")))
    for base in bases
    for means in (wide, "BF16")
]  # fmt: skip


def _kernels(what: str) -> dict[tuple[str, str], str]:
    """The code of each kernel, by architecture and those of KERNELS."""
    return {
        (arch, next(kernel for kernel in KERNELS if kernel in name)): text
        for (arch, name), text in kernel_functions(what, "apply_tilesI").items()
    }


def test_every_kernel_is_there_for_every_architecture() -> None:
    architectures = [f"sm_{number}" for number in build_info()["cuda_architectures"]]
    for what in ("sass", "ptx"):
        assert set(_kernels(what)) == {(arch, name) for arch in architectures for name in KERNELS}


def test_nothing_is_kept_in_local_memory_and_registers_suffice_for_eight_blocks() -> None:
    for (arch, name), text in _kernels("res-usage").items():
        used = {what: int(count) for what, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        assert used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == 0, f"{name} for {arch}: {used}"
    for (arch, name), text in _kernels("sass").items():
        names = {instruction.name for instruction in instructions(text).values()}
        assert not [each for each in names if each.startswith(("LDL", "STL"))], f"{name} for {arch}"


def _loop(text: str) -> list[Instruction]:
    """The loop over the elements in a tile's mask, of which each thread takes four at a time."""
    found = smallest_loop(
        instructions(text), lambda path: _count(path, "LDS") == 4 and _count(path, "FMUL") >= 4
    )
    assert found
    return found


def _count(path: list[Instruction], name: str) -> int:
    return sum(instruction.name.startswith(name) for instruction in path)


# nvcc 13.0 needs 118 to 155 on sm_80 to sm_120.
@pytest.mark.parametrize("base", ["F32", "F16", "BF16"])
def test_the_loop_has_few_instructions_and_all_its_loads_are_under_way_at_once(base: str) -> None:
    """A mean and an element of the base for each of four: of 1,024 threads, 24 KiB of a processor for BF16."""
    means = "S2_" if base == "F32" else "NS_3F32E"
    for (arch, name), text in _kernels("sass").items():
        if name != f"apply_tilesIfNS_{len(base)}{base}E{means}E":
            continue
        loop = _loop(text)
        assert len(loop) <= 170, f"{name} for {arch}: {len(loop)}"
        first_store = next(i for i, each in enumerate(loop) if each.name.startswith("STG"))
        assert _count(loop[:first_store], "LDG") == 8, f"{name} for {arch}"


def test_the_base_is_copied_16_bytes_at_a_time() -> None:
    for (arch, name), text in _kernels("sass").items():
        code = instructions(text).values()
        assert sum(each.is_wide_load for each in code) >= 2, f"{name} for {arch}"
        assert sum(each.is_wide_store for each in code) >= 2, f"{name} for {arch}"


def test_intermediate_code_fuses_nothing() -> None:
    for (arch, name), code in _kernels("ptx").items():
        assert not re.search(r"\bfma\.|\.ftz|\bmad\.\S*f(32|64)|\bdiv\.\S*f(32|64)", code), (
            f"{name} for {arch}"
        )
        assert "mul.rn.f" in code and "sub.rn.f" in code, f"{name} for {arch}"


@pytest.mark.slow
def test_nvcc_warns_of_nothing(tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on PATH")
    source = Path(__file__).parents[2] / "csrc" / "apply_cuda.cu"
    command = [nvcc, "-std=c++17", "--fmad=false", "-arch=sm_80", "-Xcompiler=-Wall,-Wextra", "-ptx"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "ptx")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
