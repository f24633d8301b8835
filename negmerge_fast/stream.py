"""Merging checkpoints in bounded memory.

A few workers, each with a lane of its own, take the pieces of a plan as they come, and read, merge and write them: while one
waits for the disk or for the link to a GPU, others work. On the CPU what was read is still in the cache when it is merged; on
a GPU copies in, kernels and copies out of different lanes overlap. Memory depends on the budget alone, not on the size of
the model or on the number of models; what is known of each tensor (half a KiB for each version of it) is counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import numpy as np

from . import __version__, backends, budget, costs, lanes
from .checkpoints import Checkpoint, Reader, open_checkpoint
from .plan import Extent, Member, Plan, make_plan, pieces
from .rule import (
    Batch,
    Counts,
    InputError,
    Inputs,
    Merge,
    NonFinite,
    Rule,
    Segment,
    Signature,
    Stats,
    Stream,
    brief,
    require_choice,
)
from .workers import NONE, Counted, Done, Pieces, Queue, in_order, join
from .writer import Output

Progress = Callable[[int, int], None]
PathLike = str | os.PathLike[str]

# One reads, one merges, one writes, where only one may merge at a time; where all may, two keep each other company.
_LANES_IN_TURNS, _FEWEST_LANES = 3, 2
# Through a GPU, as many wait for the link, its kernels and the disk while all threads read: reasoned, not measured yet.
_LANES_THAT_WAIT = 2
# Temporaries of the reference, reference.SCRATCH_BYTES, each no longer than a block; each lane keeps its own.
_SCRATCH, _BLOCK, _BLOCK_ON_DEVICE = 14, 1 << 20, 64 << 20
# The longest stroke for one file (best of 256 KiB … 8 MiB for 2 and 8 models, bench/results/strokes.jsonl: what was read is
# still in the cache when it is merged); and through a GPU, where that does not matter, and fewer are fewer launches: reasoned,
# not measured yet.
_LONGEST, _LONGEST_TO_DEVICE = 1 << 20, 4 << 20
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Report:
    """What a merge of checkpoints did; its fields are those of the JSON report. seconds: wall time."""

    base: str
    models: list[str]
    output: str
    scale: float
    min_agreement: float
    backend: str
    device: str
    elements: int
    agreed: int
    consensus_ratio: float
    nonfinite: int
    bytes_read: int
    bytes_written: int
    seconds: float
    tensors: list[dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def merge_checkpoints(
    base: PathLike,
    finetuned: Sequence[PathLike],
    output: PathLike,
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "error",
    include: str | None = None,
    exclude: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    memory_budget: int | str = "1GiB",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Merge checkpoints that need not fit in memory; the rule is merge's (NegMerge, arXiv 2410.05583, section 4).

    base, finetuned: Hugging Face directories, .safetensors files or .npy vectors (fp64, fp32, fp16, bf16), with the same
        tensor names and shapes; each may be sharded in its own way.
    output: mirrors base: the same files and tensor layout, config and tokenizer copied. It appears complete, or not at
        all; overwrite replaces only what negmerge wrote or would write.
    inputs: whether finetuned are "finetuned" models or "task_vectors".
    nonfinite: a NaN or an infinity is an "error" and nothing is written, or such elements keep the base's bits
        ("keep-base").
    include, exclude: regular expressions on tensor names; the others are the base's, untouched.
    device: "cpu", or one of torch's, through which all is streamed; "auto" decides by what was measured (costs.py).
    memory_budget: bytes, or text such as "512MiB", for buffers and all else that is allocated, on the host and on a device.
    progress: called with (bytes done, bytes in all) after every stroke; it may raise to stop the job.

    Raises InputError (a ValueError) for bad input, OSError when reading or writing fails.
    """
    job = prepare(
        base, finetuned, output, scale=scale, min_agreement=min_agreement, inputs=inputs, nonfinite=nonfinite,
        include=include, exclude=exclude, backend=backend, device=device, memory_budget=memory_budget,
        threads=threads, overwrite=overwrite,
    )  # fmt: skip
    return job.run(progress)


def prepare(
    base: PathLike,
    finetuned: Sequence[PathLike],
    output: PathLike,
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "error",
    include: str | None = None,
    exclude: str | None = None,
    backend: str = "auto",
    device: str = "auto",
    memory_budget: int | str = "1GiB",
    threads: int | None = None,
    overwrite: bool = False,
) -> Job:
    """Check everything that merge_checkpoints is given, and write nothing."""
    rule = Rule(scale, min_agreement)
    require_choice("inputs", inputs, ("finetuned", "task_vectors"))
    require_choice("nonfinite", nonfinite, ("keep-base", "error"))
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise InputError(f"threads: {threads}, expected 1 … {_MOST_THREADS}")
    if isinstance(finetuned, (str, os.PathLike)):
        raise TypeError("finetuned: one path, expected a list of paths")
    if not finetuned:
        raise InputError("finetuned: no models, expected at least one")
    opened, models = open_checkpoint(base), [open_checkpoint(path) for path in finetuned]
    for model in models:
        if _identities(model) <= _identities(opened):
            raise InputError(f"{model.path}: is the base itself, expected a fine-tuned version of it")
    plan = make_plan(opened, models, task_vectors=inputs == "task_vectors", include=include, exclude=exclude)
    target = Path(output)
    if not opened.is_directory and target.suffix != opened.path.suffix:
        raise InputError(f"{target}: expected a file name that ends in {opened.path.suffix}, like base")
    place = Output(target, plan.targets, directory=opened.is_directory, overwrite=overwrite)
    files = (f.path for c in (opened, *models) for f in {**c.weights, **c.others}.values())
    place.check([opened.path, *(m.path for m in models), *files])
    way = _way(plan, rule, backend, device, threads or backends.usual_threads())
    signatures = {member.signature for extent in plan.extents for member in extent.members}
    name, merge = backends.choose(backend, way.device, rule, signatures)
    tensors = sum(len(checkpoint.tensors) for checkpoint in (opened, *models))
    fitted = _fit(budget.parse_size(memory_budget), way.device, name, len(models), tensors, threads)
    return Job(plan, rule, nonfinite, place, name, merge, way, *fitted, threads)


def _way(plan: Plan, rule: Rule, backend: str, device: str, threads: int) -> costs.Way:
    if device != "auto":
        return costs.Way(costs.GPU if device == "cuda" else device, "asked for")
    if backend == "auto":
        return costs.choose_way(plan, rule, threads)
    on_gpu = backend == "cuda" or (backend == "triton" and costs.gpu_at_hand())
    return costs.Way(costs.GPU if on_gpu else "cpu", f"where backend {backend} is")


def _fit(
    room: int, device: str, backend: str, models: int, tensors: int, threads: int | None
) -> tuple[int, int, int]:
    """How many lanes, the longest stroke, and the memory that is taken: on the host and, beside it, on a device."""
    what, longest, block = "memory_budget", _LONGEST, _BLOCK
    threads = threads or backends.usual_threads()
    most, scratch = _LANES_IN_TURNS, 0 if backend in ("cuda", "triton") else _SCRATCH
    if device != "cpu":
        most, longest, block = threads + _LANES_THAT_WAIT, _LONGEST_TO_DEVICE, _BLOCK_ON_DEVICE
        # Page-locked memory is nobody else's any more: no more than half of what there is.
        free = {
            "free memory": budget.free_memory() // 2,
            f"free memory of {device}": lanes.room_on(device),
        }
        for place, size in free.items():
            if size < room:
                what, room = place, size
    elif backend in backends.CONCURRENT:
        most, scratch = max(threads, _FEWEST_LANES), 0
    most = min(most, max(_most_open_files() // 2, _FEWEST_LANES), _MOST_THREADS)
    return budget.fit(
        room, what, models=models, tensors=tensors, lanes=most, longest=longest, scratch=scratch, block=block
    )


def _identities(checkpoint: Checkpoint) -> set[tuple[int, int, int]]:
    return {file.identity for file in checkpoint.weights.values()}


def _most_open_files() -> int:
    """Inputs that all lanes together keep open: a share of what the process may, which is usually 1,024."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if most < 0 else min(most // 4, 256)


@dataclass(frozen=True)
class Job:
    """A merge of checkpoints that was found to be possible.

    way: where it merges, and why there. workers: pieces under way at once; chunk: the longest stroke. memory: the bytes
    that it will allocate, on the host and as many again on a device.
    """

    plan: Plan
    rule: Rule
    nonfinite: NonFinite
    output: Output
    backend: str
    merge: Merge
    way: costs.Way
    workers: int
    chunk: int
    memory: int
    threads: int | None

    def costs(self) -> costs.Costs | None:
        """What its way costs, measured now if it was not when it was chosen; None: there is nothing to merge."""
        on_cpu = self.way.device == "cpu"
        threads = self.threads or backends.usual_threads()
        found = self.way.costs or costs.measure(
            self.plan, self.rule, threads, self.backend if on_cpu else "auto"
        )
        return found if on_cpu or not found else found._replace(link=costs.link_speed(self.way.device))

    def run(self, progress: Progress | None = None, timeline: lanes.Timeline | None = None) -> Report:
        """Do it: the output is published whole, or nothing is left of it. timeline: is told when each worker did what."""
        began = time.perf_counter()
        with self.output:
            stats = self._stream(progress, timeline or lanes.Timeline(kept=False))
            made_of: dict[str, Any] = {
                "base": str(self.plan.base.path),
                "models": [str(model.path) for model in self.plan.models],
                "scale": self.rule.scale,
                "min_agreement": self.rule.min_agreement,
            }
            self.output.finish({"negmerge_fast": __version__, **made_of})
            if progress:  # the last moment to stop: syncing may have taken long
                total = self.plan.bytes_read + self.plan.bytes_written
                progress(total, total)
            self.output.publish()
        return Report(
            **made_of,
            output=str(self.output.target),
            backend=self.backend,
            device=self.way.device,
            elements=stats.elements,
            agreed=stats.agreed,
            consensus_ratio=stats.consensus_ratio,
            nonfinite=stats.nonfinite,
            bytes_read=self.plan.bytes_read,
            bytes_written=self.plan.bytes_written,
            seconds=time.perf_counter() - began,
            tensors=[{"name": name, **dataclasses.asdict(t)} for name, t in stats.tensors.items()],
        )

    def _stream(self, progress: Progress | None, timeline: lanes.Timeline) -> Stats:
        stats = Stats()
        total, moved = self.plan.bytes_read + self.plan.bytes_written, 0
        taken = Pieces(pieces(self.plan, self.chunk), ahead=4 * self.workers)
        done: Queue = SimpleQueue()
        # Pages that will be read again soon are left to the system; those of a job too large for it are given back.
        release = total > budget.free_memory() // 2
        threads = (self.threads or backends.usual_threads()) if self.backend in backends.CONCURRENT else 1
        turns = Semaphore(threads)
        workers = [
            Thread(target=self._work, args=(taken, done, turns, release, timeline), name=f"lane {k}")
            for k in range(self.workers)
        ]
        started = []
        try:
            for worker in workers:
                worker.start()
                started.append(worker)
            for piece in in_order(done, self.workers):
                if piece.error is not None:
                    raise piece.error
                for runs, counts in piece.counted:
                    stats.add(runs, counts)
                moved += piece.moved
                if progress:
                    progress(moved, total)
                taken.settled()
        finally:
            taken.stop(self.workers)
            join(started)
        return stats

    def _work(
        self, taken: Pieces, done: Queue, turns: Semaphore, release: bool, timeline: lanes.Timeline
    ) -> None:
        """One worker: read, merge and write pieces until there are no more."""
        number = NONE
        try:
            with (
                Reader(max(_most_open_files() // self.workers, 1)) as reader,
                lanes.lane_on(self.way.device, len(self.plan.models) + 1, self.chunk, timeline) as lane,
            ):
                while (next_piece := taken.take()) is not None:
                    number, piece = next_piece
                    base = piece.sources[0]
                    buffers = lane.hold([source.nbytes for source in piece.sources])
                    with timeline.span("read"):
                        self._read(piece, reader, buffers, release)
                    counted = self._merge(piece, lane, turns) if piece.members else []
                    with timeline.span("write"):
                        self.output.write(piece.target, base.offset, buffers[0], release)
                    done.put((number, Done(base.nbytes + sum(s.nbytes for s in piece.sources), counted)))
                    number = NONE
        except BaseException as error:
            done.put((number, Done(error=error)))
        done.put(None)

    def _read(self, piece: Extent, reader: Reader, buffers: list[memoryview], release: bool) -> None:
        first, *others = piece.sources
        cached = reader.read_into(first.file, first.offset, buffers[0], release)
        if not cached:  # nor are the others, then: the disk may fetch them all at once
            for source in others:
                reader.expect(source.file, source.offset, source.nbytes)
        for source, buffer in zip(others, buffers[1:], strict=True):
            reader.read_into(source.file, source.offset, buffer, release)

    def _merge(self, piece: Extent, lane: lanes.Lane, turns: Semaphore) -> list[Counted]:
        """Merge one piece in place on the base's buffer; the runs of each batch, and what was counted of them."""
        threads = 1 if self.backend in backends.CONCURRENT else self.threads
        merged: list[tuple[list[Member], Counts]] = []

        def work(addresses: list[int], owner: Any) -> None:
            for batch, members in _batches(piece, self.way.device, addresses, owner):
                merged.append((members, self.merge(batch, self.rule, threads)))

        with turns:
            lane.merge(work)
        lane.wait()
        counted = [([(m.name, m.numel) for m in members], np.array(c.tolist())) for members, c in merged]
        if self.nonfinite == "error" and any(counts[:, 1].any() for _, counts in counted):
            self._refuse_nonfinite(piece, lane)
        return counted

    def _refuse_nonfinite(self, piece: Extent, lane: lanes.Lane) -> None:
        """Name the first non-finite element of a piece; its base was overwritten and is read again."""
        base = piece.sources[0]
        with Reader(1) as reader:
            reader.read_into(base.file, base.offset, lane.hold([s.nbytes for s in piece.sources])[0])
        for batch, members in _batches(piece, "cpu", *lane.on_cpu()):
            if found := backends.first_nonfinite(batch, self.rule):
                row, element, version, value = found
                name, start, _, _ = members[row]
                tensor = self.plan.base.tensors[name]
                held = self.plan.models[version].tensors[name] if isinstance(version, int) else tensor
                index = tuple(int(i) for i in np.unravel_index(start + element, tensor.form.shape))
                what = (
                    f"the result at {index} is not finite" if version == "result" else f"{value} at {index}"
                )
                raise InputError(
                    f"{held.file.path}: tensor {brief(name)}: {what}, expected finite numbers (or --nonfinite keep-base)"
                )
        raise RuntimeError("a number that is not finite was counted, and is not found again")


def _batches(
    piece: Extent, device: str, addresses: list[int], owner: Any
) -> Iterator[tuple[Batch, list[Member]]]:
    """One batch for each signature in a piece whose versions are at these addresses."""
    groups: dict[Signature, tuple[list[Segment], list[Member]]] = {}
    for member in piece.members:
        dtypes = (member.signature.result, *member.signature.models)
        streams = [Stream(a, t, owner) for a, t in zip(addresses, dtypes, strict=True)]
        addresses = [a + member.numel * size for a, size in zip(addresses, member.sizes, strict=True)]
        segments, members = groups.setdefault(member.signature, ([], []))
        segments.append(Segment(member.numel, streams[0], streams[1:], streams[0]))
        members.append(member)
    for signature, (segments, members) in groups.items():
        yield Batch(device, signature, segments), members
