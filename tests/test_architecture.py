"""What importing the package loads, the formula in its files, and what the kernels include."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import negmerge_fast

ROOT = Path(negmerge_fast.__file__).parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_and_planning_imports_no_torch() -> None:
    heavy = (
        "import sys; print([m for m in ('torch', 'triton', 'transformers', 'sklearn') if m in sys.modules])"
    )
    core = [path.stem for path in (ROOT / "core").glob("*.py") if path.stem not in ("__init__", "reference")]
    for module in (
        "negmerge_fast",
        ", ".join(f"negmerge_fast.core.{name}" for name in sorted(core)),
        "negmerge_fast.cli.main",
        "negmerge_fast.streaming.plan",
        "negmerge_fast.streaming.api",
    ):
        assert run(f"import {module}; {heavy}") == "[]\n"


def test_public_names_are_all_there() -> None:
    for name in negmerge_fast.__all__:
        assert getattr(negmerge_fast, name) is not None
    assert set(negmerge_fast.__all__) <= set(dir(negmerge_fast))
    try:
        negmerge_fast.nonsense  # noqa: B018
    except AttributeError as error:
        assert "nonsense" in str(error)


def test_the_formula_stands_in_the_same_words_everywhere() -> None:
    formula = """
d_k   = x_k - b                        (b rounded to the type of x_k; or x_k itself, of task vectors)
agree = all d_k > 0  or  all d_k < 0
out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b
"""
    project = ROOT.parent
    for path in (
        ROOT / "core" / "rule.py",
        ROOT / "core" / "reference.py",
        project / "README.md",
        project / "csrc" / "merge_rule.h",
        project / "kernels" / "merge.py",
    ):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert formula in "\n".join(line.strip("/ ") for line in lines), path


def test_the_kernels_know_no_files_and_no_torch() -> None:
    # These know files; bindings.cpp alone includes them.
    of_files = {"merge_chunk.h", "merge_chunk.cpp"}
    own = {path.name for path in (ROOT.parent / "csrc").iterdir()} - of_files
    allowed = {
        "algorithm", "atomic", "cmath", "cpuid.h", "cstdint", "cstdlib", "cstring", "exception", "limits", "memory", "new", "stdexcept", "string", "thread",
        "type_traits", "vector", "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "immintrin.h", "pybind11/pybind11.h", "pybind11/stl.h",
    }  # fmt: skip
    for name in own:
        if name.endswith((".h", ".cpp", ".cu")):
            text = (ROOT.parent / "csrc" / name).read_text(encoding="utf-8")
            included = set(re.findall(r'#include [<"](.*)[>"]', text))
            assert included - (of_files if name == "bindings.cpp" else set()) <= allowed | own, name


def test_triton_kernels_import_only_core() -> None:
    """kernels/ has no __init__.py, so import-linter does not see it."""
    for path in (ROOT.parent / "kernels").glob("*.py"):
        imported = re.findall(
            r"^\s*(?:from|import) (\.[\w.]*)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert all(re.fullmatch(r"\.\.core\.\w+|\.\w*", module) for module in imported), (path, imported)
        assert "negmerge_fast." not in " ".join(
            re.findall(r"^\s*(?:from|import) (negmerge.*)", path.read_text(), re.MULTILINE)
        )
