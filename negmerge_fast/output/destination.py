"""Where an output goes, and whether negmerge may write there."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..checkpoints.base import MANIFEST
from ..checkpoints.formats import open_checkpoint
from ..checkpoints.reader import File
from ..core.errors import InputError
from .directory import Directory
from .manifest import altered, load, manifest_path

# Where an older output, or the manifest of an older single file, is kept in the staging directory while it is replaced.
FORMER = "former"


class OccupiedError(InputError):
    """The place of an output is taken: by an older output, or by a merge that is under way."""


@dataclass(frozen=True)
class Destination:
    """The place of an output.

    Attributes:
        path: Its real path; only the last component may be a symbolic link.
        files: The files of the base, by their names in the output. A single file is at path, whatever its one name.
        directory: Whether the output is a directory, or a single file.
        overwrite: Whether an older output of negmerge is replaced.
        inputs: All files and directories that are read.
        sources: The files of the inputs that go into a file of the output, by its name; those of the base alone may be omitted.
    """

    path: Path
    files: Mapping[str, File]
    directory: bool
    overwrite: bool
    inputs: Sequence[Path] = ()
    sources: Mapping[str, Sequence[File]] = field(default_factory=dict)

    @classmethod
    def at(
        cls,
        path: Path,
        files: Mapping[str, File],
        *,
        directory: bool,
        overwrite: bool,
        inputs: Sequence[Path] = (),
        sources: Mapping[str, Sequence[File]] | None = None,
    ) -> Destination:
        # Not abspath, for which a/.. is nothing even where a is a link; and a link at the very end stays one.
        named = path.name not in ("", "..")
        try:
            real = os.path.realpath(path.parent if named else path)
        except FileNotFoundError:
            raise InputError(f"{path}: the current directory is gone, expected an absolute path") from None
        resolved = Path(real, path.name) if named else Path(real)
        if not resolved.name:
            raise InputError(f"{path}: the root of the file system, expected a path to a new place")
        return cls(resolved, files, directory, overwrite, inputs, sources or {})

    @property
    def manifest_path(self) -> Path:
        return manifest_path(self.path, self.directory)

    @property
    def staging_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.negmerge")

    @property
    def is_half_replaced(self) -> bool:
        """Whether a merge was stopped when the manifest of a single file was replaced, and the file was not yet."""
        staged = [self.staging_path / "output" / name for name in self.files]
        kept = (self.staging_path / FORMER, *staged)
        return not self.directory and all(map(os.path.lexists, kept))


def check(destination: Destination) -> None:
    """Refuse a destination that must not be written, because of an input or of another file there."""
    path = destination.path
    for each in (destination.staging_path, destination.manifest_path):
        try:
            os.lstat(each)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # its name is too long, say
            raise InputError(f"{path}: {error.strerror}, expected a path to a new place") from None
    refuse_overlap(destination)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such directory, expected one to hold {path.name}")
    check_existing(destination)


def refuse_overlap(destination: Destination) -> None:
    """Refuse an output that is, holds or lies in an input, by whatever names the two are given.

    A bind mount, or a file system that does not tell upper case from lower case, gives one directory several names.
    """
    path, staging = destination.path, destination.staging_path

    # Asked once for each directory: there may be hundreds of inputs, on a network file system.
    @cache
    def ancestors(parent: Path) -> frozenset[object]:
        return frozenset(key for each in (parent, *parent.parents) for key in identifiers(each))

    identifiers, real_path = cache(lambda path: frozenset(_identifiers(path))), resolver()

    def lineage(path: Path) -> tuple[frozenset[object], frozenset[object]]:
        real = real_path(path)
        return identifiers(real), ancestors(real.parent)

    (own, above), (own_staging, _) = lineage(path), lineage(staging)
    for given in destination.inputs:
        found, found_above = lineage(given)
        if own_staging & (found | found_above):
            raise InputError(f"{given}: the input is inside {staging}, which is cleared for the output")
        if own & found:
            raise InputError(f"{path}: the output is the input {given}")
        if own & found_above:
            raise InputError(f"{path}: the output is above the input {given}")
        if above & found and given.is_dir():
            raise InputError(f"{path}: the output is inside the input {given}")


def resolver() -> Callable[[Path], Path]:
    """Return what resolves the links in paths, and those of each directory once."""
    real_parent = cache(os.path.realpath)

    def real_path(path: Path) -> Path:
        if path.name in ("", "..") or os.path.islink(path):
            return Path(os.path.realpath(path))
        return Path(real_parent(path.parent), path.name)

    return real_path


def _identifiers(path: Path) -> Iterator[object]:
    """What tells a path from others: itself, if it is a real one, and device and inode."""
    yield path
    try:
        found = os.stat(path)
    except OSError:  # nothing is there, or nothing that could be an input
        return
    yield found.st_dev, found.st_ino


def check_existing(destination: Destination) -> None:
    """Refuse an older output that is not to be replaced, or is not as a manifest of negmerge lists it."""
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
    mounts = _mounts_in(path)
    if os.path.ismount(path) or path in mounts:
        raise InputError(f"{path}: a mount point, expected a path that can be replaced")
    if directory:
        with Directory.at(path.parent) as parent, (parent / path.name).directory() as older:
            refuse_unknown_files(destination, older)
        if mounts:  # what is mounted there would be emptied, or could not be removed
            raise InputError(f"{mounts[0]}: a mount point, so {path} is not replaced")
    else:
        open_checkpoint(path)
    refuse_changed_files(destination, path)


def refuse_existing(destination: Destination) -> None:
    """Refuse an older output, unless it is to be replaced."""
    if os.path.lexists(destination.path) and not destination.overwrite:
        raise OccupiedError(f"{destination.path}: exists already (--overwrite replaces what negmerge wrote)")


def _mounts_in(path: Path) -> list[Path]:
    """The mount points at and below a path, also those of the same file system, as far as /proc tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    escaped = [line.split(b" ")[4] for line in lines]
    every = [re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), point) for point in escaped]
    return [point for point in map(Path, map(os.fsdecode, every)) if point.is_relative_to(path)]


def refuse_unknown_files(destination: Destination, older: Directory) -> None:
    """Refuse to replace a directory, which is or was at the destination, with files that negmerge did not write."""
    # A run that was killed may have moved a part of the output, its manifest first.
    former = destination.staging_path / FORMER / MANIFEST
    known = {MANIFEST, *_listed(older.path / MANIFEST), *_listed(former)}
    inputs = {key for path in destination.inputs for key in _identifiers(path)}
    for name, found in older.walk():
        if stat.S_ISDIR(found.st_mode):
            if (found.st_dev, found.st_ino) in inputs:
                raise InputError(
                    f"{destination.path / name}: an input, so {destination.path} is not replaced"
                )
        elif name not in known:
            raise InputError(
                f"{destination.path / name}: not negmerge's, so {destination.path} is not replaced"
            )


def refuse_changed_files(destination: Destination, older: Path) -> None:
    """Refuse to replace files that are not as negmerge wrote them: another program's model may be in their place.

    Args:
        destination: The destination.
        older: Where the older output is.
    """
    path, former = destination.path, destination.staging_path / FORMER
    # A run that was killed may have moved a part of a directory, its manifest first, or replaced the manifest of a single file.
    if destination.directory:
        manifests = [older / MANIFEST, former / MANIFEST]
    else:
        manifests = [destination.manifest_path, former]
    differences = []
    for manifest in filter(os.path.lexists, manifests):
        files = {name: older / name if destination.directory else older for name in _listed(manifest)}
        if (differs := altered(manifest, files)) is None:
            return
        differences.append(differs)
    if differences:
        raise InputError(f"{differences[0]}: {path} is not replaced")
    if not destination.directory or any(older.iterdir()):
        raise InputError(
            f"{destination.manifest_path}: missing, so {path} is not negmerge's, and is not replaced"
        )


def _listed(manifest: Path) -> list[str]:
    """The files that a manifest lists."""
    try:
        files = load(manifest).get("files")
    except (OSError, InputError):
        return []
    return list(files) if isinstance(files, dict) else []
