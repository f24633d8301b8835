"""Directories that are held open, and what lies in them.

A path leads to whatever lies there when it is used: where others may write, that can be another directory, or a symbolic link. What
is in an open directory is reached relative to it and without following links, so it stays in the directory that was checked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.reader import NOT_HERE, same_file
from .filesystem import RENAME_EXCHANGE, RENAME_NOREPLACE, lock, or_not_here, renameat2, sync

_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# One that may be written and not read can be opened so, but not listed.
_ENTERED = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
SCRATCH = ".negmerge-"
# All that is put into scratch directories: a directory of the user's may have such a name, too.
_SCRATCH_NAME = re.compile(rf"{re.escape(SCRATCH)}[0-9a-f]{{8}}")
_SCRATCH_FILES = {"file", "from", "to", "moved"}
# FUSE and NFS keep a removed file under such a name until it is closed, which may be a little later.
_HIDDEN, _CLOSING_S = (".fuse_hidden", ".nfs", ".cifs", ".smb"), 2.0


class Directory:
    """An open directory, as a context manager that closes it.

    Attributes:
        path: Where it was opened, for errors.
        descriptor: Its descriptor.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    @classmethod
    def at(cls, path: Path) -> Directory:
        """Open a directory by its path, also one that may not be listed."""
        with _located(path):
            return cls(path, os.open(path, _ENTERED))

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.descriptor != -1:
            os.close(self.descriptor)
            self.descriptor = -1

    def __truediv__(self, name: str) -> Entry:
        return Entry(self, name)

    def entries(self) -> list[Entry]:
        with _located(self.path):
            # A descriptor of its own: two threads that list by one get each a part of the names.
            descriptor = os.open(".", _LISTED, dir_fd=self.descriptor)
            try:
                return [Entry(self, name) for name in sorted(os.listdir(descriptor))]
            finally:
                os.close(descriptor)

    def folder(self, name: str) -> Directory:
        """Open a folder below, named by a relative path; "" is this one."""
        found = Directory(self.path, os.dup(self.descriptor))
        for part in name.split("/") if name else ():
            with found:
                found = (found / part).directory()
        return found

    def open(self, name: str, flags: int) -> int:
        """Open a file below, named by a relative path; returns its descriptor."""
        folder, _, last = name.rpartition("/")
        with self.folder(folder) as found:
            return (found / last).open(flags)

    def walk(self, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
        """Yield the relative path and the status of all below, a folder before what is in it."""
        for entry in self.entries():
            if (found := entry.stat()) is None:
                continue
            yield prefix + entry.name, found
            if stat.S_ISDIR(found.st_mode):
                with entry.directory() as inner:
                    yield from inner.walk(f"{prefix}{entry.name}/")

    def sync(self) -> bool:
        """Sync the names in it; returns False where that cannot be done."""
        try:
            descriptor = os.open(".", _LISTED, dir_fd=self.descriptor)
        except PermissionError:  # it may be written, but not read
            return False
        try:
            with _located(self.path):
                return sync(descriptor)
        finally:
            os.close(descriptor)

    def sync_tree(self) -> None:
        """Sync the names in it and in all folders below."""
        for entry in self.entries():
            if entry.is_directory():
                with entry.directory() as inner:
                    inner.sync_tree()
        self.sync()


class Entry(NamedTuple):
    """A name in an open directory."""

    parent: Directory
    name: str

    @property
    def path(self) -> Path:
        """The path, for errors."""
        return self.parent.path / self.name

    def stat(self) -> os.stat_result | None:
        """The status of what has this name, a link too; None if nothing has."""
        with _located(self.path):
            try:
                return os.stat(self.name, dir_fd=self.parent.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return None

    def exists(self) -> bool:
        return self.stat() is not None

    def is_directory(self) -> bool:
        found = self.stat()
        return found is not None and stat.S_ISDIR(found.st_mode)

    def directory(self) -> Directory:
        with _located(self.path):
            return Directory(self.path, os.open(self.name, _LISTED, dir_fd=self.parent.descriptor))

    def mkdir(self, mode: int) -> bool:
        """Make a directory; returns False if the name is taken."""
        with _located(self.path):
            try:
                os.mkdir(self.name, mode, dir_fd=self.parent.descriptor)
                return True
            except FileExistsError:
                return False

    def open(self, flags: int, mode: int = 0o600) -> int:
        """Open a file; returns its descriptor. A link is an error."""
        with _located(self.path):
            flags |= os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self.name, flags, mode, dir_fd=self.parent.descriptor)

    def read_bytes(self) -> bytes:
        """Read a file. A pipe that has been put in its place is empty, and not waited for."""
        with _located(self.path), open(self.open(os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.read()

    def write_bytes(self, content: bytes, mode: int = 0o600) -> None:
        """Write a file, and sync it."""
        descriptor = self.open(os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with _located(self.path), open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            sync(descriptor)

    def write_json(self, value: object, mode: int = 0o600, indent: int | None = None) -> None:
        """Write JSON to a file, and sync it."""
        self.write_bytes((json.dumps(value, indent=indent) + "\n").encode(), mode)

    def unlink(self) -> None:
        """Remove a file or a link, if there is one."""
        with _located(self.path), suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.parent.descriptor)

    def rename(self, to: Entry) -> None:
        """Rename a file or a directory, in place of what has the new name."""
        with _located(to.path):
            source, destination = self.parent.descriptor, to.parent.descriptor
            os.rename(self.name, to.name, src_dir_fd=source, dst_dir_fd=destination)

    def rename_with(self, to: Entry, flags: int) -> None:
        """renameat2: with RENAME_NOREPLACE or RENAME_EXCHANGE."""
        with _located(to.path):
            renameat2(self.parent.descriptor, self.name, to.parent.descriptor, to.name, flags)


def rename_to_new(source: Entry, to: Entry) -> bool:
    """Rename to a name that is not taken; returns whether the file system itself refuses to replace what has just come there."""
    try:
        source.rename_with(to, RENAME_NOREPLACE)
        return True
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    if not source.is_directory() and or_not_here(lambda: _hard_link(source, to)):
        source.unlink()
        return True
    if to.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to.path))
    source.rename(to)
    return False


def _hard_link(source: Entry, to: Entry) -> None:
    with _located(to.path):
        descriptors = source.parent.descriptor, to.parent.descriptor
        os.link(
            source.name, to.name, src_dir_fd=descriptors[0], dst_dir_fd=descriptors[1], follow_symlinks=False
        )


def exchange(first: Entry, second: Entry) -> bool:
    """Exchange two directories; returns False where that cannot be done in one step.

    overlayfs renames no directory of a lower layer, such as an image's.
    """
    return or_not_here(lambda: first.rename_with(second, RENAME_EXCHANGE), NOT_HERE | {errno.EXDEV})


def move_directory(source: Entry, to: Entry, first: str) -> bool:
    """Move a directory; returns False if that was done file by file, by one name before the others.

    What a killed call has moved may be there already. No file is replaced.
    """
    try:
        source.rename(to)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
    with source.directory() as before:
        to.mkdir(stat.S_IMODE(os.fstat(before.descriptor).st_mode))
        with to.directory() as after:
            for entry in sorted(before.entries(), key=lambda entry: entry.name != first):
                if entry.is_directory():
                    move_directory(entry, after / entry.name, first)
                else:
                    rename_to_new(entry, after / entry.name)
    _rmdir(source)
    return False


def _rmdir(entry: Entry) -> None:
    with _located(entry.path):
        os.rmdir(entry.name, dir_fd=entry.parent.descriptor)


def remove_tree(entry: Entry) -> None:
    """Remove whatever has a name, also a directory and all in it, of which some files may have been closed just now."""
    deadline = time.monotonic() + _CLOSING_S
    while entry.exists():
        try:
            _remove(entry)
        except OSError as error:
            closing = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOENT)
            if not closing or time.monotonic() > deadline:
                raise OSError(error.errno, error.strerror, str(entry.path)) from None
            time.sleep(0.01)


def _remove(entry: Entry) -> None:
    """Not by shutil.rmtree, which takes a directory for a link where FUSE numbers inodes anew."""
    if not entry.is_directory():
        return entry.unlink()
    with entry.directory() as inner:
        for each in inner.entries():
            _remove(each)
    _rmdir(entry)


def or_once_more(remove: Callable[[], None]) -> None:
    """Remove something, at the second attempt if the first fails, as on a disk that was full for a moment."""
    try:
        remove()
    except OSError:
        remove()


def remove_empty(entry: Entry) -> None:
    """Remove a directory, unless there is more in it than files that were closed just now."""
    deadline = time.monotonic() + _CLOSING_S
    while True:
        try:
            return _rmdir(entry)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise
            if time.monotonic() > deadline or not _holds_only_hidden(entry):
                return
            time.sleep(0.01)


def _holds_only_hidden(entry: Entry) -> bool:
    try:
        with entry.directory() as found:
            return all(each.name.startswith(_HIDDEN) for each in found.entries())
    except FileNotFoundError:
        return True


@contextmanager
def scratch_directory(parent: Directory) -> Iterator[Directory]:
    """Make a directory to try things out in, and remove it, and those that killed processes left."""
    remove_abandoned(parent)
    while (directory := _new_scratch(parent)) is None:
        pass
    with directory:
        try:
            yield directory
        finally:
            or_once_more(lambda: remove_tree(parent / directory.path.name))


def _new_scratch(parent: Directory) -> Directory | None:
    """Make a scratch directory and lock it; returns None if it was taken for an abandoned one meanwhile."""
    entry = parent / f"{SCRATCH}{os.urandom(4).hex()}"
    if not entry.mkdir(0o700):
        return None
    try:
        directory = entry.directory()
    except FileNotFoundError:
        return None
    _try_lock(directory)
    found = entry.stat()
    if found is not None and same_file(found, os.fstat(directory.descriptor)):
        return directory
    directory.close()
    return None


def remove_abandoned(parent: Directory) -> None:
    """Remove this user's scratch directories that nobody holds."""
    with suppress(OSError):
        for entry in parent.entries():
            found = entry.stat() if _SCRATCH_NAME.fullmatch(entry.name) else None
            if found and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                with entry.directory() as directory:
                    if _is_scratch(directory) and _try_lock(directory):
                        remove_tree(entry)


def _is_scratch(directory: Directory) -> bool:
    names = (os.path.basename(name) for name, _ in directory.walk())
    return all(name in _SCRATCH_FILES or name.startswith(_HIDDEN) for name in names)


def _try_lock(directory: Directory) -> bool:
    try:
        return lock(directory.descriptor, fcntl.LOCK_EX)
    except OSError:  # held; or a directory cannot be locked, as on NFS
        return False


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Name the whole path in errors of calls that take a name in a directory."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
