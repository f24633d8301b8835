"""The kernel for the hub, as it is built: what its modules import, and its digests. tests/libraries/test_hub_kernel.py loads it."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

HUB = Path(__file__).parents[2] / "hub"
ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}


@pytest.fixture
def build() -> dict[str, Any]:
    return runpy.run_path(str(HUB / "build.py"))


@pytest.fixture
def variants(tmp_path: Path, build: dict[str, Any]) -> list[Path]:
    found: list[Path] = build["build"](tmp_path)
    return found


def test_variants(variants: list[Path], tmp_path: Path) -> None:
    """A folder for each backend, with its backend in the metadata; names of modules that no other build has."""
    assert [each.relative_to(tmp_path / "build").name for each in variants] == [
        "torch-cuda",
        "torch-rocm",
        "torch-xpu",
    ]
    listed = [json.loads((each / "metadata.json").read_text()) for each in variants]
    assert [each["backend"]["type"] for each in listed] == ["cuda", "rocm", "xpu"]
    assert len({each["id"] for each in listed}) == 3 and all(each["id"].isidentifier() for each in listed)


def test_imports_are_relative_or_of_what_a_kernel_may_import(variants: list[Path]) -> None:
    for path in variants[0].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {str(node.module)}
            elif isinstance(node, ast.ImportFrom):
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert folder.is_dir() or folder.with_suffix(".py").is_file(), f"{path}: {ast.unparse(node)}"
                continue
            else:
                continue
            assert {name.split(".")[0] for name in names} <= ALLOWED, f"{path}: {ast.unparse(node)}"


def test_what_is_left_out_was_there(build: dict[str, Any]) -> None:
    """Each name of LEFT_OUT is a statement of kernels/merge.py, and the others are all there."""
    text = (HUB.parent / "kernels" / "merge.py").read_text()
    before, after = (ast.parse(each).body for each in (text, build["cut"](text)))
    gone = len(before) - len(after)
    assert gone == len(build["LEFT_OUT"])
    kept = [ast.unparse(node) for node in after]
    assert [each for each in map(ast.unparse, before) if each in kept] == kept


def test_digests(variants: list[Path]) -> None:
    for variant in variants:
        listed = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
        found = {
            str(path.relative_to(variant)): base64.b64encode(
                hashlib.sha256(path.read_bytes()).digest()
            ).decode()
            for path in variant.rglob("*.py")
        }
        assert listed == found


def test_a_build_replaces_what_was_built(variants: list[Path], tmp_path: Path, build: dict[str, Any]) -> None:
    (variants[0] / "core" / "former.py").touch()
    assert build["build"](tmp_path) == variants
    assert not (variants[0] / "core" / "former.py").exists()
