"""Calls without interrupts by signals and without garbage collection."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Disable the cyclic garbage collector: thousands of new tuples would set it off, again and again, for all objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Defer signals that Python handles, such as Ctrl-C, until a step that must not be left half done has ended."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # only this thread runs handlers
        handlers = {n: h for n in signal.valid_signals() if callable(h := signal.getsignal(n))}
    received: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)
