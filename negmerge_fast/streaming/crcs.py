"""CRC-32s of the records of zip files, written into an output when all of it is there."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..checkpoints.composed import ComposedFile, Crc
from ..checkpoints.reader import naming
from ..output.filesystem import sync
from ..output.writer import Writer
from ..runtime.executor import process_in_order

_CHUNK_BYTES = 1 << 20


def write_crcs(writer: Writer, threads: int, on_progress: Callable[[], None]) -> None:
    """Write the checksums that the files of an output lack.

    Records are read once more: another process, or an earlier run, may have written some of them.

    Args:
        writer: The output's writer. It has its own checksums of these bytes done again.
        threads: How many threads read.
        on_progress: Called after every record. It may raise to stop.
    """
    for name, file in writer.destination.files.items():
        if isinstance(file, ComposedFile) and file.crcs:
            with naming(writer.destination.path):
                descriptor = writer.staging.open_file(name, os.O_RDWR)
                try:
                    _write(descriptor, file, threads, on_progress)
                    sync(descriptor)
                finally:
                    os.close(descriptor)
            for position in (position for crc in file.crcs for position in crc.positions):
                writer.checksums.forget(name, position)


def _write(descriptor: int, file: ComposedFile, threads: int, on_progress: Callable[[], None]) -> None:
    @contextmanager
    def open_worker() -> Iterator[Callable[[Crc], tuple[Crc, int]]]:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        yield lambda crc: (crc, _crc_of(descriptor, crc, buffer))

    def put(done: tuple[Crc, int]) -> None:
        crc, value = done
        for position in crc.positions:
            os.pwrite(descriptor, value.to_bytes(4, "little"), position)
        on_progress()

    process_in_order(iter(file.crcs), threads, open_worker, put)


def _crc_of(descriptor: int, crc: Crc, buffer: memoryview) -> int:
    value, at, end = 0, crc.begin, crc.begin + crc.nbytes
    while at < end:
        if not (got := os.preadv(descriptor, [buffer[: end - at]], at)):
            raise OSError(f"the output ends at byte {at}, expected {end}")
        value, at = zlib.crc32(buffer[:got], value), at + got
    return value
