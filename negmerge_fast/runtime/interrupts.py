"""Steps without interrupts by signals, and loops without garbage collection."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from _signal import (  # type: ignore[import-not-found]
    getsignal,  # signal.getsignal makes an enum of each answer: for all signals that takes as long as a small merge
)
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

_SIGNALS = sorted(signal.valid_signals())
# More bytes than any platform's struct sigaction has. PyDLL keeps the interpreter's lock: no thread comes between.
_ACTION_BYTES = 1024
_sigaction = ctypes.PyDLL(None).sigaction


class _Collector:
    """The cyclic garbage collector, which is off as long as some thread wants it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: set[object] = set()
        self._was_enabled = False

    def disable(self, holder: object) -> None:
        with self._lock:
            if not self._holders:
                self._was_enabled = gc.isenabled()
            self._holders.add(holder)
            gc.disable()

    def restore(self, holder: object) -> None:
        with self._lock:
            if holder in self._holders:
                self._holders.remove(holder)
                if self._was_enabled and not self._holders:
                    gc.enable()

    def forget_other_threads(self) -> None:
        """Restore it in a forked child: the threads that wanted it off are not there."""
        if self._was_enabled and self._holders:
            gc.enable()
        self.__init__()  # type: ignore[misc]  # the lock may have been held


_collector = _Collector()
os.register_at_fork(after_in_child=_collector.forget_other_threads)


@contextmanager
def without_gc() -> Iterator[None]:
    """Disable the cyclic garbage collector: thousands of new tuples would set it off, again and again, for all objects.

    It is off for all threads, so what is inside must be short and must not call functions of the user's.
    """
    holder = object()
    try:
        _collector.disable(holder)
        yield
    finally:
        _collector.restore(holder)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Defer signals that Python handles, such as Ctrl-C, until a step that must not be left half done has ended.

    Then the handler of each signal that came is called once, whatever the others raise. Blocking signals would not do: another
    thread would be given them, and Python would call the handlers in this one all the same.
    """
    if not _calls_handlers():
        yield
        return
    replaced: dict[int, Any] = {}
    received: dict[int, Callable[[], object]] = {}
    ended = False

    def defer(handler: Any, number: int, frame: FrameType | None) -> None:
        if ended:  # other handlers have raised again and again while this one was to be put back
            handler(number, frame)
        else:
            received.setdefault(number, partial(handler, number, frame))

    try:
        for number in _SIGNALS:
            if callable(handler := getsignal(number)):
                replaced[number] = handler
                _set_handler(number, partial(defer, handler))
        yield
    finally:
        try:
            _put_back(replaced)
        finally:
            try:
                _put_back(replaced)  # two may have raised at once
            finally:
                ended = True
                _call_all(iter(received.values()))


def _calls_handlers() -> bool:
    """Whether this is the thread in which Python calls handlers: the interpreter's first one.

    threading takes the one that imported it first for the main thread: in a program that embeds Python it may be another.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        signal.signal(signal.SIGINT, object())  # type: ignore[arg-type]
    except TypeError:  # of the handler, which is looked at after the thread
        return True
    except ValueError:
        return False
    return True


def _put_back(handlers: dict[int, Any]) -> None:
    """Set these handlers. One that is in place again may raise at any time: all are set nevertheless."""
    try:
        for number in list(handlers):
            _set_handler(number, handlers[number])
            del handlers[number]
    except BaseException:
        _put_back(handlers)
        raise


def _call_all(calls: Iterator[Callable[[], object]]) -> None:
    """Call each of these, also after one has raised. The last exception has the earlier ones as its context."""
    try:
        for call in calls:
            call()
    except BaseException:
        _call_all(calls)
        raise


def _set_handler(number: int, handler: Any) -> None:
    """Set what Python calls for a signal. What the kernel calls stays: its flags, such as SA_RESTART, and a handler of C's."""
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _sigaction(number, None, action)
    try:
        signal.signal(number, handler)
    finally:
        _sigaction(number, action, None)
