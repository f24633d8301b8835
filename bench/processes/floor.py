"""Roofline of merges of files: reads every byte of some models once, and writes and syncs as many bytes as the first one has.

It is a process that imports little, so that its time is that of the files. Each thread reads a chunk while the system
fetches its next one, and the output is written back to the disk meanwhile.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple

from negmerge_fast.output.filesystem import allocate, start_writing_back


class FileChunk(NamedTuple):
    """A chunk to read, and the offset to write as many bytes to, None for the models after the first."""

    file: int
    at: int
    to: int | None


def file_chunks(models: list[Path], size: int) -> Iterator[FileChunk]:
    """All chunks, shard by shard, and the same chunk of every model before the next, as a merge reads them."""
    shards = [sorted(model.glob("*.safetensors")) for model in models]
    written = 0
    for paths in zip(*shards, strict=True):
        files = [os.open(path, os.O_RDONLY) for path in paths]
        lengths = [os.fstat(file).st_size for file in files]
        for at in range(0, max(lengths), size):
            for k, (file, length) in enumerate(zip(files, lengths, strict=True)):
                if at < length:
                    yield FileChunk(file, at, None if k else written + at)
        written += lengths[0]


def run(models: list[Path], out: Path, size: int, threads: int, release: bool) -> None:
    coming, lock, errors = file_chunks(models, size), Lock(), []
    output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    allocate(output, sum(path.stat().st_size for path in models[0].glob("*.safetensors")))

    def take() -> FileChunk | None:
        with lock:
            return next(coming, None)

    def read_chunks() -> None:
        buffer = memoryview(bytearray(size))
        following = take()
        while (chunk := following) is not None:
            if following := take():
                os.posix_fadvise(following.file, following.at, size, os.POSIX_FADV_WILLNEED)
            done = 0
            while got := os.preadv(chunk.file, [buffer[done:]], chunk.at + done):
                done += got
            if release:
                os.posix_fadvise(chunk.file, chunk.at, done, os.POSIX_FADV_DONTNEED)
            if chunk.to is not None:
                os.pwrite(output, buffer[:done], chunk.to)
                start_writing_back(output, chunk.to, done)

    def worker() -> None:
        try:
            read_chunks()
        except BaseException as error:
            errors.append(error)

    started = [Thread(target=worker) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    os.fsync(output)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path, help="a file")
    options.add_argument("models", type=Path, nargs="+", help="directories with the same files")
    options.add_argument("--chunk-bytes", type=int, default=4 << 20)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument(
        "--release", action="store_true", help="evict pages from the page cache once they are read"
    )
    given = options.parse_args()
    run(given.models, given.out, given.chunk_bytes, given.threads, given.release)


if __name__ == "__main__":
    main()
