"""Small models in the test's folder, and merging them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import family, save_model

import negmerge_fast as nm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with base, ft-0 and ft-1, of one file of weights each."""
    for path, tensors in zip(("base", "ft-0", "ft-1"), family(n=2), strict=True):
        save_model(tmp_path / path, tensors)
    return tmp_path


def merge(folder: Path, **options: Any) -> nm.Report:
    return nm.merge_checkpoints(
        folder / "base", [folder / "ft-0", folder / "ft-1"], folder / "out", scale=0.9, **options
    )
