"""A model of a disk that loses power: what was not synced is lost, in part or whole.

Names and bytes are synced apart from each other, as POSIX allows: bytes by fsync and fdatasync of a file, names by fsync of their
directory. A rename is done or not done. On most file systems the names of one directory reach the disk in their order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# The mode and the bytes of files, None in place of the bytes of directories, by their paths.
Tree = dict[str, tuple[int, bytes | None]]


class Call(NamedTuple):
    """A call that tests/support/faults.c has recorded."""

    name: str
    words: list[str]
    data: bytes


def recorded(log: bytes) -> list[Call]:
    found = []
    while log:
        line, _, log = log.partition(b"\n")
        name, *words, size = line.decode().split("\t")
        found.append(Call(name, words, log[: int(size)]))
        log = log[int(size) :]
    return found


@dataclass
class File:
    """A file: its bytes, those that are synced, and what was done since then: an offset and bytes, or a size."""

    mode: int
    live: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)

    def change(self, what: tuple[int, bytes] | int) -> None:
        self.pending.append(what)
        apply(self.live, what)

    def sync(self) -> None:
        self.synced, self.pending = bytes(self.live), []


def apply(data: bytearray, what: tuple[int, bytes] | int) -> None:
    if isinstance(what, int):
        del data[what:]
        data.extend(bytes(what - len(data)))
        return
    offset, written = what
    data.extend(bytes(max(offset - len(data), 0)))
    data[offset : offset + len(written)] = written


Names = dict[int, dict[str, int]]
# What one call changes: a directory, a name in it, and what it names then, if anything.
Change = list[tuple[int, str, int | None]]
Content = Callable[[File], bytes]


def name(names: Names, change: Change) -> None:
    for directory, entry, inode in change:
        if inode is None:
            names.setdefault(directory, {}).pop(entry, None)
        else:
            names.setdefault(directory, {})[entry] = inode


class Disk:
    """The disk below a folder, from what is in it, all of which is synced."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.stat().st_ino
        self.files: dict[int, File] = {}
        self.modes: dict[int, int] = {}
        self.live: Names = {self.root: {}}
        for path in folder.rglob("*"):
            found = path.stat()
            self.live.setdefault(path.parent.stat().st_ino, {})[path.name] = found.st_ino
            if path.is_dir():
                self._add_directory(found.st_ino, found.st_mode & 0o7777)
            else:
                data = path.read_bytes()
                self.files[found.st_ino] = File(found.st_mode & 0o7777, bytearray(data), data)
        self.synced: Names = {inode: dict(names) for inode, names in self.live.items()}
        self.pending: list[Change] = []

    def _add_directory(self, inode: int, mode: int) -> None:
        self.modes[inode] = mode
        self.live.setdefault(inode, {})

    def apply(self, call: Call) -> None:
        match call.name, call.words:
            case "create" | "mkdir", [parent, entry, inode, mode]:
                if call.name == "mkdir":
                    self._add_directory(int(inode), int(mode, 8))
                    self.live[int(inode)] = {}
                else:
                    self.files[int(inode)] = File(int(mode, 8))
                self._rename([(int(parent), entry, int(inode))])
            case "link", [parent, entry, inode]:
                self._rename([(int(parent), entry, int(inode))])
            case "unlink", [parent, entry]:
                self._rename([(int(parent), entry, None)])
            case "rename" | "exchange", [source, old, destination, new]:
                inode, other = self.live[int(source)][old], self.live[int(destination)].get(new)
                back = other if call.name == "exchange" else None
                self._rename([(int(source), old, back), (int(destination), new, inode)])
            case "write", [inode, offset]:
                self.files[int(inode)].change((int(offset), call.data))
            case "size", [inode, size]:
                self.files[int(inode)].change(int(size))
            case "mode", [inode, mode]:
                if int(inode) in self.files:
                    self.files[int(inode)].mode = int(mode, 8)
                else:
                    self.modes[int(inode)] = int(mode, 8)
            case "sync", [inode]:
                self._sync(int(inode))
            case _:
                raise AssertionError(call)

    def _rename(self, change: Change) -> None:
        self.pending.append(change)
        name(self.live, change)

    def _sync(self, inode: int) -> None:
        if inode in self.files:
            self.files[inode].sync()
            return
        # With what is changed in the directory, what was changed before by the same names elsewhere.
        keys, chosen = set(), []
        for change in reversed(self.pending):
            if any(directory == inode or (directory, entry) in keys for directory, entry, _ in change):
                keys |= {(directory, entry) for directory, entry, _ in change}
                chosen.append(change)
        for change in reversed(chosen):
            name(self.synced, change)
        self.pending = [change for change in self.pending if change not in chosen]

    def after_power_loss(self, seeds: int) -> Iterator[tuple[str, Tree]]:
        """Yield what may be found, with a description."""
        yield "all is kept", self._tree(self.live, _live)
        yield "names and bytes are lost", self._tree(self.synced, _synced)
        yield "bytes are zeros", self._tree(self.live, _zeros)
        yield "bytes are lost", self._tree(self.live, _synced)
        yield "names are lost", self._tree(self.synced, _live)
        for seed in range(seeds):
            generator = random.Random(seed)
            some = self._names(generator, in_order=bool(seed % 3))
            yield f"mixture {seed}", self._tree(some, lambda file, g=generator: _some(file, g))

    def _names(self, generator: random.Random, in_order: bool) -> Names:
        """The synced names and a part of the pending ones; in order: in each directory none after the first that is lost."""
        names: Names = {inode: dict(entries) for inode, entries in self.synced.items()}
        stopped: set[int] = set()
        for change in self.pending:
            directories = {directory for directory, *_ in change}
            if directories & stopped or generator.random() < 0.25:
                stopped |= directories if in_order else set()
            else:
                name(names, change)
        return names

    def _tree(self, names: Names, content: Content, directory: int | None = None, path: str = "") -> Tree:
        found: Tree = {}
        for entry, inode in sorted(names.get(self.root if directory is None else directory, {}).items()):
            if inode in self.files:
                found[path + entry] = self.files[inode].mode, content(self.files[inode])
            else:
                found[path + entry] = self.modes[inode], None
                found |= self._tree(names, content, inode, f"{path}{entry}/")
        return found


def _live(file: File) -> bytes:
    return bytes(file.live)


def _synced(file: File) -> bytes:
    return file.synced


def _zeros(file: File) -> bytes:
    """The size of a file, but none of the bytes that were not synced."""
    if not file.pending:
        return file.synced
    return file.synced[: len(file.live)].ljust(len(file.live), b"\0")


def _some(file: File, generator: random.Random) -> bytes:
    data = bytearray(file.synced)
    for what in file.pending:
        if generator.random() < 0.5:
            apply(data, what)
    if generator.random() < 0.5:
        apply(data, len(file.live))
    return bytes(data)
