"""cuobjdump, which disassembles CUDA kernels: where it is, and what it makes of the compiled library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from negmerge_fast.backends.native import build_info


def tools() -> str | None:
    """The folder of cuobjdump and nvdisasm: on PATH, or in the package nvidia-cuda-cuobjdump or triton."""
    folders = [Path(tool).parent for tool in [shutil.which("cuobjdump")] if tool]
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        if found := find_spec(package):
            folders += [Path(folder, inside) for folder in found.submodule_search_locations or []]
    return next((str(folder) for folder in folders if (folder / "cuobjdump").exists()), None)


@cache
def _dumped(what: str) -> str:
    """What cuobjdump prints of the library."""
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
    return done.stdout


@cache
def kernel_functions(what: str, function: str) -> dict[tuple[str, str], str]:
    """The code of each function of this name in the library, by architecture and name.

    what: "sass", "ptx" or "res-usage", for which the code is what the function uses.
    """
    found = {}
    for part in re.split(r"^Fatbin .* code:$", _dumped(what), flags=re.MULTILINE):
        for text in re.split(r"Function :? ?|^\.(?:entry|func) ", part, flags=re.MULTILINE)[1:]:
            arch = re.search(r"^arch = (\w+)$", part, re.MULTILINE)
            name = re.search(rf"{function}[fd].*", text.partition("\n")[0])
            if name and ("{" in text or what != "ptx"):  # not only declared
                assert arch, text[:200]
                found[arch[1], name[0]] = text
    return found
