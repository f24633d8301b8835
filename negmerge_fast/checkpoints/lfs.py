"""Git LFS pointers: short texts that stand for files that were not downloaded."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import InputError

# The second is how the first versions wrote it.
_BEGINNINGS = b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"


def is_pointer(head: bytes | bytearray) -> bool:
    return head.startswith(_BEGINNINGS)


def refuse_pointer(path: Path, head: bytes | bytearray) -> None:
    """Raise InputError if a file begins as a pointer."""
    if is_pointer(head):
        raise InputError(f'{path}: a Git LFS pointer, expected the file itself (run "git lfs pull")')
