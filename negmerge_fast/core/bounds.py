"""Bounds of magnitudes: which differences Gate.MAGNITUDE lets pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Bounds(NamedTuple):
    """The bounds of a tensor: low and high of Terms, a number for each model."""

    low: tuple[float, ...]
    high: tuple[float, ...]


class Trimming(Protocol):
    """What is asked of a method: Method of methods/base.py."""

    @property
    def over(self) -> str: ...

    def ranks(self, models: int, numel: int) -> Sequence[tuple[int, int]]: ...
