"""The machine code that nvcc makes of the CUDA kernel: read, not run, so that no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache

import pytest
from cuobjdump import tools

from negmerge_fast.backends.native import build_info

# Arithmetic and storage type, whether models are stored as the base, and rule, as they stand in a mangled name.
KERNELS = [
    f"merge_tilesI{arithmetic}NS_{len(storage)}{storage}ELb{same_dtype}ENS_{len(rule)}{rule}E"
    for arithmetic, storages in (("f", ("F32", "F16", "BF16")), ("d", ("F64", "F32", "F16", "BF16")))
    for storage in storages
    for same_dtype in ((0, 1) if arithmetic == "f" or storage == "F64" else (0,))
    for rule in ("Unanimous", "Majority")
]


@cache
def _kernels(what: str) -> dict[tuple[str, str], str]:
    """The code of each kernel in the library, by architecture and name; what: "sass" or "ptx"."""
    if (reason := build_info()["cuda"]) is not None:
        pytest.skip(f"no CUDA kernel: {reason}")
    if (folder := tools()) is None:
        pytest.skip("no cuobjdump to read the CUDA kernel with")
    from negmerge_fast import _native

    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    done = subprocess.run(
        [f"{folder}/cuobjdump", f"-{what}", _native.__file__],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    found = {}
    for part in re.split(r"^Fatbin .* code:$", done.stdout, flags=re.MULTILINE):
        for text in re.split(r"Function : |^\.entry ", part, flags=re.MULTILINE)[1:]:
            arch = re.search(r"^arch = (\w+)$", part, re.MULTILINE)
            name = next((kernel for kernel in KERNELS if kernel in text.partition("\n")[0]), None)
            assert arch and name, text[:200]
            found[arch[1], name] = text
    return found


def test_every_kernel_is_there_for_every_architecture() -> None:
    architectures = [f"sm_{number}" for number in build_info()["cuda_architectures"]]
    for what in ("sass", "ptx"):
        assert set(_kernels(what)) == {(arch, name) for arch in architectures for name in KERNELS}


def test_machine_code_loads_16_bytes_at_a_time_and_keeps_to_its_registers() -> None:
    for (arch, name), code in _kernels("sass").items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} for {arch} uses local memory"
        # One base, and models in groups of 8, 4, 2 and 1; two loads at a time where registers are short, one where more so.
        short = re.search("merge_tilesId.*(F32|F16).*Majority", name)
        assert len(re.findall(r"\bLDG\.E\S*\.128\b", code)) >= (4 if short else 8), f"{name} for {arch}"
        assert re.search(r"\bSTG\.E\S*\.(128|64)\b", code), f"{name} for {arch}"


def test_intermediate_code_divides_as_ieee_does_and_fuses_nothing_else() -> None:
    for (arch, name), code in _kernels("ptx").items():
        width = 64 if "merge_tilesId" in name else 32
        assert f"div.rn.f{width}" in code, f"{name} for {arch}"
        assert not re.search(r"\bdiv\.(approx|full)|\.ftz|\brcp\.|\bmad\.\S*f(32|64)", code), (
            f"{name} for {arch}"
        )
        # But for the quick quotient's two: the remainder, and what it adds to the first quotient.
        fused = re.findall(r"\bfma\.rn\.f\d+ \t?(%\w+), (%\w+), (%\w+), (%\w+);", code)
        assert len(fused) == len(re.findall(r"\bfma\.", code)) and len(fused) % 2 == 0, f"{name} for {arch}"
        assert bool(fused) == ("Unanimous" in name), f"{name} for {arch}"
        for remainder, quotient in zip(fused[::2], fused[1::2], strict=True):
            assert quotient[1] == remainder[0], f"{name} for {arch}"
