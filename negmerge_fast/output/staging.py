"""The staging directory of an output: .OUT.negmerge/ beside OUT, where all files are complete before any of them is published.

Only its owner may enter it, and all that is in it is reached through its descriptor. A lock marks it as in use. A directory that
a killed run left behind is not locked: the next run clears it, or resumes it. Several processes may write one output: rank 0
creates the files and publishes, and all hold the lock. Where a file system has no locks, it is used without one; preflight.py
says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..checkpoints.base import MANIFEST
from ..checkpoints.reader import naming, same_file
from ..core.errors import InputError
from ..core.hashing import hash_of
from .destination import FORMER, Destination, OccupiedError
from .directory import (
    Directory,
    Entry,
    move_directory,
    or_once_more,
    remove_abandoned,
    remove_empty,
    remove_tree,
    scratch_directory,
)
from .filesystem import lock
from .permissions import Permissions
from .reserve import create_files, permissions_in, refuse_full_disk, refuse_other_files

_LOCK, _MARK, _STAGED, _JOURNAL = "lock", "exchange", "output", "journal-"
_RANKS = ("rank-", "share-")  # the latter of early versions
_MAX_TRIES = 1000  # of a directory that others remove again and again
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Staging:
    """A staging directory, as a context manager: on exit it is removed, or kept for the next run, and unlocked.

    Args:
        destination: The output.
        resume: Whether unfinished output is kept for the next run.

    Attributes:
        path: Its path, for errors.
        notes: What a user should know of the end of a merge, a line each.
    """

    def __init__(self, destination: Destination, *, resume: bool = False) -> None:
        self.destination, self.resume = destination, resume
        self.path = destination.staging_path
        self.notes: list[str] = []
        self._parent: Directory | None = None
        self._directory: Directory | None = None
        self._lock = -1
        self._is_locked = False  # False where there are no locks
        self._is_owner = True
        self._is_left = False

    @property
    def parent(self) -> Directory:
        """The directory of the output."""
        assert self._parent is not None
        return self._parent

    @property
    def directory(self) -> Directory:
        assert self._directory is not None
        return self._directory

    @property
    def staged(self) -> Entry:
        """The output while it is here; a single file is in it, beside its manifest."""
        return self.directory / _STAGED

    @property
    def former(self) -> Entry:
        """Where an older output is for a moment, or the manifest of an older single file."""
        return self.directory / FORMER

    @property
    def published(self) -> Entry:
        """The output at its destination."""
        return self.parent / self.destination.path.name

    @property
    def published_manifest(self) -> Entry:
        """The manifest of a single file, at its destination."""
        return self.parent / self.destination.manifest_path.name

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._lock != -1:
                self._leave(is_published=kind is None)
        finally:
            self._close()

    def _leave(self, is_published: bool) -> None:
        # Rank 0 may have been stopped when it had published, and have left it to the others.
        may_remove = (is_published and self._is_owner) or self._is_last()
        is_kept = self._is_left or (not is_published and self.resume and self.journals())
        if may_remove and not (is_kept and not self._was_published()):
            self._try_to(self._remove)
        self._unlock()
        # Only now: FUSE and NFS keep what is removed while it is open, by this rank or another.
        if not (self.directory / _LOCK).exists():
            self._try_to(lambda: remove_empty(self.parent / self.path.name))

    def _try_to(self, remove: Callable[[], None]) -> None:
        """Remove something; if that fails, the next run does it. On NFS, others may have a file of an older output open."""
        try:
            or_once_more(remove)
        except OSError as error:
            self.notes.append(
                f"{self.path}: left behind ({error.strerror}): the next merge to here removes it"
            )

    def _unlock(self) -> None:
        descriptor, self._lock = self._lock, -1
        os.close(descriptor)

    def _close(self) -> None:
        _IN_USE.discard(self)
        if self._lock != -1:
            self._unlock()
        for directory in (self._directory, self._parent):
            if directory is not None:
                directory.close()

    def let_go(self) -> None:
        """Close all in a forked child: it must not hold the lock, nor remove anything."""
        with suppress(OSError):
            self._close()

    def open(self) -> None:
        """Lock the directory for this process alone. It may resume or clear what an earlier run left."""
        self._acquire(fcntl.LOCK_EX)
        self.put_back()
        if self._was_published():
            self._clear()

    def let_join(self) -> None:
        """Let the other ranks share the lock."""
        if self._is_locked:
            with naming(self.path / _LOCK):
                lock(self._lock, fcntl.LOCK_SH)

    def join(self) -> None:
        """Share the lock of rank 0, which creates the files and publishes."""
        self._is_owner = False
        self._acquire(fcntl.LOCK_SH)

    def remove_finished(self) -> None:
        """Remove what a run left that published its output and was killed then, unless it is in use, or another job's."""
        self.remove_scratch()
        if os.path.lexists(self.path):
            with suppress(InputError, OSError), self:
                self._acquire(fcntl.LOCK_EX)
                if not self._was_published() and len(self.directory.entries()) > 1:  # more than the lock
                    self.leave_to_others()

    def remove_scratch(self) -> None:
        """Remove what killed runs left that had not begun yet."""
        with suppress(OSError), Directory.at(self.path.parent) as parent:
            remove_abandoned(parent)

    def leave_to_others(self) -> None:
        """Keep what is here, which is another job's."""
        self._is_left = True

    def _is_last(self) -> bool:
        """Whether no other process holds the lock: then none writes, and none can join."""
        if not self._is_locked:
            return self._is_owner
        try:
            lock(self._lock, fcntl.LOCK_EX)
            return self._is_lock(self._lock)
        except OSError:
            return False

    def _is_lock(self, descriptor: int) -> bool:
        """Whether an open file is the one that has the lock's name."""
        named = (self.directory / _LOCK).stat()
        return named is not None and same_file(os.fstat(descriptor), named)

    def _acquire(self, kind: int) -> None:
        _IN_USE.add(self)
        self._parent = Directory.at(self.path.parent)
        entry = self.parent / self.path.name
        for _ in range(_MAX_TRIES):
            self._directory, is_new = None, entry.mkdir(stat.S_IRWXU)
            try:
                self._directory = _open_own(entry)
                self._refuse_unlocked_files()
                self._open_lock(kind)
                if self._lock != -1:
                    if is_new:  # a power loss must not take its name and leave others
                        self.directory.sync()
                    return
            except FileNotFoundError:  # its holder has just finished and removed the directory
                pass
            except BaseException:
                if is_new and self._directory is not None:
                    (self.directory / _LOCK).unlink()
                    remove_empty(entry)
                raise
            if self._directory is not None:
                self._directory.close()
        raise InputError(f"{self.path}: others remove it all the time, expected negmerge's own")

    def _open_lock(self, kind: int) -> None:
        """Open the lock file and lock it, unless its holder has just removed it."""
        descriptor = (self.directory / _LOCK).open(os.O_RDWR | os.O_CREAT)
        try:
            with naming(self.path / _LOCK):
                self._is_locked = lock(descriptor, kind)
                if self._is_lock(descriptor):
                    self._lock = descriptor
        except BlockingIOError:
            raise OccupiedError(
                f"{self.destination.path}: another negmerge is writing it (it holds {self.path / _LOCK})"
            ) from None
        finally:
            if self._lock != descriptor:
                os.close(descriptor)

    def _refuse_unlocked_files(self) -> None:
        """Refuse a directory without the lock file that all of negmerge's files lie beside."""
        if (found := self.directory.entries()) and _LOCK not in [entry.name for entry in found]:
            raise InputError(f"{found[0].path}: not negmerge's, expected nothing of others in {self.path}")

    def journals(self) -> list[Entry]:
        """The journals that an earlier run left."""
        return [entry for entry in self.directory.entries() if entry.name.startswith(_JOURNAL)]

    def journal(self, rank: int) -> Entry:
        return self.directory / f"{_JOURNAL}{rank}"

    def write_rank_result(self, rank: int, value: Mapping[str, object]) -> None:
        """Hand a result to rank 0, as a file since it may be large."""
        (self.directory / f"rank-{rank}.json").write_json(value)

    def read_rank_result(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / f"rank-{rank}.json").read_bytes())
        return found

    def open_file(self, name: str, flags: int) -> int:
        """Open a file of the output; returns its descriptor."""
        return self.directory.open(f"{_STAGED}/{name}", flags)

    def read_file(self, name: str) -> BinaryIO:
        return open(self.open_file(name, os.O_RDONLY), "rb")

    def write_manifest(self, manifest: Mapping[str, object]) -> None:
        """Write the manifest beside the output's files, and sync it and all names."""
        with self.staged.directory() as staged:
            (staged / MANIFEST).unlink()  # of an earlier run, which may have given it other permissions
            (staged / MANIFEST).write_json(manifest, self._permissions.of_file(MANIFEST), indent=2)
        self.directory.sync_tree()

    @cached_property
    def _permissions(self) -> Permissions:
        return permissions_in(self.directory, self.destination)

    def mark(self) -> None:
        """Mark the output that is about to be published, so that a run after a crash knows what was.

        An older output is here then, if it was exchanged, and the journals do not speak of it. What is marked is the new
        manifest's hash: the number of an inode may change.
        """
        with self.staged.directory() as staged:
            marked = hash_of((staged / MANIFEST).read_bytes())
        (self.directory / _MARK).write_json(marked)
        self.directory.sync()

    def keep_manifest(self) -> None:
        """Keep the manifest of an older single file, until the file is replaced too."""
        if found := self.published_manifest.stat():
            self.former.write_bytes(self.published_manifest.read_bytes(), stat.S_IMODE(found.st_mode))
            self.directory.sync()

    def _was_published(self) -> bool:
        """Whether what was marked is at its destination."""
        if not self._is_marked():
            return False
        if self.destination.directory:
            return True
        [name] = self.destination.files
        try:
            os.close(self.open_file(name, os.O_RDONLY))
            return False
        except FileNotFoundError:
            return True

    def _is_marked(self) -> bool:
        """Whether the manifest at the destination is the one that was marked."""
        try:
            if self.destination.directory:
                with self.published.directory() as output:
                    found = (output / MANIFEST).read_bytes()
            else:
                found = self.published_manifest.read_bytes()
            return bool(json.loads((self.directory / _MARK).read_bytes()) == hash_of(found))
        except (OSError, ValueError):
            return False

    def put_back(self) -> None:
        """Give an older output, or its manifest, its place again if it was not replaced to the end."""
        if self._was_published():
            return
        directory, former = self.destination.directory, self.former.stat()
        if directory and former and stat.S_ISDIR(former.st_mode):
            move_directory(self.former, self.published, MANIFEST)
        elif directory or not self._is_marked():  # the older manifest is still in its place
            return
        elif former and stat.S_ISREG(former.st_mode):
            self.former.rename(self.published_manifest)
        elif not self.published.exists():
            self.published_manifest.unlink()
        else:
            return
        self.parent.sync()

    def create(self) -> None:
        """Create the files of a new output, in place of any unfinished one."""
        self._clear()
        refuse_full_disk(self.path, self.path.parent, self.destination.files)
        create_files(self.staged, self.destination, self._permissions, is_durable=self.resume)

    def refuse_incomplete(self) -> None:
        """Refuse to resume an output of which a file is missing or is not what was created."""
        with self.staged.directory() as staged:
            refuse_other_files(staged, self.destination, self._permissions)

    def _clear(self) -> None:
        if found := self.journals():  # first, and for good: they speak of what is removed next
            for entry in found:
                entry.unlink()
            self.directory.sync()
        self.put_back()
        remove_tree(self.former)
        remove_tree(self.staged)
        for entry in self.directory.entries():
            if entry.name.startswith(_RANKS):
                entry.unlink()
        # Last: while it is here, a later run knows that the output was published.
        (self.directory / _MARK).unlink()

    def _remove(self) -> None:
        self._clear()
        # The lock file last, also on the disk: until it is gone, no other process can hold the lock.
        self.directory.sync()
        (self.directory / _LOCK).unlink()


# Those of this process that hold a directory.
_IN_USE: weakref.WeakSet[Staging] = weakref.WeakSet()


def _let_go() -> None:
    for staging in list(_IN_USE):
        staging.let_go()


os.register_at_fork(after_in_child=_let_go)


def _open_own(entry: Entry) -> Directory:
    """Open a directory that only this user may write in: others could put links and files of their own there."""
    try:
        directory = entry.directory()
    except PermissionError:
        if (found := entry.stat()) and found.st_uid != os.geteuid():
            raise _of_another_user(entry.path, found) from None
        raise
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        is_link = os.path.islink(entry.path)
        kind = "a symbolic link" if is_link else "not a directory"
        raise InputError(f"{entry.path}: {kind}, expected a directory of negmerge's own") from None
    try:
        _refuse_others(directory, entry.parent)
    except BaseException:
        directory.close()
        raise
    return directory


def _of_another_user(path: Path, found: os.stat_result) -> InputError:
    return InputError(f"{path}: belongs to user {found.st_uid}, expected a directory of negmerge's own")


def _refuse_others(directory: Directory, parent: Directory) -> None:
    found = os.fstat(directory.descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_MAY_WRITE:
        # Some file systems give all files one owner or one mode.
        with scratch_directory(parent) as scratch:
            descriptor = (scratch / "file").open(os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            own = os.fstat(descriptor)
            os.close(descriptor)
        if found.st_uid != own.st_uid:
            raise _of_another_user(directory.path, found)
        if found.st_mode & ~own.st_mode & _OTHERS_MAY_WRITE:
            mode = stat.S_IMODE(found.st_mode)
            raise InputError(f"{directory.path}: others may write in it (mode {mode:o}), expected mode 700")
    if found.st_mode & 0o777 != stat.S_IRWXU:
        with suppress(OSError):  # of an earlier version, which others could read
            # What is made in it belongs to its group, as in the directory that it lies in.
            os.fchmod(directory.descriptor, stat.S_IRWXU | found.st_mode & stat.S_ISGID)
