"""Bounds of magnitudes (core/bounds.py): what is counted and kept of a batch, and the bounds of what is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock, local
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ..core.batch import Batch, Segment
from ..core.bounds import INFINITY, Bounds, Interval, Search, Trimming, bounds_of, ceil_f32, number_of
from ..core.descriptors import has_expansions, pack_descriptors
from ..core.dtypes import DTYPE_CODES, FLOAT_SIZES
from ..core.low_rank import Expansion
from . import native, registry

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# Two intervals for each model (csrc/magnitudes.h): their edges, what is counted, and what a row of the found may have behind it.
EDGES, COUNTED, _SPARE = 4, 5, 4
_KEYS = {"F32": np.int32, "F64": np.int64}

# Elements of a tensor, or of all of them, of which no sample is taken: all magnitudes are kept.
MAX_UNSAMPLED = 1 << 16
# Elements of a sample of a tensor, and of all. With these an interval has a few per cent of the elements.
_MIN_SAMPLE, MAX_SAMPLE, MODEL_SAMPLE, _SAMPLED = 1 << 14, 1 << 18, 1 << 19, 64
# Elements of a block of a sample: neighbours are alike, and reading them costs as much as reading one.
SAMPLE_BLOCK = 128
# Standard deviations to both sides, and how many independent samples tell what one is.
_DEVIATIONS, _REPLICATES = 5.0, 64

# Magnitudes that are kept of an interval before they are counted in bins.
MAX_KEPT = 1 << 20
# About one of so many elements is in an interval that a sample told. So many of them wait to be counted in bins.
_PER_INTERVAL, _WAITING = 64, 1 << 15
# Bytes for each that is kept: the keys, twice while they are counted, and bins.
BYTES_PER_KEPT = 24

# Elements at a time, of all models.
_BLOCK = 1 << 21

# Returns int64[segments, n, COUNTED], and the keys that are in an interval, for each segment and model.
Measured: TypeAlias = "tuple[Array, list[list[Array]]]"
# Given a batch, and float64[segments, n, EDGES].
Measure: TypeAlias = "Callable[[Batch, Array], Measured]"


def choose(device: str) -> Measure:
    """The function that measures on a device."""
    return measure_natively if native.why_not("cpu", device) is None else measure_with_torch


_per_thread = local()


def measure_natively(batch: Batch, edges: Array) -> Measured:
    """Measure a batch in main memory with the compiled loop, on this thread. The keys are valid until the thread's next call."""
    result, models, task_vectors = batch.signature
    n, dtype = len(models), np.dtype(_KEYS[batch.signature.arithmetic])
    rows = [segment.numel + _SPARE for segment in batch.segments]
    counts = np.empty((len(rows), n, COUNTED), np.int64)
    found = _scratch(n * sum(rows) * dtype.itemsize).view(dtype)
    descriptors = pack_descriptors(batch)
    native.library().measure_magnitudes(
        DTYPE_CODES[result],
        bytes(map(DTYPE_CODES.__getitem__, models)),
        task_vectors,
        len(rows),
        descriptors.buffer_info()[0],
        np.ascontiguousarray(edges, np.float64).ctypes.data,
        counts.ctypes.data,
        found.ctypes.data,
        native.instruction_set(),
    )
    keys, at = [], 0
    for row, numbers in zip(rows, counts[:, :, -1].tolist(), strict=True):
        keys.append([found[at + k * row : at + k * row + count] for k, count in enumerate(numbers)])
        at += n * row
    return counts, keys


def _scratch(size: int) -> Array:
    """Memory of this thread."""
    memory: Array | None = getattr(_per_thread, "memory", None)
    if memory is None or memory.nbytes < size:
        _per_thread.memory = memory = None
        memory = _per_thread.memory = np.empty(-(size // -4096) * 4096, np.uint8)
    return memory[: -(size // -8) * 8]


def measure_with_torch(batch: Batch, edges: Array) -> Measured:
    """Measure a batch on any device of torch."""
    from .pytorch import plain_arithmetic

    counts = np.zeros((len(batch.segments), len(batch.signature.models), COUNTED), np.int64)
    keys: list[list[Array]] = []
    with plain_arithmetic():
        for row, segment in enumerate(batch.segments):
            keys.append([])
            for k, found in enumerate(_magnitudes(batch, segment)):
                keys[row].append(_count(found, edges[row, k], counts[row, k]))
    return counts, keys


def _magnitudes(batch: Batch, segment: Segment) -> Iterator[torch.Tensor]:
    """|d_k| of each model of a segment."""
    import torch

    from .pytorch import TORCH_DTYPES, compute_alone_if_flushing, load, rounded

    signature, wide = batch.signature, TORCH_DTYPES[batch.signature.arithmetic]
    compute_alone_if_flushing(torch.empty(segment.numel, dtype=wide, device=batch.device))
    base = None
    if segment.base is not None and not signature.task_vectors:
        base = load(segment.base, 0, segment.numel)
    for operand in segment.models:
        d = load(operand, 0, segment.numel).to(wide)
        if base is not None:
            rounds = signature.rounds_base(operand.dtype)
            d = d - (rounded(base, TORCH_DTYPES[operand.dtype]) if rounds else base).to(wide)
        yield d.abs()


def _count(magnitudes: torch.Tensor, edges: Array, counts: Array) -> Array:
    """Count the magnitudes of a model below the edges of its intervals; return the keys that are in these."""
    import torch

    from .pytorch import bits_of

    key = _KEYS["F64" if magnitudes.dtype == torch.float64 else "F32"]
    inside = None
    for w in range(0, EDGES, 2):
        low, high = (torch.tensor(e, dtype=torch.float64).to(magnitudes.dtype) for e in edges[w : w + 2])
        if w and not high:
            break
        low_flags, high_flags = (magnitudes < edge.to(magnitudes.device) for edge in (low, high))
        counts[w] = int(torch.count_nonzero(low_flags))
        counts[w + 1] = int(torch.count_nonzero(high_flags))
        if int(bits_of(high) - bits_of(low)) > 1:
            found = high_flags & ~low_flags
            inside = found if inside is None else inside | found
    if inside is None:
        return np.empty(0, key)
    keys: Array = bits_of(magnitudes[inside]).cpu().numpy()
    counts[-1] = len(keys)
    return keys


class IntervalCounts:
    """The magnitudes that were counted in an interval: how many are below it, and their keys in it.

    Keys are kept one by one, or counted in bins when there are too many. If more are expected than there are different ones, each of
    these has a bin from the start: that is as exact, and takes less memory.

    Args:
        interval: The interval.
        capacity: How many keys are kept.
        expected: How many there will be, about.

    Attributes:
        lower: How many are below the interval.
        inside: How many are in it.
        shift: Of how many low bits of a key nothing is known.
    """

    def __init__(self, interval: Interval, capacity: int, expected: int = 0) -> None:
        self.interval, self.lower, self.inside, self.shift = interval, 0, 0, 0
        self._bits = max(capacity, 2).bit_length() - 1
        is_narrow = interval.high - interval.low <= min(1 << self._bits, expected)
        self._capacity = min(capacity, _WAITING) if is_narrow else capacity
        self._kept, self._keys = 0, list[Array]()
        self._bins: Array | None = None
        self._sorted: Array | None = None

    def add(self, lower: int, inside: int, keys: Array) -> None:
        """Add what was counted. keys: int64 or int32, copied; without the keys all of those inside are the interval's only one."""
        self.lower += lower
        self.inside += inside
        if len(keys):
            self._keys.append(keys.copy())
            self._kept += len(keys)
            if self._kept > self._capacity:
                self._count_kept()

    def _count_kept(self) -> None:
        low, high = self.interval
        if self._bins is None:
            self.shift = max((high - low - 1).bit_length() - self._bits, 0)
            self._bins = np.zeros(((high - 1) >> self.shift) - (low >> self.shift) + 1, np.uint32)
        if self.inside >> 32:
            self._bins = self._bins.astype(np.int64, copy=False)
        if self._keys:
            numbers = (self._joined() >> self.shift) - (low >> self.shift)
            np.add.at(self._bins, numbers, self._bins.dtype.type(1))
        self._keys, self._kept = [], 0

    def _joined(self) -> Array:
        return self._keys[0] if len(self._keys) == 1 else np.concatenate(self._keys)

    def range_at(self, position: int) -> tuple[int, int]:
        """The key at a position of those in the interval, sorted: low ≤ key < high."""
        low, high = self.interval
        if high - low == 1:
            return low, high
        if self._bins is None:
            key = int(np.partition(self._joined(), position)[position])
            return key, key + 1
        self._count_kept()
        found = int(np.searchsorted(np.cumsum(self._bins, dtype=np.int64), position, side="right")) + (
            low >> self.shift
        )
        return max(low, found << self.shift), min(high, (found + 1) << self.shift)

    def count_lower(self, key: int) -> int:
        """How many are below a key: an edge of the interval, or one in it in which nothing is unknown."""
        low, high = self.interval
        if key <= low or key >= high:
            return self.lower + (self.inside if key >= high else 0)
        if self._bins is not None:
            self._count_kept()
            return self.lower + int(
                self._bins[: (key >> self.shift) - (low >> self.shift)].sum(dtype=np.int64)
            )
        if self._sorted is None:
            self._sorted = np.sort(self._joined()) if self._keys else np.empty(0, np.int64)
        return self.lower + int(np.searchsorted(self._sorted, key))


class Sample(NamedTuple):
    """Some magnitudes of each model.

    Attributes:
        keys: Of each model, in the order of the blocks; infinity of what is not finite.
        sizes: How many elements each block has.
    """

    keys: Sequence[Array]
    sizes: Array


class Group:
    """What has common bounds: a tensor, or all of them. Threads may add to it at once.

    Args:
        numel: Its number of elements.
        models: The number of models.
        arithmetic: The type of its keys: F64 if any of its tensors is of that arithmetic type.
        method: Whose fractions.
        capacity: How many keys are kept of each interval.
    """

    def __init__(
        self, numel: int, models: int, arithmetic: str, method: Trimming, capacity: int | None = None
    ) -> None:
        self.numel, self.arithmetic, self._capacity = numel, arithmetic, capacity or MAX_KEPT
        self.searches = [Search(numel, *ranks, arithmetic) for ranks in method.ranks(models, numel)]
        self.lock = Lock()
        self.has_intervals = False
        self._added = 0
        self._counted: list[list[IntervalCounts]] = []
        self._edges: dict[str, Array] = {}

    @property
    def is_found(self) -> bool:
        return all(search.is_found for search in self.searches)

    @property
    def needs_sample(self) -> bool:
        """Whether it is too large for all of its keys to be kept."""
        return self.numel > MAX_UNSAMPLED and not self.is_found

    def plan(self, sample: Sample | None = None) -> None:
        """Choose the intervals of the next read."""
        for k, search in enumerate(self.searches):
            search.plan(
                [_bracket(search, w.position, sample.keys[k], sample.sizes) for w in search.wanted]
                if sample
                else ()
            )
        self.begin()

    def begin(self) -> None:
        """Begin to count in the intervals that were chosen."""
        self._counted = [
            [IntervalCounts(w, self._capacity, self.numel // _PER_INTERVAL) for w in search.intervals]
            for search in self.searches
        ]
        self._added, self.has_intervals = 0, True
        self._edges = {}

    def edges(self, arithmetic: str) -> Array:
        """The edges of the intervals as float64[n, EDGES], for a tensor of an arithmetic type."""
        if arithmetic not in self._edges:
            edges = np.zeros((len(self.searches), EDGES))
            for k, search in enumerate(self.searches):
                for i, key in enumerate(key for interval in search.intervals for key in interval):
                    number = number_of(key, self.arithmetic)
                    # A number is below one that F32 does not hold if it is below the next that it holds.
                    edges[k, i] = number if arithmetic == self.arithmetic else ceil_f32(number)
            self._edges[arithmetic] = edges
        return self._edges[arithmetic]

    def add(self, arithmetic: str, numel: int, edges: Array, counts: Array, found: Sequence[Array]) -> bool:
        """Add elements of a tensor of an arithmetic type, measured with these edges; returns whether all were added in this read."""
        rows = counts.tolist()
        with self.lock:
            self._added += numel
            for k, counted in enumerate(self._counted):
                keys = found[k]
                if arithmetic != self.arithmetic:
                    keys = keys.view(np.float32).astype(np.float64).view(np.int64)
                for w, each in enumerate(counted):
                    lower, high = rows[k][2 * w : 2 * w + 2]
                    own = keys
                    if len(counted) > 1 and len(keys):
                        own = keys[(keys >= each.interval.low) & (keys < each.interval.high)]
                    inside = high - lower
                    if inside and not len(own) and each.interval.high - each.interval.low > 1:
                        # The interval has one number of F32, and more of the group's type.
                        key = np.float64(edges[k, 2 * w]).view(np.int64)
                        own = np.full(inside, key)
                    each.add(lower, inside, own)
            return self._added == self.numel

    def finish(self) -> None:
        """Narrow the searches by what was counted, and choose intervals for the next read if one is needed."""
        for search, counted in zip(self.searches, self._counted, strict=True):
            lower = [count for each in counted for count in (each.lower, each.lower + each.inside)]
            for wanted in search.wanted:
                if wanted.is_found:
                    continue
                search.narrow_to_intervals(wanted, lower)
                if (w := search.interval_of(wanted)) is not None:
                    low, high = counted[w].range_at(wanted.position - counted[w].lower)
                    wanted.low, wanted.high = max(wanted.low, low), min(wanted.high, high)
        self.plan()

    def steps(self) -> list[int]:
        """For each model, in multiples of what keys were counted."""
        return [1 << max((each.shift for each in counted), default=0) for counted in self._counted]

    def count_lower(self, asked: Sequence[tuple[int, Sequence[int]]]) -> list[list[int]]:
        """What core/bounds.py asks for, of what was added here."""
        return [
            [next(t for t in self._counted[k] if key <= t.interval.high).count_lower(key) for key in keys]
            for k, keys in asked
        ]

    def bounds(self, arithmetic: str) -> Bounds:
        """The bounds of its tensors of an arithmetic type."""
        return bounds_of(self.searches, arithmetic)


def _bracket(search: Search, position: int, keys: Array, sizes: Array) -> tuple[int, int]:
    """The keys between which the one at a position probably is.

    Elements that are neighbours are alike, and blocks of them tell less than as many elements from anywhere. How much is told by
    the differences between parts of the sample with every 64th block.
    """
    count, q = len(keys), (position + 0.5) / search.numel
    ordered = np.sort(keys)
    lower = keys < ordered[min(int(q * count), count - 1)]
    replicates = min(_REPLICATES, len(sizes))
    columns = np.arange(len(sizes)) % replicates
    per_block = np.add.reduceat(lower, np.cumsum(sizes) - sizes, dtype=np.int64)
    fractions = np.bincount(columns, per_block, replicates) / np.bincount(columns, sizes, replicates)
    deviation = float(fractions.std(ddof=1)) / math.sqrt(replicates) if replicates > 1 else 0.0
    margin = _DEVIATIONS * max(deviation, math.sqrt(q * (1 - q) / count)) * count + 2
    first, last = math.floor(q * count - margin), math.ceil(q * count + margin)
    low = int(ordered[first]) if first >= 0 else 0
    high = int(ordered[last]) + 1 if last < count else INFINITY[search.arithmetic]
    return low, high


def sample_size(numel: int) -> int:
    """The elements of a tensor's sample."""
    return min(max(numel // _SAMPLED, _MIN_SAMPLE), MAX_SAMPLE)


def sample_blocks(numel: int, count: int, block: int = SAMPLE_BLOCK) -> list[tuple[int, int]]:
    """Cut about so many elements out of a tensor: one block of each of equally long parts, somewhere in it. Pairs of start and size."""
    blocks = count // block
    if blocks * block >= numel:
        return [(0, numel)] if count else []
    part = numel // max(blocks, 1)
    # Not at equal distances, which may be those of rows.
    return [(j * numel // blocks + (j * 2654435761 >> 8) % (part - block + 1), block) for j in range(blocks)]


def allot(numels: Sequence[int], wanted: int, block: int = SAMPLE_BLOCK) -> list[int]:
    """How many elements of each tensor are in a sample of all: in proportion, in whole blocks, so that not each small tensor is read."""
    total, credit, found = max(sum(numels), 1), 0.0, []
    for numel in numels:
        credit += wanted * numel / total
        found.append(int(credit) // block * block)
        credit -= found[-1]
    return found


def keys_of_all(measured: Measured, numels: Sequence[int], arithmetic: str, wanted: str) -> list[Array]:
    """The keys of each model of a batch that was measured with EVERYTHING, of a type; infinity of what is not finite."""
    _, found = measured
    joined = []
    for k in range(len(found[0])):
        keys = np.concatenate([row[k] for row in found])
        if arithmetic != wanted:
            keys = keys.view(np.float32).astype(np.float64).view(np.int64)
        missing = sum(numels) - len(keys)
        joined.append(
            np.concatenate([keys, np.full(missing, INFINITY[wanted], keys.dtype)]) if missing else keys
        )
    return joined


def everything(segments: int, models: int) -> Array:
    """Edges between which all finite magnitudes are."""
    edges = np.zeros((segments, models, EDGES))
    edges[:, :, 1] = math.inf
    return edges


def bounds_in_memory(
    batches: Iterable[tuple[Batch, Sequence[str]]], method: Trimming, threads: int | None = None
) -> dict[str, Bounds]:
    """Find the exact bounds of each tensor.

    Args:
        batches: Each with the name of the tensor that each segment is of: on any device, of any signature. A tensor may have several
            segments. An Expansion may take the place of an Operand. Outputs are not written; they may be None.
        method: Whose fractions: a Method that needs bounds.
        threads: CPU threads; None is the usual number.
    """
    given = [(batch, names) for batch, names in batches if batch.segments]
    segments = [
        (name, batch, segment)
        for batch, names in given
        for name, segment in zip(names, batch.segments, strict=True)
    ]
    arithmetics = {name: batch.signature.arithmetic for name, batch, _ in segments}
    bounds: dict[str, Bounds] = {}
    for joined in _with_common_bounds(segments, method.over):
        arithmetic = "F64" if any(arithmetics[name] == "F64" for name, _, _ in joined) else "F32"
        numel, models = sum(segment.numel for _, _, segment in joined), len(joined[0][1].signature.models)
        group = Group(numel, models, arithmetic, method)
        group.plan(_sample_in_memory(group, joined, threads) if group.needs_sample else None)
        while not group.is_found:
            _measure_in_memory(group, joined, threads)
            group.finish()
        bounds.update((name, group.bounds(arithmetics[name])) for name, _, _ in joined)
    return bounds


_Named: TypeAlias = "tuple[str, Batch, Segment]"


def _with_common_bounds(segments: Sequence[_Named], over: str) -> list[list[_Named]]:
    """What has common bounds."""
    found: dict[str, list[_Named]] = {}
    for named in segments:
        found.setdefault(named[0] if over == "tensor" else "", []).append(named)
    return list(found.values())


def _sample_in_memory(group: Group, joined: Sequence[_Named], threads: int | None) -> Sample:
    wanted = sample_size(group.numel) if len(joined) == 1 else MODEL_SAMPLE
    keys: list[list[Array]] = [[] for _ in group.searches]
    sizes: list[int] = []
    for (_, batch, segment), own in zip(
        joined, allot([each.numel for _, _, each in joined], wanted), strict=True
    ):
        # Elsewhere each block is a few launches for each model.
        block = SAMPLE_BLOCK if batch.device == "cpu" else max(own // 8, SAMPLE_BLOCK)
        cut = [_part_of(segment, *each) for each in sample_blocks(segment.numel, own, block)]
        for part in _blocks(replace(batch, segments=cut, terms=None), threads) if cut else ():
            numels = [each.numel for each in part.segments]
            measured = choose(batch.device)(part, everything(len(numels), len(keys)))
            for k, found in enumerate(
                keys_of_all(measured, numels, batch.signature.arithmetic, group.arithmetic)
            ):
                keys[k].append(found)
            sizes += numels
    return Sample([np.concatenate(each) for each in keys], np.array(sizes))


def _measure_in_memory(group: Group, joined: Sequence[_Named], threads: int | None) -> None:
    """Add all elements of a group."""

    def add(part: Batch) -> None:
        arithmetic = part.signature.arithmetic
        edges = group.edges(arithmetic)
        counts, found = choose(part.device)(part, np.tile(edges, (len(part.segments), 1, 1)))
        for row, segment in enumerate(part.segments):
            group.add(arithmetic, segment.numel, edges, counts[row], found[row])

    parts: list[Batch] = []
    for _, batch, segment in joined:
        whole = replace(batch, segments=[segment], terms=None)
        if batch.device == "cpu" and not has_expansions(whole):
            parts += _blocks(whole, threads)
        else:  # one after the other: they are expanded to the same memory, or wait for one device
            for part in _blocks(whole, threads):
                add(part)
    is_native = choose("cpu") is measure_natively
    count = min(threads or registry.usual_threads(), len(parts)) if is_native else 1
    if count < 2:
        for part in parts:
            add(part)
        return
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(add, parts))


def _blocks(batch: Batch, threads: int | None) -> Iterator[Batch]:
    """Cut a batch into blocks of bounded size, without low-rank models: these are expanded to memory that is used again."""
    if has_expansions(batch):
        from . import low_rank

        _, expand = registry.choose_expand("auto", batch.device)
        for dense in low_rank.expanded(batch, expand, threads):
            yield replace(batch, segments=dense, terms=None)
        return
    limit = max(_BLOCK // len(batch.signature.models), 1024)
    small: list[Segment] = []
    held = 0
    for segment in batch.segments:
        for start in range(0, segment.numel, limit):
            part = _part_of(segment, start, min(limit, segment.numel - start))
            if held + part.numel > limit:
                yield replace(batch, segments=small)
                small, held = [], 0
            small.append(part)
            held += part.numel
    if small:
        yield replace(batch, segments=small)


def _part_of(segment: Segment, start: int, numel: int) -> Segment:
    if (start, numel) == (0, segment.numel):
        return segment._replace(out=None)
    moved = [
        model._replace(begin=model.begin + start)
        if isinstance(model, Expansion)
        else model._replace(address=model.address + start * FLOAT_SIZES[model.dtype])
        for model in segment.models
    ]
    base = segment.base
    if base is not None:
        base = base._replace(address=base.address + start * FLOAT_SIZES[base.dtype])
    return Segment(numel, base, moved, None)
