"""Pieces of a plan for several workers to take, and what became of them, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import TypeAlias

from ..streaming.plan import Extent
from ..streaming.progress import Done

# Called in a worker's thread: what it needs, and as long as it has that, what it does with a piece.
Ready: TypeAlias = "Callable[[], AbstractContextManager[Callable[[Extent], Done]]]"
# Numbers of pieces and what became of them; None: a worker has ended.
_Queue: TypeAlias = "SimpleQueue[tuple[int, Done] | None]"
# The number of no piece: a worker failed before it took one.
_NONE = -1


def work_through(
    coming: Iterator[Extent],
    workers: int,
    ready: Ready,
    settle: Callable[[Done], None],
) -> None:
    """Have pieces worked on by so many threads, and be told of each, in their order.

    settle: is told, in this thread; it may raise to stop them. The first error, in the order of the pieces, is raised when
    all threads have ended.
    """
    taken = _Pieces(coming, ahead=4 * workers)
    done: _Queue = SimpleQueue()
    threads = [
        Thread(target=_work, args=(taken, done, ready), name=f"lane {number}") for number in range(workers)
    ]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        for piece in _in_order(done, workers):
            if piece.error is not None:
                raise piece.error
            settle(piece)
            taken.settled()
    finally:
        taken.stop(workers)
        _join(started)


def _work(taken: _Pieces, done: _Queue, ready: Ready) -> None:
    number = _NONE
    try:
        with ready() as work:
            while (next_piece := taken.take()) is not None:
                number, piece = next_piece
                done.put((number, work(piece)))
                number = _NONE
    except BaseException as error:
        done.put((number, Done(error=error)))
    done.put(None)


def _in_order(done: _Queue, workers: int) -> Iterator[Done]:
    """What became of the pieces, in their order, until all workers have ended."""
    early: dict[int, Done] = {}
    following = 0
    while workers:
        if (message := done.get()) is None:
            workers -= 1
            continue
        number, piece = message
        if number == _NONE:
            yield piece
        early[number] = piece
        while following in early:
            yield early.pop(following)
            following += 1


class _Pieces:
    """The pieces of a plan, numbered, for several workers to take; none after a stop.

    ahead: how many may be taken before the first of them is settled, so that what became of them cannot pile up.
    """

    def __init__(self, coming: Iterator[Extent], ahead: int) -> None:
        self._coming, self._lock, self._stopped = enumerate(coming), Lock(), False
        self._room = Semaphore(ahead)

    def take(self) -> tuple[int, Extent] | None:
        self._room.acquire()
        with self._lock:
            return None if self._stopped else next(self._coming, None)

    def settled(self) -> None:
        self._room.release()

    def stop(self, workers: int) -> None:
        self._stopped = True
        self._room.release(workers)


def _join(workers: Sequence[Thread]) -> None:
    """Wait for all: they use files that are closed next. An interruption comes when they have ended."""
    interrupted: BaseException | None = None
    for worker in workers:
        while worker.is_alive():
            try:
                worker.join()
            except BaseException as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted
