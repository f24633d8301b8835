"""What to read, merge and write: pure arithmetic on the layouts of all checkpoints. Nothing is opened here.

Extents are runs of bytes of one output file. Those with members are neighbouring tensors that are neighbours in every
model's file, too, so that each stream is read in one long stroke; those without are copied from the base. Together they
cover every byte of every output file, in order: a position in a plan is a number of those bytes. Pieces are extents cut to
the size of the buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoints import Checkpoint, File, Tensor
from .layout import mismatches
from .rule import FLOAT_SIZES, Batch, InputError, Segment, Signature, Stream, brief


class Member(NamedTuple):
    """A tensor, or a run of its elements."""

    name: str
    start: int
    numel: int
    signature: Signature

    @property
    def sizes(self) -> list[int]:
        """Bytes per element in the base and in each model."""
        return [FLOAT_SIZES[dtype] for dtype in (self.signature.result, *self.signature.models)]


class Source(NamedTuple):
    """A run of bytes of an input file."""

    file: File
    offset: int
    nbytes: int


class Extent(NamedTuple):
    """target: the output file, relative to the output; it is written where the base (the first source) is read."""

    target: str
    sources: list[Source]
    members: list[Member]


class Run(NamedTuple):
    """From one position in a plan to another."""

    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """targets: every output file, with the file of the base that it mirrors.

    kept: how many tensors are the base's, untouched.
    """

    base: Checkpoint
    models: list[Checkpoint]
    targets: dict[str, File]
    extents: list[Extent]
    kept: int

    @property
    def tensors(self) -> int:
        return sum(len(extent.members) for extent in self.extents)

    @property
    def elements(self) -> int:
        return sum(member.numel for extent in self.extents for member in extent.members)

    def segments(self, chunk: int) -> int:
        """How many runs of elements the backends are given."""
        return sum(len(piece.members) for piece in pieces(self.extents, chunk))

    @property
    def whole(self) -> Run:
        return Run(0, sum(extent.sources[0].nbytes for extent in self.extents))

    @property
    def bytes_read(self) -> int:
        return sum(source.nbytes for extent in self.extents for source in extent.sources)

    @property
    def bytes_written(self) -> int:
        return sum(file.size for file in self.targets.values())


def make_plan(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    task_vectors: bool = False,
    include: str | None = None,
    exclude: str | None = None,
) -> Plan:
    """Pair the tensors of all checkpoints by name.

    include, exclude: regular expressions searched in the names; tensors not chosen are the base's, untouched.
    Raises InputError, one line with what does not fit.
    """
    chosen = _choose(base.tensors, include, exclude)
    chosen_in = [_choose(model.tensors, include, exclude) for model in models]
    if (include or exclude) and not chosen:
        raise InputError(f"{base.path}: no tensor is chosen by include {include!r}, exclude {exclude!r}")

    def where(k: int | None, name: str) -> str:
        checkpoint = base if k is None else models[k]
        path = checkpoint.tensors[name].file.path if name in checkpoint.tensors else checkpoint.path
        return f"{path}: tensor {brief(name)}"

    forms = {name: tensor.form for name, tensor in chosen.items()}
    forms_in = [{name: tensor.form for name, tensor in held.items()} for held in chosen_in]
    if problems := mismatches(forms, forms_in, where, task_vectors):
        raise InputError("; ".join(problems))

    merged = [name for name, tensor in chosen.items() if tensor.form.dtype in FLOAT_SIZES]
    held: dict[Path, list[tuple[str, Tensor]]] = {file.path: [] for file in base.weights.values()}
    for name in merged:
        held[chosen[name].file.path].append((name, chosen[name]))
    extents: list[Extent] = []
    for target, file in base.weights.items():
        extents += _extents(target, file, held[file.path], models, task_vectors)
    extents += [
        Extent(name, [Source(file, 0, file.size)], []) for name, file in base.others.items() if file.size
    ]
    targets = {**base.weights, **base.others}
    return Plan(base, list(models), targets, extents, len(base.tensors) - len(merged))


def _choose(tensors: Mapping[str, Tensor], include: str | None, exclude: str | None) -> dict[str, Tensor]:
    def pattern(label: str, text: str | None, default: str) -> re.Pattern[str]:
        try:
            return re.compile(default if text is None else text)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{label}: {text!r} is not a regular expression ({error})") from None

    if include is None and exclude is None:
        return dict(tensors)
    wanted, unwanted = pattern("include", include, ""), pattern("exclude", exclude, r"(?!)")
    return {n: t for n, t in tensors.items() if wanted.search(n) and not unwanted.search(n)}


def _extents(
    target: str,
    file: File,
    held: list[tuple[str, Tensor]],
    models: Sequence[Checkpoint],
    task_vectors: bool,
) -> Iterator[Extent]:
    """Cover one file of the base; held: its tensors to merge."""
    position = 0
    run: list[list[Tensor]] = []
    members: list[Member] = []

    def finished() -> Extent:
        columns = zip(*run, strict=True)
        sources = [Source(c[0].file, c[0].offset, c[-1].end - c[0].offset) for c in columns]
        return Extent(target, sources, members)

    for name, tensor in sorted(held, key=lambda item: (item[1].offset, item[1].end)):
        versions = [tensor, *(model.tensors[name] for model in models)]
        if run and not all(_adjacent(last, here) for last, here in zip(run[-1], versions, strict=True)):
            yield finished()
            run, members = [], []
        if not run and tensor.offset > position:
            yield Extent(target, [Source(file, position, tensor.offset - position)], [])
        signature = Signature(tensor.form.dtype, tuple(v.form.dtype for v in versions[1:]), task_vectors)
        run.append(versions)
        members.append(Member(name, 0, tensor.numel, signature))
        position = tensor.end
    if run:
        yield finished()
    if file.size > position:
        yield Extent(target, [Source(file, position, file.size - position)], [])


def _adjacent(last: Tensor, here: Tensor) -> bool:
    return last.file is here.file and last.end == here.offset


def part(plan: Plan, run: Run) -> Iterator[Extent]:
    """The extents, or parts of them, whose elements begin within a run."""
    at = 0
    for extent in plan.extents:
        size = extent.sources[0].nbytes
        if run.begin <= at and at + size <= run.end:
            yield extent
        elif at < run.end and run.begin < at + size:
            yield from _slice(extent, run.begin - at, run.end - at)
        at += size


def _slice(extent: Extent, begin: int, end: int) -> Iterator[Extent]:
    """What begins between two bytes of an extent's base, of every source; nothing, where that is within one element."""
    if not extent.members:
        (source,) = extent.sources
        first, last = max(begin, 0), min(end, source.nbytes)
        yield Extent(extent.target, [Source(source.file, source.offset + first, last - first)], [])
        return
    at, members = 0, []
    before, taken = [0] * len(extent.sources), [0] * len(extent.sources)
    for member in extent.members:
        size = member.sizes[0]
        # Rounded up: an element is where its first byte is.
        first, last = (min(max(-((at - edge) // size), 0), member.numel) for edge in (begin, end))
        before = [count + first * each for count, each in zip(before, member.sizes, strict=True)]
        if first < last:
            members.append(member._replace(start=member.start + first, numel=last - first))
            taken = [count + (last - first) * each for count, each in zip(taken, member.sizes, strict=True)]
        at += member.numel * size
    sources = [
        Source(source.file, source.offset + skipped, nbytes)
        for source, skipped, nbytes in zip(extent.sources, before, taken, strict=True)
    ]
    if members:
        yield Extent(extent.target, sources, members)


def left(whole: Run, done: Iterable[Run]) -> list[Run]:
    """What of a run is in none of others."""
    found, at = [], whole.begin
    for run in [*sorted(done), Run(whole.end, whole.end)]:
        if run.begin > at:
            found.append(Run(at, run.begin))
        at = max(at, run.end)
    return found


def between(runs: Sequence[Run], begin: int, end: int) -> list[Run]:
    """Of runs in a row, what lies between two numbers of their bytes."""
    found = []
    at = 0
    for run in runs:
        size = run.end - run.begin
        first, last = max(begin - at, 0), min(end - at, size)
        if first < last:
            found.append(Run(run.begin + first, run.begin + last))
        at += size
    return found


def shares(plan: Plan, runs: Sequence[Run], count: int) -> list[list[Run]]:
    """Runs cut between elements into so many lots, of about as many bytes to read and write each."""
    parts: list[tuple[int, int, Extent, int]] = []  # begin, end, and the extent with its own begin
    at = 0
    for extent in plan.extents:
        end = at + extent.sources[0].nbytes
        overlaps = [(max(run.begin, at), min(run.end, end)) for run in runs]
        parts += [(begin, until, extent, at) for begin, until in overlaps if begin < until]
        at = end
    total = sum((end - begin) * _moved_per_byte(extent) for begin, end, extent, _ in parts)
    lots: list[list[Run]] = [[] for _ in range(count)]
    done = 0.0
    for begin, end, extent, start in parts:
        weight = _moved_per_byte(extent)
        while begin < end:
            lot = min(int(done * count / total), count - 1)
            until = end
            if lot < count - 1:
                room = max(int((total * (lot + 1) / count - done) / weight), 1)
                until = min(start + _between_elements(extent, begin + room - start), end)
            if lots[lot] and lots[lot][-1].end == begin:
                lots[lot][-1] = Run(lots[lot][-1].begin, until)
            else:
                lots[lot].append(Run(begin, until))
            done += (until - begin) * weight
            begin = until
    return lots


def _moved_per_byte(extent: Extent) -> float:
    """Bytes read and written for each byte of the output."""
    return 1 + sum(source.nbytes for source in extent.sources) / extent.sources[0].nbytes


def _between_elements(extent: Extent, offset: int) -> int:
    """The first byte of an element that is not before an offset into the base's source."""
    at = 0
    for member in extent.members:
        size = member.sizes[0]
        if offset < at + member.numel * size:
            return at + -(-(offset - at) // size) * size
        at += member.numel * size
    return offset


def pieces(extents: Iterable[Extent], chunk: int) -> Iterator[Extent]:
    """Extents, cut so that no source is longer than chunk bytes (at least 8: one element)."""
    for extent in extents:
        if extent.members:
            yield from _cut(extent, chunk)
            continue
        (source,) = extent.sources
        for done in range(0, source.nbytes, chunk):
            size = min(chunk, source.nbytes - done)
            yield Extent(extent.target, [Source(source.file, source.offset + done, size)], [])


def _cut(extent: Extent, chunk: int) -> Iterator[Extent]:
    positions = [source.offset for source in extent.sources]
    parts: list[Member] = []
    room = chunk

    def finished() -> Extent:
        lengths = [
            sum(column) for column in zip(*([p.numel * s for s in p.sizes] for p in parts), strict=True)
        ]
        sources = [
            Source(source.file, at, length)
            for source, at, length in zip(extent.sources, positions, lengths, strict=True)
        ]
        positions[:] = [at + length for at, length in zip(positions, lengths, strict=True)]
        return Extent(extent.target, sources, parts)

    for member in extent.members:
        widest = max(member.sizes)
        done = 0
        while True:
            count = min(member.numel - done, room // widest)
            if count or not member.numel:
                parts.append(member._replace(start=member.start + done, numel=count))
                done, room = done + count, room - count * widest
            if done == member.numel:
                break
            yield finished()
            parts, room = [], chunk
    yield finished()


def batches(
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
