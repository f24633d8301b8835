"""Merges that are stopped by an error, to be resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from interrupted import contents, make_models
from small_chunks import record_every_chunk

import negmerge_fast as nm


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and their merge without an interruption."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    nm.merge_checkpoints(folder / "base", [folder / "ft-0", folder / "ft-1"], folder / "expected", scale=0.9)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    for name in ("base", "ft-0", "ft-1"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "negmerge.json"}


def merge(folder: Path, **options: Any) -> nm.Report:
    options = {"scale": 0.9, "threads": 1, "resume": True, **options}
    return nm.merge_checkpoints(
        folder / "base", [folder / "ft-0", folder / "ft-1"], folder / "out", **options
    )


class Stop(Exception):
    pass


def interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, at: float = 0.5, **options: Any) -> None:
    """Merge until the fraction `at` is done, in small chunks, and stop."""
    record_every_chunk(monkeypatch)

    def progress(done: int, total: int) -> None:
        time.sleep(0.005)  # for more than one record
        if done > at * total:
            raise Stop

    with pytest.raises(Stop):
        merge(folder, progress=progress, **options)
    monkeypatch.undo()
