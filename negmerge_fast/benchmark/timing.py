"""One way beside its limit: in each round first the limit, then the way, so that a drift of the machine hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .bandwidth import Limit, flush, of_merge
from .candidates import Way, judge, nothing
from .records import Row, machine, on_gpu, speed
from .timers import Clock, clock, wait, wall
from .workload import Work

_MOST_ROUNDS = 50


def rest(device: str) -> None:
    """Time for a CPU's threads to stop waiting, busily, for more of what came before.

    No more than that: after 20 ms two threads often begin on one processor, and reading memory takes twice as long.
    """
    if not on_gpu(device):
        time.sleep(0.005)


def alternate(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: time.sleep(0.02),
) -> dict[str, list[float]]:
    """Seconds of each way in each round. One round runs them all in turn, so that a drift of the machine hits all.

    before: done before each, and not timed; threads of the way before must have stopped waiting for more work, busily.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            before()
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return seconds


class Trial:
    """setup() and run() are a round; only run() is timed, between two readings of `now`.

    before: what setup does first. between: what it does after the limit. verify: is given what the last round returned, and
    raises where that is wrong: what was right once may not stay so. row: the work, with the bytes that count.
    """

    def __init__(
        self, run: Callable[[], Any], row: Row, limit: Limit | None, device: str = "cpu", now: Clock | None = None,
        before: Callable[[], object] = nothing, between: Callable[[], object] = nothing,
        verify: Callable[[Any], object] = lambda _: None, of_limit: Clock | None = None,
    ) -> None:  # fmt: skip
        self._run, self._row, self._limit, self._device = run, row, limit, device
        self.now = now or clock(device)
        self._before, self._between, self._verify = before, between, verify
        self._limit_now = of_limit or clock(device)
        self._limits: list[tuple[Any, Any]] = []
        self._kept: Any = None

    def setup(self) -> None:
        self._kept = None  # the last round's result; to free it is not timed
        self._before()
        if self._limit is not None:
            began = self._limit_now()
            self._limit.run()
            self._limits.append((began, self._limit_now()))
        self._between()

    def run(self) -> None:
        self._kept = self._run()

    def rounds(self, seconds: float, least: int, taken: float = 0.0) -> int:
        """How many rounds take about so many seconds, by one that is not counted.

        taken: by a run before. Where that was too long, it was the one that is not counted.
        """
        if taken > seconds:
            return least
        began = time.perf_counter()
        self.setup()
        self.run()
        wait(self._device)
        taken = time.perf_counter() - began
        self._limits.clear()
        return max(least, min(_MOST_ROUNDS, int(seconds / taken)))

    def result(self, seconds: Sequence[float], copies: int = 1, **more: Any) -> Row:
        """The row of all rounds; seconds: of each round, in which so many copies of the work were done."""
        self._verify(self._kept)
        self._kept = None
        row = speed({**machine(self._device), **self._row}, [s / copies for s in seconds])
        if self._limit is not None:
            limits = [self._limit.bytes / (ended - began) / 1e9 for began, ended in self._limits]
            speeds = [row["bytes"] * copies / s / 1e9 for s in seconds]
            shares = [speed / limit for speed, limit in zip(speeds, limits, strict=True)]
            row["limit"] = self._limit.name
            row["limit GB/s"], row["of_limit"] = statistics.median(limits), statistics.median(shares)
        return {**row, **more}

    def measure(
        self, seconds: float, least: int, taken: float = 0.0, tick: Callable[[], None] = nothing
    ) -> list[float]:
        """All rounds, without pytest-benchmark. tick: called between them; it may raise to stop."""
        timed = []
        for _ in range(self.rounds(seconds, least, taken)):
            tick()
            self.setup()
            began = self.now()
            self.run()
            timed.append(self.now() - began)
        return timed


def trial_of(work: Work, way: Way, suite: str, as_called: bool = False) -> Trial:
    """A way on a work in memory. as_called: time as a caller sees it who waits for the device."""
    inputs = [work.out, *work.versions[1:]] if way.before is not nothing else work.versions
    before: Callable[[], object] = way.before
    between: Callable[[], object] = partial(rest, work.device)
    if on_gpu(work.device):
        before, between = partial(_flushed, way, work.device), _hide(way, work.device)
    return Trial(
        way.run, work.row(suite, way.name), of_merge(work.device, inputs, work.bytes), work.device,
        wall(work.device) if as_called else clock(work.device), before, between,
        verify=partial(judge, work, way) if way.counts else lambda _: None,
    )  # fmt: skip


def _flushed(way: Way, device: str) -> None:
    way.before()
    flush(device)  # meanwhile the host asks for the limit


def _hide(way: Way, device: str) -> Callable[[], None]:
    """Flush the caches for as long as the host takes to ask for the way's work: the device never waits for the host."""
    now = clock(device)
    flush(device)
    began = now()
    flush(device)
    of_flush = now() - began
    way.before()
    wait(device)
    asked = time.perf_counter()
    way.run()
    of_host = time.perf_counter() - asked
    wait(device)
    # Where a way waits for the device itself, there is nothing to hide.
    times = 1 + min(int(1.5 * of_host / of_flush), 200)

    def hide() -> None:
        for _ in range(times):
            flush(device)

    return hide
