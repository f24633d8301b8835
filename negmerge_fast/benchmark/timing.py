"""Rounds of a candidate, each beside its roofline, so that a drift of the machine affects both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .bandwidth import Roofline, flush, of_merge
from .candidates import Candidate, judge, nothing
from .records import Row, machine, on_gpu, roofline_fields, speed
from .timers import Clock, clock, wait, wall
from .workload import Workload

_MAX_ROUNDS = 50


def rest(device: str) -> None:
    """Sleep until a CPU's threads have stopped spinning after the previous task.

    Longer would do harm: after 20 ms two threads often start on one processor, and reading memory takes twice as long.
    """
    if not on_gpu(device):
        time.sleep(0.005)


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: time.sleep(0.02),
) -> dict[str, list[float]]:
    """Time candidates in turns, so that a drift of the machine affects all of them.

    Args:
        candidates: Tasks by name.
        rounds: How often each is run.
        before: Done before each run, and not timed. By default a pause in which the threads of the previous run stop spinning.

    Returns:
        The seconds of each candidate in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            before()
            began = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - began)
    return seconds


class Timing:
    """The rounds of one task. A round is setup(), which runs the roofline, and then run(), the only part that is timed.

    Args:
        task: What run() runs.
        row: The fields of the row that say what is measured, with the bytes that count.
        roofline: Run and timed by setup(), if there is one.
        device: Where the task runs.
        now: The clock of run(), that of the device by default.
        before: Done by setup() before the roofline.
        between: Done by setup() after the roofline.
        verify: Given the result of the last round, raises if it is wrong: a task that was right once may not stay so.
        roofline_clock: The clock of the roofline, that of the device by default.
    """

    def __init__(
        self, task: Callable[[], Any], row: Row, roofline: Roofline | None, device: str = "cpu", now: Clock | None = None,
        before: Callable[[], object] = nothing, between: Callable[[], object] = nothing,
        verify: Callable[[Any], object] = lambda _: None, roofline_clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self._task, self._row, self._roofline, self._device = task, row, roofline, device
        self.now = now or clock(device)
        self._before, self._between, self._verify = before, between, verify
        self._roofline_now = roofline_clock or clock(device)
        self._rooflines: list[tuple[Any, Any]] = []
        self._result: Any = None

    def setup(self) -> None:
        self._result = None  # freed here, so that freeing it is not timed
        self._before()
        if self._roofline is not None:
            began = self._roofline_now()
            self._roofline.task()
            self._rooflines.append((began, self._roofline_now()))
        self._between()

    def run(self) -> None:
        self._result = self._task()

    def rounds(self, seconds: float, min_rounds: int, taken: float = 0.0) -> int:
        """The number of rounds that take about so many seconds, estimated by a round that is not counted.

        taken: seconds of an earlier run. If they exceed `seconds`, that run replaces the uncounted round.
        """
        if taken > seconds:
            return min_rounds
        began = time.perf_counter()
        self.setup()
        self.run()
        wait(self._device)
        taken = time.perf_counter() - began
        self._rooflines.clear()
        return max(min_rounds, min(_MAX_ROUNDS, int(seconds / taken)))

    def result(self, seconds: Sequence[float], copies: int = 1, **more: Any) -> Row:
        """The row of all rounds. seconds: of each round, which merged so many copies of the workload."""
        self._verify(self._result)
        self._result = None
        row = speed({**machine(self._device), **self._row}, [s / copies for s in seconds])
        if self._roofline is not None:
            rooflines = [self._roofline.bytes / (ended - began) for began, ended in self._rooflines]
            row |= roofline_fields(
                self._roofline.name, rooflines, [row["bytes"] * copies / s for s in seconds]
            )
        return {**row, **more}

    def measure(
        self, seconds: float, min_rounds: int, taken: float = 0.0, on_progress: Callable[[], None] = nothing
    ) -> list[float]:
        """Run all rounds, without pytest-benchmark. on_progress: called before each round; it may raise to stop."""
        timed = []
        for _ in range(self.rounds(seconds, min_rounds, taken)):
            on_progress()
            self.setup()
            began = self.now()
            self.run()
            timed.append(self.now() - began)
        return timed


def timing_of(workload: Workload, candidate: Candidate, suite: str, as_called: bool = False) -> Timing:
    """The timing of a candidate on a workload in memory. as_called: by the clock of a caller that waits for the device."""
    inputs = [workload.out, *workload.versions[1:]] if candidate.before is not nothing else workload.versions
    before: Callable[[], object] = candidate.before
    between: Callable[[], object] = partial(rest, workload.device)
    if on_gpu(workload.device):
        before, between = (
            partial(_prepare, candidate, workload.device),
            _hide_launch(candidate, workload.device),
        )
    return Timing(
        candidate.task, workload.row(suite, candidate.name), of_merge(workload.device, inputs, workload.bytes), workload.device,
        wall(workload.device) if as_called else clock(workload.device), before, between,
        verify=partial(judge, workload, candidate) if candidate.counts else lambda _: None,
    )  # fmt: skip


def _prepare(candidate: Candidate, device: str) -> None:
    candidate.before()
    flush(device)  # takes longer than the host's launch of the roofline


def _hide_launch(candidate: Candidate, device: str) -> Callable[[], None]:
    """A task that flushes the caches for as long as the host takes to launch the candidate, so that the device never waits."""
    now = clock(device)
    flush(device)
    began = now()
    flush(device)
    of_flush = now() - began
    candidate.before()
    wait(device)
    asked = time.perf_counter()
    candidate.task()
    of_host = time.perf_counter() - asked
    wait(device)
    # The limit is for candidates that wait for the device themselves, where flushes hide nothing.
    times = 1 + min(int(1.5 * of_host / of_flush), 200)

    def hide() -> None:
        for _ in range(times):
            flush(device)

    return hide
