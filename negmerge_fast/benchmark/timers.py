"""Clocks: the CPU's, and events on a GPU's stream. The difference of two readings is seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .records import on_gpu

Clock = Callable[[], Any]


class Moment:
    """An event on a device's current stream.

    Recording one does not wait, so that the host adds nothing to what is timed. `later - earlier` waits for both and
    returns the seconds between them.
    """

    __slots__ = ("event",)

    def __init__(self, device: str) -> None:
        self.event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record(torch.cuda.current_stream(device))

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def clock(device: str) -> Clock:
    """A clock of the device: what the host does while the device is busy takes no time."""
    if not on_gpu(device):
        return time.perf_counter

    def now() -> Moment:
        return Moment(device)

    return now


def wall(device: str) -> Clock:
    """A clock of the host that waits for the device, as a caller does."""

    def now() -> float:
        wait(device)
        return time.perf_counter()

    return now


def wait(device: str) -> None:
    """Wait until a device has done all that was launched on it."""
    if on_gpu(device):
        torch.cuda.synchronize(device)
