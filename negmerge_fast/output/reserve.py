"""The files of an output, reserved in its staging directory before anything is written to them."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ..checkpoints.reader import NOT_HERE, File, naming
from ..core.errors import InputError
from .destination import Destination
from .directory import Directory, Entry
from .filesystem import TMPFS, allocate, filesystem_type, or_not_here, set_size, sync
from .permissions import Permissions, has_acl


def permissions_in(directory: Directory, destination: Destination) -> Permissions:
    """The permissions of what is created in a directory: in its group, or in this process's."""
    found = os.fstat(directory.descriptor)
    if has_acl(directory.descriptor, "default"):  # its entries get the bits of a group
        return Permissions(destination, ())
    inherited = found.st_mode & stat.S_ISGID
    return Permissions(destination, {found.st_gid} if inherited else {os.getegid(), found.st_gid})


def create_files(staged: Entry, destination: Destination, permissions: Permissions, is_durable: bool) -> None:
    """Create the folders and files of an output, each of its size.

    Args:
        staged: What becomes the output's directory, or holds its single file.
        destination: The output.
        permissions: Their permissions.
        is_durable: Whether they are on the disk afterwards.
    """
    staged.mkdir(permissions.of_folder("") if destination.directory else stat.S_IRWXU)
    parents = {str(parent) for name in destination.files for parent in PurePosixPath(name).parents}
    with staged.directory() as directory:
        for folder in sorted(parents - {"."}):
            with directory.folder(os.path.dirname(folder)) as above:
                (above / os.path.basename(folder)).mkdir(permissions.of_folder(folder))
        for name, like in destination.files.items():
            with directory.folder(os.path.dirname(name)) as above, naming(destination.path):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                descriptor = (above / os.path.basename(name)).open(flags, permissions.of_file(name))
                try:
                    _reserve(staged.parent, descriptor, like.size)
                    if is_durable or not like.size:  # it may not be opened again before a crash
                        sync(descriptor)
                finally:
                    os.close(descriptor)


def _reserve(directory: Directory, descriptor: int, size: int) -> None:
    # tmpfs reserves a page by fetching it, on one thread; the workers fetch pages faster as they write.
    if filesystem_type(directory.path) == TMPFS:
        set_size(descriptor, size)
    elif size:
        allocate(descriptor, size)


def refuse_other_files(staged: Directory, destination: Destination, permissions: Permissions) -> None:
    """Refuse to resume an output of which a file is missing, has another size, or is some other file of the user's.

    Permissions that the inputs do not give any more are taken from the files.
    """
    for name, file in destination.files.items():
        if (found := _inspect(staged, name, permissions.of_file(name))) != f"{file.size} bytes":
            raise InputError(
                f"{staged.path / name}: {found}, expected {file.size} bytes of unfinished output "
                "(without --resume it is made anew)"
            )


def _inspect(staged: Directory, name: str, allowed: int) -> str:
    """Say what a file is, and leave it no more permissions than allowed."""
    try:
        descriptor = staged.open(name, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return "missing"
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            return "not a file of its own"
        if (mode := stat.S_IMODE(found.st_mode)) & ~allowed:
            or_not_here(lambda: os.fchmod(descriptor, mode & allowed))
    finally:
        os.close(descriptor)
    return f"{found.st_size} bytes"


def refuse_full_disk(path: Path, folder: Path, files: Mapping[str, File], reclaimed: int = 0) -> None:
    """Raise OSError if files do not fit.

    Args:
        path: A directory on the file system.
        folder: The directory to name.
        files: What will be written.
        reclaimed: Bytes that will be removed before.
    """
    needed = sum(file.size for file in files.values())
    try:
        disk = shutil.disk_usage(path)
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
        return
    # Some network file systems know of no size at all.
    if disk.total and needed > disk.free + reclaimed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {disk.free:,} are free", str(folder))
