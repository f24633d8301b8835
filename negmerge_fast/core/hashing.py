"""Hashes of bytes, written as text."""

from __future__ import annotations

from typing import Any

from xxhash import xxh3_128


def hash_of(*parts: Any) -> str:
    """The xxh3_128 of byte strings one after the other, as `xxh3_128:` and hexadecimal digits."""
    hasher = xxh3_128()
    for part in parts:
        hasher.update(part)
    return f"xxh3_128:{hasher.hexdigest()}"
