"""Counts of a merge."""

from __future__ import annotations

import pytest

from negmerge_fast.core.batch import Rows
from negmerge_fast.core.stats import Stats


class Interrupted(Rows):
    """Counts at whose first reading Ctrl-C is pressed."""

    pressed = False

    def tolist(self) -> list[list[int]]:
        if not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return self


def test_an_interrupt_while_they_are_added_up_counts_nothing_twice() -> None:
    stats = Stats()
    stats.add([("a", 5)], Rows([[1, 0, 2]]))
    stats.add([("a", 3), ("b", 2)], Interrupted([[1, 1, 0], [2, 0, 0]]))
    with pytest.raises(KeyboardInterrupt):
        _ = stats.tensors
    assert (stats.elements, stats.agreed, stats.nonfinite, stats.vetoed_by_zero) == (10, 4, 1, 2)
