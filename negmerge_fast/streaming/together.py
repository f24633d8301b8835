"""Jobs of one plan, run together: what is read once is merged and written for the output of each.

Each output has its own staging directory, journal and manifest. One of which an earlier run did a part is given what it lacks only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..core.bounds import Bounds
from ..core.ranges import Range, subtract
from ..output.journal import Fingerprint, ProgressRecord, summed
from ..runtime.buffers import Timeline
from ..runtime.distributed import SingleProcess
from ..runtime.executor import process_in_order
from .partition import chunks, partition, slice_plan
from .plan import Extent, Plan
from .progress import OnProgress
from .report import Report

if TYPE_CHECKING:
    from .job import Job


class Portion(NamedTuple):
    """A range of a plan, and the numbers of the outputs that it is to be written to."""

    range: Range
    outputs: tuple[int, ...]


class Task(NamedTuple):
    """A chunk, and the numbers of the outputs that it is to be written to."""

    chunk: Extent
    outputs: tuple[int, ...]


class Begun(NamedTuple):
    """Outputs that rank 0 has created or resumed.

    Attributes:
        before: What was done of each before; of rank 0 only.
        fingerprints: Those of rank 0.
        shards: What each rank is to do.
    """

    before: list[ProgressRecord]
    fingerprints: list[Fingerprint]
    shards: list[list[Portion]]


def run_together(
    jobs: Sequence[Job],
    progress: OnProgress | None,
    timeline: Timeline | None,
    ranks: SingleProcess,
) -> list[Report]:
    """Run jobs of one plan, with the same options apart from their scales, and publish one output after the other.

    The arguments are those of Job.run.

    Returns:
        What was done for each. What was read is counted for the first output that it was read for.
    """
    unfinished = [job for job in jobs if not job.finished]
    reports = iter(_run(unfinished, progress, timeline or Timeline(kept=False), ranks) if unfinished else [])
    return [job.tidy_up(ranks) if job.finished else next(reports) for job in jobs]


def _run(
    jobs: Sequence[Job], progress: OnProgress | None, timeline: Timeline, ranks: SingleProcess
) -> list[Report]:
    began, first = time.perf_counter(), jobs[0]
    with ExitStack() as held:
        for job in jobs:
            held.enter_context(job.holding_staging())
            held.enter_context(job.writer)
        begun = _begin(jobs, ranks)
        shard = begun.shards[ranks.rank]
        remaining_bytes = sum(_bytes_moved(first.plan, portion) for each in begun.shards for portion in each)
        to_measure = first.bytes_to_measure if any(begun.shards) else 0
        on_moved = _on_moved(jobs, progress, ranks, to_measure, remaining_bytes)
        with ranks.failing_together():
            for job, fingerprint in zip(jobs, begun.fingerprints, strict=True):
                job.join(fingerprint, ranks)
        # Of all that is merged, also if an earlier run has merged some of it.
        bounds: Mapping[str, Bounds] = {}
        measured = 0
        if to_measure:

            def on_measured(nbytes: int) -> None:
                nonlocal measured
                measured = min(nbytes, to_measure)
                on_moved(measured)

            bounds = first.measure_bounds(ranks, on_measured)
        with ranks.failing_together():
            done = _process(
                jobs, shard, timeline, ranks.rank, lambda moved: on_moved(measured + moved), bounds
            )
        with ranks.failing_together():
            for k, job in enumerate(jobs if ranks.rank == 0 else ()):
                records = [done[k], *job.peer_records(ranks.count)]
                done[k] = job.publish(
                    begun.before[k], records, lambda: on_moved(to_measure + remaining_bytes)
                )
    seconds = time.perf_counter() - began
    reports = []
    for k, job in enumerate(jobs):
        job.notes.extend(job.staging.notes)
        written = sum(r.end - r.begin for each in begun.shards for r in _ranges(each, k))
        reports.append(job.report(begun.before[k], done[k], written, seconds))
    reports[0] = replace(reports[0], bytes_read=reports[0].bytes_read + to_measure)
    return reports


def _begin(jobs: Sequence[Job], ranks: SingleProcess) -> Begun:
    """Resume or create all outputs on rank 0, before anything is written to one."""
    before = [summed([]) for _ in jobs]
    first = jobs[0]

    def begin() -> tuple[list[Fingerprint], list[list[Range]], list[list[Range]]]:
        for k, job in enumerate(jobs):
            before[k] = job.resume()
            if ranks.count > 1:
                job.staging.let_join()
        remaining = [subtract(first.plan.whole, each.ranges) for each in before]
        shards = partition(first.plan, _union(first.plan.whole, remaining), ranks.count, first.alignment)
        return [job.rank_fingerprint for job in jobs], remaining, shards

    fingerprints, remaining, shards = ranks.on_rank0(begin)
    lacking = [[Range(*range_) for range_ in each] for each in remaining]
    portions = [list(_portions([Range(*range_) for range_ in shard], lacking)) for shard in shards]
    for k, job in enumerate(jobs):
        job.take_ranges([_ranges(each, k) for each in portions])
    return Begun(before, fingerprints, portions)


def _union(whole: Range, each: Sequence[Sequence[Range]]) -> list[Range]:
    """What is in some of several lists of ranges."""
    if len(each) == 1:
        return list(each[0])
    return subtract(whole, subtract(whole, [range_ for ranges in each for range_ in ranges]))


def _portions(shard: Sequence[Range], remaining: Sequence[Sequence[Range]]) -> Iterator[Portion]:
    """Cut ranges where what one of the outputs lacks begins or ends."""
    bounds = sorted({bound for ranges in remaining for range_ in ranges for bound in range_})
    for begin, end in shard:
        cuts = [begin, *(bound for bound in bounds if begin < bound < end), end]
        for first, last in pairwise(cuts):
            lacking = (
                k
                for k, ranges in enumerate(remaining)
                if any(range_.begin <= first and last <= range_.end for range_ in ranges)
            )
            yield Portion(Range(first, last), tuple(lacking))


def _ranges(portions: Sequence[Portion], output: int) -> list[Range]:
    return [portion.range for portion in portions if output in portion.outputs]


def _process(
    jobs: Sequence[Job],
    shard: Sequence[Portion],
    timeline: Timeline,
    rank: int,
    on_moved: Callable[[int], None],
    bounds: Mapping[str, Bounds],
) -> list[ProgressRecord]:
    """Process this rank's chunks, and leave what was done for rank 0."""
    first, moved = jobs[0], [0] * len(jobs)

    def count(output: int, nbytes: int) -> None:
        moved[output] = nbytes
        on_moved(sum(moved))

    with ExitStack() as recording:
        recorders = [
            recording.enter_context(job.recorder(_ranges(shard, k), rank, partial(count, k)))
            for k, job in enumerate(jobs)
        ]

        def on_result(done: tuple[Task, Sequence[object]]) -> None:
            task, results = done
            for k, result in zip(task.outputs, results, strict=True):
                recorders[k].on_result(result)  # type: ignore[arg-type]

        with first.shared_reader() as shared:
            make_worker = first.worker_maker(timeline, shared, jobs, bounds)
            process_in_order(_tasks(first, shard), first.workers, make_worker, on_result)
    done = [recorder.whole for recorder in recorders]
    for job, each in zip(jobs, done, strict=True):
        job.hand_over(each, rank)
    return done


def _tasks(job: Job, shard: Sequence[Portion]) -> Iterator[Task]:
    for range_, outputs in shard:
        for chunk in chunks(slice_plan(job.plan, range_), job.chunk_bytes, job.alignment):
            yield Task(chunk, outputs)


def _bytes_moved(plan: Plan, portion: Portion) -> int:
    """The bytes to read and write for a portion."""
    extents = slice_plan(plan, portion.range)
    copies = len(portion.outputs)
    return sum(copies * e.sources[0].nbytes + sum(s.stored_nbytes for s in e.sources) for e in extents)


def _on_moved(
    jobs: Sequence[Job],
    progress: OnProgress | None,
    ranks: SingleProcess,
    to_measure: int,
    remaining_bytes: int,
) -> Callable[[int], None]:
    """Return what is called with the bytes that this rank has moved; it may raise to stop the jobs."""
    plan = jobs[0].plan
    total = to_measure + plan.bytes_read + len(jobs) * plan.whole.end

    def on_moved(moved: int) -> None:
        moved = ranks.poll(moved)
        if progress:
            progress(total - to_measure - remaining_bytes + moved, total)

    return on_moved
