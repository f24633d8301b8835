"""Clocks whose readings are subtracted from each other: seconds of the CPU's, or events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .records import on_gpu

Clock = Callable[[], Any]


class Moment:
    """A point in the work of a device's current stream.

    Making one waits for nothing, so that nothing lies between what is timed and its ends. later - earlier waits, and is
    the seconds between them.
    """

    __slots__ = ("event",)

    def __init__(self, device: str) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(torch.cuda.current_stream(device))

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def clock(device: str) -> Clock:
    """Time as the device sees it: what the host does while the device is busy with something else is free."""
    if not on_gpu(device):
        return time.perf_counter

    def now() -> Moment:
        return Moment(device)

    return now


def wall(device: str) -> Clock:
    """Time as a caller sees it who waits for the device."""

    def now() -> float:
        wait(device)
        return time.perf_counter()

    return now


def wait(device: str) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)
