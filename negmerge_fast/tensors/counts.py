"""Counts of a merge in memory: as statistics, and in a warning of elements that are not finite."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..core.batch import COUNTED, Counts
from ..core.errors import MergeWarning, some_names
from ..core.stats import Stats

# The name and the length of each segment of a batch, and the counts of the batch.
Results: TypeAlias = "Sequence[tuple[list[tuple[str, int]], Counts]]"

# What becomes of an element that is not finite, where there is a base.
LEFT = "left as in the base"
_NONFINITE = COUNTED.index("nonfinite")


class StreamCounts(NamedTuple):
    """Counts that a stream writes. Their reader may have another current stream, and Stats does not show them to it."""

    counts: Counts
    written: torch.cuda.Event

    def tolist(self) -> Any:
        self.written.synchronize()
        return self.counts.tolist()


def readable(results: Results) -> Results:
    """Results of a merge that was just launched, with counts that may be read on any stream."""
    gpus = {counts.device for _, counts in results if isinstance(counts, torch.Tensor) and counts.is_cuda}
    events: dict[Any, Any] = {device: event for device in gpus if (event := _event_now(device))}
    return [
        (
            segments,
            StreamCounts(counts, event) if (event := events.get(getattr(counts, "device", None))) else counts,
        )
        for segments, counts in results
    ]


def _event_now(device: torch.device) -> torch.cuda.Event | None:
    """An event on the current stream of a device. None in a capture: counts are written by replays, which no event tells."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


def stats_of(results: Results) -> Stats:
    """The statistics of a merge."""
    stats = Stats()
    for segments, counts in results:
        stats.add(segments, counts)
    return stats


class _Untold(NamedTuple):
    """Counts of a GPU that no one has looked at yet."""

    results: Results
    order: Sequence[str]
    kept: str


_untold: list[_Untold] = []
os.register_at_fork(after_in_child=_untold.clear)  # a forked child cannot use the GPU


def tell_of_nonfinite(results: Results, order: Sequence[str], kept: str, stacklevel: int = 4) -> None:
    """Warn of elements that are not finite, once for all results of a call.

    Counts of a GPU are not waited for: the first call that finds them written tells of them, or the end of the process.
    In a capture no one tells of them.

    Args:
        results: What readable returned.
        order: The names of the tensors, in the order of the base.
        kept: What these elements were: left as in the base, or set to 0.
        stacklevel: As of warnings.warn, from here.
    """
    results = [each for each in results if not (isinstance(each[1], torch.Tensor) and each[1].is_cuda)]
    if any(isinstance(counts, StreamCounts) for _, counts in results):
        _untold.append(_Untold(results, order, kept))
    elif text := _nonfinite(results, order, kept):
        warnings.warn(f"the result: {text}", MergeWarning, stacklevel)


def tell_of_earlier(stacklevel: int = 4, wait: bool = False) -> None:
    """Warn of elements that are not finite in the results of earlier calls on GPUs, if these have ended."""
    if not _untold or (not wait and torch.cuda.is_current_stream_capturing()):
        return
    for each in [each for each in _untold if wait or _are_written(each.results)]:
        _untold.remove(each)
        if text := _nonfinite(each.results, each.order, each.kept):
            warnings.warn(f"the result of an earlier call: {text}", MergeWarning, stacklevel)


@atexit.register
def _tell_at_exit() -> None:
    with suppress(RuntimeError):  # the device has failed, and whoever used it was told
        tell_of_earlier(wait=True)


def _are_written(results: Results) -> bool:
    events = [counts.written for _, counts in results if isinstance(counts, StreamCounts)]
    return all(event.query() for event in events)  # type: ignore[no-untyped-call]


def _nonfinite(results: Results, order: Sequence[str], kept: str) -> str:
    """The line that tells of elements that are not finite; empty if there are none."""
    found: dict[str, int] = {}
    for segments, counts in results:
        column = np.asarray(_read(counts))[:, _NONFINITE]
        if column.any():
            for (name, _), count in zip(segments, column.tolist(), strict=True):
                if count:  # a tensor may be merged in several segments
                    found[name] = found.get(name, 0) + count
    if not found:
        return ""
    names = [name for name in order if name in found]
    of = f" of {some_names(names)}" if names != [""] else ""
    number = sum(found.values())
    elements = "element" if number == 1 else "elements"
    return f"{number:,} {elements}{of} {kept}: not finite in a version or after the merge"


def _read(counts: Counts) -> Any:
    if not isinstance(counts, StreamCounts):
        return counts if isinstance(counts, (np.ndarray, memoryview)) else counts.tolist()
    # On a stream of its own: the current one may have much else to do.
    with torch.cuda.stream(torch.cuda.Stream(counts.counts.device)):  # type: ignore[attr-defined,no-untyped-call]
        return counts.tolist()
