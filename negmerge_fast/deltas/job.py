"""Making a delta of checkpoints: streamed in bounded memory, resumed, and on several ranks, as a merge is.

Workers write masks where they stay (format.py), and each rank appends its means to a file of its own (spool.py). When all is counted,
rank 0 writes the headers and puts the means behind the masks. A process alone with little to read writes means where they stay, too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..backends import masks, registry
from ..checkpoints.base import Checkpoint
from ..checkpoints.delta import INDEX, DeltaInfo, TensorInfo, sample_range
from ..checkpoints.reader import File, Reader, naming
from ..core.delta import MASK_WORD, mask_bytes
from ..core.hashing import hash_of
from ..core.low_rank import AdaptersAs
from ..core.pairing import Rename
from ..core.ranges import Range
from ..core.rule import Inputs, NonFinite
from ..core.stats import Stats, TensorStats
from ..methods.base import Method
from ..output import manifest as manifests
from ..output.directory import Entry
from ..output.filesystem import set_size, sync
from ..output.journal import Journal, ProgressRecord
from ..output.journal import read as read_journal
from ..output.manifest import Recipe
from ..output.staging import Staging
from ..output.writer import Writer
from ..streaming import api as merges
from ..streaming.budget import allocate
from ..streaming.job import Job
from ..streaming.options import MergeOptions, PathLike, as_path, require_callable
from ..streaming.partition import slice_plan
from ..streaming.placement import Placement
from ..streaming.plan import Extent, Plan
from ..streaming.progress import OnProgress, Recorder
from ..streaming.report import Report
from ..streaming.rules import Rules
from ..streaming.skipping import Skipping
from ..streaming.together import Task
from .format import DeltaFile, file_names, index_of
from .spool import InPlace, Spool
from .worker import EXTRA_BUFFERS, DeltaResult, DeltaWorker

_COPIED_BYTES = 4 << 20


class _Means(NamedTuple):
    """Means of consecutive elements of a tensor: the first element, and where they are in the spool of a rank."""

    start: int
    rank: int
    offset: int
    nbytes: int


# A process alone that reads less than this writes means where they stay, so that they need not be copied at the end. If it is killed, that
# is done over in seconds. bench/processes/deltas.py measures such a delta.
_DONE_OVER_BYTES = 8 << 30


@dataclass
class _Ranges:
    """What became of ranges of the plan.

    Attributes:
        recorded: The ranges that each rank's spool holds of earlier runs, in order.
        current: Those of each rank, of this run.
        ends: Where the means end in each file, if they are written in place; None if they are in spools.
        sizes: Of the files, once complete.
    """

    recorded: dict[int, list[Range]] = field(default_factory=dict)
    current: list[list[Range]] = field(default_factory=list)
    ends: dict[str, int] | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[int, list[Range]]]:
        current = dict(enumerate(self.current))
        for rank in sorted({*self.recorded, *current}):
            yield rank, [*self.recorded.get(rank, []), *current.get(rank, [])]


@dataclass(frozen=True)
class DeltaJob(Job):
    """A delta that was checked. Its plan has what is merged, and the delta's files in place of the base's.

    Attributes:
        deltas: The files of the delta, by name.
    """

    deltas: Mapping[str, DeltaFile] = field(kw_only=True)
    _ranges: _Ranges = field(default_factory=_Ranges, kw_only=True)

    alignment = MASK_WORD
    extra_buffers = EXTRA_BUFFERS

    def report(self, before: ProgressRecord, done: ProgressRecord, written: int, seconds: float) -> Report:
        """Report what was done. bytes_done_before are of the base, and bytes_written those of the delta's files."""
        report = super().report(before, done, written, seconds)
        return replace(report, scale=None, bytes_written=sum(self._ranges.sizes.values()))

    def take_ranges(self, shards: Sequence[Sequence[Range]]) -> None:
        self._ranges.current[:] = map(list, shards)

    def _refuse_incomplete(self) -> None:
        for entry in self.staging.journals():
            rank = int(entry.name.rpartition("-")[2])
            records = read_journal(entry, self._fingerprint)
            self._ranges.recorded[rank] = [range_ for record in records for range_ in record.ranges]
        # A run that was stopped at the very end may have put means behind the masks.
        for name, file in self.destination.files.items():
            try:
                descriptor = self.staging.open_file(name, os.O_WRONLY)
            except FileNotFoundError:
                continue
            try:
                if os.fstat(descriptor).st_size > file.size:
                    set_size(descriptor, file.size)
            finally:
                os.close(descriptor)
        super()._refuse_incomplete()

    def recorder(self, ranges: Sequence[Range], rank: int, on_moved: Callable[[int], None]) -> DeltaRecorder:
        sizes: dict[str, int] = {}
        for range_ in ranges:
            for extent in slice_plan(self.plan, range_):
                nbytes = sum(mask_bytes(s.numel) for s in extent.slices)
                sizes[extent.path] = sizes.get(extent.path, 0) + nbytes
        self.writer.expect(sizes)
        entry = self.staging.journal(rank)
        records = read_journal(entry, self._fingerprint) if self.staging.resume else []
        single = len(self._ranges.current) == 1
        if single and not self.staging.resume and self.plan.bytes_read < _DONE_OVER_BYTES:
            # Without a journal: a run that resumes goes on from spools, and makes this one's anew.
            self._ranges.ends = {name: file.masks_end for name, file in self.deltas.items()}
            in_place = InPlace(lambda name: self.staging.open_file(name, os.O_WRONLY), self._ranges.ends)
            return DeltaRecorder(ranges, None, on_moved, False, in_place, self.destination.path)
        spool = Spool(self._spool(rank), sum(self._means_bytes(record.stats) for record in records))

        def sync_all() -> None:
            self.writer.sync()
            with naming(self.destination.path):
                spool.sync()

        journal = Journal(entry, self._fingerprint, sync_all)
        return DeltaRecorder(ranges, journal, on_moved, self.staging.resume, spool, self.destination.path)

    def _spool(self, rank: int) -> Entry:
        return self.staging.directory / f"rank-{rank}.means"

    def _means_bytes(self, stats: Stats) -> int:
        sizes = {name: t.mean_size for file in self.deltas.values() for name, t in file.tensors.items()}
        return sum(counted.agreed * sizes[name] for name, counted in stats.tensors.items())

    def _processor(
        self, outputs: Sequence[tuple[Rules, Writer]], **parts: Any
    ) -> Callable[[Task], Sequence[Any]]:
        worker = DeltaWorker(**parts, files=self.deltas)
        return lambda task: [worker.process(task.chunk)]

    def _finish(self, manifest: Mapping[str, object], stats: Stats, on_progress: Callable[[], None]) -> None:
        """Write headers and means, now that all is counted, and then the manifest."""
        sizes = self._ranges.sizes
        means = self._means(stats) if self._ranges.ends is None else {}
        for name, file in self.deltas.items():
            sizes[name] = self._complete(name, file, stats.tensors, means)
            on_progress()
        if INDEX in self.destination.files:
            content = index_of(self.deltas)
            sizes[INDEX] = len(content)
            descriptor = self.staging.open_file(INDEX, os.O_WRONLY)
            with naming(self.destination.path), open(descriptor, "wb") as index:
                index.write(content)
                index.flush()
                sync(descriptor)
        files = {name: replace(file, size=sizes[name]) for name, file in self.destination.files.items()}
        with Writer(replace(self.destination, files=files), self.staging) as writer:
            writer.finish(manifest, on_progress)

    def _means(self, stats: Stats) -> dict[str, list[_Means]]:
        """Where the means of each tensor are, in the order of its elements."""
        found: dict[str, list[_Means]] = {}
        for rank, ranges in self._ranges:
            offset = 0
            for range_ in ranges:
                for extent in slice_plan(self.plan, range_):
                    for name, start, numel, *_ in extent.slices:
                        tensor = self.deltas[extent.path].tensors[name]
                        if numel == tensor.numel:
                            count = stats.tensors[name].agreed
                        else:
                            count = self._count(extent.path, name, start, numel)
                        nbytes = count * tensor.mean_size
                        found.setdefault(name, []).append(_Means(start, rank, offset, nbytes))
                        offset += nbytes
        return {name: sorted(each) for name, each in found.items()}

    def _count(self, path: str, name: str, start: int, numel: int) -> int:
        """Count the elements in the mask, of some of a tensor."""
        words = bytearray(mask_bytes(numel))
        with naming(self.destination.path), self.staging.read_file(path) as file:
            file.seek(self.deltas[path].mask_position(name, start))
            file.readinto(words)  # type: ignore[attr-defined]
        return masks.rank(ctypes.addressof(ctypes.c_char.from_buffer(words)), 0, numel) if words else 0

    def _complete(
        self,
        name: str,
        file: DeltaFile,
        counted: Mapping[str, TensorStats],
        means: Mapping[str, Sequence[_Means]],
    ) -> int:
        """Write the header of a file, and the means behind its masks if they are not there; returns its size."""
        ends, spools = self._ranges.ends, {}
        if ends is None:
            spools = {rank: self._spool(rank).open(os.O_RDONLY) for rank, _ in self._ranges}
        position = file.masks_end if ends is None else ends[name]
        descriptor = self.staging.open_file(name, os.O_WRONLY)
        try:
            with naming(self.destination.path):
                os.pwrite(descriptor, file.header(counted), 0)
                for each in (each for tensor in file.tensors for each in means.get(tensor, ())):
                    _copy(spools[each.rank], each.offset, each.nbytes, descriptor, position)
                    position += each.nbytes
                set_size(descriptor, position)
                sync(descriptor)
        finally:
            for opened in (descriptor, *spools.values()):
                os.close(opened)
        expected = sum(counted[n].agreed * t.mean_size for n, t in file.tensors.items())
        if position - file.masks_end != expected:
            raise RuntimeError(
                f"{self.destination.path}: {position - file.masks_end} bytes of means, expected {expected}"
            )
        return position

    def _note_variances(self, open_file: object) -> None:
        """A delta has none."""


class DeltaRecorder(Recorder):
    """A recorder that appends means to a rank's spool before they are on record."""

    def __init__(
        self,
        ranges: Sequence[Range],
        journal: Journal | None,
        on_moved: Callable[[int], None],
        keep: bool,
        spool: Spool | InPlace,
        path: Path,
    ) -> None:
        super().__init__(ranges, journal, on_moved, keep)
        self._spool, self._output = spool, path

    def on_result(self, result: DeltaResult) -> None:  # type: ignore[override]
        with naming(self._output):
            self._spool.append(result.path, result.means)
        super().on_result(result.chunk)

    def __exit__(self, *error: object) -> None:
        with self._spool:
            super().__exit__(*error)  # type: ignore[arg-type]


def _copy(source: int, offset: int, nbytes: int, destination: int, position: int) -> None:
    """Copy bytes of one open file to another."""
    end = offset + nbytes
    while offset < end:
        data = os.pread(source, min(_COPIED_BYTES, end - offset), offset)
        if not data:
            raise OSError(f"the means end at byte {offset}, expected {end}")
        done = 0
        while done < len(data):
            done += os.pwrite(destination, memoryview(data)[done:], position + done)
        offset, position = offset + len(data), position + len(data)


def delta_checkpoints(
    base: PathLike,
    finetuned: Sequence[PathLike],
    output: PathLike,
    *,
    half: bool = False,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "error",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    backend: str = "auto",
    memory_budget: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    adapters_as: AdaptersAs = "difference",
    method: str | Method = "negmerge",
    weights: PathLike | None = None,
    progress: OnProgress | None = None,
) -> Report:
    """Make the consensus delta of checkpoints that need not fit in memory (NegMerge, arXiv 2410.05583, section 4).

    The delta is what a merge takes off the base, apart from λ: a mask of the elements that agree, and their means. Applying it with any
    λ gives the bits of merge_checkpoints with that λ.

    Args:
        base: A checkpoint as of merge_checkpoints.
        finetuned: One or more of the same kind.
        output: The path of the delta, a directory. It appears complete or not at all.
        half: Store means in BF16. Applying then gives other bits than a merge.
        min_agreement: As of merge_checkpoints, like all that follow.
        inputs: "finetuned" or "task_vectors".
        nonfinite: With "keep-base" elements that are not finite in any version are not in the delta.
        include: The delta has nothing of other tensors.
        exclude: Nor of these.
        rename: For the names of tensors of finetuned.
        keep: Patterns of files of the base; a delta has none of them, but what may hold weights must be chosen or not.
        drop: As keep.
        backend: "auto", "cpu" or "torch".
        memory_budget: The most bytes to allocate.
        threads: How many threads read and compute.
        overwrite: Replace output if its manifest says that negmerge wrote every file in it, as it is.
        resume: Continue what an interrupted run left.
        adapters_as: What LoRA adapters are, "difference" or "merged".
        method: As of merge_checkpoints. The delta is then of the elements that the method changes, and w · r in place of their means.
        weights: As of merge_checkpoints.
        progress: Called with (bytes done, bytes in all) after every chunk. It may raise to stop.

    Returns:
        What was done; scale is None.

    Raises:
        InputError: As of merge_checkpoints.
        OSError: If reading or writing fails.
        TypeError: If finetuned is one path.
    """
    require_callable("progress", progress)
    options = options_of(
        min_agreement=min_agreement, inputs=inputs, nonfinite=nonfinite, include=include, exclude=exclude, rename=rename, keep=keep,
        drop=drop, backend=backend, memory_budget=memory_budget, threads=threads, overwrite=overwrite, resume=resume,
        adapters_as=adapters_as, method=method, weights=weights,
    )  # fmt: skip
    return merges.run(lambda: prepare_delta(base, finetuned, output, options, half), progress)


def options_of(**options: object) -> MergeOptions:
    """The options of a merge that a delta has, too."""
    for name in ("scale", "device", "skip_unchanged"):
        if name in options:
            raise TypeError(f"{name}: a delta has no such option")
    return MergeOptions(scale=0.0, device="cpu", skip_unchanged=False, **options)  # type: ignore[arg-type]


def prepare_delta(
    base: PathLike, finetuned: Sequence[PathLike], output: PathLike, options: MergeOptions, half: bool = False
) -> DeltaJob:
    """Check a delta and decide how it is made, without writing anything. The arguments are as of delta_checkpoints."""
    path = as_path("output", output)
    plan = merges.open_and_plan(base, finetuned, options)
    recipe = replace(merges.recipe_of(plan, options), means=manifests.BF16 if half else manifests.EXACT)
    plan, deltas = _lay_out(plan, recipe)
    destination = merges.destination_of(path, plan, options, directory=True)
    finished = merges.is_finished(destination, recipe, plan.checkpoints, None, options)
    notes = [] if finished else merges.try_out(plan.base.opened.weights.values(), destination)
    if half:
        notes = [*notes, "means are stored in BF16: applied, they give other bits than a merge"]
    staging = Staging(destination, resume=options.resume)
    choose = registry.choose_low_rank_consensus if plan.is_low_rank else registry.choose_consensus
    name, merge = choose(options.backend, "cpu", recipe.rule, plan.signatures)
    return DeltaJob(
        plan,
        options,
        recipe,
        destination,
        staging,
        Writer(destination, staging),
        name,
        merge,
        Placement("cpu", "deltas of files are made there"),
        *allocate(plan, options, "cpu", (name, "torch"), EXTRA_BUFFERS),
        Skipping(recipe.rule, len(plan.models), None),
        Rules(recipe.rule),
        [*plan.notes, *notes],
        finished,
        deltas=deltas,
    )


def _lay_out(plan: Plan, recipe: Recipe) -> tuple[Plan, dict[str, DeltaFile]]:
    """The plan of a delta, and its files: one for each file of the base that holds what is merged."""
    merged: dict[str, list[Extent]] = {}
    for extent in plan.extents:
        if extent.slices:
            merged.setdefault(extent.path, []).append(extent)
    names = dict(zip(merged, file_names(len(merged)), strict=True))
    info = DeltaInfo(
        len(plan.models),
        recipe.rule.min_agreement,
        recipe.inputs,
        manifests.input_json(recipe.base),
        recipe.method.to_json() if recipe.method else None,
        recipe.weights.path if recipe.weights else None,
    )
    samples = _samples(plan.base, [s.name for each in merged.values() for e in each for s in e.slices])
    deltas, files = {}, {}
    for path, name in names.items():
        tensors = {}
        for tensor_slice in (s for extent in merged[path] for s in extent.slices):
            arithmetic = tensor_slice.signature.arithmetic
            spec = plan.base.tensors[tensor_slice.name].spec
            masked = None if recipe.rule.choices is None else 0
            known = TensorInfo(spec, arithmetic, 0, 0, samples[tensor_slice.name], masked)
            tensors[tensor_slice.name] = known, arithmetic if recipe.means == manifests.EXACT else "BF16"
        deltas[name] = DeltaFile.of(info, tensors)
        like = plan.base.weights[path]
        files[name] = File(like.path, deltas[name].masks_end, like.identity, like.mode)
    if len(names) > 1:
        files[INDEX] = replace(next(iter(files.values())), size=0)
    extents = [extent._replace(path=names[path]) for path, each in merged.items() for extent in each]
    return replace(plan, files=files, extents=extents), deltas


def _samples(base: Checkpoint, names: Sequence[str]) -> dict[str, str]:
    """The hashes of the bytes in the middle of some tensors."""
    hashes = {}
    with Reader(16) as reader:
        for name in names:
            source = base.tensors[name].source
            taken = sample_range(source.nbytes)
            buffer = memoryview(bytearray(len(taken)))
            source.read_into(reader, buffer, taken.start)
            hashes[name] = hash_of(buffer)
    return hashes
