"""Checksums of files that are written in chunks, by any number of threads and in any order.

A file's checksum is the hash of the hashes of its blocks. So each block is hashed while it is in the cache, in any order.
Memory: 17 bytes for each block (136 for each MiB of the files), and a copy of each block that is not complete yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from threading import Lock

from xxhash import xxh3_128_digest

from ..core.hashing import hash_of

# Bytes. xxhash releases the GIL only to hash more than 64 KiB.
BLOCK = 128 << 10

_DIGEST = 16


class Checksums:
    """Checksums of several files.

    Args:
        sizes: The sizes of the files in bytes, by name.
        block: Bytes of each block but a file's last one.
    """

    def __init__(self, sizes: Mapping[str, int], block: int = BLOCK) -> None:
        self.block = block
        self._files = {name: _Blocks(size, block) for name, size in sizes.items()}
        self._lock = Lock()

    def add(self, name: str, offset: int, data: memoryview) -> None:
        """Add a range of bytes of a file, from any thread. Each byte is added once; only whole blocks may come again."""
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

    def forget(self, name: str, offset: int) -> None:
        """Forget the hash of a block that was written again: the one that has this byte."""
        self._files[name].known[offset // self.block] = 0

    def gaps(self, name: str) -> Iterator[tuple[int, int]]:
        """Offset and size of the blocks whose hash is not known yet. They may be added during the iteration."""
        blocks, number = self._files[name], -1
        while (number := blocks.known.find(0, number + 1)) >= 0:
            offset = number * self.block
            yield offset, min(self.block, blocks.size - offset)

    def of(self, name: str) -> str:
        """The checksum of a file. Raises ValueError if a part of it is missing."""
        blocks = self._files[name]
        if (number := blocks.known.find(0)) >= 0:
            raise ValueError(
                f"{name}: bytes from {number * self.block} have not come, expected the whole file"
            )
        return hash_of(blocks.digests)

    def export(self) -> dict[str, tuple[bytes, bytes]]:
        """The known hashes, for another process: of each file a mask of its blocks, and their hashes.

        Incomplete blocks are not exported, nor are files without any known hash.
        """
        with self._lock:
            return {
                n: (bytes(blocks.known), bytes(blocks.digests))
                for n, blocks in self._files.items()
                if any(blocks.known)
            }

    def update(self, exported: Mapping[str, tuple[bytes, bytes]]) -> None:
        """Add the hashes that another process exported for the same files."""
        with self._lock:
            for name, (known, digests) in exported.items():
                self._files[name].update(known, digests)


class _Blocks:
    """The blocks of one file: their hashes, which of them are known, and the incomplete blocks."""

    def __init__(self, size: int, block: int) -> None:
        count = -(-size // block)
        self.size, self.known, self.digests = size, bytearray(count), bytearray(count * _DIGEST)
        # The bytes of each incomplete block, and how many of them are missing.
        self._parts: dict[int, tuple[bytearray, int]] = {}

    def know(self, number: int, digest: bytes) -> None:
        self.digests[number * _DIGEST : (number + 1) * _DIGEST] = digest
        self.known[number] = 1
        self._parts.pop(number, None)

    def put(self, number: int, begin: int, part: memoryview, size: int) -> bytearray | None:
        """Store a part of a block; returns the whole block once it is complete."""
        if self.known[number]:
            return None
        whole, missing = self._parts.pop(number) if number in self._parts else (bytearray(size), size)
        whole[begin : begin + len(part)] = part
        if missing == len(part):
            return whole
        self._parts[number] = whole, missing - len(part)
        return None

    def update(self, known: bytes, digests: bytes) -> None:
        import numpy as np

        theirs = np.frombuffer(known, bool)
        np.frombuffer(self.known, np.uint8)[theirs] = 1
        rows = np.frombuffer(self.digests, np.uint8).reshape(-1, _DIGEST)
        rows[theirs] = np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST)[theirs]


def memory(sizes: Iterable[int], workers: int) -> int:
    """The maximum of bytes that the checksums of such files take while workers write their chunks in order."""
    # An incomplete block touches a chunk that a worker is processing, at either end, or the first one not taken yet.
    return sum(-(-size // BLOCK) for size in sizes) * (_DIGEST + 1) + (2 * workers + 1) * BLOCK
