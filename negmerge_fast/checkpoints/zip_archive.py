"""The records of a PyTorch file, which is a zip archive whose entries are stored, not compressed.

Little of the format is allowed, and all that is said twice has to agree: torch's reader and this one then see the same archive.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..core.errors import InputError, short_repr
from .reader import File

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF

# Bits of the flags: a descriptor behind the data repeats what the local header leaves at zero; the name is UTF-8. All others change
# what the data are: encrypted, patched.
_DESCRIBED, _KNOWN_FLAGS = 8, 8 | 1 << 11
_MAX_DESCRIPTOR_BYTES = 24
_ENCRYPTED = 1 | 1 << 6 | 1 << 13

# An entry takes some 100 bytes: a directory of so many bytes is of half a million storages.
_MAX_DIRECTORY_BYTES = 64 << 20


class ZipEntry(NamedTuple):
    """An entry of the archive: where its data are, and their CRC-32."""

    begin: int
    end: int
    crc: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class _Entry(NamedTuple):
    """What the central directory says of an entry."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int


class Archive(NamedTuple):
    """The entries by their names without the archive's own, and the central directory."""

    file: File
    entries: dict[str, ZipEntry]
    directory: bytes

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of an entry.

        Raises:
            InputError: If it is missing, too long or damaged.
        """
        path, entry = self.file.path, self.entries.get(name)
        if entry is None:
            raise InputError(f"{path}: a zip archive without {name}, expected a file that torch.save wrote")
        if entry.nbytes > max_bytes:
            raise InputError(f"{path}: {name} of {entry.nbytes:,} bytes, expected at most {max_bytes:,}")
        content = bytes(self.file.read(entry.begin, entry.nbytes))
        is_checked = any(
            each.crc for each in self.entries.values()
        )  # torch.serialization.set_crc32_options(False)
        if is_checked and zlib.crc32(content) != entry.crc:
            raise InputError(
                f"{path}: the CRC of {name} is {zlib.crc32(content):08x}, expected {entry.crc:08x}: damaged"
            )
        return content


def read_archive(file: File) -> Archive:
    """Read the directory of an archive, and compare the header of each entry with it.

    Raises:
        InputError: If anything is not as torch.save or a plain archiver writes it.
    """
    directory, begin, count = _read_directory(file)
    if b"/constants.pkl" in directory:
        raise InputError(
            f"{file.path}: a TorchScript archive, expected a state dict (torch.save(torch.jit.load(…).state_dict(), 'model.pt'))"
        )
    entries = sorted(_entries(file.path, directory, count), key=lambda entry: entry.header)
    found: dict[str, ZipEntry] = {}
    roots = {entry.name.partition(b"/")[0] for entry in entries}
    if len(roots) > 1:
        some = " and ".join(short_repr(root.decode("utf-8", "replace")) for root in sorted(roots)[:2])
        raise InputError(f"{file.path}: entries in {some}, expected one folder for all of the archive")
    for entry, held in zip(entries, _read_headers(file, entries), strict=True):
        name = entry.name.decode().partition("/")[2]
        if name in found:
            raise InputError(f"{file.path}: two entries {short_repr(name)}, expected different names")
        found[name] = held
    ends = [*(entry.header for entry in entries), begin]
    if ends[0] != 0:
        raise InputError(
            f"{file.path}: the first entry begins at byte {ends[0]}, expected 0: other data in front"
        )
    for (name, held), (_, following) in zip(found.items(), pairwise(ends), strict=True):
        if not held.end <= following <= held.end + _MAX_DESCRIPTOR_BYTES:
            raise InputError(
                f"{file.path}: entry {short_repr(name)} ends at byte {held.end}, the next begins at {following}: "
                "entries overlap or leave holes"
            )
    return Archive(file, found, directory)


def _read_directory(file: File) -> tuple[bytes, int, int]:
    """Return the central directory, where it begins, and how many entries it has."""
    path, size = file.path, file.size
    tail = bytes(file.read(max(size - 98, 0), min(size, 98)))
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        raise InputError(
            f"{path}: no end of a zip archive at byte {max(size - 22, 0)}: truncated, or other data behind it"
        )
    _, *disks, on_disk, count, nbytes, begin, _ = _END.unpack(end)
    told = (on_disk, count, nbytes, begin)
    position = size - _END.size
    if tail[-42:].startswith(b"PK\6\7"):
        _, disk, at, total = _LOCATOR.unpack(tail[-42:-22])
        if len(tail) < 98 or at != size - 98 or disk or total > 1 or not tail.startswith(b"PK\6\6"):
            raise InputError(f"{path}: its zip64 record is not in front of its locator, expected it there")
        _, length, _, _, *disks64, on_disk, count, nbytes, begin = _END64.unpack(tail[:56])
        disks, position = [*disks, *disks64], size - 98
        limits = (_MAX16, _MAX16, _MAX32, _MAX32)
        values = (on_disk, count, nbytes, begin)
        if length != 44 or any(t not in (min(v, m), m) for t, v, m in zip(told, values, limits, strict=True)):
            raise InputError(
                f"{path}: its zip64 record says {values}, the end of the archive {told}, expected the same"
            )
    elif _MAX16 in told[:2] or _MAX32 in told[2:]:
        raise InputError(f"{path}: no zip64 record, but the end of the archive refers to one")
    if any(disks) or on_disk != count:
        raise InputError(f"{path}: one of several disks of a zip archive, expected all of it")
    if (
        begin + nbytes != position
        or nbytes > _MAX_DIRECTORY_BYTES
        or count * _CENTRAL.size > nbytes
        or not count
    ):
        raise InputError(
            f"{path}: a directory of {count} entries and {nbytes} bytes at byte {begin}, expected it to end at {position}"
        )
    return bytes(file.read(begin, nbytes)), begin, count


def _entries(path: Path, directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            raise InputError(f"{path}: the zip archive's directory ends too early")
        fields = _CENTRAL.unpack_from(directory, at)
        (
            magic,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_size,
            extra_size,
            comment_size,
            disk,
            _,
            _,
            header,
        ) = fields
        name = directory[at + _CENTRAL.size : at + _CENTRAL.size + name_size]
        extra = directory[at + _CENTRAL.size + name_size :][:extra_size]
        at += _CENTRAL.size + name_size + extra_size + comment_size
        shown = short_repr(name.decode("utf-8", "replace"))
        if magic != b"PK\1\2" or at > len(directory) or disk:
            raise InputError(f"{path}: the zip archive's directory is malformed")
        if flags & _ENCRYPTED:
            raise InputError(f"{path}: entry {shown} is encrypted, expected a file that torch.save wrote")
        if method or flags & ~_KNOWN_FLAGS:
            raise InputError(
                f"{path}: entry {shown} is compressed (method {method}, flags {flags:#x}), expected stored data, as torch.save writes it"
            )
        values = _widened([size, packed, header], extra)
        if values is None or values[0] != values[1]:
            raise InputError(
                f"{path}: entry {shown}: its sizes are {packed} and {size}, or are missing, expected one size"
            )
        if not _is_plain(name):
            raise InputError(f"{path}: entry {shown}, expected a name inside of the archive")
        yield _Entry(name, flags, crc, values[0], values[2])
    if at != len(directory):
        raise InputError(
            f"{path}: {len(directory) - at} bytes behind the last entry of the zip archive's directory"
        )


def _is_plain(name: bytes) -> bool:
    """Whether a name is a normalized path of a file in a folder."""
    try:
        parts = name.decode("utf-8").split("/")
    except UnicodeDecodeError:
        return False
    return (
        len(parts) > 1 and not {"", ".", ".."}.intersection(parts) and b"\\" not in name and b"\0" not in name
    )


def _widened(values: list[int], extra: bytes) -> list[int] | None:
    """Replace the values that are at their limit by those of the zip64 field; None if it lacks one."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + size]
        at += 4 + size
        if kind == 1:
            wide = [k for k, value in enumerate(values) if value == _MAX32]
            if len(field) < 8 * len(wide):
                return None
            for k, value in zip(wide, struct.unpack_from(f"<{len(wide)}Q", field), strict=True):
                values[k] = value
            return values
    return None if _MAX32 in values else values


def _read_headers(file: File, entries: list[_Entry]) -> Iterator[ZipEntry]:
    """Where the data of each entry are: behind its own header, which may be longer than the directory says."""
    sizes = [_LOCAL.size + len(entry.name) for entry in entries]
    ranges = [range(e.header, e.header + size) for e, size in zip(entries, sizes, strict=True)]
    if any(each.stop > file.size for each in ranges):
        raise InputError(f"{file.path}: an entry of the zip archive begins behind its end")
    headers, at = file.read_ranges(ranges), 0
    for entry, size in zip(entries, sizes, strict=True):
        magic, _, flags, method, _, _, crc, packed, unpacked, name_size, extra_size = _LOCAL.unpack_from(
            headers, at
        )
        name = bytes(headers[at + _LOCAL.size : at + size])
        at += size
        later = flags & _DESCRIBED and not (
            crc or packed or unpacked
        )  # told by the descriptor behind the data
        same = crc == entry.crc and all(n in (entry.size, _MAX32) for n in (packed, unpacked))
        if (
            magic != b"PK\3\4"
            or name != entry.name
            or name_size != len(name)
            or (flags, method) != (entry.flags, 0)
        ):
            raise InputError(
                f"{file.path}: the header of entry {short_repr(entry.name.decode())} is not as in the directory"
            )
        if not (later or same):
            raise InputError(
                f"{file.path}: entry {short_repr(entry.name.decode())} of {unpacked} bytes and CRC {crc:08x}, expected {entry.size} "
                f"and {entry.crc:08x} as in the directory"
            )
        begin = entry.header + size + extra_size
        yield ZipEntry(begin, begin + entry.size, entry.crc)
