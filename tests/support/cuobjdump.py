"""Where cuobjdump is, which disassembles CUDA kernels."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path


def tools() -> str | None:
    """The folder of cuobjdump and nvdisasm: on PATH, or in the package nvidia-cuda-cuobjdump or triton."""
    folders = [Path(tool).parent for tool in [shutil.which("cuobjdump")] if tool]
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        if found := find_spec(package):
            folders += [Path(folder, inside) for folder in found.submodule_search_locations or []]
    return next((str(folder) for folder in folders if (folder / "cuobjdump").exists()), None)
