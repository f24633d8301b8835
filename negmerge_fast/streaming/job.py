"""A merge of checkpoints, once it was found to be possible: how it runs, by one process or several, and goes on after a crash.

A few workers, each with a lane of its own, take the pieces of a plan as they come, and read, merge and write them: while one
waits for the disk or for the link to a GPU, others work. On the CPU what was read is still in the cache when it is merged; on
a GPU copies in, kernels and copies out of different lanes overlap. Memory depends on the budget alone, not on the size of
the model or on the number of models; what is known of each tensor (half a KiB for each version of it) is counted.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from threading import Semaphore
from typing import Any

import numpy as np

from ..backends import registry
from ..checkpoints.reader import Reader
from ..core.batch import Counts, Merge
from ..core.errors import InputError, short_repr
from ..core.ranges import Range, subtract
from ..core.rule import Rule
from ..core.stats import Stats, TensorStats
from ..output.journal import Fingerprint, Journal, ProgressRecord, difference, summed
from ..output.journal import read as read_journal
from ..output.manifest import Recipe, load
from ..output.publish import Destination
from ..output.publish import publish as publish_output
from ..output.staging import Staging
from ..output.writer import Writer
from ..runtime import memory
from ..runtime.buffers import Timeline, WorkerBuffers
from ..runtime.device import buffers_on
from ..runtime.distributed import SINGLE, SingleProcess
from ..runtime.executor import process_in_order
from . import probes
from .budget import max_open_files
from .partition import chunks, partition, slice_plan
from .placement import Placement, Throughput, measure_throughput
from .plan import Extent, Plan, TensorSlice
from .progress import ChunkCounts, ChunkResult, Progress
from .report import Report
from .skipping import ChunkPruner, Skipping, none_agreed
from .worker import batches

# Called with bytes done and bytes in all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A merge of checkpoints that was found to be possible.

    way: where it merges, and why there. workers: pieces under way at once; chunk: the longest stroke. memory: the bytes
    that it will allocate, on the host and as many again on a device. finished: the output is there already, of an earlier run
    that was stopped at its very end.
    """

    plan: Plan
    recipe: Recipe
    destination: Destination
    staging: Staging
    writer: Writer
    backend: str
    merge: Merge
    placement: Placement
    workers: int
    chunk_bytes: int
    memory: int
    threads: int | None
    skipping: Skipping
    finished: bool = False

    @property
    def rule(self) -> Rule:
        return self.recipe.rule

    def throughput(self) -> Throughput | None:
        """What its way costs, measured now if it was not when it was chosen; None: there is nothing to merge."""
        on_cpu = self.placement.device == "cpu"
        threads = self.threads or registry.usual_threads()
        found = self.placement.throughput or measure_throughput(
            self.plan, self.rule, threads, self.backend if on_cpu else "auto"
        )
        return (
            found
            if on_cpu or not found
            else found._replace(h2d_bandwidth=probes.h2d_bandwidth(self.placement.device))
        )

    def run(
        self,
        progress: OnProgress | None = None,
        timeline: Timeline | None = None,
        ranks: SingleProcess = SINGLE,
    ) -> Report:
        """Do it: the output is published whole, or not at all. timeline: is told when each worker did what.

        ranks: the processes that do it together, each some runs of the output; the first of them returns the whole report.
        """
        began = time.perf_counter()
        timeline = timeline or Timeline(kept=False)
        total = self.plan.bytes_read + self.plan.bytes_written
        before = done = summed([])
        if self.finished:
            return self._finished(ranks)
        skips = self.skipping.counter is not None
        job = {**self._fingerprint, "nonfinite": self.recipe.nonfinite, "skip_unchanged": skips}

        def look(moved: int) -> None:
            moved = ranks.poll(moved)
            if progress:
                progress(total - coming + moved, total)

        def begin() -> tuple[Fingerprint, list[list[Range]]]:
            nonlocal before
            before = self._take_over()
            if ranks.count > 1:
                self.staging.let_join()
            return job, partition(self.plan, subtract(self.plan.whole, before.ranges), ranks.count)

        def work() -> None:
            nonlocal done
            if differs := difference(first, job):
                raise InputError(f"rank {ranks.rank}: the output of the first rank {differs}")
            done = self._work_as(ranks, shards[ranks.rank], look, timeline)

        def publish() -> None:
            nonlocal done
            done = self._publish(before, [done, *self._of_others(ranks)], lambda: look(coming))

        with self.staging, self.writer:
            first, cut = ranks.on_rank0(begin)
            shards = [[Range(*run) for run in shard] for shard in cut]
            coming = sum(self._moved(run) for shard in shards for run in shard)
            ranks.all_gather(work)
            ranks.on_rank0(publish)
        written = sum(run.end - run.begin for shard in shards for run in shard)
        return self._report(done, written, time.perf_counter() - began)

    def _finished(self, ranks: SingleProcess) -> Report:
        """Tidy up after the run that finished it."""
        with self.staging:
            if ranks.rank == 0:
                self.staging.open()
        counted = load(self.destination.manifest_path)["counted"]
        stats = Stats()
        stats.include({"": TensorStats(counted["elements"], counted["agreed"], counted["nonfinite"])})
        report = self._report(summed([])._replace(stats=stats), 0, 0.0)
        return dataclasses.replace(report, tensors=[])

    def _report(self, done: ProgressRecord, written: int, seconds: float) -> Report:
        stats = done.stats
        return Report(
            base=self.recipe.base.path,
            models=[model.path for model in self.recipe.models],
            scale=self.rule.scale,
            min_agreement=self.rule.min_agreement,
            output=str(self.destination.path),
            backend=self.backend,
            device=self.placement.device,
            elements=stats.elements,
            agreed=stats.agreed,
            consensus_ratio=stats.consensus_ratio,
            nonfinite=stats.nonfinite,
            bytes_read=done.read,
            bytes_skipped=done.skipped,
            bytes_written=written,
            bytes_done_before=self.plan.whole.end - written,
            seconds=seconds,
            tensors=[{"name": name, **dataclasses.asdict(t)} for name, t in stats.tensors.items()],
        )

    def _take_over(self) -> ProgressRecord:
        """Open the output, and go on with what an earlier run left of it, or make room: what is done already."""
        self.staging.open()
        found = self.staging.journals() if self.staging.resume else []
        done = summed(record for path in found for record in read_journal(path, self._fingerprint))
        if not done.ranges:
            self.staging.create()
            return done
        if self.recipe.nonfinite == "error" and done.stats.nonfinite:
            raise InputError(
                f"{self.staging.path}: {done.stats.nonfinite:,} elements that are not finite were counted, expected none "
                "(--nonfinite keep-base, as before)"
            )
        if not self.skipping.counter and done.skipped:
            raise InputError(
                f"{self.staging.path}: {done.skipped:,} bytes of the models were skipped, expected none (--skip-unchanged, as before)"
            )
        self.staging.refuse_incomplete()
        return done

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        """What makes the output's bytes: an unfinished one of anything else is not gone on with."""
        checkpoints = (self.plan.base, *self.plan.models)
        files = [file for c in checkpoints for file in {**c.weights, **c.extra_files}.values()]
        how = self.recipe.to_json()
        return {
            **{k: v for k, v in how.items() if k not in ("base", "models", "nonfinite")},
            "models": [os.path.realpath(checkpoint.path) for checkpoint in checkpoints],
            "files": {os.path.realpath(f.path): [f.size, f.identity[2], f.header] for f in files},
        }

    def _moved(self, run: Range) -> int:
        """Bytes to read and write for a run of the output."""
        return sum(e.sources[0].nbytes + sum(s.nbytes for s in e.sources) for e in slice_plan(self.plan, run))

    def _work_as(
        self, ranks: SingleProcess, todo: Sequence[Range], look: Callable[[int], None], timeline: Timeline
    ) -> ProgressRecord:
        """Do what is this rank's, and leave for the first one what was counted."""
        if ranks.rank:
            self.staging.join()
        done = self._stream(todo, look, timeline, ranks.rank)
        if ranks.rank:
            known = self.writer.checksums.export().items()
            sums = {name: [base64.b64encode(each).decode() for each in pair] for name, pair in known}
            self.staging.write_rank_result(ranks.rank, {"done": done.to_json(), "sums": sums})
        return done

    def _of_others(self, ranks: SingleProcess) -> Iterator[ProgressRecord]:
        """What the other ranks did, and the checksums that they know."""
        for rank in range(1, ranks.count):
            found = self.staging.read_rank_result(rank)
            sums = {name: tuple(map(base64.b64decode, pair)) for name, pair in found["sums"].items()}
            self.writer.checksums.update(sums)  # type: ignore[arg-type]
            yield ProgressRecord.of_json(found["done"])

    def _publish(
        self, before: ProgressRecord, shared: Sequence[ProgressRecord], tick: Callable[[], None]
    ) -> ProgressRecord:
        """Make one output of what all ranks have done, and say what that was."""
        done = summed(shared)
        if gaps := subtract(self.plan.whole, [*before.ranges, *done.ranges]):
            raise RuntimeError(f"{self.destination.path}: {gaps[0]} was not written")
        stats = Stats()
        stats.include({m.name: TensorStats() for extent in self.plan.extents for m in extent.slices})
        for record in (before, done):
            stats.include(record.stats.tensors)
        counted = {"elements": stats.elements, "agreed": stats.agreed, "nonfinite": stats.nonfinite}
        self.writer.finish({**self.recipe.to_json(), "counted": counted}, tick)
        tick()  # the last moment to stop: syncing may have taken long
        publish_output(self.destination, self.staging)
        return done._replace(stats=stats)

    def _stream(
        self, todo: Sequence[Range], look: Callable[[int], None], timeline: Timeline, rank: int
    ) -> ProgressRecord:
        """Do some runs of the output, and say what was counted there."""
        sizes: dict[str, int] = {}
        for extent in (extent for run in todo for extent in slice_plan(self.plan, run)):
            sizes[extent.path] = sizes.get(extent.path, 0) + extent.sources[0].nbytes
        self.writer.expect(sizes)
        # Pages that will be read again soon are left to the system; those of a job too large for it are given back.
        release = self.plan.bytes_read + self.plan.bytes_written > memory.free_memory() // 2
        threads = (self.threads or registry.usual_threads()) if self.backend in registry.CONCURRENT else 1
        journal = Journal(self.staging.journal(rank), self._fingerprint, self.writer.sync)
        progress_so_far = Progress(todo)

        def flush(chunk: ChunkResult) -> None:
            progress_so_far.add(chunk)
            look(progress_so_far.moved)
            if journal.due():
                journal.keep(progress_so_far.record())

        coming = chain.from_iterable(chunks(slice_plan(self.plan, run), self.chunk_bytes) for run in todo)
        ready = partial(self._worker, Semaphore(threads), release, timeline)

        def keep() -> None:
            journal.flush()
            if (record := progress_so_far.record()).ranges and self.staging.resume:
                journal.keep_now(record)

        try:
            process_in_order(coming, self.workers, ready, flush)
        except BaseException:
            with suppress(OSError):  # what stopped it is what is said
                keep()
            raise
        keep()  # others may take long, and fail
        return progress_so_far.whole

    @contextmanager
    def _worker(
        self, turns: Semaphore, release: bool, timeline: Timeline
    ) -> Iterator[Callable[[Extent], ChunkResult]]:
        """What one worker needs, and what it does with a piece: read, merge and write."""
        with (
            Reader(max(max_open_files() // self.workers, 1)) as reader,
            buffers_on(self.placement.device, len(self.plan.models) + 1, self.chunk_bytes, timeline) as lane,
        ):

            def work(chunk: Extent) -> ChunkResult:
                base = chunk.sources[0]
                buffers = lane.reserve([source.nbytes for source in chunk.sources])
                pruner = ChunkPruner(self.skipping, chunk, buffers, *lane.addresses())
                with timeline.span("read"):
                    skipped = self._read(chunk, pruner, reader, buffers, release)
                counted = self._merge(chunk, lane, turns) if pruner.can_agree else none_agreed(chunk)
                with timeline.span("write"):
                    like = None if pruner.can_agree else reader.descriptor(base.file)
                    self.writer.write(chunk.path, base.offset, buffers[0], release, like)
                read = sum(source.nbytes for source in chunk.sources) - skipped
                return ChunkResult(read, base.nbytes, counted, skipped)

            yield work

    def _read(
        self, chunk: Extent, pruner: ChunkPruner, reader: Reader, buffers: list[memoryview], release: bool
    ) -> int:
        """Read a piece, of each model what can still agree; returns how many bytes were left unread."""
        first, *extra_files = chunk.sources
        cached = reader.read_into(first.file, first.offset, buffers[0], release)
        skipped, expected, soon = 0, 0, self.skipping.expected_models
        for k, (source, buffer) in enumerate(zip(extra_files, buffers[1:], strict=True)):
            pruner.prune(k)
            if not pruner.can_agree:
                skipped += sum(source.nbytes for source in extra_files[k:])
                self.skipping.record(k, skipped)
                return skipped
            if k == expected and not cached:  # nor are the others, then: the disk may fetch them all at once
                for version, coming in enumerate(extra_files[k:soon], k + 1):
                    for begin, end in pruner.byte_ranges(version):
                        reader.expect(coming.file, coming.offset + begin, end - begin)
                expected, soon = soon, len(extra_files)
            ranges = list(pruner.byte_ranges(k + 1))
            if unread := source.nbytes - sum(end - begin for begin, end in ranges):
                skipped += unread
                np.frombuffer(buffer, np.uint8).fill(0)
            for begin, end in ranges:
                reader.read_into(source.file, source.offset + begin, buffer[begin:end], release)
        if extra_files:
            self.skipping.record(len(extra_files), skipped)
        return skipped

    def _merge(self, chunk: Extent, lane: WorkerBuffers, turns: Semaphore) -> list[ChunkCounts]:
        """Merge one piece in place on the base's buffer; the runs of each batch, and what was counted of them."""
        threads = 1 if self.backend in registry.CONCURRENT else self.threads
        merged: list[tuple[list[TensorSlice], Counts]] = []

        def launch(addresses: list[int], owner: Any) -> None:
            for batch, slices in batches(chunk, self.placement.device, addresses, owner):
                merged.append((slices, self.merge(batch, self.rule, threads)))

        with turns:
            lane.launch(launch)
        lane.wait()
        counted = [([(m.name, m.numel) for m in slices], np.array(c.tolist())) for slices, c in merged]
        if self.recipe.nonfinite == "error" and any(counts[:, 1].any() for _, counts in counted):
            self._refuse_nonfinite(chunk, lane)
        return counted

    def _refuse_nonfinite(self, chunk: Extent, lane: WorkerBuffers) -> None:
        """Name the first non-finite element of a piece; its base was overwritten and is read again."""
        base = chunk.sources[0]
        with Reader(1) as reader:
            reader.read_into(base.file, base.offset, lane.reserve([s.nbytes for s in chunk.sources])[0])
        for batch, slices in batches(chunk, "cpu", *lane.addresses()):
            if found := registry.first_nonfinite(batch, self.rule):
                row, element, version, value = found
                name, start, _, _ = slices[row]
                tensor = self.plan.base.tensors[name]
                held = self.plan.models[version].tensors[name] if isinstance(version, int) else tensor
                index = tuple(int(i) for i in np.unravel_index(start + element, tensor.spec.shape))
                what = (
                    f"the result at {index} is not finite" if version == "result" else f"{value} at {index}"
                )
                raise InputError(
                    f"{held.source.file.path}: tensor {short_repr(name)}: {what}, expected finite numbers (or --nonfinite keep-base)"
                )
        raise RuntimeError("a number that is not finite was counted, and is not found again")
