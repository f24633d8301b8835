"""A merge of checkpoints that was checked: run by one process or several, and resumed after a crash.

A few workers, each with its own buffers, take the chunks of a plan in order, and read, merge and write them: while one waits
for the disk or for copies to a GPU, others work. On the CPU a chunk is one native call (native.py), and is still in the cache when
it is written; on a GPU copies and
kernels of different workers overlap. Memory depends on the budget alone, not on the size of the model or the number of models;
what is known of each tensor (half a KiB for each version) is counted.
"""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from threading import Semaphore
from typing import Any, BinaryIO, ClassVar

from ..backends import registry
from ..backends.native import library, merge_cpu
from ..checkpoints.reader import Reader
from ..core.batch import Merge
from ..core.bounds import Bounds
from ..core.errors import InputError
from ..core.ranges import Range, subtract
from ..core.rule import Rule
from ..core.stats import Stats, TensorStats
from ..core.unmergeable import variances_below_zero
from ..output.destination import Destination, OccupiedError, refuse_existing
from ..output.directory import Entry
from ..output.journal import Fingerprint, Journal, ProgressRecord, difference, summed
from ..output.journal import read as read_journal
from ..output.manifest import Recipe
from ..output.manifest import read as read_manifest
from ..output.publish import publish
from ..output.staging import Staging
from ..output.writer import Writer
from ..runtime import memory
from ..runtime.buffers import Timeline
from ..runtime.device import buffers_on
from ..runtime.distributed import SINGLE, SingleProcess
from ..runtime.executor import MakeWorker
from ..runtime.interrupts import without_interrupts
from . import probes, variances
from .budget import max_open_files
from .native import ChunkMerger
from .options import MergeOptions
from .partition import slice_plan
from .placement import Placement, Throughput, measure_throughput
from .plan import Plan
from .progress import OnProgress, Recorder
from .read_ahead import ReadAhead
from .report import Report
from .rules import Rules
from .skipping import Skipping
from .together import Task, run_together
from .worker import Worker


@dataclass(frozen=True)
class Job:
    """A merge of checkpoints to one output, as prepare found it possible. Several may run together (together.py).

    Attributes:
        backend: The name of the backend that merges; merge is its function.
        workers: Chunks under way at once.
        chunk_bytes: The most bytes of a version in a chunk.
        memory: The bytes that it will allocate, on the host and again on a device.
        rules: What each tensor is merged by; bounds are measured when it runs.
        notes: What a user should know of the merge, a line each: of the plan, and what is found while it runs.
        finished: Whether the output is complete already, by an earlier run that was stopped at its very end.
    """

    plan: Plan
    options: MergeOptions
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
    skipping: Skipping
    rules: Rules
    notes: list[str]
    finished: bool = False

    # Chunks, and what each rank does, begin at multiples of so many elements of a tensor.
    alignment: ClassVar[int] = 1
    # Buffers of a worker beside those for the versions.
    extra_buffers: ClassVar[int] = 0

    @property
    def rule(self) -> Rule:
        return self.recipe.rule

    @property
    def is_plain(self) -> bool:
        """Whether the rule is that of core/rule.py."""
        return self.rule.choices is None

    @property
    def method_name(self) -> str:
        return str(self.recipe.method or "negmerge")

    def throughput(self) -> Throughput | None:
        """Measure this job's bandwidths, as far as placement did not; None if there is nothing to merge."""
        on_cpu = self.placement.device == "cpu"
        backend = self.backend if on_cpu else "auto"
        found = self.placement.throughput or measure_throughput(
            self.plan, self.rule, self.options.thread_count, backend
        )
        if on_cpu or not found:
            return found
        return found._replace(h2d_bandwidth=probes.h2d_bandwidth(self.placement.device))

    def run(
        self,
        progress: OnProgress | None = None,
        timeline: Timeline | None = None,
        ranks: SingleProcess = SINGLE,
    ) -> Report:
        """Merge, and publish the whole output or nothing.

        Args:
            progress: Called with bytes done and bytes in all after every chunk.
            timeline: Records what each worker did when.
            ranks: The processes that merge together, each some ranges of the output.

        Returns:
            What was done; of the whole job on rank 0 only.
        """
        [report] = run_together([self], progress, timeline, ranks)
        return report

    @contextmanager
    def holding_staging(self) -> Iterator[None]:
        """Hold the staging directory; nothing of it stays behind for an interrupt."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            with without_interrupts():
                self.staging.__exit__(type(error) if error else None, error, None)

    def take_ranges(self, shards: Sequence[Sequence[Range]]) -> None:
        """Learn what each rank will do of this output."""

    def resume(self) -> ProgressRecord:
        """Open the staging directory; return what an earlier run did there, or create the output."""
        with without_interrupts():
            self.staging.open()
        refuse_existing(self.destination)  # it was put back, or has come since the check
        found = self.staging.journals() if self.staging.resume else []
        done = summed(record for entry in found for record in read_journal(entry, self._fingerprint))
        if not done.ranges:
            self.staging.create()
            return done
        if self.recipe.nonfinite == "error" and done.stats.nonfinite:
            raise InputError(
                f"{self.staging.path}: {done.stats.nonfinite:,} elements that are not finite were counted, expected none "
                "(--nonfinite keep-base, as before)"
            )
        if not self.options.skips and done.skipped:
            raise InputError(
                f"{self.staging.path}: {done.skipped:,} bytes of the models were skipped, expected none (--skip-unchanged, as before)"
            )
        self._refuse_incomplete()
        return done

    def _refuse_incomplete(self) -> None:
        self.staging.refuse_incomplete()

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        """What determines the output's bytes: unfinished output of anything else is not resumed."""
        plan, checkpoints = self.plan, self.plan.checkpoints
        files = [file for checkpoint in checkpoints for file in checkpoint.inputs.values()]
        recipe = self.recipe.to_json()
        return {
            **{k: v for k, v in recipe.items() if k not in ("base", "models", "nonfinite", "weights")},
            "models": [os.path.realpath(checkpoint.path) for checkpoint in (plan.base, *plan.models)],
            **({"weights": os.path.realpath(plan.weights.path)} if plan.weights else {}),
            "files": {
                os.path.realpath(f.path): [f.size, f.identity[2], f.header, f.sample if f.header else ""]
                for f in files
            },
        }

    @property
    def rank_fingerprint(self) -> Fingerprint:
        """What all ranks of one run must agree on."""
        options = {"nonfinite": self.recipe.nonfinite, "skip_unchanged": self.options.skips}
        return {**self._fingerprint, **options}

    def join(self, fingerprint: Fingerprint, ranks: SingleProcess) -> None:
        if differs := difference(fingerprint, self.rank_fingerprint):
            raise InputError(f"rank {ranks.rank}: the output of the first rank {differs}")
        if ranks.rank:
            try:
                self.staging.join()
            except OccupiedError:
                ranks.poll(0)  # raises if the first rank was stopped, and is removing what it made
                raise

    def recorder(self, ranges: Sequence[Range], rank: int, on_moved: Callable[[int], None]) -> Recorder:
        sizes: dict[str, int] = {}
        for extent in chain.from_iterable(slice_plan(self.plan, range_) for range_ in ranges):
            sizes[extent.path] = sizes.get(extent.path, 0) + extent.sources[0].nbytes
        self.writer.expect(sizes)
        journal = Journal(self.staging.journal(rank), self._fingerprint, self.writer.sync)
        return Recorder(ranges, journal, on_moved, keep=self.staging.resume)

    def shared_reader(self) -> AbstractContextManager[Reader | None]:
        """Return a reader for all workers, if it can keep all files open.

        The system reads ahead for each descriptor: together the workers read a file from its beginning to its end, and each alone
        would read every other chunk.
        """
        files = len({file for files in self.plan.sources.values() for file in files})
        return Reader(files) if files <= max_open_files() else nullcontext()

    @property
    def bytes_to_measure(self) -> int:
        """What measure_bounds usually reads, on all ranks together."""
        if not self._needs_bounds:
            return 0
        from .bounds import bytes_to_measure  # imports NumPy, which most merges do not need

        return bytes_to_measure(self.plan.unweighted)

    @property
    def _needs_bounds(self) -> bool:
        return self.recipe.method is not None and self.recipe.method.needs_bounds

    def measure_bounds(self, ranks: SingleProcess, on_moved: Callable[[int], None]) -> Mapping[str, Bounds]:
        """Find the bounds that the method needs, on all ranks together; none if it needs none.

        on_moved: called with the bytes that this rank has read for it.
        """
        if not self._needs_bounds:
            return {}
        from .bounds import measure

        assert self.recipe.method
        return measure(self.plan.unweighted, self.recipe.method, self.options, ranks, on_moved)

    def worker_maker(
        self,
        timeline: Timeline,
        shared: Reader | None,
        jobs: Sequence[Job],
        bounds: Mapping[str, Bounds],
    ) -> MakeWorker[Task, tuple[Task, Sequence[Any]]]:
        """Return what opens a worker for some jobs in its thread; it gives each task with a result for each of its outputs."""
        concurrent = self.backend in registry.CONCURRENT
        turns = Semaphore(self.options.thread_count if concurrent else 1)
        # Pages that will be read again soon are left to the system; those of a job too large for it are given back.
        moved = self.plan.bytes_read + len(jobs) * self.plan.bytes_written
        release = moved > memory.free_memory() // 2
        read_ahead = ReadAhead()
        low_rank = self.plan.is_low_rank and not self.options.skips
        is_native = not self.options.skips and (
            self.merge is merge_cpu or (low_rank and self.backend == "cpu")
        )
        of_jobs = [dataclasses.replace(job.rules, bounds=bounds) for job in jobs]
        turn = library().Turn() if is_native and self.options.thread_count == 1 else None  # of two workers

        @contextmanager
        def open_worker() -> Iterator[Callable[[Task], tuple[Task, Sequence[Any]]]]:
            buffers_of_worker = self.plan.versions + self.extra_buffers + (len(jobs) > 1)
            device = self.placement.device
            with (
                nullcontext(shared) if shared else Reader(max(max_open_files() // self.workers, 1)) as reader,
                buffers_on(device, buffers_of_worker, self.chunk_bytes, timeline) as buffers,
            ):
                process = self._processor(
                    [(rules, job.writer) for rules, job in zip(of_jobs, jobs, strict=True)],
                    plan=self.plan,
                    rules=of_jobs[0],
                    merge=self.merge,
                    device=device,
                    merge_threads=1 if concurrent else self.options.threads,
                    turns=turns,
                    low_rank=low_rank,
                    nonfinite=self.recipe.nonfinite,
                    skipping=self.skipping,
                    writer=self.writer,
                    release=release,
                    reader=reader,
                    read_ahead=read_ahead,
                    native=ChunkMerger(release, self.recipe.nonfinite == "error", turn)
                    if is_native
                    else None,
                    buffers=buffers,
                    timeline=timeline,
                )
                yield lambda task: (task, process(task))

        return open_worker

    def _processor(
        self, outputs: Sequence[tuple[Rules, Writer]], **parts: Any
    ) -> Callable[[Task], Sequence[Any]]:
        """Return what processes a task, with a result for each of its outputs.

        Args:
            outputs: The rules and the writer of each output of the jobs.
            parts: The fields of a Worker.
        """
        worker = Worker(**parts)
        if len(outputs) == 1:
            return lambda task: [worker.process_chunk(task.chunk)]
        return lambda task: worker.process_for(task.chunk, [outputs[k] for k in task.outputs])

    def hand_over(self, done: ProgressRecord, rank: int) -> None:
        """Leave for rank 0 what this rank did, and the checksums that it knows."""
        if rank:
            known = self.writer.checksums.export().items()
            sums = {name: [base64.b64encode(each).decode() for each in pair] for name, pair in known}
            self.staging.write_rank_result(rank, {"done": done.to_json(), "sums": sums})

    def peer_records(self, ranks: int) -> Iterator[ProgressRecord]:
        """Yield what the other ranks did, and take over their checksums."""
        for rank in range(1, ranks):
            found = self.staging.read_rank_result(rank)
            sums = {name: tuple(map(base64.b64decode, pair)) for name, pair in found["sums"].items()}
            self.writer.checksums.update(sums)  # type: ignore[arg-type]
            yield ProgressRecord.of_json(found["done"])

    def publish(
        self, before: ProgressRecord, records: Sequence[ProgressRecord], on_progress: Callable[[], None]
    ) -> ProgressRecord:
        """Publish the output of all ranks; return what they did, with the counts of the whole output."""
        done = summed(records)
        if gaps := subtract(self.plan.whole, [*before.ranges, *done.ranges]):
            raise RuntimeError(f"{self.destination.path}: {gaps[0]} was not written")
        stats = Stats()
        stats.include({s.name: TensorStats() for extent in self.plan.extents for s in extent.slices})
        for record in (before, done):
            stats.include(record.stats.tensors)
        stats = self._total(stats)
        counted = {
            "elements": stats.elements,
            "agreed": stats.agreed,
            # How much is skipped depends on the machine, and the manifest must not.
            "nonfinite": None if self.options.skips else stats.nonfinite,
            "vetoed_by_zero": None if self.options.skips or not self.is_plain else stats.vetoed_by_zero,
            **({} if self.is_plain else {"masked": stats.masked}),
        }
        self._note_variances(self.staging.read_file)
        self._finish({**self.recipe.to_json(), "counted": counted}, stats, on_progress)
        on_progress()  # the last moment to stop: syncing may have taken long
        with without_interrupts():
            publish(self.destination, self.staging)
        return done._replace(stats=stats)

    def _total(self, stats: Stats) -> Stats:
        """What the output's manifest and report count, of what its elements were counted as."""
        return stats

    def _finish(self, manifest: Mapping[str, object], stats: Stats, on_progress: Callable[[], None]) -> None:
        """Complete what is staged, with this manifest. stats: of the whole output."""
        if self.plan.base.format == "pt":
            from .crcs import write_crcs

            write_crcs(self.writer, self.options.thread_count, on_progress)
        self.writer.finish(manifest, on_progress)

    def _note_variances(self, open_file: Callable[[str], BinaryIO]) -> None:
        """Note a network that the merge has broken, though it followed the rule."""
        if below := variances.below_zero(self.plan.extents, open_file):
            self.notes.append(f"the output: {variances_below_zero(below)}")

    def tidy_up(self, ranks: SingleProcess) -> Report:
        """Remove what the run that finished the output left; report the counts of its manifest."""
        path, directory = self.destination.path, self.destination.directory
        if ranks.rank == 0:
            with without_interrupts():
                self.staging.remove_scratch()
                if os.path.lexists(self.staging.path):
                    self._clear_own()
        self._note_variances(lambda name: (path / name if directory else path).open("rb"))
        counted = read_manifest(self.destination.manifest_path).counted
        stats = Stats()
        stats.include({"": TensorStats(counted.elements, counted.agreed)})
        nothing = summed([])
        report = self.report(nothing, nothing._replace(stats=stats), 0, 0.0)
        return dataclasses.replace(
            report,
            nonfinite=counted.nonfinite,
            vetoed_by_zero=counted.vetoed_by_zero,
            masked=counted.masked,
            tensors=[],
        )

    def _clear_own(self) -> None:
        """Remove unfinished output of this job, which is of no use any more, and leave that of others."""
        with self.staging:
            self.staging.open()
            if not all(map(self._is_own, self.staging.journals())):
                self.staging.leave_to_others()
                self.notes.append(f"{self.staging.path}: the unfinished output of another merge, left alone")

    def _is_own(self, journal: Entry) -> bool:
        """Whether a journal is of this job."""
        try:
            read_journal(journal, self._fingerprint)
            return True
        except InputError:
            return False

    def report(self, before: ProgressRecord, done: ProgressRecord, written: int, seconds: float) -> Report:
        """Report what was done. written: bytes, by all ranks."""
        stats = done.stats
        vetoes_known = self.is_plain and not before.skipped and not done.skipped
        tensors = [{"name": name, **dataclasses.asdict(t)} for name, t in stats.tensors.items()]
        unknown = {} if vetoes_known else {"vetoed_by_zero": None}
        unknown |= {"masked": None} if self.is_plain else {}
        return Report(
            base=str(self.plan.base.path),
            models=[str(model.path) for model in self.plan.models],
            method=self.method_name,
            weights=str(self.plan.weights.path) if self.plan.weights else None,
            scale=self.recipe.scale,
            min_agreement=self.rule.min_agreement,
            output=str(self.destination.path),
            backend=self.backend,
            device=self.placement.device,
            elements=stats.elements,
            agreed=stats.agreed,
            consensus_ratio=stats.consensus_ratio,
            nonfinite=stats.nonfinite,
            vetoed_by_zero=stats.vetoed_by_zero if vetoes_known else None,
            masked=None if self.is_plain else stats.masked,
            bytes_read=done.read,
            bytes_skipped=done.skipped,
            bytes_written=written,
            bytes_done_before=self.plan.whole.end - written,
            seconds=seconds,
            notes=list(self.notes),
            adapters=list(self.plan.placed),
            skipped_files=list(self.plan.base.skipped_files),
            large_files=self.plan.base.large_files,
            tensors=[{**tensor, **unknown} for tensor in tensors],
        )
