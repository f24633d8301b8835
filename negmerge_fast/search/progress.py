"""Progress of a search of λ, with the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..core.errors import short_repr

# Called with the number of scales that have been evaluated, and of all.
OnProgress = Callable[[int, int], None]


@contextmanager
def on_progress_of(progress: bool | OnProgress) -> Iterator[OnProgress]:
    """A bar, which only a terminal shows, or the user's own function."""
    if not callable(progress) and not isinstance(progress, bool):
        raise TypeError(f"progress: {short_repr(progress)}, expected True, False or a function")
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm  # takes longer to import than small models take to evaluate

    with tqdm(
        total=0, desc="select", unit="scale", leave=False,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt} scales, {remaining} left",
    ) as bar:  # fmt: skip

        def show(done: int, total: int) -> None:
            bar.update(done - bar.n)
            if bar.total != total:
                bar.total = total
                bar.refresh()

        yield show
