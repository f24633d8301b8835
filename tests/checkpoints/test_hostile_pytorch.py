"""PyTorch files that would run code, or lie: refused in one line, nothing is run, in bounded memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile_pytorch import ATTRIBUTES, CASES, GOOD, file, legacy, safetensors_zip, state
from in_process import Process
from stored_tensors import check

from negmerge_fast.checkpoints.formats import open_checkpoint
from negmerge_fast.checkpoints.reader import File
from negmerge_fast.checkpoints.zip_archive import read_archive
from negmerge_fast.core.errors import InputError

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    process = Process("torch")
    yield process
    process.close()


def test_the_corpus() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("make", [file, legacy])
def test_what_it_is_made_of_is_fine(tmp_path: Path, make: object) -> None:
    assert callable(make)
    (tmp_path / "m.pt").write_bytes(make(GOOD))
    assert torch.load(tmp_path / "m.pt", weights_only=True)["a"].tolist() == [1.5, -2.5]
    check(open_checkpoint(tmp_path / "m.pt"), {"a": torch.tensor([1.5, -2.5])})


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes_stand_for_no_method(tmp_path: Path, attribute: str) -> None:
    (tmp_path / "m.pt").write_bytes(file(state(ATTRIBUTES[attribute])))
    check(open_checkpoint(tmp_path / "m.pt"), {"a": torch.tensor([1.5, -2.5])})


@pytest.mark.parametrize("case", CASES)
def test_refused(process: Process, tmp_path: Path, case: str) -> None:
    (tmp_path / "m.pt").write_bytes(CASES[case]())
    status, out, err = process.negmerge(tmp_path, "inspect", "m.pt")
    assert (status, out) == (2, ""), (out, err[-2000:])
    assert err.startswith("negmerge: m.pt: ") and err.endswith("\n") and err[:-1].isprintable(), err[:2000]
    assert len(err) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_a_pickle_renamed(tmp_path: Path) -> None:
    for content in (file(GOOD), legacy(GOOD)):
        (tmp_path / "m.safetensors").write_bytes(content)
        with pytest.raises(
            InputError, match=r"a PyTorch file, not a safetensors file \(rename it to m\.pt\)"
        ):
            open_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(safetensors_zip())
    assert list(open_checkpoint(tmp_path / "m.safetensors").tensors) == ["a"]


def test_a_long_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(file(GOOD))
    archive = read_archive(File.at(tmp_path / "m.pt"))
    with pytest.raises(InputError, match=rf"data.pkl of {len(GOOD)} bytes, expected at most 99"):
        archive.read("data.pkl", 99)
