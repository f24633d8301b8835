"""What publishing will need beside a destination, tried out with small scratch files before anything is merged."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..checkpoints.reader import File
from ..core.errors import InputError
from .destination import Destination
from .directory import Directory, exchange, rename_to_new, scratch_directory
from .filesystem import lock, sync
from .reserve import refuse_full_disk


def try_inputs(files: Iterable[File]) -> None:
    """Read a sample of each file that will be read.

    Raises:
        InputError: If one may not be read.
        OSError: If reading fails.
    """
    for file in files:
        _ = file.sample


def try_destination(destination: Destination) -> list[str]:
    """Try what publishing will need, and remove every trace of it.

    Returns:
        What is less safe on this file system than elsewhere, a line each.

    Raises:
        InputError: If an older output may not be replaced.
        OSError: If the file system refuses what is needed.
    """
    path, staging, named = destination.path, destination.staging_path, destination.staging_path
    try:
        with Directory.at(path.parent) as parent, scratch_directory(parent) as scratch:
            named = path
            notes = list(_missing(destination, scratch))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(named)) from None
    refuse_full_disk(path.parent, path.parent, destination.files, _bytes_in(staging))
    _refuse_large_files(destination)
    if destination.overwrite and os.path.lexists(path):
        _refuse_irremovable(path)
    return notes


def refuse_full_disk_for(destinations: Sequence[Destination]) -> None:
    """Raise OSError if several outputs beside each other do not fit on the disk together."""
    if len(destinations) < 2:
        return
    parent = destinations[0].path.parent
    files = {f"{k}/{name}": f for k, each in enumerate(destinations) for name, f in each.files.items()}
    refuse_full_disk(parent, parent, files, sum(_bytes_in(each.staging_path) for each in destinations))


def _missing(destination: Destination, scratch: Directory) -> Iterator[str]:
    """Yield what is not here, and name what will be less safe for it."""
    path = destination.path
    with open((scratch / "file").open(os.O_RDWR | os.O_CREAT | os.O_EXCL), "rb+") as file:
        locked = lock(file.fileno(), fcntl.LOCK_EX)
        # The directory first: the file, which is empty, is on the disk with it.
        synced = scratch.sync() and sync(file.fileno()) and _may(path.parent, os.R_OK)
    if not locked:
        yield f"{path}: there are no file locks here: do not start two merges to it at once"
    if not synced:
        yield f"{path}: not everything can be synced here: a power loss soon after the merge may damage it"
    if not destination.directory:
        if not rename_to_new(scratch / "file", scratch / "moved"):
            yield f"{path}: a file that another program makes here as the merge ends may be replaced"
        (scratch / "moved").rename(scratch / "file")
        return
    for name in ("from", "to"):
        (scratch / name).mkdir(stat.S_IRWXU)
    if destination.overwrite and os.path.lexists(path) and not exchange(scratch / "from", scratch / "to"):
        yield f"{path}: cannot be replaced in one step here: for a moment there will be no output"
    with (scratch / "to").directory() as to:
        rename_to_new(scratch / "from", to / "moved")


def _bytes_in(folder: Path) -> int:
    """The bytes on the disk of all files in a directory; 0 if there is none."""
    total = 0
    for file in (Path(at, name) for at, _, names in os.walk(folder) for name in names):
        with suppress(FileNotFoundError):  # another run's, which has just removed it
            total += os.lstat(file).st_blocks * 512
    return total


def _refuse_large_files(destination: Destination) -> None:
    """Refuse files that are longer than this process may write (ulimit -f)."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    for name, file in destination.files.items():
        if limit != resource.RLIM_INFINITY and file.size > limit:
            path = destination.path / name if destination.directory else destination.path
            raise OSError(
                errno.EFBIG, f"{file.size:,} bytes, but files may have {limit:,} (ulimit -f)", str(path)
            )


def _refuse_irremovable(path: Path) -> None:
    """Refuse an older output that this user may not move or remove."""
    parent, own = os.lstat(path.parent), os.lstat(path)
    if parent.st_mode & stat.S_ISVTX and os.geteuid() not in (0, own.st_uid, parent.st_uid):
        raise InputError(f"{path}: another user's, who alone may replace it in this directory")
    for folder, _, _ in os.walk(path):
        if not _may(folder, os.W_OK | os.X_OK):
            raise InputError(f"{folder}: cannot be written, so {path} is not replaced")


def _may(path: str | Path, what: int) -> bool:
    return os.access(path, what, effective_ids=os.access in os.supports_effective_ids)
