"""Threads that process items, and results in the order of the items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from typing import Generic, TypeAlias, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Called in a worker's thread. The context manager holds the worker's resources and yields the function that processes items.
MakeWorker: TypeAlias = "Callable[[], AbstractContextManager[Callable[[_Item], _Result]]]"


@dataclass(frozen=True)
class _Outcome(Generic[_Result]):
    """The result or the error of an item; its number is None if a worker failed before it took one."""

    number: int | None
    result: _Result | None = None
    error: BaseException | None = None


def process_in_order(
    items: Iterator[_Item],
    workers: int,
    make_worker: MakeWorker[_Item, _Result],
    on_result: Callable[[_Result], None],
) -> None:
    """Process items on several threads, and deliver the results in the order of the items.

    Args:
        items: Taken one at a time by the next free worker.
        workers: Number of threads.
        make_worker: Called once in each thread.
        on_result: Called in the caller's thread. It may raise to stop the workers.

    Raises:
        BaseException: The first error, in the order of the items, once all threads have ended.
    """
    numbered = _NumberedItems(items, ahead=4 * workers)
    outcomes: SimpleQueue[_Outcome[_Result] | None] = SimpleQueue()
    threads = [_Worker(numbered, outcomes, make_worker, name=f"worker {number}") for number in range(workers)]
    started: list[_Worker[_Item, _Result]] = []
    try:
        for thread in threads:
            started.append(thread)  # before: an interrupt of its start does not tell whether it runs
            thread.start()
        for outcome in _in_order(outcomes, workers):
            if outcome.error is not None:
                raise outcome.error
            on_result(outcome.result)  # type: ignore[arg-type]  # a result, as there is no error
            numbered.release()
    finally:
        numbered.stop(workers)
        _join(started)


class _Worker(Thread, Generic[_Item, _Result]):
    """A thread that processes items, and tells when it has ended.

    Before Python 3.13, Thread.join takes a running thread for an ended one if it is interrupted.
    """

    def __init__(
        self,
        items: _NumberedItems[_Item],
        outcomes: SimpleQueue[_Outcome[_Result] | None],
        make_worker: MakeWorker[_Item, _Result],
        name: str,
    ) -> None:
        super().__init__(name=name)
        self._items, self._outcomes, self._make_worker = items, outcomes, make_worker
        self._token = Lock()
        self.ended = Event()

    def cancel(self) -> bool:
        """Whether it has not begun; then it never will."""
        return self._token.acquire(blocking=False)

    def run(self) -> None:
        if not self._token.acquire(blocking=False):
            return
        number: int | None = None
        try:
            with self._make_worker() as process:
                while (numbered := self._items.take()) is not None:
                    number, item = numbered
                    self._outcomes.put(_Outcome(number, process(item)))
                    number = None
        except BaseException as error:
            self._outcomes.put(_Outcome(number, error=error))
        finally:
            self._outcomes.put(None)
            self.ended.set()


def _in_order(outcomes: SimpleQueue[_Outcome[_Result] | None], workers: int) -> Iterator[_Outcome[_Result]]:
    """Yield outcomes in the order of their items, until all workers have ended."""
    early: dict[int, _Outcome[_Result]] = {}
    following = 0
    while workers:
        if (outcome := outcomes.get()) is None:
            workers -= 1
            continue
        if outcome.number is None:
            yield outcome
            continue
        early[outcome.number] = outcome
        while following in early:
            yield early.pop(following)
            following += 1


class _NumberedItems(Generic[_Item]):
    """A queue of numbered items that several workers share.

    Args:
        items: The items.
        ahead: How many may be taken before the first result is delivered, so that results cannot pile up.
    """

    def __init__(self, items: Iterator[_Item], ahead: int) -> None:
        self._items, self._lock, self._stopped = enumerate(items), Lock(), False
        self._slots = Semaphore(ahead)

    def take(self) -> tuple[int, _Item] | None:
        self._slots.acquire()
        with self._lock:
            return None if self._stopped else next(self._items, None)

    def release(self) -> None:
        self._slots.release()

    def stop(self, workers: int) -> None:
        self._stopped = True
        self._slots.release(workers)


def _join(workers: Sequence[_Worker[_Item, _Result]]) -> None:
    """Wait for all threads, which use files that are closed next; an interrupt is raised after that."""
    interrupted: BaseException | None = None
    for worker in workers:
        has_ended = worker.cancel()
        while not has_ended:
            try:
                worker.ended.wait()
                worker.join()
                has_ended = True
            except BaseException as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted
