"""The compiled library: what is recorded of its build, and what it depends on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from negmerge_fast.backends import native
from negmerge_fast.core.batch import Batch, Signature, segment_at
from negmerge_fast.core.errors import InputError
from negmerge_fast.core.rule import Rule


def test_build_info_is_true() -> None:
    info = native.build_info()
    if info["cpu"] is None:
        from negmerge_fast import _native

        assert _native.cuda == (info["cuda"] is None) == bool(info["cuda_architectures"])
    else:
        assert importlib.util.find_spec("negmerge_fast._native") is None
    for reason in (info["cpu"], info["cuda"]):
        assert reason is None or "/csrc/" not in reason, f"our own source does not compile: {reason}"


def test_library_loads_neither_cuda_nor_torch() -> None:
    pytest.importorskip("negmerge_fast._native")
    code = "import negmerge_fast._native; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    files = {Path(line.split()[-1]).name for line in maps.splitlines() if ".so" in line}
    assert any(name.startswith("_native.") for name in files)
    assert not [name for name in files if any(part in name for part in ("cuda", "nvidia", "torch", "c10"))]


def test_without_a_record_the_package_was_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "build_info.py"))
    info = native.build_info()
    assert "pip install" in info["cpu"] and "pip install" in info["cuda"]
    assert info["cuda_architectures"] == []


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("negmerge_fast._native")
    monkeypatch.setenv("NEGMERGE_CPU", "abacus")
    with pytest.raises(InputError, match=r"NEGMERGE_CPU: 'abacus', expected one of .*baseline"):
        native.instruction_set()
    monkeypatch.setenv("NEGMERGE_CPU", "baseline")
    assert native.instruction_set() == "baseline"
    monkeypatch.delenv("NEGMERGE_CPU")
    assert native.instruction_set() == native.library().instruction_sets[0]


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_counts_are_a_table_in_memory(segments: int) -> None:
    """A row for each segment, of no segment too, and no NumPy."""
    pytest.importorskip("negmerge_fast._native")
    held = [np.full(5, value, np.float32) for value in (1.0, 2.0, 3.0)]
    signature = Signature("F32", ("F32", "F32"), False)
    segment = segment_at(5, signature, [array.ctypes.data for array in held], held)._replace(out=None)
    counts = native.merge_cpu(Batch("cpu", signature, [segment] * segments), Rule(0.5))
    assert counts.tolist() == [[5, 0, 0]] * segments
    assert not isinstance(counts, np.ndarray)


def test_a_table_goes_along_with_a_launch_or_is_uploaded_with_the_counts_behind_it() -> None:
    table = np.arange(7)
    counts, address, words = native.place_table(table, (2, 3), "cpu", uploaded=False)
    assert (address, words) == (table.ctypes.data, 7)
    assert torch.equal(counts, torch.zeros(2, 3, dtype=torch.int64))
    counts, address, words = native.place_table(table, (2, 3), "cpu", uploaded=True)
    assert words == 0 and counts.data_ptr() == address + table.nbytes
    memory = counts.as_strided((13,), (1,), 0)
    assert memory.data_ptr() == address and memory.tolist() == [*range(7), *[0] * 6]
    assert counts.shape == (2, 3)
