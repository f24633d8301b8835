"""Garbage collection and signals, put off for a while."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from negmerge_fast.runtime import interrupts
from negmerge_fast.runtime.interrupts import without_gc, without_interrupts

SA_RESTART = 0x10000000


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    yield
    gc.enable()
    changed = {n for n, handler in handlers.items() if signal.getsignal(n) is not handler}
    for number in changed:
        signal.signal(number, handlers[number] or signal.SIG_DFL)
    assert not changed


@contextmanager
def handler_of(number: int, handler: Callable[[int, Any], Any]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def another_thread_with(number: int) -> Iterator[None]:
    """Another thread, which does not block a signal that is blocked here."""
    ended, ready = threading.Event(), threading.Event()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        ready.set()
        ended.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def action(number: int) -> tuple[int, int, int]:
    """What the kernel knows of a signal: the handler, the mask and the flags of Linux's struct sigaction."""
    held = ctypes.create_string_buffer(152)
    ctypes.CDLL(None).sigaction(int(number), None, held)
    at = [ctypes.c_uint64.from_buffer(held, 8 * i).value for i in range(18)]
    return at[0], at[1], at[17] & 0xFFFFFFFF


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(ValueError, match="inside"), without_gc():
        assert not gc.isenabled()
        with without_gc():
            pass
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled() == enabled


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("first", ["began first", "began last"])
def test_garbage_collection_is_as_before_whichever_thread_ends_first(enabled: bool, first: str) -> None:
    (gc.enable if enabled else gc.disable)()
    began, end = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def run(k: int) -> None:
        with without_gc():
            began[k].set()
            end[k].wait()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread, event in zip(threads, began, strict=True):
        thread.start()
        event.wait()
    order = (0, 1) if first == "began first" else (1, 0)
    for k in order:
        assert not gc.isenabled()
        end[k].set()
        threads[k].join()
    assert gc.isenabled() == enabled


def test_garbage_collection_in_a_forked_child() -> None:
    """Neither the lock nor the wish of a thread that the child does not have is left behind."""
    gc.enable()
    began, end = threading.Event(), threading.Event()

    def run() -> None:
        with without_gc():
            began.set()
            end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait()
    if not (child := os.fork()):
        with without_gc():
            inside = gc.isenabled()
        os._exit(0 if gc.isenabled() and not inside else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    end.set()
    thread.join()
    assert gc.isenabled()


def test_an_interrupt_comes_when_the_step_has_ended() -> None:
    handler = signal.getsignal(signal.SIGINT)
    steps = []
    with pytest.raises(KeyboardInterrupt), without_interrupts():
        signal.raise_signal(signal.SIGINT)
        steps.append("ended")
    assert steps == ["ended"] and signal.getsignal(signal.SIGINT) is handler


def test_a_signal_that_another_thread_is_given_comes_when_the_step_has_ended() -> None:
    """The kernel gives a signal of the process to any thread that does not block it, and Python calls the handler here."""
    received: list[int] = []
    steps = []
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with (
            handler_of(signal.SIGUSR1, lambda number, _: received.append(number)),
            another_thread_with(signal.SIGUSR1),
        ):
            with without_interrupts():
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.05)
                steps.append(list(received))
            assert (steps, received) == ([[]], [signal.SIGUSR1])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def test_none_of_several_signals_is_lost() -> None:
    """Also if a handler raises: the last exception is raised, and has the others as its context."""
    received: list[str] = []

    def stop(number: int, frame: Any) -> None:
        received.append("TERM")
        raise SystemExit(143)

    with (
        handler_of(signal.SIGTERM, stop),
        handler_of(signal.SIGUSR1, lambda *_: received.append("USR1")),
        handler_of(signal.SIGUSR2, lambda *_: received.append("USR2")),
    ):
        with pytest.raises(SystemExit) as raised, without_interrupts():
            for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.raise_signal(number)
            assert received == []
        assert received == ["USR2", "TERM", "USR1"]
        assert isinstance(raised.value.__context__, KeyboardInterrupt)


def test_a_signal_and_an_error_of_the_step() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, without_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("inside")
    assert isinstance(raised.value.__context__, ValueError)


def test_a_step_inside_a_step() -> None:
    received: list[str] = []
    with handler_of(signal.SIGTERM, lambda *_: received.append("TERM")), without_interrupts():
        with without_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == ["TERM"]


def test_handlers_that_raise_while_others_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in place again may raise at any time; here it does as soon as it is, and two at once."""
    numbers = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    called: list[int] = []

    def stop(number: int, frame: Any) -> None:
        called.append(number)
        raise SystemExit(number)

    def set_handler(number: int, handler: Any) -> None:
        set_as_before(number, handler)
        if ended and number == signal.SIGUSR1:
            ended.clear()
            both = (signal.SIGHUP, signal.SIGUSR1)
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            for each in both:
                signal.raise_signal(each)  # to this thread: another one would not block it
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

    set_as_before = interrupts._set_handler
    monkeypatch.setattr(interrupts, "_set_handler", set_handler)
    before = {n: signal.signal(n, stop) for n in numbers}
    try:
        ended: list[bool] = []
        with pytest.raises(SystemExit), without_interrupts():
            signal.raise_signal(signal.SIGTERM)
            ended.append(True)
        assert [signal.getsignal(n) for n in numbers] == [stop] * 4
        assert sorted(called) == [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_callbacks_of_asyncio_run_once() -> None:
    """The C handler has told the loop already when the signal came."""

    async def run() -> list[str]:
        seen: list[str] = []
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, seen.append, "USR1")
        loop.add_signal_handler(signal.SIGTERM, seen.append, "TERM")
        with without_interrupts():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        return seen

    assert asyncio.run(run()) == ["USR1", "TERM"]


def test_a_wakeup_descriptor_is_written_once() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with pytest.raises(KeyboardInterrupt), without_interrupts():
            signal.raise_signal(signal.SIGINT)
        assert os.read(reading, 16) == bytes([signal.SIGINT])
    finally:
        assert signal.set_wakeup_fd(before) == writing
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("restarts", [True, False])
def test_what_the_kernel_knows_of_a_signal_stays(restarts: bool) -> None:
    with handler_of(signal.SIGUSR2, lambda *_: None):
        signal.siginterrupt(signal.SIGUSR2, not restarts)
        before = action(signal.SIGUSR2)
        assert bool(before[2] & SA_RESTART) == restarts
        with without_interrupts():
            assert action(signal.SIGUSR2) == before
        assert action(signal.SIGUSR2) == before


def test_handlers_that_are_not_pythons_stay(tmp_path: Path) -> None:
    """Of C, even where a handler of Python's was set before; and those that ignore a signal, or do what is usual."""
    with (
        open(tmp_path / "dumped", "w") as dumped,
        handler_of(signal.SIGUSR1, lambda *_: None),
        handler_of(signal.SIGUSR2, signal.SIG_IGN),  # type: ignore[arg-type]
    ):
        faulthandler.register(signal.SIGUSR1, dumped, all_threads=False)
        try:
            numbers = signal.valid_signals() - {signal.SIGINT}
            before = {n: action(n) for n in numbers}
            with without_interrupts():
                assert {n: action(n) for n in numbers} == before
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR2)
            assert {n: action(n) for n in numbers} == before
            signal.raise_signal(signal.SIGUSR1)
        finally:
            assert faulthandler.unregister(signal.SIGUSR1)
    assert (tmp_path / "dumped").read_text().count("most recent call first") == 2


def test_another_thread_changes_no_handlers() -> None:
    found = []

    def run() -> None:
        with without_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_a_thread_that_imported_threading_first() -> None:
    """In a program that embeds Python it is the main thread to threading, and not to signal."""
    code = """
import _thread, sys, time
ended = []
def run():
    try:
        from negmerge_fast.runtime.interrupts import without_interrupts
        with without_interrupts():
            ended.append("")
    except BaseException as error:
        ended.append(repr(error))
assert "threading" not in sys.modules
_thread.start_new_thread(run, ())
while not ended:
    time.sleep(0.01)
print(ended)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['']\n", done.stderr
