"""Whole models in memory: many small tensors in one call, and the shapes of real models."""

from __future__ import annotations

from collections.abc import Callable

from cases import Case


def test_layout(case: Case, time_merge: Callable[[Case], None]) -> None:
    time_merge(case)
