"""Staging directories without a merge."""

from __future__ import annotations

from pathlib import Path

from negmerge_fast.checkpoints.reader import File
from negmerge_fast.output.destination import Destination
from negmerge_fast.output.staging import Staging


def staging_for(path: Path, resume: bool = False) -> Staging:
    """The staging directory of an output that has no file but the base's, an empty one."""
    base = path.with_name("like")
    base.mkdir(exist_ok=True)
    (base / "model.safetensors").touch()
    files = {"model.safetensors": File.at(base / "model.safetensors")}
    return Staging(Destination.at(path, files, directory=True, overwrite=False), resume=resume)
