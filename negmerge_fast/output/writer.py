"""An output that is published whole, or not at all.

It grows in .OUT.negmerge/ beside OUT, under a lock, and is moved into place by one rename when every byte of it is on
the disk. Whatever happens before leaves OUT as it was; a directory that a killed run left behind has no holder of its
lock, and the next run clears it, or goes on with it. Several processes may write one output: the first of them makes room
and publishes, and all hold the lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from ..checkpoints.base import MANIFEST
from ..checkpoints.formats import open_checkpoint
from ..checkpoints.reader import File, naming
from ..core.errors import InputError
from .checksums import BLOCK, Checksums
from .filesystem import (
    REFLINK_FILESYSTEMS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    TMPFS,
    allocate,
    kind_of,
    reflink,
    rename,
    start_writing_back,
    sync_directory,
)
from .manifest import load, manifest_path, save


class Output:
    """The place of an output, and as a context manager the output while it grows.

    files: of the base, by what they are called relative to target; each has a file of its size here, for nobody who may
        not use the base's. For a single file, whatever its one name, it is target.
    resume: what is unfinished is kept for the next run.
    """

    def __init__(
        self,
        target: Path,
        files: Mapping[str, File],
        *,
        directory: bool,
        overwrite: bool,
        resume: bool = False,
    ) -> None:
        # Not abspath, for which a/.. is nothing even where a is a link; and a link at the very end stays one.
        named = target.name not in ("", "..")
        real = os.path.realpath(target.parent if named else target)
        self.path = Path(real, target.name) if named else Path(real)
        if not self.path.name:
            raise InputError(f"{target}: the root of the file system, expected a path to a new place")
        self.files, self.directory, self.overwrite, self.resume = files, directory, overwrite, resume
        self.manifest = manifest_path(self.path, directory)
        self.work = self.path.with_name(f".{self.path.name}.negmerge")
        self._staged = self.work / "output"
        self._open: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._files_lock = Lock()
        self._lost: OSError | None = None
        self._lock = -1
        self._first = True
        self._can_reflink = False
        self.sums = Checksums({name: file.size for name, file in files.items()})

    def check(self, inputs: Iterable[Path]) -> None:
        """Refuse a place that must not be written: where an input is, or where something else is."""
        try:
            os.lstat(self.work)
        except FileNotFoundError:
            pass
        except OSError as error:  # its name is too long, say
            raise InputError(f"{self.path}: {error.strerror}, expected a path to a new place") from None
        real, work = Path(os.path.realpath(self.path)), Path(os.path.realpath(self.work))
        for path in inputs:
            found = Path(os.path.realpath(path))
            if work == found or work in found.parents:
                raise InputError(f"{path}: the input is inside {self.work}, which is cleared for the output")
            if real == found or real in found.parents or (found in real.parents and found.is_dir()):
                relation = "is" if real == found else "is above" if real in found.parents else "is inside"
                raise InputError(f"{self.path}: the output {relation} the input {path}")
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path.parent}: no such directory, expected one to hold {self.path.name}")
        self._check_existing()

    def _check_existing(self) -> None:
        # What negmerge wrote beside a single file that is gone is in nobody's way.
        if not self.directory and os.path.lexists(self.manifest) and not _listed(self.manifest):
            raise InputError(f"{self.manifest}: not negmerge's, expected no other file of this name")
        if not os.path.lexists(self.path):
            return
        if not self.overwrite:
            raise InputError(f"{self.path}: exists already (--overwrite replaces what negmerge wrote)")
        if self.path.is_symlink() or self.path.is_dir() != self.directory:
            kind = "directory" if self.directory else "regular file"
            raise InputError(f"{self.path}: exists and is not a {kind}: not replaced")
        if os.path.ismount(self.path):
            raise InputError(f"{self.path}: a mount point, expected a directory that can be replaced")
        if self.directory:
            self._refuse_strangers(self.path)
        else:
            open_checkpoint(self.path)

    def _refuse_strangers(self, place: Path) -> None:
        """place: where a directory is that was, or is to be, replaced."""
        ours = {*self.files, MANIFEST, *_listed(place / MANIFEST)}
        for found in sorted(p for p in place.rglob("*") if p.is_symlink() or not p.is_dir()):
            if (name := str(found.relative_to(place))) not in ours:
                raise InputError(f"{self.path / name}: not negmerge's, so {self.path} is not replaced")

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._open):
            self._close(name, sync=False)
        if self._lock == -1:
            return
        try:
            over = self._first if kind is None else self._is_last()
            kept = kind is not None and self.resume and self.journals()
            if over and not kept:
                self._remove_work()
        finally:
            os.close(self._lock)
            self._lock = -1

    def open(self) -> None:
        """Take the lock: what an earlier run left is now this one's, to go on with or to clear."""
        self._acquire(fcntl.LOCK_EX)
        if self._was_exchanged():
            self._clear()

    def join(self) -> None:
        """Take part in the work of another process, which makes room and publishes."""
        self._first = False
        self._acquire(fcntl.LOCK_SH)

    def let_join(self) -> None:
        """Let other processes take part."""
        with naming(self.work / "lock"):
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _is_last(self) -> bool:
        """Whether no other process of the job is there any more: none writes then, and none can come."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._lock), os.stat(self.work / "lock"))
        except OSError:
            return False

    def journals(self) -> list[Path]:
        """Those that an earlier run left."""
        return sorted(self.work.glob("journal-*"))

    def journal(self, number: int) -> Path:
        """Of one process of the job."""
        return self.work / f"journal-{number}"

    def leave(self, rank: int, value: Mapping[str, object]) -> None:
        """Leave something for the first rank, on the file system, for it may be large."""
        save(self._left_by(rank), value)

    def left_by(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._left_by(rank).read_text(encoding="utf-8"))
        return found

    def _left_by(self, rank: int) -> Path:
        return self.work / f"share-{rank}"

    def make_room(self) -> None:
        """For a new output, in the place of whatever is unfinished."""
        self._clear()
        self._reserve()

    def refuse_incomplete(self) -> None:
        """Look whether an output that is to be gone on with is all there."""
        for name, file in self.files.items():
            path = self._path(name)
            size = path.stat().st_size if path.is_file() else None
            if size != file.size:
                found = "missing" if size is None else f"{size} bytes"
                raise InputError(
                    f"{path}: {found}, expected {file.size} bytes of unfinished output (without --resume it is made anew)"
                )

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Say how many bytes of each file will be written here."""
        self._unwritten = dict(sizes)

    def write(
        self, name: str, offset: int, data: memoryview, release: bool = False, like: int | None = None
    ) -> None:
        """Write a run of bytes of one file, from any thread; a file that is complete is synced.

        release: give its pages back to the system then. like: a descriptor of a file that has the same bytes in the same place.
        """
        if not data:
            return
        descriptor = self._descriptor(name)
        with naming(self.path):
            shared = range(offset, offset)
            if like is not None and self._can_reflink:
                shared = reflink(like, descriptor, offset, offset + len(data))
            for begin, end in ((offset, shared.start), (shared.stop, offset + len(data))):
                while begin < end:
                    begin += os.pwrite(descriptor, data[begin - offset : end - offset], begin)
            start_writing_back(descriptor, offset, len(data))
        self.sums.add(name, offset, data)  # now, for it is still in the cache
        with self._files_lock:
            self._unwritten[name] -= len(data)
            complete = not self._unwritten[name]
        if complete:
            self._close(name, release=release)

    def sync(self) -> None:
        """Bring to the disk what is written, and its names; what was complete before, and could not be, is an error, too."""
        with self._files_lock:
            unfinished = [os.dup(descriptor) for descriptor in self._open.values()]
        try:
            with naming(self.path):
                for descriptor in unfinished:
                    os.fdatasync(descriptor)
        finally:
            for descriptor in unfinished:
                os.close(descriptor)
        if self._lost:
            raise self._lost
        self._sync_directories()
        sync_directory(self.work.parent)

    def _descriptor(self, name: str) -> int:
        with self._files_lock:
            if name not in self._open:
                self._open[name] = os.open(self._path(name), os.O_WRONLY | os.O_CLOEXEC)
            return self._open[name]

    def finish(self, manifest: Mapping[str, object], tick: Callable[[], None]) -> None:
        """Bring everything to the disk; manifest: what the output says of itself, but for its files.

        tick: called now and then while bytes are read that were not written here; it may raise to stop.
        """
        self._add_missing_sums(tick)
        listed = {
            name if self.directory else self.path.name: {"size": like.size, "checksum": self.sums.of(name)}
            for name, like in sorted(self.files.items())
        }
        save(self._path(MANIFEST), {**manifest, "block": BLOCK, "files": listed}, indent=2)
        self._sync_directories()

    def _add_missing_sums(self, tick: Callable[[], None]) -> None:
        """Of blocks that an earlier run wrote, or of which two processes wrote a part."""
        for name in self.files:
            with naming(self.path), open(self._path(name), "rb") as file:
                for offset, size in self.sums.gaps(name):
                    file.seek(offset)
                    self.sums.add(name, offset, memoryview(file.read(size)))
                    tick()

    def _sync_directories(self) -> None:
        for folder, _, _ in os.walk(self.work):
            sync_directory(folder)

    def publish(self) -> None:
        """Move what is finished into place."""
        self._check_existing()
        if self.directory:
            self._move(self._staged)
        else:
            self._move_with_manifest(*map(self._path, self.files))
        sync_directory(self.path.parent)

    def _move_with_manifest(self, staged: Path) -> None:
        """A single file's manifest comes first.

        Who is killed in between leaves it beside an older output or beside none: `negmerge verify` says so, and the next
        merge replaces it. The other way round there would be an output with nothing, or with another's, to hold it against.
        """
        former = self.manifest.read_bytes() if self.manifest.exists() else None
        try:
            os.replace(self._path(MANIFEST), self.manifest)
            self._move(staged)
        except BaseException:
            if former is None:
                self.manifest.unlink(missing_ok=True)
            else:
                self.manifest.write_bytes(former)
            raise

    def _move(self, staged: Path) -> None:
        exists = self.overwrite and os.path.lexists(self.path)
        if exists and not self.directory:
            os.replace(staged, self.path)
            return
        try:
            if exists:
                self._tell_exchange(staged)
            rename(staged, self.path, RENAME_EXCHANGE if exists else RENAME_NOREPLACE)
            if exists:
                self._refuse_late_strangers()
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            if exists:
                raise OSError(
                    f"{self.path}: this file system cannot exchange directories: remove it first"
                ) from None
            os.rename(staged, self.path)

    def _tell_exchange(self, staged: Path) -> None:
        """To whoever comes after a crash, and must not take what was replaced for what the journals speak of."""
        save(self.work / "exchange", staged.stat().st_ino)
        sync_directory(self.work)

    def _was_exchanged(self) -> bool:
        try:
            return bool(json.loads((self.work / "exchange").read_text()) == os.stat(self.path).st_ino)
        except (OSError, ValueError):
            return False

    def _refuse_late_strangers(self) -> None:
        """What was replaced is looked at again: a file may have come since the last look."""
        try:
            self._refuse_strangers(self._staged)
        except InputError:
            rename(self._staged, self.path, RENAME_EXCHANGE)
            raise

    def _path(self, name: str) -> Path:
        return self._staged / name

    def _close(self, name: str, sync: bool = True, release: bool = False) -> None:
        descriptor = self._open[name]
        try:
            if sync:
                with naming(self.path):
                    os.fsync(descriptor)
            if release:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._lost = error
            raise
        finally:
            # Not before: sync() has to know of it until it is on the disk.
            with self._files_lock:
                del self._open[name]
            os.close(descriptor)

    def _acquire(self, kind: int) -> None:
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
                with naming(lock):
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    self._lock, self._can_reflink = descriptor, kind_of(self.work) in REFLINK_FILESYSTEMS
                    return
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(f"{self.path}: another negmerge is writing it (it holds {lock})") from None
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _clear(self) -> None:
        if found := self.journals():  # first, and for good: they speak of what is removed next
            for path in found:
                path.unlink()
            sync_directory(self.work)
        if self._staged.is_dir():
            shutil.rmtree(self._staged)
        else:
            self._staged.unlink(missing_ok=True)
        for path in (*self.work.glob("share-*"), *self.work.glob("exchange")):
            path.unlink()

    def _remove_work(self) -> None:
        self._clear()
        # The lock's file last: until it is gone, nobody else can hold the lock.
        (self.work / "lock").unlink(missing_ok=True)
        try:
            self.work.rmdir()
        except OSError as error:  # somebody else's file, or the next run has just moved in
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    def _reserve(self) -> None:
        needed = sum(file.size for file in self.files.values())
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free", str(self.path.parent)
            )
        self._staged.mkdir()
        # There, to reserve a page is to fetch it, one after the other; whoever writes it can do that.
        in_memory = kind_of(self.work) == TMPFS
        for name, like in self.files.items():
            path = self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Writable to us, whatever the base is.
            mode = like.mode | stat.S_IWUSR
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                if like.size:
                    with naming(self.path):
                        if in_memory:
                            os.ftruncate(descriptor, like.size)
                        else:
                            allocate(descriptor, like.size)
            finally:
                os.close(descriptor)


def _listed(manifest: Path) -> list[str]:
    """The files that an earlier output says are its own: a list of names, or what is known of each by its name."""
    try:
        files = load(manifest).get("files")
    except (OSError, InputError):
        return []
    return [name for name in files if isinstance(name, str)] if isinstance(files, (list, dict)) else []
