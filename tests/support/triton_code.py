"""What Triton's compiler makes of a kernel for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cuobjdump import tools

SM_80, SM_90, SM_100, SM_120 = (("cuda", capability, 32) for capability in (80, 90, 100, 120))
GFX942 = ("hip", "gfx942", 64)


def compile_kernel(
    kernel: Any, constants: dict[str, Any], target: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Compile a kernel of whose arguments memory, counts and numbers are addresses, and all other arguments integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from negmerge_fast.kernels import merge

    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    addresses = {"memory": "*i64", "counts": "*i64", "numbers": "*fp64"}
    types |= {name: kind for name, kind in addresses.items() if name in types}
    source = ASTSource(kernel, types, constants)  # the last has another name in Triton 3.2
    if target in (SM_100, SM_120) and merge.VERSION < (3, 3):
        pytest.skip("Triton 3.2 knows no sm_100 and no sm_120")
    try:
        return triton.compile(source, target=GPUTarget(*target), options=options)
    except Exception as error:
        if "ROCm linker" in str(error):
            pytest.skip("this version of Triton needs a linker of ROCm")
        raise


def machine_code(cubin: bytes, folder: Path) -> str:
    if (found := tools()) is None:
        pytest.skip("no cuobjdump to read the kernel with")
    (folder / "kernel.cubin").write_bytes(cubin)
    path = os.pathsep.join([found, os.environ.get("PATH", "")])
    done = subprocess.run(
        [f"{found}/cuobjdump", "-sass", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    return done.stdout
