"""The executor: results in order, the first error, and no thread left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from negmerge_fast.runtime.executor import process_in_order


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def worker(process: Callable[[int], int]) -> Callable[[], Iterator[Callable[[int], int]]]:
    @contextmanager
    def make_worker() -> Iterator[Callable[[int], int]]:
        yield process

    return make_worker  # type: ignore[return-value]


def slow_if_even(item: int) -> int:
    time.sleep(0.004 if item % 2 == 0 else 0)
    return item * item


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_results_come_in_the_order_of_the_items(workers: int, count: int) -> None:
    results: list[int] = []
    process_in_order(iter(range(count)), workers, worker(slow_if_even), results.append)
    assert results == [item * item for item in range(count)]


def test_workers_are_made_in_their_own_threads_and_closed_there() -> None:
    made, closed = [], []

    @contextmanager
    def make_worker() -> Iterator[Callable[[int], str]]:
        made.append(threading.current_thread().name)
        yield lambda item: threading.current_thread().name
        closed.append(threading.current_thread().name)

    names: list[str] = []
    process_in_order(iter(range(30)), 3, make_worker, names.append)
    assert sorted(made) == sorted(closed) == ["worker 0", "worker 1", "worker 2"]
    assert len(names) == 30 and set(names) <= set(made)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_error_in_the_order_of_the_items_is_raised(workers: int) -> None:
    def process(item: int) -> int:
        if item in (5, 6):
            time.sleep(0.02 if item == 5 else 0)
            raise ValueError(f"item {item}")
        return item

    results: list[int] = []
    with pytest.raises(ValueError, match="item 5"):
        process_in_order(iter(range(100)), workers, worker(process), results.append)
    assert results == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError("enough"), KeyboardInterrupt()])
def test_a_callback_that_raises_stops_the_workers(error: BaseException) -> None:
    processed: list[int] = []

    def process(item: int) -> int:
        processed.append(item)
        return item

    def on_result(result: int) -> None:
        if result == 10:
            raise error

    with pytest.raises(type(error)) as raised:
        process_in_order(iter(range(10**6)), 3, worker(process), on_result)
    assert raised.value is error
    assert max(processed) <= 10 + 4 * 3, "results cannot pile up"


@pytest.mark.parametrize("fails", ["open", "close"])
def test_an_error_of_a_worker_itself_is_raised(fails: str) -> None:
    @contextmanager
    def make_worker() -> Iterator[Callable[[int], int]]:
        mine = threading.current_thread().name == "worker 1"
        if mine and fails == "open":
            raise OSError("cannot open")
        yield lambda item: item
        if mine:
            raise OSError("cannot close")

    with pytest.raises(OSError, match=f"cannot {fails}"):
        process_in_order(iter(range(100)), 2, make_worker, lambda result: None)


def test_an_error_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("no more")

    results: list[int] = []
    with pytest.raises(ValueError, match="no more"):
        process_in_order(items(), 1, worker(slow_if_even), results.append)
    assert results == [0, 1, 4]


def test_an_interrupt_waits_for_the_threads() -> None:
    """A result raises; the interrupt comes while the threads are joined."""
    main, ended = threading.main_thread(), []

    def process(item: int) -> int:
        if item:
            time.sleep(0.2)
            assert main.ident is not None
            signal.pthread_kill(main.ident, signal.SIGINT)
            time.sleep(0.2)
            ended.append(item)
        return item

    def on_result(result: int) -> None:
        raise ValueError("stop")

    with pytest.raises(KeyboardInterrupt):
        process_in_order(iter(range(2)), 2, worker(process), on_result)
    assert ended == [1]
