"""The Triton kernel of the hub, loaded by Hugging Face's package `kernels` from a local folder, in Triton's interpreter."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from library_models import MARKS

pytest.importorskip("triton")
pytestmark = MARKS

ROOT = Path(__file__).parents[2]

# In a process of its own: TRITON_INTERPRET is read when triton is imported. Elsewhere than in the checkout, whose folder kernels/ is no package.
SCRIPT = """
import sys
from itertools import product
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm

import negmerge_fast as nm
from negmerge_fast.core.reference import plain_merge

variant = Path(sys.argv[1])
kernel = get_local_kernel(variant)
(loaded,) = get_loaded_kernels()
assert loaded.module is kernel and str(loaded.metadata.name) == "negmerge-fast"
assert "negmerge_fast.kernels" not in sys.modules  # what runs is the kernel of the folder
assert str(Digest.hash_variant(DigestAlgorithm.SHA256, variant)) == str(loaded.metadata.digest)

torch.manual_seed(0)
HOSTILE = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, 1e-7, 65504.0])
bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(bits[a.element_size()]), b.view(bits[b.element_size()]))


TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
for base_dtype, dtype, (agreement, vectors) in product(TYPES, TYPES, ((1.0, False), (0.6, True))):
    bases = [torch.randn(numel) for numel in (3001, 0, 7)]
    versions = [[(0.0 if vectors else base) + torch.randn(len(base)) for base in bases] for _ in range(3)]
    for each in (bases[0], versions[0][0], versions[1][0]):
        each[torch.randint(3001, (9,))] = HOSTILE
    bases = [base.to(base_dtype) for base in bases]
    versions = [[each.to(dtype) for each in version] for version in versions]
    expected = [plain_merge(base, [v[i] for v in versions], 0.9, agreement, vectors) for i, base in enumerate(bases)]
    options = {"min_agreement": agreement, "task_vectors": vectors}
    alone = kernel.merge(bases[0], [v[0] for v in versions], 0.9, **options)
    assert same(alone, expected[0][0]), (base_dtype, dtype, options)
    counts = kernel.merge_(bases, versions, 0.9, **options)
    for base, count, (out, *counted) in zip(bases, counts, expected, strict=True):
        assert same(base, out) and count.tolist() == counted, (base_dtype, dtype, options)

# Mixed types, not contiguous, not aligned.
base = torch.randn(40, 30)
models = [torch.randn(30, 40).T, torch.randn(1201).bfloat16()[1:].view(40, 30), torch.randn(40, 30).double()]
assert same(kernel.merge(base, models, 0.7), nm.merge(base, [each.contiguous() for each in models], scale=0.7))

for wrong in (
    lambda: kernel.merge(base, [base.int()], 0.5),
    lambda: kernel.merge(base, [base[1:]], 0.5),
    lambda: kernel.merge(base, [], 0.5),
    lambda: kernel.merge(base, [base], float("nan")),
    lambda: kernel.merge_([base], [[base, base]], 0.5),
    lambda: kernel.merge_([base.T], [[base.T]], 0.5),
):
    try:
        wrong()
    except ValueError as error:
        assert "expected" in str(error) and "\\n" not in str(error)
    else:
        raise AssertionError("not refused")
"""


def run(script: str, variant: Path, folder: Path) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(variant)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    found: Path = runpy.run_path(str(ROOT / "hub" / "build.py"))["build"](tmp_path)[0]
    return found


def test_it_loads_and_gives_the_same_bits(variant: Path, tmp_path: Path) -> None:
    run(SCRIPT, variant, tmp_path)


def test_older_versions_find_it_in_a_folder_of_its_name(variant: Path, tmp_path: Path) -> None:
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("negmerge_fast", sys.argv[1] + "/negmerge_fast/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["negmerge_fast"] = kernel
spec.loader.exec_module(kernel)
print(*kernel.__all__, kernel.merge.__name__, kernel.merge_.__name__)
"""
    assert run(script, variant, tmp_path).split() == ["merge", "merge_", "merge", "merge_"]
