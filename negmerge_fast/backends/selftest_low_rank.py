"""The self-test of a kernel that writes low-rank differences: as selftest.py, which says what it is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from ..core.batch import Operand
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, first_line
from ..core.low_rank import ExpandBatch, ExpandSegment, ExpandSignature, Expansion, LowRank
from . import low_rank
from .pytorch import TORCH_DTYPES
from .selftest import HOSTILE


class _Case(NamedTuple):
    """A segment: the sizes of a difference, the elements that are written, and bytes by which base and out are misaligned."""

    matrices: int
    rows: int
    columns: int
    rank: int
    begin: int
    numel: int
    odd: int = 0


# A tile of the CUDA kernel is 8 × 128 and its left factor 32 ranks at a time; one of the Triton kernel is 32 × 128. In three blocks or
# programs each has several tiles, some of these of several boxes: parts of rows, rows, whole matrices, and again.
_CASES = (
    _Case(1, 41, 301, 5, 0, 41 * 301), _Case(1, 41, 301, 33, 170, 37 * 301), _Case(3, 9, 130, 4, 1 * 130 + 7, 21 * 130, 1),
    _Case(1, 1, 300, 65, 3, 290), _Case(1, 70, 1, 2, 0, 70, 1), _Case(4, 3, 5, 1, 1, 57), _Case(1, 33, 129, 130, 0, 33 * 129),
)  # fmt: skip

# Elements behind the last output: a row that is too much must not be written to the memory of others.
_BEYOND = 512

# A kernel's function. uploaded: whether its table is to be, where it could go along with the launch: once it is, once not.
Kernel = Callable[[ExpandBatch, bool], None]

_results: dict[tuple[str, str, ExpandSignature], str | None] = {}


def failure(name: str, kernel: Kernel, device: str, signature: ExpandSignature) -> str | None:
    """Self-test a backend for low-rank differences of a signature on a device; returns why it must not be used, None if it passes."""
    key = name, device, signature
    if key not in _results:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise InputError(
                f"backend {name}: not yet self-tested on {device}, expected one call before a graph's capture"
            )
        failures = (_run_case(kernel, device, signature, misaligned) for misaligned in (False, True))
        _results[key] = next(filter(None, failures), None)
    return _results[key]


def _run_case(kernel: Kernel, device: str, signature: ExpandSignature, misaligned: bool) -> str | None:
    """Compare a backend with PyTorch on the CPU; returns how they differ. misaligned: some of the segments are."""
    got = [memory.to(device, copy=True) for memory in _memory(signature)]
    try:
        kernel(_batch(device, signature, got, misaligned), misaligned)
        found = got[-1].cpu()
    except torch.cuda.OutOfMemoryError:  # says nothing of the kernel
        raise
    except Exception as error:  # the compiler's or the device's: the kernel cannot be used
        return f"failed its self-test on {device}: {type(error).__name__}: {first_line(error)}"
    wrong = _differing(signature, found, _expected(signature, misaligned))
    if wrong is None:
        return None
    what = f"low-rank differences of {signature.arithmetic}"
    if signature.result:
        what += f" added to {signature.result}"
    return f"not the reference's bits on {device} for {what}: byte {wrong} of the self-test differs"


def _differing(signature: ExpandSignature, found: torch.Tensor, expected: torch.Tensor) -> int | None:
    """The first byte that differs, but for those of NaN: which NaN an operation gives differs between processors."""
    wrong = found != expected
    dtype = TORCH_DTYPES[signature.result or signature.arithmetic]
    for case, (start, _) in zip(_CASES, _positions(), strict=True):
        begin = start * dtype.itemsize + case.odd
        part = slice(begin, begin + case.numel * dtype.itemsize)
        left, right = (memory[part].clone().view(dtype).isnan() for memory in (found, expected))
        wrong[part] &= ~(left & right).repeat_interleave(dtype.itemsize)
    at = wrong.nonzero()
    return int(at[0]) if len(at) else None


@lru_cache(maxsize=2)
def _expected(signature: ExpandSignature, misaligned: bool) -> torch.Tensor:
    """The outputs that the reference leaves."""
    memory = [held.clone() for held in _memory(signature)]
    low_rank.expand(_batch("cpu", signature, memory, misaligned))
    return memory[-1]


@lru_cache(maxsize=1)
def _memory(signature: ExpandSignature) -> list[torch.Tensor]:
    """The bytes of left factors, right factors, bases and outputs. Beyond the outputs nothing may be written."""
    generator = torch.Generator().manual_seed(0)
    arithmetic = TORCH_DTYPES[signature.arithmetic]
    with torch.device("cpu"):
        left, right = (
            _numbers(sum(sizes), 0.002, generator).to(arithmetic).view(torch.uint8)
            for sizes in zip(*map(_factor_sizes, _CASES), strict=True)
        )
        stored = TORCH_DTYPES[signature.result or signature.arithmetic]
        numel = sum(size for _, size in _positions()) + _BEYOND
        base = _numbers(numel, 0.05, generator).to(stored).view(torch.uint8)
        return [left, right, base, torch.full_like(base, 0xA5)]


def _numbers(numel: int, rare: float, generator: torch.Generator) -> torch.Tensor:
    """Random numbers with hostile ones strewn in: of factors few, for one makes a whole row or column hostile."""
    hostile = torch.tensor(HOSTILE, dtype=torch.float64)
    index = torch.randint(len(hostile), (numel,), generator=generator)
    drawn = torch.randn(numel, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(numel, generator=generator) < rare, hostile[index], drawn)


def _factor_sizes(case: _Case) -> tuple[int, int]:
    return case.matrices * case.rows * case.rank, case.matrices * case.rank * case.columns


def _positions() -> list[tuple[int, int]]:
    """Where each segment begins in base and out, in elements, and how many it takes there: one more, for its misalignment."""
    positions, start = [], 0
    for case in _CASES:
        positions.append((start, size := -((case.numel + 1) // -16) * 16))
        start += size
    return positions


def _batch(
    device: str, signature: ExpandSignature, memory: list[torch.Tensor], misaligned: bool
) -> ExpandBatch:
    size, stored = FLOAT_SIZES[signature.arithmetic], signature.result or signature.arithmetic
    left, right, base, out = (held.data_ptr() for held in memory)
    scale = float(torch.tensor(1.7, dtype=TORCH_DTYPES[signature.arithmetic], device="cpu"))
    segments = []
    for case, (start, _) in zip(_CASES, _positions(), strict=True):
        sizes = case.matrices, case.rows, case.columns, case.rank
        factors = LowRank(left, right, *sizes, scale, memory)
        at = start * FLOAT_SIZES[stored] + case.odd
        origin = Operand(base + at, stored, memory[2]) if signature.result else None
        written = Operand(out + at, stored, memory[3])
        if misaligned or not case.odd:
            segments.append(ExpandSegment(case.numel, Expansion(factors, case.begin), origin, written))
        left, right = (at + size * n for at, n in zip((left, right), _factor_sizes(case), strict=True))
    return ExpandBatch(device, *signature, segments)
