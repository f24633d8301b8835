"""The PyTorch backend: the fallback on every torch device, and what the other backends are self-tested against.

core/reference.py computes the same over whole tensors; core/rule.py says it to the bit. Here it is done block by block:
the temporaries stay in cache, and the extra memory is a few MB whatever the model. Two running values per element, the
least and the greatest d_k, give both flags of `agree` and whether every d_k is finite (torch's minimum and maximum
propagate NaN).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..core.batch import Batch, Operand, Segment, Signature, counted_by
from ..core.choices import Terms
from ..core.dtypes import FLOAT_SIZES, TORCH_NAMES
from ..core.rule import Rule

# The table of core/dtypes.py as torch's dtypes, and from these back to names.
TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, spelled) for name, spelled in TORCH_NAMES.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOAT_NAMES = {dtype: name for dtype, name in DTYPE_NAMES.items() if name in FLOAT_SIZES}

# Integer dtypes by size, for the bits of a number.
BITS_DTYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16}

# Bytes of one temporary: 256 Ki elements of fp32 were the best of 16 Ki … 1 Mi, bench/results/reference.jsonl.
CPU_BLOCK_BYTES = 1024 * 1024
# On a GPU every operation is a launch, so that few and large ones are faster.
DEVICE_BLOCK_BYTES = 64 * 1024 * 1024

# The most that a merge on the CPU allocates beside its data: the temporaries of _Workspace for a majority rule.
SCRATCH_BYTES = 14 * CPU_BLOCK_BYTES


def merge(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
    """Merge a batch; returns int64[segments, len(counted_by(rule))] on the batch's device."""
    counts = torch.zeros(len(batch.segments), len(counted_by(rule)), dtype=torch.int64, device=batch.device)
    with _computing(batch, rule, threads) as workspace:
        for row, (segment, terms) in enumerate(zip(batch.segments, terms_of(batch), strict=True)):
            for start in range(0, segment.numel, workspace.block):
                size = min(workspace.block, segment.numel - start)
                counts[row] += workspace.merge_block(segment, start, size, terms)
    return counts


def terms_of(batch: Batch) -> Sequence[Terms | None]:
    """The terms of each segment, or None for each."""
    return [None] * len(batch.segments) if batch.terms is None else batch.terms


def first_nonfinite(batch: Batch, rule: Rule) -> tuple[int, int, int | str, str] | None:
    """Find the first non-finite element of a batch, for an error message. Writes nothing.

    Returns:
        The segment's number, the element's index in it, the version it is in ("base", a model's number from 0, "weights" or
        "result") and the value found there, as text; None if everything is finite.
    """
    with _computing(batch, rule) as workspace:
        for row, (segment, terms) in enumerate(zip(batch.segments, terms_of(batch), strict=True)):
            for start in range(0, segment.numel, workspace.block):
                size = min(workspace.block, segment.numel - start)
                if workspace.merge_block(segment._replace(out=None), start, size, terms)[1]:
                    index = start + int(workspace.nonfinite[:size].nonzero()[0])
                    return row, index, *_culprit(segment, terms, batch.signature, index)
    return None


def _culprit(
    segment: Segment, terms: Terms | None, signature: Signature, index: int
) -> tuple[int | str, str]:
    versions: list[tuple[int | str, Operand]] = list(enumerate(segment.models))
    if segment.base is not None:
        versions.insert(0, ("base", segment.base))
    if terms is not None and terms.weight is not None:
        versions.append(("weights", terms.weight))
    for which, operand in versions:
        value = float(load(operand, index, 1))
        if value - value != 0:
            return which, f"{value}"
    if segment.base is not None:
        b = load(segment.base, index, 1)
        for dtype in filter(signature.rounds_base, signature.models):
            if not rounded(b, TORCH_DTYPES[dtype]).isfinite():
                return "base", f"{float(b)} (infinite in a model's {dtype})"
    return "result", f"{float('inf')}"


class Workspace(Protocol):
    """What merges blocks of a batch.

    Attributes:
        block: The most elements of a block.
        d: A temporary of so many numbers of the arithmetic type.
        nonfinite: The flags of the block that was merged last.
    """

    block: int
    d: torch.Tensor
    nonfinite: torch.Tensor

    def merge_block(self, segment: Segment, start: int, size: int, terms: Terms | None) -> torch.Tensor:
        """Merge elements start … start + size; returns the counts."""


class _Workspace:
    """The temporaries of one block."""

    def __init__(self, batch: Batch, rule: Rule) -> None:
        self.signature = batch.signature
        self.storage = TORCH_DTYPES[batch.signature.result]
        self.dtype = TORCH_DTYPES[batch.signature.arithmetic]
        self.required = rule.required(len(batch.signature.models))
        self.unanimous = self.required == len(batch.signature.models)
        device = torch.device(batch.device)
        max_elements = (
            CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
        ) // self.dtype.itemsize
        self.block = min(max_elements, max((s.numel for s in batch.segments), default=0)) or 1

        rounds = any(map(batch.signature.rounds_base, set(batch.signature.models)))
        wide, flags = (6 if self.unanimous else 9) + rounds, 4
        memory = _scratch((wide * self.dtype.itemsize + flags) * self.block, device)
        numbers, bits = torch.split(memory, [len(memory) - flags * self.block, flags * self.block])
        temporaries = torch.split(numbers.view(self.dtype), self.block)
        self.b, self.x, self.d, self.least, self.greatest, self.sum = temporaries[:6]
        if not self.unanimous:
            self.negative, self.n_positive, self.n_negative = temporaries[6:9]
        self.origin = temporaries[-1] if rounds else self.b
        self.agree, self.nonfinite, self.flag, self.possible = torch.split(bits.view(torch.bool), self.block)
        # Tensors on the device: on a GPU, torch divides by a Python number by multiplying with its reciprocal.
        self.n = torch.tensor(float(len(batch.signature.models)), dtype=self.dtype, device=device)
        self.minus_scale = (
            torch.tensor(-rule.scale, dtype=torch.float64, device="cpu").to(self.dtype).to(device)
        )

    def merge_block(self, segment: Segment, start: int, size: int, _: Terms | None = None) -> torch.Tensor:
        """Merge elements start … start + size; their non-finite flags are in self.nonfinite then."""
        stored = None if segment.base is None else load(segment.base, start, size)
        b = self.b[:size]
        b.zero_() if stored is None else b.copy_(stored)
        mean = self._unanimous_mean if self.unanimous else self._majority_mean
        agree, nonfinite, possible = (flags[:size] for flags in (self.agree, self.nonfinite, self.possible))
        t = mean(segment, start, b, agree).mul_(self.minus_scale)
        result = self._round(t.add_(b))

        if self._all_finite(b, result):
            nonfinite.zero_()
        else:
            finite = (
                torch.isfinite(self.least[:size]) & torch.isfinite(self.greatest[:size]) & torch.isfinite(b)
            )
            finite &= torch.isfinite(result) | ~agree
            torch.logical_not(finite, out=nonfinite)
            agree &= finite
            possible &= finite
        if segment.out is not None:
            kept = b.to(self.storage) if stored is None else stored
            chosen = self.d.view(BITS_DTYPES[self.storage.itemsize])[:size]
            store(segment.out, start, torch.where(agree, bits_of(result), bits_of(kept), out=chosen))
        # Not sum(), which converts every flag to int64 first.
        agreed = torch.count_nonzero(agree)
        return torch.stack([agreed, torch.count_nonzero(nonfinite), torch.count_nonzero(possible) - agreed])

    def _round(self, values: torch.Tensor) -> torch.Tensor:
        if self.dtype == self.storage:
            return values
        # By way of float32, as all backends: a direct conversion from float64 rounds once, and differently.
        out: torch.Tensor = self.x.view(self.storage)
        return out[: len(values)].copy_(values.float())

    def _origin(self, b: torch.Tensor, dtype: str) -> torch.Tensor:
        """What d_k of a model of this dtype subtracts: b, or b rounded to the dtype."""
        if not self.signature.rounds_base(dtype):
            return b
        return self.origin[: len(b)].copy_(rounded(b, TORCH_DTYPES[dtype]))

    def _all_finite(self, b: torch.Tensor, result: torch.Tensor) -> bool:
        """A cheap test: a sum is finite only if all of its terms are. A sum that overflows is a false alarm."""
        extremes = (self.least[: len(b)], self.greatest[: len(b)], b, result)
        return bool(torch.stack([t.sum(dtype=self.dtype) for t in extremes]).isfinite().all())

    def _differences(self, segment: Segment, start: int, b: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield each d_k, updating the least and the greatest."""
        size = len(b)
        d, least, greatest = self.d[:size], self.least[:size], self.greatest[:size]
        origin, origin_dtype = b, ""
        for k, operand in enumerate(segment.models):
            if operand.dtype != origin_dtype:
                origin, origin_dtype = self._origin(b, operand.dtype), operand.dtype
            x = load(operand, start, size)
            if x.dtype != self.dtype:
                x = self.x[:size].copy_(x)
            if self.signature.task_vectors:
                d.copy_(x)
            else:
                torch.sub(x, origin, out=d)
            if k == 0:
                least.copy_(d)
                greatest.copy_(d)
            else:
                torch.minimum(least, d, out=least)
                torch.maximum(greatest, d, out=greatest)
            yield d

    def _unanimous_mean(
        self, segment: Segment, start: int, b: torch.Tensor, agree: torch.Tensor
    ) -> torch.Tensor:
        total = self.sum[: len(b)].zero_()
        for d in self._differences(segment, start, b):
            total.add_(d)
        torch.gt(self.least[: len(b)], 0, out=agree)
        agree |= torch.lt(self.greatest[: len(b)], 0, out=self.flag[: len(b)])
        torch.ge(self.least[: len(b)], 0, out=self.possible[: len(b)])
        self.possible[: len(b)] |= torch.le(self.greatest[: len(b)], 0, out=self.flag[: len(b)])
        return total.div_(self.n)

    def _majority_mean(
        self, segment: Segment, start: int, b: torch.Tensor, agree: torch.Tensor
    ) -> torch.Tensor:
        size = len(b)
        # Adding +0 for the models of the other sign changes no bit of a sum that started at +0.
        positive, negative = self.sum[:size].zero_(), self.negative[:size].zero_()
        n_positive, n_negative = self.n_positive[:size].zero_(), self.n_negative[:size].zero_()
        flag, clamped = self.flag[:size], self.x[:size]
        for d in self._differences(segment, start, b):
            positive.add_(torch.clamp(d, min=0, out=clamped))
            negative.add_(torch.clamp(d, max=0, out=clamped))
            n_positive.add_(torch.gt(d, 0, out=flag))
            n_negative.add_(torch.lt(d, 0, out=flag))
        # Zeros have the sign of the majority here.
        n_dissenters = torch.minimum(n_positive, n_negative, out=clamped)
        torch.le(n_dissenters, len(segment.models) - self.required, out=self.possible[:size])
        torch.ge(n_positive, self.required, out=agree)
        is_negative = torch.ge(n_negative, self.required, out=flag)
        agree |= is_negative
        torch.where(is_negative, negative, positive, out=positive)
        torch.where(is_negative, n_negative, n_positive, out=n_positive)
        return positive.div_(n_positive)


_per_thread = threading.local()


def _scratch(size: int, device: torch.device) -> torch.Tensor:
    """Memory for temporaries. On the CPU each thread keeps its own, so that many batches allocate once."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    memory: torch.Tensor | None = getattr(_per_thread, "memory", None)
    if memory is None or len(memory) < size:
        _per_thread.memory = memory = None  # freed before the new one is allocated
        memory = _per_thread.memory = torch.empty(size, dtype=torch.uint8, device=device)
    return memory[:size]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to a storage type, to 16 bits by way of float32."""
    return (values.float() if dtype.itemsize == 2 else values).to(dtype)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """Numbers as integers of their size: the same memory."""
    return values.view(BITS_DTYPES[values.itemsize])


def _bytes(operand: Operand, start: int, size: int) -> torch.Tensor:
    owner = operand.owner
    if not isinstance(owner, torch.Tensor):
        owner = torch.frombuffer(owner, dtype=torch.uint8)
    memory, itemsize = bytes_of(owner), TORCH_DTYPES[operand.dtype].itemsize
    first = operand.address - memory.data_ptr() + start * itemsize
    return memory[first : first + size * itemsize]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor."""
    # Not view(-1): a dimension of size 1 may have any stride in a contiguous tensor, and would keep it.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def memory_at(device: torch.device, owners: Any, address: int, size: int) -> torch.Tensor:
    """Bytes at an address. On the CPU any can be reached, elsewhere only those of the owners: a tensor, or a sequence with some."""
    if not size:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
    for owner in owners if isinstance(owners, (list, tuple)) else (owners,):
        if isinstance(owner, torch.Tensor) and 0 <= address - owner.data_ptr() <= owner.nbytes - size:
            return bytes_of(owner)[address - owner.data_ptr() :][:size]
    raise ValueError(f"address {address:#x}: in none of the segment's owners, expected one of these tensors")


def aligned(memory: torch.Tensor, itemsize: int) -> torch.Tensor:
    """Bytes that can be viewed as elements of a size: a copy if these cannot."""
    if memory.data_ptr() % itemsize == 0 and memory.storage_offset() % itemsize == 0:
        return memory
    return memory.clone()


def load(operand: Operand, start: int, size: int) -> torch.Tensor:
    """Elements of an operand in their dtype: a view, or a copy if they are not aligned."""
    dtype = TORCH_DTYPES[operand.dtype]
    return aligned(_bytes(operand, start, size), dtype.itemsize).view(dtype)


def store(operand: Operand, start: int, bits: torch.Tensor) -> None:
    """Write elements of an operand, given them or their bits."""
    _bytes(operand, start, len(bits)).copy_(bits.view(torch.uint8))


@contextmanager
def _computing(batch: Batch, rule: Rule, threads: int | None = None) -> Iterator[Workspace]:
    """Give the temporaries of a batch, and keep subnormals while they are in use."""
    with plain_arithmetic(threads):
        workspace: Workspace
        if rule.choices is None:
            workspace = _Workspace(batch, rule)
        else:
            from .pytorch_family import FamilyWorkspace

            workspace = FamilyWorkspace(batch, rule, rule.choices)
        compute_alone_if_flushing(workspace.d)
        yield workspace


@contextmanager
def plain_arithmetic(threads: int | None = None) -> Iterator[None]:
    """Compute on so many threads, without gradients, and keep subnormals.

    torch.set_flush_denormal(True) is a mode of the calling thread, and for ever of each of torch's threads that is started
    under it. The caller's mode is off for the call; for the others there is compute_alone_if_flushing.
    """
    before = torch.get_num_threads()
    if threads is not None and threads != before:
        torch.set_num_threads(threads)
    flushing = _flushes(torch.empty(1, dtype=torch.float32, device="cpu"))
    if flushing:
        torch.set_flush_denormal(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
        if flushing:
            torch.set_flush_denormal(True)


def compute_alone_if_flushing(temporary: torch.Tensor) -> None:
    """Let the calling thread compute alone for the rest of plain_arithmetic, if another one flushes subnormals.

    temporary: of the type and the size of what will be computed, so that as many threads take part. It is overwritten.
    """
    if temporary.device.type == "cpu" and _flushes(temporary):
        torch.set_num_threads(1)


def _flushes(numbers: torch.Tensor) -> bool:
    """Whether arithmetic on these elements flushes subnormals to zero, in any thread that takes part."""
    bits_of(numbers).fill_(1)
    return not bool(numbers.mul_(1.0).all())
