"""An output that is published whole, or not at all.

It grows in .OUT.negmerge/ beside OUT, under a lock, and is moved into place by one rename when every byte of it is on
the disk. Whatever happens before leaves OUT as it was; a directory that a killed run left behind has no holder of its
lock, and the next run clears it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType

from .checkpoints import File, open_checkpoint
from .checkpoints.files import naming
from .checkpoints.huggingface import MANIFEST
from .rule import InputError

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_SYNC_FILE_RANGE_WRITE = 2
_TMPFS = 0x01021994


class Output:
    """The place of an output, and as a context manager the output while it grows.

    files: of the base, by what they are called relative to target; each has a file of its size here, for nobody who may
        not use the base's. For a single file, the one name is target's own.
    """

    def __init__(self, target: Path, files: Mapping[str, File], *, directory: bool, overwrite: bool) -> None:
        # Not abspath, for which a/.. is nothing even where a is a link; and a link at the very end stays one.
        named = target.name not in ("", "..")
        real = os.path.realpath(target.parent if named else target)
        self.target = Path(real, target.name) if named else Path(real)
        if not self.target.name:
            raise InputError(f"{target}: the root of the file system, expected a path to a new place")
        self.files, self.directory, self.overwrite = files, directory, overwrite
        self.work = self.target.with_name(f".{self.target.name}.negmerge")
        self._staged = self.work / "output"
        self._open: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._files_lock = Lock()
        self._lock = -1

    def check(self, inputs: Iterable[Path]) -> None:
        """Refuse a place that must not be written: where an input is, or where something else is."""
        try:
            os.lstat(self.work)
        except FileNotFoundError:
            pass
        except OSError as error:  # its name is too long, say
            raise InputError(f"{self.target}: {error.strerror}, expected a path to a new place") from None
        real, work = Path(os.path.realpath(self.target)), Path(os.path.realpath(self.work))
        for path in inputs:
            found = Path(os.path.realpath(path))
            if work == found or work in found.parents:
                raise InputError(f"{path}: the input is inside {self.work}, which is cleared for the output")
            if real == found or real in found.parents or (found in real.parents and found.is_dir()):
                relation = "is" if real == found else "is above" if real in found.parents else "is inside"
                raise InputError(f"{self.target}: the output {relation} the input {path}")
        if not self.target.parent.is_dir():
            raise InputError(
                f"{self.target.parent}: no such directory, expected one to hold {self.target.name}"
            )
        self._check_existing()

    def _check_existing(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not self.overwrite:
            raise InputError(f"{self.target}: exists already (--overwrite replaces what negmerge wrote)")
        if self.target.is_symlink() or self.target.is_dir() != self.directory:
            kind = "directory" if self.directory else "regular file"
            raise InputError(f"{self.target}: exists and is not a {kind}: not replaced")
        if os.path.ismount(self.target):
            raise InputError(f"{self.target}: a mount point, expected a directory that can be replaced")
        if self.directory:
            self._refuse_strangers(self.target)
        else:
            open_checkpoint(self.target)

    def _refuse_strangers(self, place: Path) -> None:
        """place: where a directory is that was, or is to be, replaced."""
        ours = {*self.files, MANIFEST, *_listed(place / MANIFEST)}
        for found in sorted(p for p in place.rglob("*") if p.is_symlink() or not p.is_dir()):
            if (name := str(found.relative_to(place))) not in ours:
                raise InputError(f"{self.target / name}: not negmerge's, so {self.target} is not replaced")

    def __enter__(self) -> Output:
        self._unwritten = {name: file.size for name, file in self.files.items()}
        self._acquire()
        try:
            self._clear()
            self._reserve()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def write(self, name: str, offset: int, data: memoryview, release: bool = False) -> None:
        """Write a run of bytes of one file, from any thread; a file that is complete is synced.

        release: give its pages back to the system then.
        """
        if not data:
            return
        descriptor, done = self._descriptor(name), 0
        with naming(self.target):
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
            _start_writing_back(descriptor, offset, len(data))
        with self._files_lock:
            self._unwritten[name] -= len(data)
            complete = not self._unwritten[name]
        if complete:
            self._close(name, release=release)

    def _descriptor(self, name: str) -> int:
        with self._files_lock:
            if name not in self._open:
                self._open[name] = os.open(self._path(name), os.O_WRONLY | os.O_CLOEXEC)
            return self._open[name]

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Bring everything to the disk; manifest: what a directory says of itself."""
        if missing := [name for name, count in self._unwritten.items() if count]:
            raise RuntimeError(f"{self.target}: {missing[0]} was not written whole")
        if self.directory:
            listed = {**manifest, "files": sorted(self.files)}
            with open(self._path(MANIFEST), "w", encoding="utf-8") as file:
                file.write(json.dumps(listed, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            for folder, _, _ in os.walk(self._staged):
                _sync_directory(folder)

    def publish(self) -> None:
        """Move what is finished into place."""
        self._check_existing()
        self._move()
        _sync_directory(self.target.parent)

    def _move(self) -> None:
        exists = self.overwrite and os.path.lexists(self.target)
        if exists and not self.directory:
            os.replace(self._staged, self.target)
            return
        try:
            _rename(self._staged, self.target, _RENAME_EXCHANGE if exists else _RENAME_NOREPLACE)
            if exists:
                self._refuse_late_strangers()
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            if exists:
                raise OSError(
                    f"{self.target}: this file system cannot exchange directories: remove it first"
                ) from None
            os.rename(self._staged, self.target)

    def _refuse_late_strangers(self) -> None:
        """What was replaced is looked at again: a file may have come since the last look."""
        try:
            self._refuse_strangers(self._staged)
        except InputError:
            _rename(self._staged, self.target, _RENAME_EXCHANGE)
            raise

    def _path(self, name: str) -> Path:
        return self._staged / name if self.directory else self._staged

    def _close(self, name: str, sync: bool = True, release: bool = False) -> None:
        with self._files_lock:
            descriptor = self._open.pop(name)
        try:
            if sync:
                with naming(self.target):
                    os.fsync(descriptor)
            if release:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _acquire(self) -> None:
        lock = self.work / "lock"
        while True:
            if self.work.is_symlink():
                raise InputError(f"{self.work}: a symbolic link, expected a directory of negmerge's own")
            self.work.mkdir(exist_ok=True)
            try:
                # Whatever negmerge has in there, it has beside its lock.
                if (held := os.listdir(self.work)) and lock.name not in held:
                    raise InputError(
                        f"{self.work / held[0]}: not negmerge's, expected nothing of others in {self.work}"
                    )
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # its holder has just finished and removed the directory
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    self._lock = descriptor
                    return
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(f"{self.target}: another negmerge is writing it (it holds {lock})") from None
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _clear(self) -> None:
        if self._staged.is_dir():
            shutil.rmtree(self._staged)
        else:
            self._staged.unlink(missing_ok=True)

    def _reserve(self) -> None:
        needed = sum(file.size for file in self.files.values())
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", str(self.target.parent)
            )
        if self.directory:
            self._staged.mkdir()
        # There, to reserve a page is to fetch it, one after the other; whoever writes it can do that.
        in_memory = _is_tmpfs(self.work)
        for name, like in self.files.items():
            path = self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Writable to us, whatever the base is.
            mode = like.mode | stat.S_IWUSR
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                if like.size:
                    with naming(self.target):
                        if in_memory:
                            os.ftruncate(descriptor, like.size)
                        else:
                            _allocate(descriptor, like.size)
            finally:
                os.close(descriptor)

    def _release(self) -> None:
        for name in list(self._open):
            self._close(name, sync=False)
        self._clear()
        # The lock's file last: until it is gone, nobody else can hold the lock.
        (self.work / "lock").unlink(missing_ok=True)
        try:
            self.work.rmdir()
        except OSError as error:  # somebody else's file, or the next run has just moved in
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
        finally:
            os.close(self._lock)


def _listed(manifest: Path) -> list[str]:
    """The files that an earlier output says are its own."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return [name for name in files if isinstance(name, str)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _is_tmpfs(path: Path) -> bool:
    found = ctypes.create_string_buffer(256)  # struct statfs, whose first field says
    failed = _LIBC.statfs(os.fsencode(path), found)
    return not failed and ctypes.c_long.from_buffer(found).value == _TMPFS


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _start_writing_back(descriptor: int, offset: int, size: int) -> None:
    """So that the sync at the end has little left to do. posix_fadvise(DONTNEED) does that, too, but waits for all CPUs."""
    if hasattr(_LIBC, "sync_file_range"):  # a hint: what it returns does not matter
        _LIBC.sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE
        )


def _rename(source: Path, target: Path, flags: int) -> None:
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD
    if _LIBC.renameat2(here, os.fsencode(source), here, os.fsencode(target), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _sync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
