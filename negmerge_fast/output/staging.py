"""The staging directory of an output: .OUT.negmerge/ beside OUT, where all files are complete before any of them is published.

A lock marks the directory as in use. A directory that a killed run left behind is not locked: the next run clears it, or
resumes it. Several processes may write one output: rank 0 creates the files and publishes, and all hold the lock. Where a file
system has no locks, the directory is used without one; preflight.py says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoints.base import MANIFEST
from ..checkpoints.reader import NOT_HERE, File, naming, same_file
from ..core.errors import InputError
from ..core.hashing import hash_of
from .filesystem import (
    TMPFS,
    allocate,
    filesystem_type,
    lock,
    move_directory,
    remove_empty,
    remove_tree,
    set_size,
    sync_directory,
    write_json,
)

# Where an older output is moved, in the staging directory.
FORMER = "former"


def staging_path(destination_path: Path) -> Path:
    return destination_path.with_name(f".{destination_path.name}.negmerge")


class Staging:
    """A staging directory, as a context manager: on exit it is removed, or kept for the next run, and unlocked.

    Args:
        destination_path: Where the output will be.
        files: The files of the base, by their names in the output. Each has a file of its size here.
        resume: Whether unfinished output is kept for the next run.

    Attributes:
        notes: What a user should know of the end of a merge, a line each.
        former: Where an older output is for a moment, if it cannot be exchanged with the new one in one step.
    """

    def __init__(self, destination_path: Path, files: Mapping[str, File], *, resume: bool = False) -> None:
        self.destination_path, self.files, self.resume = destination_path, files, resume
        self.path = staging_path(destination_path)
        self.staged = self.path / "output"
        self.former = self.path / FORMER
        self._lock_path = self.path / "lock"
        self._exchange_path = self.path / "exchange"
        self._lock = -1
        self._is_locked = False  # False where there are no locks
        self._is_owner = True
        self.notes: list[str] = []

    def file(self, name: str) -> Path:
        """The path of an output's file while it is here."""
        return self.staged / name

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock == -1:
            return
        try:
            may_remove = self._is_owner if kind is None else self._is_last()
            kept = kind is not None and self.resume and self.journals()
            if may_remove and not kept:
                self._remove_unless_in_use(is_published=kind is None)
        finally:
            os.close(self._lock)
            self._lock = -1
        # Only now: FUSE and NFS keep what is removed while it is open, by this rank or another.
        if not os.path.lexists(self._lock_path):
            remove_empty(self.path)

    def open(self) -> None:
        """Lock the directory for this process alone. It may resume or clear what an earlier run left."""
        self._acquire(fcntl.LOCK_EX)
        self.put_back()
        if self._was_exchanged():
            self._clear()

    def let_join(self) -> None:
        """Let the other ranks share the lock."""
        if self._is_locked:
            with naming(self._lock_path):
                lock(self._lock, fcntl.LOCK_SH)

    def join(self) -> None:
        """Share the lock of rank 0, which creates the files and publishes."""
        self._is_owner = False
        self._acquire(fcntl.LOCK_SH)

    def _is_last(self) -> bool:
        """Whether no other process holds the lock: then none writes, and none can join."""
        if not self._is_locked:
            return self._is_owner
        try:
            lock(self._lock, fcntl.LOCK_EX)
            return same_file(os.fstat(self._lock), os.stat(self._lock_path))
        except OSError:
            return False

    def _acquire(self, kind: int) -> None:
        while self._lock == -1:
            if self.path.is_symlink():
                raise InputError(f"{self.path}: a symbolic link, expected a directory of negmerge's own")
            is_new = not self.path.exists()
            self.path.mkdir(exist_ok=True)
            try:
                self._refuse_unlocked_files()
                self._open_lock(kind)
            except FileNotFoundError:  # its holder has just finished and removed the directory
                continue
            except OSError:
                if is_new:
                    self._lock_path.unlink(missing_ok=True)
                    remove_empty(self.path)
                raise

    def _open_lock(self, kind: int) -> None:
        """Open the lock file and lock it, unless its holder has just removed it."""
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with naming(self._lock_path):
                self._is_locked = lock(descriptor, kind)
                if same_file(os.fstat(descriptor), os.stat(self._lock_path)):
                    self._lock = descriptor
        except BlockingIOError:
            raise InputError(
                f"{self.destination_path}: another negmerge is writing it (it holds {self._lock_path})"
            ) from None
        finally:
            if self._lock != descriptor:
                os.close(descriptor)

    def _refuse_unlocked_files(self) -> None:
        """Refuse a directory without the lock file that all of negmerge's files lie beside."""
        if (found := os.listdir(self.path)) and self._lock_path.name not in found:
            raise InputError(
                f"{self.path / found[0]}: not negmerge's, expected nothing of others in {self.path}"
            )

    def journals(self) -> list[Path]:
        """The journals that an earlier run left."""
        return sorted(self.path.glob("journal-*"))

    def journal(self, rank: int) -> Path:
        return self.path / f"journal-{rank}"

    def write_rank_result(self, rank: int, value: Mapping[str, object]) -> None:
        """Hand a result to rank 0, as a file since it may be large."""
        write_json(self._rank_path(rank), value)

    def read_rank_result(self, rank: int) -> dict[str, Any]:
        path = self._rank_path(rank)
        with naming(path):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _rank_path(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.json"

    def mark_exchange(self) -> None:
        """Mark that OUT is about to be exchanged, so that a run after a crash ignores the journals.

        They speak of the new output, and the staging directory then holds the old one. What is marked is the new manifest's
        hash: the number of an inode may change.
        """
        write_json(self._exchange_path, self._hash_of_manifest(self.staged))
        sync_directory(self.path)

    def _was_exchanged(self) -> bool:
        try:
            marked = json.loads(self._exchange_path.read_text())
            if not isinstance(marked, str):  # of an early version: the journals may speak of anything
                return True
            return marked == self._hash_of_manifest(self.destination_path)
        except (OSError, ValueError):
            return False

    @staticmethod
    def _hash_of_manifest(output: Path) -> str:
        with naming(output / MANIFEST):
            return hash_of((output / MANIFEST).read_bytes())

    def put_back(self) -> None:
        """Give an older output its place again, if a run was stopped while it was moved away."""
        if self.former.exists() and not self._was_exchanged():
            move_directory(self.former, self.destination_path, MANIFEST)
            sync_directory(self.destination_path.parent)

    def create(self) -> None:
        """Create the files of a new output, in place of any unfinished one."""
        self._clear()
        refuse_full_disk(self.path, self.destination_path.parent, self.files)
        self.staged.mkdir()
        # tmpfs reserves a page by fetching it, on one thread; the workers fetch pages faster as they write.
        reserve = set_size if filesystem_type(self.path) == TMPFS else allocate
        for name, like in self.files.items():
            path = self.file(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            # No more permissions than the base's file has, but for writing.
            mode = like.mode | stat.S_IWUSR
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                if like.size:
                    with naming(self.destination_path):
                        reserve(descriptor, like.size)
            finally:
                os.close(descriptor)

    def refuse_incomplete(self) -> None:
        """Refuse to resume an output of which a file is missing or has another size."""
        for name, file in self.files.items():
            path = self.file(name)
            size = path.stat().st_size if path.is_file() else None
            if size != file.size:
                found = "missing" if size is None else f"{size} bytes"
                raise InputError(
                    f"{path}: {found}, expected {file.size} bytes of unfinished output (without --resume it is made anew)"
                )

    def _clear(self) -> None:
        if found := self.journals():  # first, and for good: they speak of what is removed next
            for path in found:
                path.unlink()
            sync_directory(self.path)
        self.put_back()
        remove_tree(self.former)
        if self.staged.is_dir():
            remove_tree(self.staged)
        else:
            self.staged.unlink(missing_ok=True)
        for pattern in ("rank-*", "share-*", "exchange"):  # share-*: the name of rank files in early versions
            for path in self.path.glob(pattern):
                path.unlink()

    def _remove_unless_in_use(self, is_published: bool) -> None:
        """Remove the directory. On NFS it stays while others have a file of an older output open, which is no failure."""
        try:
            self._remove()
        except OSError as error:
            if not is_published or error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise
            self.notes.append(f"{self.path}: in use by another program: the next merge to here removes it")

    def _remove(self) -> None:
        self._clear()
        # The lock file last: until it is gone, no other process can hold the lock.
        self._lock_path.unlink(missing_ok=True)


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
