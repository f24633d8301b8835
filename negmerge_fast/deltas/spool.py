"""The means of a delta while it is made: each rank appends them to a file of its own, in the order of what it reads.

Where they belong is not known before all ranks have counted, unless there is one that begins at the beginning. A journal's records
tell which ranges a rank's file holds, in which order; the masks tell how many means each range has.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..core.errors import InputError
from ..output.directory import Entry
from ..output.filesystem import sync_data


class Spool:
    """A rank's file of means, as a context manager.

    Args:
        entry: The file.
        recorded: How many of its bytes are on record: what an interrupted run left behind them is cut off.

    Raises:
        InputError: If it is shorter than that.
    """

    def __init__(self, entry: Entry, recorded: int) -> None:
        self.entry, self._size = entry, recorded
        self._descriptor = entry.open(os.O_RDWR | os.O_CREAT)
        found = os.fstat(self._descriptor).st_size
        if found < recorded:
            os.close(self._descriptor)
            raise InputError(
                f"{entry.path}: {found} bytes, expected {recorded} of unfinished output (without --resume it is made anew)"
            )
        os.ftruncate(self._descriptor, recorded)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, path: str, data: bytes) -> None:
        _write(self._descriptor, data, self._size)
        self._size += len(data)

    def sync(self) -> None:
        sync_data(self._descriptor)


class InPlace:
    """Means that are written where they stay, as a context manager: what one process reads from the beginning comes in their order.

    Args:
        open_file: Opens a file of the delta for writing; returns its descriptor.
        ends: Where the next means go, by the names of files.
    """

    def __init__(self, open_file: Callable[[str], int], ends: dict[str, int]) -> None:
        self._open_file, self._ends = open_file, ends
        self._path, self._descriptor = "", -1

    def __enter__(self) -> InPlace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._path:
            os.close(self._descriptor)
            self._path = ""

    def append(self, path: str, data: bytes) -> None:
        if path != self._path:
            self.__exit__()
            self._path, self._descriptor = path, self._open_file(path)
        _write(self._descriptor, data, self._ends[path])
        self._ends[path] += len(data)


def _write(descriptor: int, data: bytes, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, memoryview(data)[done:], position + done)
