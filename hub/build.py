"""Builds the Triton kernel of NegMerge as Hugging Face's package `kernels` loads it.

python hub/build.py [DIR]        DIR/build/torch-cuda and others, for a kernel repository of the hub; the usual one is build/hub-kernel

Each variant has package.py as its __init__.py, the modules of core/ and kernels/ that it needs, with their relative imports, and a
metadata.json. What kernels/merge.py has for the package's own batches is left out: it needs NumPy, which a kernel of the hub may not import.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "negmerge-fast"
# By convention, 0 is a version whose interface may still change.
VERSION = 0
# Triton's GPUs. The modules are the same; metadata.json names the backend.
BACKENDS = ("cuda", "rocm", "xpu")
COPIED = {
    "hub/package.py": "__init__.py",
    **{
        f"negmerge_fast/core/{name}.py": f"core/{name}.py"
        for name in ("__init__", "batch", "choices", "dtypes", "errors", "rule")
    },
    **{f"kernels/{name}.py": f"kernels/{name}.py" for name in ("launch", "merge")},
}
# Of kernels/merge.py: functions and imports.
LEFT_OUT = {
    "why_not",
    "merge",
    "merge_in_few_programs",
    "_launch",
    "launch_merge",
    "on",
    "numpy",
    "core.descriptors",
}
# Older versions of `kernels` look for the package in a folder of its name.
COMPATIBLE = '''"""The kernel, for versions of `kernels` that look for it here."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location(f"_{__name__.replace('.', '_')}_flat", _path)
_module = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({name: getattr(_module, name) for name in __all__})
'''


def cut(text: str) -> str:
    """A module's text without the statements that LEFT_OUT names."""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef):
            names = {node.name}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            names = {node.module} if isinstance(node, ast.ImportFrom) else set()
        if names & LEFT_OUT:
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines)


def build(folder: Path) -> list[Path]:
    """Write every variant; returns their folders."""
    files = {to: (ROOT / path).read_text(encoding="utf-8") for path, to in COPIED.items()}
    files["kernels/merge.py"] = cut(files["kernels/merge.py"])
    files[f"{NAME.replace('-', '_')}/__init__.py"] = COMPATIBLE
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in sorted(files.items())}
    content = hashlib.sha256(b"".join(digests.values())).hexdigest()[:12]
    variants = []
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path, text in files.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_text(text, encoding="utf-8")
        metadata = {
            "name": NAME,
            # Two versions of it in one process are two modules.
            "id": f"_{NAME.replace('-', '_')}_{backend}_{content}",
            "version": VERSION,
            "license": "MIT",
            "backend": {"type": backend},
            "python-depends": [],
            "digest": {
                "algorithm": "sha256",
                "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()},
            },
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        variants.append(variant)
    return variants


if __name__ == "__main__":
    for built in build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub-kernel"):
        print(built)
