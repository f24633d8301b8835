"""Merges of checkpoints in chunks smaller than usual, and journals that record each of them: the one place that sets that."""

from __future__ import annotations

import pytest

from negmerge_fast.output import journal
from negmerge_fast.streaming import budget

# Where a program is run as text: RECORD_EVERY_CHUNK before what it does.
RECORD_EVERY_CHUNK = """
from negmerge_fast.output import journal
from negmerge_fast.streaming import budget
journal.INTERVAL_S, budget.MAX_CHUNK_BYTES = 0.0, 1 << 16
"""


def set_chunk_bytes(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(budget, "MAX_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(budget, "_MIN_CHUNK_BYTES", min(chunk_bytes, 4096))


def record_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 KiB, each on record as soon as it is on the disk."""
    set_chunk_bytes(monkeypatch, 1 << 16)
    monkeypatch.setattr(journal, "INTERVAL_S", 0.0)
