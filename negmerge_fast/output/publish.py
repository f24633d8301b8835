"""Where an output goes: whether negmerge may write there, and moving a finished output from its staging directory.

One rename publishes an output, so OUT is the old one or the new one, and never a part of either. Where a file system cannot
exchange directories, replacing one takes two renames, and OUT is missing in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.base import MANIFEST
from ..checkpoints.formats import open_checkpoint
from ..checkpoints.reader import File, naming
from ..core.errors import InputError
from .filesystem import exchange, move_directory, rename_to_new, sync_directory
from .manifest import load, manifest_path
from .staging import FORMER, Staging, staging_path


@dataclass(frozen=True)
class Destination:
    """The place of an output.

    Attributes:
        path: Its real path; only the last component may be a symbolic link.
        files: The files of the base, by their names in the output. A single file is at path, whatever its one name.
        directory: Whether the output is a directory, or a single file.
        overwrite: Whether an older output of negmerge is replaced.
    """

    path: Path
    files: Mapping[str, File]
    directory: bool
    overwrite: bool

    @classmethod
    def at(cls, path: Path, files: Mapping[str, File], *, directory: bool, overwrite: bool) -> Destination:
        # Not abspath, for which a/.. is nothing even where a is a link; and a link at the very end stays one.
        named = path.name not in ("", "..")
        real = os.path.realpath(path.parent if named else path)
        resolved = Path(real, path.name) if named else Path(real)
        if not resolved.name:
            raise InputError(f"{path}: the root of the file system, expected a path to a new place")
        return cls(resolved, files, directory, overwrite)

    @property
    def manifest_path(self) -> Path:
        return manifest_path(self.path, self.directory)


def check(destination: Destination, inputs: Iterable[Path]) -> None:
    """Refuse a destination that must not be written, because of an input or of another file there."""
    path, staging = destination.path, staging_path(destination.path)
    for each in (staging, destination.manifest_path):
        try:
            os.lstat(each)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # its name is too long, say
            raise InputError(f"{path}: {error.strerror}, expected a path to a new place") from None
    _refuse_overlap(path, staging, inputs)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such directory, expected one to hold {path.name}")
    _check_existing(destination)


def _refuse_overlap(path: Path, staging: Path, inputs: Iterable[Path]) -> None:
    real, real_staging = Path(os.path.realpath(path)), Path(os.path.realpath(staging))
    for given in inputs:
        found = Path(os.path.realpath(given))
        if real_staging == found or real_staging in found.parents:
            raise InputError(f"{given}: the input is inside {staging}, which is cleared for the output")
        if real == found or real in found.parents or (found in real.parents and found.is_dir()):
            relation = "is" if real == found else "is above" if real in found.parents else "is inside"
            raise InputError(f"{path}: the output {relation} the input {given}")


def _check_existing(destination: Destination) -> None:
    path, directory, manifest = destination.path, destination.directory, destination.manifest_path
    # A manifest of negmerge's whose single file is gone may be replaced.
    if not directory and os.path.lexists(manifest) and not _listed(manifest):
        raise InputError(f"{manifest}: not negmerge's, expected no other file of this name")
    if not os.path.lexists(path):
        return
    refuse_existing(destination)
    if path.is_symlink() or path.is_dir() != directory:
        kind = "directory" if directory else "regular file"
        raise InputError(f"{path}: exists and is not a {kind}: not replaced")
    if os.path.ismount(path):
        raise InputError(f"{path}: a mount point, expected a directory that can be replaced")
    if directory:
        _refuse_unknown_files(destination, path)
    else:
        open_checkpoint(path)


def refuse_existing(destination: Destination) -> None:
    """Refuse an older output, unless it is to be replaced."""
    if os.path.lexists(destination.path) and not destination.overwrite:
        raise InputError(f"{destination.path}: exists already (--overwrite replaces what negmerge wrote)")


def _refuse_unknown_files(destination: Destination, folder: Path) -> None:
    """Refuse to replace a directory, which is or was at the destination, with files that negmerge did not write."""
    # A run that was killed may have moved a part of the output there, its manifest first.
    former = staging_path(destination.path) / FORMER
    known = {*destination.files, MANIFEST, *_listed(folder / MANIFEST), *_listed(former / MANIFEST)}
    for found in sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        if (name := str(found.relative_to(folder))) not in known:
            raise InputError(
                f"{destination.path / name}: not negmerge's, so {destination.path} is not replaced"
            )


def _listed(manifest: Path) -> list[str]:
    """The files that a manifest lists: a list of names, or an object with their names as keys."""
    try:
        files = load(manifest).get("files")
    except (OSError, InputError):
        return []
    return [name for name in files if isinstance(name, str)] if isinstance(files, (list, dict)) else []


def publish(destination: Destination, staging: Staging) -> None:
    """Move a finished output to its destination."""
    _check_existing(destination)
    if destination.directory:
        _move(destination, staging, staging.staged)
    else:
        _move_with_manifest(destination, staging)
    sync_directory(destination.path.parent)


def _move_with_manifest(destination: Destination, staging: Staging) -> None:
    """Move a single file, after its manifest.

    A crash in between leaves the new manifest beside an older output or beside none: `negmerge verify` reports it, and the
    next merge replaces it. In the other order a crash would leave an output with no manifest, or with that of another.
    """
    [name], manifest = destination.files, destination.manifest_path
    with naming(manifest):
        former = manifest.read_bytes() if manifest.exists() else None
    try:
        os.replace(staging.file(MANIFEST), manifest)
        _move(destination, staging, staging.file(name))
    except BaseException:
        if former is None:
            manifest.unlink(missing_ok=True)
        else:
            with naming(manifest):
                manifest.write_bytes(former)
        raise


def _move(destination: Destination, staging: Staging, staged: Path) -> None:
    """Move a directory or a file to the destination by one rename."""
    if not (destination.overwrite and os.path.lexists(destination.path)):
        rename_to_new(staged, destination.path)
    elif destination.directory:
        _exchange(destination, staging)
    else:
        os.replace(staged, destination.path)


def _exchange(destination: Destination, staging: Staging) -> None:
    """Exchange an older output with the new one; the staging directory then holds the older."""
    staging.mark_exchange()
    if exchange(staging.staged, destination.path):
        _refuse_late_unknown_files(destination, staging)
        return
    try:
        if not move_directory(destination.path, staging.former, MANIFEST):
            staging.notes.append(
                f"{destination.path}: was replaced file by file: its directory cannot be moved"
            )
        _refuse_unknown_files(destination, staging.former)
        os.rename(staging.staged, destination.path)
    except BaseException:
        staging.put_back()
        raise


def _refuse_late_unknown_files(destination: Destination, staging: Staging) -> None:
    """Check the older output once more after the exchange, for files that came since the last check."""
    try:
        _refuse_unknown_files(destination, staging.staged)
    except InputError:
        exchange(staging.staged, destination.path)
        raise
