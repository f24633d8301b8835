"""Hash of bytes, written as text."""

from __future__ import annotations

from typing import Any

from xxhash import xxh3_128


def hash_of(*parts: Any) -> str:
    """A hash in words: of bytes, or of runs of them one behind the other."""
    hasher = xxh3_128()
    for part in parts:
        hasher.update(part)
    return f"xxh3_128:{hasher.hexdigest()}"
