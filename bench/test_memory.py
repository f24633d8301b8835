"""One tensor in memory: every backend, dtype, number of models and size, and baselines on the same memory."""

from __future__ import annotations

from collections.abc import Callable

from cases import Case


def test_memory(case: Case, time_merge: Callable[[Case], None]) -> None:
    time_merge(case)
