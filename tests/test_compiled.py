"""What the compilers made of the kernels: looked at, not run. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from negmerge_fast import _native

STREAMS = ("F64", "F32", "F16", "BF16")


def _cuobjdump() -> str | None:
    """On the path; or where the packages triton and nvidia-cuda-cuobjdump keep it."""
    places = [shutil.which("cuobjdump")]
    for package, inside in (
        ("triton", "backends/nvidia/bin"),
        ("nvidia", "cu13/bin"),
        ("nvidia", "cuda_cuobjdump/bin"),
    ):
        found = find_spec(package)
        places += [
            str(Path(folder) / inside / "cuobjdump")
            for folder in (found and found.submodule_search_locations) or []
        ]
    return next((place for place in places if place and Path(place).exists()), None)


@cache
def _dump(what: str) -> dict[str, str]:
    """The code of each kernel, by architecture and name: SASS or PTX."""
    if not _native.cuda:
        pytest.skip("built without CUDA")
    if (tool := _cuobjdump()) is None:
        pytest.skip("no cuobjdump")
    done = subprocess.run([tool, f"-{what}", _native.__file__], capture_output=True, text=True, check=True)
    kernels = {}
    for part in re.split(r"^Fatbin \w+ code:$", done.stdout, flags=re.MULTILINE)[1:]:
        arch = re.search(r"^arch = (\S+)", part, re.MULTILINE)
        pattern = (
            r"^\s+Function : (\S+)$"
            if what == "sass"
            else r"^\.(?:visible )?entry (\S+)\($|^\.visible \.entry (\S+)\("
        )
        pieces = re.split(pattern, part, flags=re.MULTILINE)
        del arch, pieces
    return kernels
