"""Who may read an output: nobody who could not read all that went into it."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection
from pathlib import Path

from ..checkpoints.base import MANIFEST
from ..checkpoints.reader import File
from .destination import Destination, resolver

_READ_WRITE, _GROUP, _OTHERS, _ALL = 0o666, 0o070, 0o007, 0o777
# Entries of an access list (posix_acl_xattr.h).
_NAMED_USER, _NAMED_GROUP, _MASK = 0x02, 0x08, 0x10


class Permissions:
    """The modes of an output's files and directories, before the umask.

    A file gets what all inputs that went into it allow, and all directories that lead to these and not to the output too. A
    directory gets what that of the base allows.

    Args:
        destination: The output.
        groups: The groups that what is created may belong to.
    """

    def __init__(self, destination: Destination, groups: Collection[int]) -> None:
        self._destination, self._groups = destination, frozenset(groups)
        self._shared = {_identity(os.stat(folder)) for folder in destination.path.parents}
        self._modes: dict[Path, int] = {}
        self._real_path = resolver()

    def of_file(self, name: str) -> int:
        mode = _READ_WRITE
        for source in self._sources(name):
            mode &= self._readers(source.path)
        return mode | stat.S_IRUSR | stat.S_IWUSR

    def of_folder(self, folder: str) -> int:
        """The mode of a folder of the output; "" is the output itself."""
        name, file = next(iter(self._destination.files.items()))
        path = file.path.parents[name.count("/")] / folder
        return self._common(os.stat(path), path) | stat.S_IRWXU

    def _sources(self, name: str) -> Collection[File]:
        files, sources = self._destination.files, self._destination.sources
        if name == MANIFEST:  # it tells of all
            return {*files.values(), *(file for each in sources.values() for file in each)}
        return {files[name], *sources.get(name, ())}

    def _readers(self, path: Path) -> int:
        """Who may read and write a file, and may reach it."""
        real = self._real_path(path)
        return self._common(os.stat(real), real) & self._visitors(real.parent)

    def _visitors(self, folder: Path) -> int:
        """Who may reach what is in a directory."""
        if folder not in self._modes:
            found = os.stat(folder)
            search = 0o111 if _identity(found) in self._shared else self._common(found, folder) & 0o111
            above = self._visitors(folder.parent) if folder != folder.parent else _READ_WRITE
            self._modes[folder] = above & (search << 2 | search << 1)
        return self._modes[folder]

    def _common(self, found: os.stat_result, path: Path) -> int:
        """The permissions of a mode that hold for the groups of what is created."""
        mode = stat.S_IMODE(found.st_mode) & _ALL
        if acl := _acl(path, "access"):  # then the group's bits are the bound of its entries
            mode &= ~_GROUP & (~_OTHERS | _named(acl))
        if self._groups == {found.st_gid}:
            return mode
        # Its group is another: everybody may be in that one, and may not be.
        everybody = mode >> 3 & mode & 0o007
        return mode & stat.S_IRWXU | everybody << 3 | everybody


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def has_acl(path: Path | int, kind: str) -> bool:
    """Whether a file, or an open one, has an access list ("access"), or gives one to what is made in it ("default")."""
    return bool(_acl(path, kind))


def _acl(path: Path | int, kind: str) -> bytes:
    try:
        return os.getxattr(path, f"system.posix_acl_{kind}")
    except OSError:  # none, or none here
        return b""


def _named(acl: bytes) -> int:
    """What all users and groups that an access list names may do: an entry may give less than everybody has."""
    entries = list(struct.iter_unpack("<HHI", acl[4:]))
    permitted = 0o7
    for tag, permissions, _ in entries:
        if tag in (_NAMED_USER, _NAMED_GROUP):
            permitted &= permissions
    for tag, permissions, _ in entries:
        if tag == _MASK and permitted != 0o7:
            permitted &= permissions
    return permitted
