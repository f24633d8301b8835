"""What a call asks of the process around it while it works: no interruption, no collection of garbage."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_gc() -> Iterator[None]:
    """Without the searches for cycles that thousands of new tuples set off, each through all objects of the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Signals that Python handles, Ctrl-C first of all, wait for the end of what must not be left half done."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other runs handlers
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
