"""What became of the compiled part, _native, when the package was built; setup.py writes it beside the library."""

from __future__ import annotations

import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TypedDict


class BuildInfo(TypedDict):
    cpu: str | None  # why there is no CPU kernel; None: there is one
    cuda: str | None  # the same of the CUDA kernel
    cuda_architectures: list[int]  # that it has machine code for; others start from intermediate code


def build_info() -> BuildInfo:
    # Each Python has its own library, and its own file: several may share one source folder.
    path = Path(__file__).with_name("_native" + EXTENSION_SUFFIXES[0]).with_suffix(".json")
    try:
        info: BuildInfo = json.loads(path.read_text())
    except FileNotFoundError:
        reason = "negmerge_fast was never installed for this Python, which compiles it: pip install -e ."
        return {"cpu": reason, "cuda": reason, "cuda_architectures": []}
    return info
