"""Merging checkpoints in bounded memory.

A few workers, each with one buffer per version of the model, take the pieces of a plan as they come, and read, merge and
write them: while one waits for the disk, others compute, and what was read is still in the cache when it is merged.
Memory depends on the budget alone, not on the size of the model or on the number of models; what is known of each
tensor (half a KiB for each version of it) is counted.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import numpy as np

from . import __version__, backends
from .checkpoints import Checkpoint, Reader, open_checkpoint
from .plan import Extent, Member, Plan, make_plan, pieces
from .rule import (
    Batch,
    InputError,
    Inputs,
    Merge,
    NonFinite,
    Rule,
    Segment,
    Signature,
    Stats,
    Stream,
    require_choice,
)
from .workers import NONE, Done, Pieces, Queue, in_order, join
from .writer import Output

Progress = Callable[[int, int], None]
PathLike = str | os.PathLike[str]

# One reads, one merges, one writes, where only one may merge at a time; where all may, two keep each other company.
_WORKERS_IN_TURNS, _FEWEST_WORKERS = 3, 2
# Temporaries of the reference, reference.SCRATCH_BYTES; each worker keeps its own.
_SCRATCH = 14
# The longest stroke for one file (best of 256 KiB to 4 MiB: what was read is still in the cache when it is merged), and
# the shortest worth a system call.
_LONGEST, _SHORTEST = 1 << 20, 4096
# What the interpreter's own objects take while a job runs, and what it knows of each tensor of each version.
_OBJECTS, _OF_A_TENSOR = 4 << 20, 512
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
    memory_budget: bytes, or text such as "512MiB", for buffers and all else that is allocated.
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
    if device == "auto":
        device = "cuda:0" if backend == "cuda" else "cpu"
    signatures = {member.signature for extent in plan.extents for member in extent.members}
    name, merge = backends.choose(backend, device, rule, signatures)
    tensors = sum(len(checkpoint.tensors) for checkpoint in (opened, *models))
    most, scratch = _WORKERS_IN_TURNS, _SCRATCH
    if name in backends.CONCURRENT:
        most, scratch = max(threads or backends.usual_threads(), _FEWEST_WORKERS), 0
    most = min(most, max(_most_open_files() // 2, _FEWEST_WORKERS), _MOST_THREADS)
    workers, chunk, memory = _fit(parse_size(memory_budget), len(models), tensors, most, scratch)
    return Job(plan, rule, nonfinite, place, name, merge, device, workers, chunk, memory, threads)


def _identities(checkpoint: Checkpoint) -> set[tuple[int, int, int]]:
    return {file.identity for file in checkpoint.weights.values()}


def parse_size(size: int | str) -> int:
    """Bytes from "512MiB", "1.5 GB" or a number."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(i?)B?|B)?\s*", str(size), re.IGNORECASE)
    if not found:
        raise InputError(f"memory_budget: {size!r}, expected a size such as 512MiB or 1GB")
    number, letter, binary = found.groups()
    power = "KMGT".index(letter.upper()) + 1 if letter else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _fit(budget: int, models: int, tensors: int, workers: int, scratch: int) -> tuple[int, int, int]:
    """As many workers and as long strokes as the budget allows, and the memory that the job then takes, in bytes.

    tensors: of all versions together. scratch: how many temporaries a worker has, beside its buffers.
    """

    def memory() -> int:
        # A block of temporaries is as long as a stroke, in a wider type perhaps, or as reference.SCRATCH_BYTES allows.
        of_a_worker = (models + 1) * chunk + scratch * min(4 * chunk, 1 << 20)
        return workers * of_a_worker + _OBJECTS + tensors * _OF_A_TENSOR

    chunk = _LONGEST
    while memory() > budget and chunk > _SHORTEST:
        chunk //= 2
        if chunk < _LONGEST // 8 and workers > _FEWEST_WORKERS:
            workers, chunk = max(workers // 2, _FEWEST_WORKERS), _LONGEST
    if memory() > budget:
        raise InputError(
            f"memory_budget: {budget:,} bytes, expected at least {memory():,} for {models} models and their {tensors:,} tensors"
        )
    return workers, chunk, memory()


def _buffers(versions: int, chunk: int) -> list[Any]:
    """Memory of one worker: a buffer for each version of the model."""
    # A mapping of its own: given back to the system as soon as the job is done.
    memory = mmap.mmap(-1, versions * chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return [np.frombuffer(memory, np.uint8, chunk, k * chunk) for k in range(versions)]


def _most_open_files() -> int:
    """Inputs that all workers together keep open: a share of what the process may, which is usually 1,024."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if most < 0 else min(most // 4, 256)


@dataclass(frozen=True)
class Job:
    """A merge of checkpoints that was found to be possible. memory: the bytes it will allocate; chunk: its longest stroke."""

    plan: Plan
    rule: Rule
    nonfinite: NonFinite
    output: Output
    backend: str
    merge: Merge
    device: str
    workers: int
    chunk: int
    memory: int
    threads: int | None

    def run(self, progress: Progress | None = None) -> Report:
        """Do it: the output is published whole, or nothing is left of it."""
        began = time.perf_counter()
        with self.output:
            stats = self._stream(progress)
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
            elements=stats.elements,
            agreed=stats.agreed,
            consensus_ratio=stats.consensus_ratio,
            nonfinite=stats.nonfinite,
            bytes_read=self.plan.bytes_read,
            bytes_written=self.plan.bytes_written,
            seconds=time.perf_counter() - began,
            tensors=[{"name": name, **dataclasses.asdict(t)} for name, t in stats.tensors.items()],
        )

    def _stream(self, progress: Progress | None) -> Stats:
        stats = Stats()
        total, moved = self.plan.bytes_read + self.plan.bytes_written, 0
        taken = Pieces(pieces(self.plan, self.chunk), ahead=4 * self.workers)
        done: Queue = SimpleQueue()
        # Pages that will be read again soon are left to the system; those of a job too large for it are given back.
        release = total > _free_memory() // 2
        threads = (self.threads or backends.usual_threads()) if self.backend in backends.CONCURRENT else 1
        turns = Semaphore(threads)
        workers = [Thread(target=self._work, args=(taken, done, turns, release)) for _ in range(self.workers)]
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

    def _work(self, taken: Pieces, done: Queue, turns: Semaphore, release: bool) -> None:
        """One worker: read, merge and write pieces until there are no more."""
        number = NONE
        try:
            buffers = _buffers(len(self.plan.models) + 1, self.chunk)
            with Reader(max(_most_open_files() // self.workers, 1)) as reader:
                while (next_piece := taken.take()) is not None:
                    number, piece = next_piece
                    self._read(piece, reader, buffers, release)
                    with turns:
                        counted = list(self._merge(piece, buffers))
                    base = piece.sources[0]
                    self.output.write(
                        piece.target, base.offset, memoryview(buffers[0])[: base.nbytes], release
                    )
                    done.put((number, Done(base.nbytes + sum(s.nbytes for s in piece.sources), counted)))
                    number = NONE
        except BaseException as error:
            done.put((number, Done(error=error)))
        done.put(None)

    def _read(self, piece: Extent, reader: Reader, buffers: list[Any], release: bool) -> None:
        first, *others = piece.sources
        cached = reader.read_into(first.file, first.offset, memoryview(buffers[0])[: first.nbytes], release)
        if not cached:  # nor are the others, then: the disk may fetch them all at once
            for source in others:
                reader.expect(source.file, source.offset, source.nbytes)
        for source, buffer in zip(others, buffers[1:], strict=False):
            reader.read_into(source.file, source.offset, memoryview(buffer)[: source.nbytes], release)

    def _merge(self, piece: Extent, buffers: list[Any]) -> Iterator[tuple[list[tuple[str, int]], Any]]:
        """Merge one piece in place on the base's buffer; the runs of each batch, and what was counted of them."""
        if not piece.members:
            return
        threads = 1 if self.backend in backends.CONCURRENT else self.threads
        for batch, members in self._batches(piece, buffers):
            counts = np.array(self.merge(batch, self.rule, threads).tolist())
            if batch.device != "cpu":
                _from_device(batch, buffers[0])
            if self.nonfinite == "error" and counts[:, 1].any():
                self._refuse_nonfinite(piece, buffers)
            yield [(m.name, m.numel) for m in members], counts

    def _batches(self, piece: Extent, buffers: list[Any]) -> Iterator[tuple[Batch, list[Member]]]:
        """One batch for each signature in the piece."""
        owners: list[Any] = buffers
        addresses = [buffer.ctypes.data for buffer in buffers]
        if self.device != "cpu":
            owners = _to_device(buffers, self.device)
            addresses = [owner.data_ptr() for owner in owners]
        groups: dict[Signature, tuple[list[Segment], list[Member]]] = {}
        for member in piece.members:
            dtypes = (member.signature.result, *member.signature.models)
            streams = [Stream(a, t, o) for a, t, o in zip(addresses, dtypes, owners, strict=True)]
            addresses = [a + member.numel * size for a, size in zip(addresses, member.sizes, strict=True)]
            segments, members = groups.setdefault(member.signature, ([], []))
            segments.append(Segment(member.numel, streams[0], streams[1:], streams[0]))
            members.append(member)
        for signature, (segments, members) in groups.items():
            yield Batch(self.device, signature, segments), members

    def _refuse_nonfinite(self, piece: Extent, buffers: list[Any]) -> None:
        """Name the first non-finite element of a piece; its base was overwritten and is read again."""
        base = piece.sources[0]
        with Reader(1) as reader:
            reader.read_into(base.file, base.offset, memoryview(buffers[0])[: base.nbytes])
        for batch, members in self._batches(piece, buffers):
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
                    f"{held.file.path}: tensor {name!r}: {what}, expected finite numbers (or --nonfinite keep-base)"
                )
        raise RuntimeError("a number that is not finite was counted, and is not found again")


def _to_device(buffers: list[Any], device: str) -> list[Any]:
    import torch

    return [torch.from_numpy(buffer).to(device) for buffer in buffers]


def _from_device(batch: Batch, buffer: Any) -> None:
    import torch

    out = batch.segments[0].out
    assert out is not None
    torch.from_numpy(buffer).copy_(out.owner)


def _free_memory() -> int:
    """Bytes that could still be used: what the machine has available, or what the control group allows."""
    found = [1 << 62]
    for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        if available := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            found.append(int(available[1]) * 1024)
        elif text.strip().isdigit():
            found.append(int(text))
    return min(found)
