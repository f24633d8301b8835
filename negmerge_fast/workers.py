"""Pieces of a plan for several workers to take, and what became of them, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .plan import Extent


def join(workers: Sequence[Thread]) -> None:
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


class Pieces:
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


# The name and the number of elements of each segment of a batch, and int64[segments, 2]: agreed and non-finite.
Counted: TypeAlias = "tuple[list[tuple[str, int]], np.ndarray[Any, Any]]"


class Done(NamedTuple):
    """What a worker says of a piece: the bytes that it read and wrote, and what was counted; or why it failed.

    skipped: those of the bytes that it did not need to read.
    """

    read: int = 0
    written: int = 0
    counted: Sequence[Counted] = ()
    skipped: int = 0
    error: BaseException | None = None


# Numbers of pieces and what became of them; None: a worker has ended.
Queue: TypeAlias = "SimpleQueue[tuple[int, Done] | None]"
# The number of no piece: a worker failed before it took one.
NONE = -1


def in_order(done: Queue, workers: int) -> Iterator[Done]:
    """What became of the pieces, in their order, until all workers have ended."""
    early: dict[int, Done] = {}
    following = 0
    while workers:
        if (message := done.get()) is None:
            workers -= 1
            continue
        number, piece = message
        if number == NONE:
            yield piece
        early[number] = piece
        while following in early:
            yield early.pop(following)
            following += 1
