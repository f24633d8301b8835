"""Checksums of files that are written in pieces, by any number of threads and in any order.

A file's checksum is the hash of the hashes of its blocks, so that each block is hashed while it is in the cache, whenever it
comes. It takes 17 bytes of memory for each block (136 for each MiB of the files) and, for a while, a copy of each block of
which a part is still to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from threading import Lock

import numpy as np
from xxhash import xxh3_128_digest

from ..core.hashing import hash_of

# Bytes. xxhash lets other threads of Python run only while it hashes more than 64 KiB.
BLOCK = 128 << 10

_DIGEST = 16


class Checksums:
    """What is known of the blocks of some files.

    sizes: of the files, in bytes, by name. block: bytes of each block but a file's last one.
    """

    def __init__(self, sizes: Mapping[str, int], block: int = BLOCK) -> None:
        self.block = block
        self._files = {name: _Blocks(size, block) for name, size in sizes.items()}
        self._lock = Lock()

    def add(self, name: str, offset: int, data: memoryview) -> None:
        """Take a run of bytes of a file, in any order and cut, from any thread: each byte once, or whole blocks again."""
        blocks, end = self._files[name], offset + len(data)
        if not 0 <= offset <= end <= blocks.size:
            raise ValueError(f"{name}: bytes {offset} … {end}, expected them to be within {blocks.size}")
        while offset < end:
            number, begin = divmod(offset, self.block)
            size = min(self.block, blocks.size - number * self.block)
            part, data = data[: size - begin], data[size - begin :]
            offset += len(part)
            whole: memoryview | bytearray | None = part
            if len(part) < size:
                with self._lock:
                    whole = blocks.put(number, begin, part, size)
            if whole is not None:
                digest = xxh3_128_digest(whole)
                with self._lock:
                    blocks.know(number, digest)

    def gaps(self, name: str) -> Iterator[tuple[int, int]]:
        """The blocks of a file whose hash is not known: offset and size. They may be added while this goes on."""
        blocks, number = self._files[name], -1
        while (number := blocks.known.find(0, number + 1)) >= 0:
            offset = number * self.block
            yield offset, min(self.block, blocks.size - offset)

    def of(self, name: str) -> str:
        """The checksum of a file of which everything has come."""
        blocks = self._files[name]
        if (number := blocks.known.find(0)) >= 0:
            raise ValueError(
                f"{name}: bytes from {number * self.block} have not come, expected the whole file"
            )
        return hash_of(blocks.digests)

    def export(self) -> dict[str, tuple[bytes, bytes]]:
        """What is known, for another process: of each file, which of its blocks, and their hashes. Parts of blocks are not.

        Files of which nothing is known are left out.
        """
        with self._lock:
            return {
                n: (bytes(blocks.known), bytes(blocks.digests))
                for n, blocks in self._files.items()
                if any(blocks.known)
            }

    def update(self, exported: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Take what another process knows of the same files."""
        with self._lock:
            for name, (known, digests) in exported.items():
                self._files[name].update(known, digests)


class _Blocks:
    """One file's blocks: their digests, which of them are known, and those that have come in part."""

    def __init__(self, size: int, block: int) -> None:
        count = -(-size // block)
        self.size, self.known, self.digests = size, bytearray(count), bytearray(count * _DIGEST)
        # The bytes of each block, and how many of them are still to come.
        self._parts: dict[int, tuple[bytearray, int]] = {}

    def know(self, number: int, digest: bytes) -> None:
        self.digests[number * _DIGEST : (number + 1) * _DIGEST] = digest
        self.known[number] = 1
        self._parts.pop(number, None)

    def put(self, number: int, begin: int, part: memoryview, size: int) -> bytearray | None:
        """Keep a part of a block; all of it, when that was the last one."""
        if self.known[number]:
            return None
        whole, missing = self._parts.pop(number) if number in self._parts else (bytearray(size), size)
        whole[begin : begin + len(part)] = part
        if missing == len(part):
            return whole
        self._parts[number] = whole, missing - len(part)
        return None

    def update(self, known: bytes, digests: bytes) -> None:
        theirs = np.frombuffer(known, bool)
        np.frombuffer(self.known, np.uint8)[theirs] = 1
        rows = np.frombuffer(self.digests, np.uint8).reshape(-1, _DIGEST)
        rows[theirs] = np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST)[theirs]


def memory(sizes: Iterable[int], workers: int) -> int:
    """The most bytes that checksums of files of these sizes take, while so many workers write the files in turn."""
    # What has come in part borders on what a worker has in hand, at either end, or on what none has taken yet.
    return sum(-(-size // BLOCK) for size in sizes) * (_DIGEST + 1) + (2 * workers + 1) * BLOCK
