"""Bytes of an output: written by any thread into the staging directory, with checksums, and synced to the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from threading import Lock
from types import TracebackType

from ..checkpoints.reader import advise, naming, sample_of
from .checksums import BLOCK, Checksums
from .destination import Destination
from .filesystem import REFLINK_FILESYSTEMS, filesystem_type, reflink, start_writing_back, sync, sync_data
from .manifest import sealed
from .staging import Staging


class Writer:
    """Writes the files of an output, as a context manager: on exit it closes those that are not complete."""

    def __init__(self, destination: Destination, staging: Staging) -> None:
        self.destination, self.staging = destination, staging
        self.checksums = Checksums({name: file.size for name, file in destination.files.items()})
        self._open: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._lock = Lock()
        self._sync_error: OSError | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._open):
            self._close(name, is_complete=False)

    def expect(self, sizes: Mapping[str, int]) -> None:
        """Set how many bytes of each file this process will write."""
        self._unwritten = dict(sizes)

    def write(
        self, name: str, offset: int, data: memoryview, release: bool = False, like: int | None = None
    ) -> None:
        """Write a range of bytes of one file, from any thread. A file that is complete is synced.

        Args:
            name: The file's name in the output.
            offset: Where the bytes begin in the file.
            data: The bytes.
            release: Whether the file's pages are given back to the system once it is synced.
            like: A descriptor of a file that has the same bytes at the same offset.
        """
        if not data:
            return
        descriptor = self.descriptor(name)
        with naming(self.destination.path):
            cloned = range(offset, offset)
            if like is not None and self._can_reflink:
                cloned = reflink(like, descriptor, offset, offset + len(data))
            for begin, end in ((offset, cloned.start), (cloned.stop, offset + len(data))):
                while begin < end:
                    begin += os.pwrite(descriptor, data[begin - offset : end - offset], begin)
            start_writing_back(descriptor, offset, len(data))
        self.written(name, offset, data, release)

    def written(self, name: str, offset: int, data: memoryview, release: bool = False) -> None:
        """Take note of bytes that were written to a file's descriptor; the arguments are those of write."""
        self.checksums.add(name, offset, data)  # now, for it is still in the cache
        with self._lock:
            self._unwritten[name] -= len(data)
            complete = not self._unwritten[name]
        if complete:
            self._close(name, release=release)

    def sync(self) -> None:
        """Sync all that is written, and the names of the files.

        Raises:
            OSError: Also if a file that was complete could not be synced.
        """
        with self._lock, naming(self.destination.path):
            unfinished = [os.dup(descriptor) for descriptor in self._open.values()]
        try:
            with naming(self.destination.path):
                for descriptor in unfinished:
                    sync_data(descriptor)
        finally:
            for descriptor in unfinished:
                os.close(descriptor)
        if self._sync_error:
            raise self._sync_error
        self.staging.directory.sync_tree()
        self.staging.parent.sync()

    def finish(self, manifest: Mapping[str, object], on_progress: Callable[[], None]) -> None:
        """Write the manifest into the staging directory, and sync it.

        Args:
            manifest: Its fields, but for those of the files.
            on_progress: Called while bytes are read that were not written here. It may raise to stop.
        """
        self._add_missing_checksums(on_progress)
        directory, path = self.destination.directory, self.destination.path
        files = {
            name if directory else path.name: {
                "size": like.size,
                "checksum": self.checksums.of(name),
                "sample": self._sample(name),
            }
            for name, like in sorted(self.destination.files.items())
        }
        self.staging.write_manifest(sealed({**manifest, "block": BLOCK, "files": files}))

    def _sample(self, name: str) -> str:
        with naming(self.destination.path), self.staging.read_file(name) as file:
            return sample_of(file.fileno())

    def _add_missing_checksums(self, on_progress: Callable[[], None]) -> None:
        """Read the blocks that an earlier run wrote, or of which two processes wrote a part."""
        for name in self.destination.files:
            with naming(self.destination.path), self.staging.read_file(name) as file:
                for offset, size in self.checksums.gaps(name):
                    file.seek(offset)
                    self.checksums.add(name, offset, memoryview(file.read(size)))
                    on_progress()

    @cached_property
    def _can_reflink(self) -> bool:
        return filesystem_type(self.staging.path) in REFLINK_FILESYSTEMS

    def descriptor(self, name: str) -> int:
        """Return the descriptor that a file is written to. It stays open until all of the file is written."""
        with self._lock:
            if name not in self._open:
                self._open[name] = self.staging.open_file(name, os.O_WRONLY)
            return self._open[name]

    def _close(self, name: str, is_complete: bool = True, release: bool = False) -> None:
        descriptor = self._open[name]
        try:
            if is_complete:
                with naming(self.destination.path):
                    sync(descriptor)
            if release:
                advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._sync_error = error
            raise
        finally:
            # Not earlier: sync() has to sync it too until it is on the disk.
            with self._lock:
                del self._open[name]
            with naming(self.destination.path):
                os.close(descriptor)
