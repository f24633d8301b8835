"""The choice of a backend: with and without Triton."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import negmerge_fast as nm


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_works_the_same_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, negmerge_fast as nm
from negmerge_fast.cli import info
assert nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0).tolist() == [-1, -1, -1]
try:
    nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0, backend="triton")
except nm.InputError as error:
    print(error)
print(info.text())
"""
    printed = python(code)
    assert "backend 'triton' cannot run here: triton: cannot be imported" in printed
    assert re.search(r"^backend triton on .*: cannot be imported", printed, re.MULTILINE)


def test_a_merge_on_the_cpu_imports_no_triton() -> None:
    code = """
import sys, torch, negmerge_fast as nm
before = "triton" in sys.modules
nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0)
print(before, "triton" in sys.modules)
"""
    assert python(code) == "False False\n"


def test_triton_is_for_gpus_unless_it_is_interpreted() -> None:
    pytest.importorskip("triton")
    with pytest.raises(nm.InputError, match="triton: is for tensors on a GPU"):
        nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0, backend="triton")
