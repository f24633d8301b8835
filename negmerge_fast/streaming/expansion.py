"""Consensus deltas as a merge reads them: dense task vectors, expanded from masks and means as they are read.

A merge of one task vector that is a delta's means, and zero where the mask is not set, gives the bits of applying it (core/delta.py).
The dense tensors are in a file that does not exist: its bytes are computed chunk by chunk.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import PurePosixPath
from threading import Lock, local
from typing import Any

from ..backends import masks, registry
from ..checkpoints.base import ByteRange, Checkpoint, TensorRef
from ..checkpoints.computed import ComputedFile, address_of
from ..checkpoints.delta import DeltaCheckpoint, DeltaTensor, sample_range
from ..checkpoints.reader import File, Reader
from ..core.batch import Batch, Merge, Operands, Segment, Signature
from ..core.delta import MASK_WORD, mask_bytes
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, short_repr
from ..core.hashing import hash_of
from ..core.rule import Rule
from ..core.schema import TensorSpec
from ..output.manifest import InputFile
from .plan import Plan, plan_of

# What a file of a delta that is applied, its checkpoint's kind, calls itself.
KIND = "delta"

# Elements for each count of those before it: an eighth of a byte each has to be read to find a mean.
_BLOCK = 1 << 16
# Bytes of a mask that are read at a time to count them: a multiple of a block's.
_COUNTED_BYTES = 1 << 16

# Buffers of a worker in which means and masks are read, each at most as long as a chunk.
EXTRA_BUFFERS = 2

# Buffers of each thread, as long as the longest that it needed.
_BUFFERS = local()


def _buffer(name: str, size: int) -> tuple[memoryview, int]:
    """Memory of this thread that is used until the next one of that name, and its address."""
    held = getattr(_BUFFERS, name, b"")
    if len(held) < max(size, 1):
        held = bytearray(max(size, 1))
        setattr(_BUFFERS, name, held)
    return memoryview(held)[:size], address_of(held)


class _Expanded:
    """A dense tensor: its place in the file, and its delta.

    Attributes:
        name: Its name in the base.
        tensor: Its mask and means.
        offset: Where it begins in the expanded file.
        size: Bytes of an element.
    """

    def __init__(self, name: str, tensor: DeltaTensor, offset: int) -> None:
        self.name, self.tensor, self.offset = name, tensor, offset
        self.size = FLOAT_SIZES[tensor.info.arithmetic]
        self.numel = tensor.info.numel
        self._lock = Lock()
        self._ranks: array[int] | None = None

    @property
    def stored(self) -> int:
        """Bytes of its mask and means."""
        return self.tensor.mask.nbytes + self.tensor.means.source.nbytes

    def compute(self, reader: Reader, begin: int, end: int, buffer: memoryview, release: bool) -> bool:
        first = begin // MASK_WORD * MASK_WORD
        whole = (begin, end) == (0, self.numel)
        if not whole:  # from where it is known how many are before it
            first, before = begin // _BLOCK * _BLOCK, self._ranks_of(reader)[begin // _BLOCK]
        words, mask = _buffer("mask", mask_bytes(end) - first // 8)
        cached = bool(self.tensor.mask.read_into(reader, words, first // 8, release))
        count = masks.rank(mask, begin - first, end - first)
        if whole:
            before = 0
            self._refuse_mask(count, words)
        else:
            before += masks.rank(mask, 0, begin - first)
        means = self.tensor.means
        width = FLOAT_SIZES[means.spec.dtype]
        packed, address = _buffer("means", count * width)
        cached = bool(means.source.read_into(reader, packed, before * width, release)) and cached
        self._refuse_means(address, count, before)
        masks.expand(
            mask,
            begin - first,
            end - begin,
            address,
            means.spec.dtype,
            self.tensor.info.arithmetic,
            address_of(buffer),
        )
        return cached

    def _ranks_of(self, reader: Reader) -> array[int]:
        """How many elements before each block are in the mask, counted once: all of the mask is read for it."""
        with self._lock:
            if self._ranks is None:
                self._ranks = self._count(reader)
            return self._ranks

    def _count(self, reader: Reader) -> array[int]:
        total, ranks, source = 0, array("q"), self.tensor.mask
        words = memoryview(b"")
        for start in range(0, source.nbytes, _COUNTED_BYTES):
            words, mask = _buffer("counted", min(_COUNTED_BYTES, source.nbytes - start))
            source.read_into(reader, words, start)
            for first in range(0, 8 * len(words), _BLOCK):
                ranks.append(total)
                total += masks.rank(mask, first, min(first + _BLOCK, 8 * len(words)))
        self._refuse_mask(total, words)
        return ranks

    def _refuse_mask(self, count: int, words: memoryview) -> None:
        """Refuse a mask of another number of elements than there are means. words: the end of it, with all that is behind the last."""
        behind = self.numel % MASK_WORD
        if behind and int.from_bytes(words[-MASK_WORD // 8 :], "little") >> behind:
            raise self._malformed(self.tensor.mask, f"set behind element {self.numel:,}, expected zeros")
        if count != self.tensor.agreed:
            expected = f"expected {self.tensor.agreed:,}, of which there are means"
            raise self._malformed(self.tensor.mask, f"{count:,} elements are set, {expected}")

    def _refuse_means(self, address: int, count: int, before: int) -> None:
        """Refuse means that are zero or not finite: no element with such a mean agrees."""
        dtype = self.tensor.means.spec.dtype
        if count and _usable(address, count, dtype) != count:
            size = FLOAT_SIZES[dtype]
            found = next(i for i in range(count) if not _usable(address + i * size, 1, dtype))
            raise self._malformed(
                self.tensor.means.source,
                f"mean {before + found:,} is zero or not finite, expected another number",
            )

    def _malformed(self, source: ByteRange, problem: str) -> InputError:
        return InputError(f"{source.file.path}: tensor {short_repr(self.name)}: {problem}")


@cache
def _counter() -> Merge:
    return registry.choose("auto", "cpu")[1]


def _usable(address: int, count: int, dtype: str) -> int:
    """How many of some numbers are finite and not zero: those are what a merge of them alone takes off a base of zeros."""
    # The owner of memory that outlives the call is of no use to a backend, but the fallback looks at it.
    memory = (ctypes.c_char * (count * FLOAT_SIZES[dtype])).from_address(address)
    operands = Operands([address], (dtype,), [memory])
    batch = Batch("cpu", Signature(dtype, (dtype,), True), [Segment(count, None, operands, None)])
    [(agreed, _, _)] = _counter()(batch, _COUNT, 1).tolist()
    return int(agreed)


_COUNT = Rule(-1.0)


def expand(delta: DeltaCheckpoint) -> Checkpoint:
    """A delta as a checkpoint of dense task vectors, of the type of their arithmetic. Nothing is read yet."""
    held: dict[File, list[tuple[str, DeltaTensor]]] = {}
    for name, tensor in delta.tensors.items():
        held.setdefault(tensor.mask.file, []).append((name, tensor))
    tensors = {}
    for file, found in held.items():
        expanded, at = [], 0
        for name, tensor in sorted(found, key=lambda item: item[1].mask.offset):
            expanded.append(_Expanded(name, tensor, at))
            at += expanded[-1].numel * expanded[-1].size
        dense = ComputedFile(
            file.path, at, file.identity, file.mode, changed_ns=file.changed_ns, computed=expanded
        )
        for each in expanded:
            spec = TensorSpec(each.tensor.info.arithmetic, each.tensor.info.spec.shape)
            tensors[each.name] = TensorRef(spec, ByteRange(dense, each.offset, each.numel * each.size))
    return Checkpoint(delta.path, KIND, tensors, dict(delta.files), {})


def plan_delta(base: Checkpoint, delta: DeltaCheckpoint) -> Plan:
    """Plan how a delta is applied to its base.

    Raises:
        InputError: If it is the delta of another base.
    """
    if base.undecided:
        raise InputError(base.undecided[0])
    notes = [*base.notes, *refuse_other_base(base, delta)]
    opened = expand(delta)
    tensors = {name: base.tensors[name] for name in delta.tensors}
    return plan_of(base, [opened], tensors, [opened.tensors], True, notes)


def refuse_other_base(base: Checkpoint, delta: DeltaCheckpoint) -> list[str]:
    """Refuse a base that is not the delta's; return what is less sure of another one, a line each.

    Its tensors have the names, types, shapes and samples that are recorded; and each file of its weights is, whatever its name, one
    that the delta was made of, as far as size, header and sample tell. Samples of tensors alone would not tell a base in other
    files from one that was changed a little. A delta that was made in memory records nothing else, and nothing else can be compared of a
    base that was converted to another format.
    """
    _refuse_other_tensors(base, delta)
    recorded: Mapping[str, Any] = delta.info.base.get("files", {})
    if not recorded:
        return [
            f"{delta.path}: was made in memory, and records of its base 64 bytes of each tensor, which are the same"
        ]
    weights = base.opened.weights
    if _formats(weights).isdisjoint(_formats(recorded)):
        return [
            f"{base.path}: in another format than the base of {delta.path}, with the same 64 bytes of each tensor"
        ]
    known = {InputFile(**each) for each in recorded.values()}
    for file in weights.values():
        if InputFile(file.size, file.header, file.sample) not in known:
            raise InputError(
                f"{file.path}: not one of the files that {delta.path} was made of, "
                f"expected those of {short_repr(delta.info.base['path'])} (their names do not matter)"
            )
    return []


def _formats(names: Iterable[str]) -> set[str]:
    """The formats of files of weights, by their names; indexes do not count."""
    suffixes = {PurePosixPath(name).suffix for name in names} - {".json"}
    return {suffix if suffix in (".safetensors", ".npy") else "PyTorch" for suffix in suffixes}


def _refuse_other_tensors(base: Checkpoint, delta: DeltaCheckpoint) -> None:
    with Reader(16) as reader:
        for name, (info, _, _) in delta.tensors.items():
            if name not in base.tensors:
                raise InputError(
                    f"{base.path}: no tensor {short_repr(name)}, expected the base of {delta.path}"
                )
            spec, source = base.tensors[name]
            where = f"{source.file.path}: tensor {short_repr(name)}"
            if spec != info.spec:
                told = [f"{each.dtype} {each.shape}" for each in (spec, info.spec)]
                raise InputError(f"{where}: {told[0]}, expected {told[1]} as in the base of {delta.path}")
            taken = sample_range(source.nbytes)
            buffer = memoryview(bytearray(len(taken)))
            source.read_into(reader, buffer, taken.start)
            if hash_of(buffer) != info.sample:
                raise InputError(f"{where}: other numbers than in the base of {delta.path}")
