"""The arrows of the house: who may import whom; and that importing stays lean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import negmerge_fast

ROOT = Path(negmerge_fast.__file__).parent

# What each room may import of the package. Kernels know no files; plan, checkpoints and writer know no kernels.
ARROWS = {
    "__init__": {"job", "rule", "stream", "tensors", "verify"},
    "__main__": {"cli"},
    "backends": {"kernels", "native", "reference", "rule", "trust"},
    "budget": {"checksums", "rule"},
    "build_info": set(),
    "checkpoints": {"checkpoints", "checksums", "layout", "rule"},
    "checksums": set(),
    "cli": {
        "__init__",
        "backends",
        "checkpoints",
        "demo",
        "info",
        "measure",
        "plan",
        "ranks",
        "rule",
        "signals",
        "stream",
        "verify",
    },
    "costs": {"backends", "checkpoints", "lanes", "plan", "rule"},
    "demo": {"__init__", "rule"},
    "flat": {"layout", "rule"},
    "foreign": {"rule"},
    "job": {
        "backends",
        "budget",
        "checkpoints",
        "costs",
        "journal",
        "lanes",
        "manifest",
        "plan",
        "ranks",
        "rule",
        "unread",
        "workers",
        "writer",
    },
    "journal": {"checkpoints", "linux", "plan", "rule", "workers"},
    "info": {"__init__", "backends", "costs"},
    "kernels": {"kernels", "rule", "table"},
    "lanes": set(),
    "layout": {"rule"},
    "linux": set(),
    "manifest": {"__init__", "checkpoints", "rule"},
    "measure": {"__init__", "backends", "budget", "measure", "reference", "rule"},
    "native": {"__init__", "build_info", "rule", "table"},
    "ops": {"backends", "flat", "layout", "overlap", "rule"},
    "overlap": {"rule"},
    "plan": {"checkpoints", "layout", "rule"},
    "process": set(),
    "ranks": {"rule"},
    "reference": {"rule"},
    "rule": set(),
    "sharded": {"rule"},
    "signals": {"rule"},
    "stream": {
        "backends",
        "budget",
        "checkpoints",
        "costs",
        "job",
        "lanes",
        "manifest",
        "plan",
        "process",
        "rule",
        "unread",
        "writer",
    },
    "table": {"rule"},
    "tensors": {"backends", "flat", "foreign", "layout", "ops", "overlap", "process", "rule", "sharded"},
    "trust": {"reference", "rule"},
    "unread": {"plan", "rule", "workers"},
    "verify": {
        "backends",
        "budget",
        "checkpoints",
        "checksums",
        "lanes",
        "manifest",
        "plan",
        "rule",
        "workers",
    },
    "workers": {"plan"},
    "writer": {"checkpoints", "checksums", "linux", "manifest", "rule"},
}


# Each module with its place in the package: kernels/ lies beside it.
MODULES = {path: path.relative_to(ROOT).parts for path in ROOT.rglob("*.py")}
MODULES |= {path: ("kernels", path.name) for path in (ROOT.parent / "kernels").glob("*.py")}
ROOMS = {parts[0].removesuffix(".py") for parts in MODULES.values()}


def imports(path: Path) -> set[str]:
    """The rooms of the package that a module imports, anywhere in it."""
    package = MODULES[path][:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            above = ["negmerge_fast", *package][: len(package) + 2 - node.level]
            modules = [".".join([*above, node.module or name.name]) for name in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "negmerge_fast":
                room = parts[1] if len(parts) > 1 else "__init__"
                found.add(room if room in ROOMS else "__init__")
    return found


def test_every_room_imports_only_what_it_may() -> None:
    for path, parts in MODULES.items():
        room = parts[0].removesuffix(".py")
        assert imports(path) <= ARROWS[room], f"{path.name} imports {imports(path) - ARROWS[room]}"
    assert set(ARROWS) == ROOMS


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_and_planning_imports_no_torch() -> None:
    heavy = (
        "import sys; print([m for m in ('torch', 'triton', 'transformers', 'sklearn') if m in sys.modules])"
    )
    for module in ("negmerge_fast", "negmerge_fast.cli", "negmerge_fast.plan", "negmerge_fast.stream"):
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
d_k   = x_k - b                        (or x_k itself, when the inputs are task vectors)
agree = all d_k > 0  or  all d_k < 0
out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b
"""
    project = ROOT.parent
    for place in (
        ROOT / "rule.py",
        ROOT / "reference.py",
        project / "README.md",
        project / "csrc" / "merge_rule.h",
        project / "kernels" / "merge.py",
    ):
        lines = place.read_text(encoding="utf-8").splitlines()
        assert formula in "\n".join(line.strip("/ ") for line in lines), place


def test_the_kernels_know_no_files_and_no_torch() -> None:
    own = {path.name for path in (ROOT.parent / "csrc").iterdir()}
    allowed = {
        "algorithm", "atomic", "cmath", "cpuid.h", "cstdint", "cstring", "exception", "limits", "stdexcept", "string", "thread",
        "type_traits", "vector", "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "immintrin.h", "pybind11/pybind11.h", "pybind11/stl.h",
    }  # fmt: skip
    for name in own:
        if name.endswith((".h", ".cpp", ".cu")):
            text = (ROOT.parent / "csrc" / name).read_text(encoding="utf-8")
            assert set(re.findall(r'#include [<"](.*)[>"]', text)) <= allowed | own, name
