"""The self-test of a kernel that applies consensus deltas: as selftest.py, which says what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from ..core.delta import APPLIED, MASK_WORD, RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature
from ..core.descriptors import Act
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, first_line
from . import masks, pytorch_delta
from .pytorch import TORCH_DTYPES
from .selftest import HOSTILE

# The segments of the self-test: elements, kind, bytes by which base and out are misaligned, and fraction of the mask. In three blocks or
# programs the CUDA kernel has 15 tiles, and some of these go on from one segment to the next.
_SEGMENTS = (
    (3 * RANK_BLOCK + 131, "in place", 0, 0.1), (2 * RANK_BLOCK + 5, "apart", 0, 0.5), (517, "apart", 1, 0.9),
    (300, "in place", 1, 0.3), (0, "saved", 0, 0.5), (2 * RANK_BLOCK, "saved", 0, 0.1), (1, "apart", 0, 1.0),
    (RANK_BLOCK + 1, "saved", 1, 1.0), (RANK_BLOCK, "apart", 0, 0.0), (70, "count", 0, 0.5), (70, "count saved", 0, 0.5),
)  # fmt: skip

_RUNS = ((Act.APPLY, 0.9), (Act.APPLY, -1.0), (Act.RESTORE, 0.0), (Act.SAVE, 0.0))

# A kernel's function for all that is done with deltas.
Kernel = Callable[[DeltaBatch, Act, float], torch.Tensor]

_results: dict[tuple[str, str, DeltaSignature], str | None] = {}


def failure(name: str, kernel: Kernel, device: str, signature: DeltaSignature) -> str | None:
    """Self-test a backend for deltas of a signature on a device; returns why it must not be used, None if it passes."""
    key = name, device, signature
    if key not in _results:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise InputError(
                f"backend {name}: not yet self-tested on {device}, expected one call before a graph's capture"
            )
        failures = (_run_case(kernel, device, signature, act, scale) for act, scale in _RUNS)
        _results[key] = next(filter(None, failures), None)
    return _results[key]


def _run_case(kernel: Kernel, device: str, signature: DeltaSignature, act: Act, scale: float) -> str | None:
    """Compare a backend with PyTorch on the CPU; returns how they differ."""
    got = [memory.to(device, copy=True) for memory in _memory(signature)]
    expected, counts = _expected(signature, act, scale)
    try:
        counted = kernel(_batch(device, signature, got, act), act, scale).tolist()
    except torch.cuda.OutOfMemoryError:  # says nothing of the kernel
        raise
    except Exception as error:  # the compiler's or the device's: the kernel cannot be used
        return f"failed its self-test on {device}: {type(error).__name__}: {first_line(error)}"
    what = f"{act.name.lower()} a delta of {signature.means} on {signature.result}"
    for actual, right in zip(got, expected, strict=True):
        if len(wrong := (actual.cpu() != right).nonzero()):
            at = int(wrong[0])
            return (
                f"not the reference's bits on {device} to {what}: "
                f"byte {at} of the self-test is {int(actual[at]):#04x}, expected {int(right[at]):#04x}"
            )
    if [list(row) for row in counted] != counts:
        return f"not the reference's counts on {device} to {what}: {counted}, expected {counts}"
    return None


@lru_cache(maxsize=len(_RUNS))  # those of one signature, for the next backend that has a self-test
def _expected(
    signature: DeltaSignature, act: Act, scale: float
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The bytes that the reference leaves, and its counts."""
    memory = [held.clone() for held in _memory(signature)]
    batch = _batch("cpu", signature, memory, act)
    if act == Act.SAVE:
        pytorch_delta.save(batch)
        return memory, [[0] * len(APPLIED) for _ in batch.segments]
    counts = pytorch_delta.apply(batch, scale if act == Act.APPLY else None).tolist()
    return memory, counts


@lru_cache(maxsize=1)
def _memory(signature: DeltaSignature) -> list[torch.Tensor]:
    """The bytes of base, saved elements, means, masks, ranks and outputs that are not the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        numel = sum(elements for _, elements, _ in _spans())
        numbers = [torch.randn(numel, generator=generator, dtype=torch.float64) for _ in range(3)]
        numbers[2] *= 0.01
        hostile = torch.tensor(HOSTILE, dtype=torch.float64)
        for values in numbers:
            index = torch.randint(len(hostile), (numel,), generator=generator)
            values.copy_(torch.where(torch.rand(numel, generator=generator) < 0.2, hostile[index], values))
        stored = TORCH_DTYPES[signature.result]
        base, saved = (values.to(stored).view(torch.uint8) for values in numbers[:2])
        means = numbers[2].to(TORCH_DTYPES[signature.means]).view(torch.uint8)
        packed, ranks = _masks(generator)
        return [base, saved, means, packed, ranks, torch.full_like(base, 0xA5)]


def _spans() -> Iterator[tuple[int, int, tuple[int, str, int, float]]]:
    """Where each segment begins in every memory, in elements, and how many it takes there: all are aligned as `_SEGMENTS` says."""
    start = 0
    for segment in _SEGMENTS:
        size = -((segment[0] + 1) // -MASK_WORD) * MASK_WORD
        yield start, size, segment
        start += size


def _masks(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks, and ranks as bytes. Those of a segment begin at its first element's place, of eight elements a byte each."""
    numel = sum(elements for _, elements, _ in _spans())
    packed, ranks = torch.zeros(numel // 8, dtype=torch.uint8), torch.zeros(numel, dtype=torch.uint8)
    weights = 2 ** torch.arange(8)
    for start, size, (length, _, _, fraction) in _spans():
        flags = torch.zeros(size, dtype=torch.int64)
        flags[:length] = torch.rand(length, generator=generator) < fraction
        if fraction == 1.0:
            flags[:length] = 1
        packed[start // 8 : (start + size) // 8] = (flags.view(-1, 8) * weights).sum(1)
        masks.ranks(packed.data_ptr() + start // 8, length, ranks.data_ptr() + start)
    return packed, ranks


def _batch(device: str, signature: DeltaSignature, memory: list[torch.Tensor], act: Act) -> DeltaBatch:
    size = FLOAT_SIZES[signature.result]
    base, saved, means, packed, ranks, out = (held.data_ptr() for held in memory)
    segments = []
    for start, _, (length, kind, odd, _) in _spans():
        offset = start * size
        is_saved = kind.endswith("saved") if act == Act.APPLY else act == Act.RESTORE
        at_base, at_out = base + offset + odd, out + offset + odd
        segments.append(
            DeltaSegment(
                length,
                packed + start // 8,
                means + start * FLOAT_SIZES[signature.means],
                ranks + start,
                0 if is_saved else at_base,
                saved + offset if is_saved or act == Act.SAVE else 0,
                0 if kind.startswith("count") else at_base if kind == "in place" else at_out,
                memory,
            )
        )
    return DeltaBatch(device, signature, segments)
