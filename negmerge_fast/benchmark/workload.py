"""A base and its fine-tuned versions in memory, as backends and formulas take them, and their comparison with the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backends import pytorch
from ..core.batch import COUNTED, Batch, Operand, Segment, Signature
from ..core.dtypes import FLOAT_SIZES
from ..core.rule import Rule
from ..runtime import memory
from .records import Row, on_gpu
from .shapes import Shapes

SCALE = 0.9
RULE = Rule(SCALE)

# Bytes that each tensor is aligned to, as the allocators of GPUs do.
_ALIGNED = 512
# Elements that are drawn at a time, bytes that are compared at a time, and offsets into what was drawn.
_BLOCK = 1 << 22
_COMPARED_BYTES = 1 << 26
_SHIFTS = 1 << 20


class Lacking(Exception):
    """What this machine lacks to measure a case, in one line."""


class Workload:
    """A base and n fine-tuned versions, each one flat tensor that holds the model's tensors one after another.

    The n versions agree on 2 / (n + 1) of the elements by construction.

    Args:
        layout: A name for the shapes.
        shapes: The shapes of the model's tensors.
        dtype: The dtype of all versions.
        n: The number of fine-tuned versions.
        device: Where they are.
        rotate: Whether to make as many copies as exceed the CPU's caches several times, so that each has left the caches when
            its turn comes again. On a GPU there is one copy, and the caches are flushed.

    Raises:
        Lacking: If they do not fit into memory.
    """

    def __init__(
        self, layout: str, shapes: Shapes, dtype: str, n: int, device: str, rotate: bool = True
    ) -> None:
        self.layout, self.shapes, self.dtype, self.n, self.device = layout, shapes, dtype, n, device
        self.size = FLOAT_SIZES[dtype]
        self.numel = sum(map(math.prod, shapes.values()))
        self.bytes = (n + 2) * self.numel * self.size
        unit = _ALIGNED // self.size
        ends = np.cumsum([0, *(-(math.prod(shape) // -unit) * unit for shape in shapes.values())])
        caches = 4 * last_level_cache() if rotate and not on_gpu(device) else 0
        self.copies = max(1, -(caches // -self.bytes))
        self.spans = [
            (copy * int(ends[-1]) + int(start), shape)
            for copy in range(self.copies)
            for start, shape in zip(ends, shapes.values(), strict=False)
        ]
        padded_numel = self.copies * int(ends[-1])
        needed, free = (n + 2) * padded_numel * self.size + 6 * _COMPARED_BYTES, free_memory(device)
        if needed > 0.9 * free:
            raise Lacking(f"{self}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free on {device}")
        self.versions = [
            torch.empty(padded_numel, dtype=pytorch.TORCH_DTYPES[dtype], device=device) for _ in range(n + 1)
        ]
        self.out = torch.empty_like(self.versions[0])
        self._fill()

    def __str__(self) -> str:
        return f"{self.layout}, {self.dtype}, n = {self.n}"

    def row(self, suite: str, candidate: str) -> Row:
        """The fields of a row that say what is measured."""
        return {
            "suite": suite, "layout": self.layout, "way": candidate, "dtype": self.dtype, "n": self.n, "numel": self.numel,
            "bytes": self.bytes, "state": "in memory",
        }  # fmt: skip

    def _fill(self) -> None:
        """Draw a base, a direction, and versions that are the base plus the direction plus noise as large as it."""
        wide = torch.float64 if self.dtype == "F64" else torch.float32
        base, *models = self.versions
        block = min(_BLOCK, len(base))
        generator = torch.Generator(self.device).manual_seed(0)
        # Drawn once. Each block takes another part of it.
        drawn = torch.randn(block + _SHIFTS, generator=generator, dtype=wide, device=self.device)
        drawn_blocks = 0

        def noise(size: int) -> torch.Tensor:
            nonlocal drawn_blocks
            drawn_blocks += 1
            at = drawn_blocks * 611_953 % _SHIFTS
            return drawn[at : at + size]

        for start in range(0, len(base), block):
            size = min(block, len(base) - start)
            stored = base[start : start + size].copy_(noise(size)).to(wide)
            lean = noise(size)
            for model in models:
                model[start : start + size].copy_((lean + noise(size)).mul_(0.1).add_(stored))

    def tensors(self, version: torch.Tensor) -> list[torch.Tensor]:
        """Views of a version's tensors, copy after copy."""
        return [version[start : start + math.prod(shape)].view(shape) for start, shape in self.spans]

    def batches(self, in_place: bool) -> list[Batch]:
        """A batch for each copy. If in_place, the base is `out`, which has to be filled with it."""
        versions = [self.out, *self.versions[1:]] if in_place else self.versions
        base, *models, out = [
            [Operand(tensor.data_ptr(), self.dtype, tensor) for tensor in self.tensors(version)]
            for version in (*versions, self.out)
        ]
        segments = [
            Segment(math.prod(shape), base[i], [model[i] for model in models], out[i])
            for i, (_, shape) in enumerate(self.spans)
        ]
        signature, each = Signature(self.dtype, (self.dtype,) * self.n, False), len(self.shapes)
        return [Batch(self.device, signature, segments[i : i + each]) for i in range(0, len(segments), each)]

    def poison(self) -> None:
        """Fill the output, so that what a candidate does not write differs from the reference."""
        self.out.view(torch.uint8).fill_(0xA5)

    def compare(self, merged: Sequence[torch.Tensor]) -> tuple[int, list[list[int]]]:
        """Compare merged tensors with the reference.

        Returns:
            The number of elements whose bits differ, and the reference's counts, tensor by tensor.
        """
        segments = [segment for batch in self.batches(in_place=False) for segment in batch.segments]
        max_numel = min(_COMPARED_BYTES // self.size, len(self.out))
        expected = torch.empty(max_numel, dtype=self.out.dtype, device=self.device)
        signature = Signature(self.dtype, (self.dtype,) * self.n, False)
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        counts = np.zeros((len(segments), len(COUNTED)), np.int64)
        for pack in _packs([segment.numel for segment in segments], max_numel):
            parts = [
                _subsegment(
                    segments[row], start, numel, Operand(expected[at:].data_ptr(), self.dtype, expected)
                )
                for row, start, numel, at in pack
            ]
            counted = pytorch.merge(Batch(self.device, signature, parts), RULE).tolist()
            for (row, start, numel, at), of_part in zip(pack, counted, strict=True):
                counts[row] += of_part
                found = merged[row].reshape(-1)[start : start + numel]
                wrong += (_bits(found) != _bits(expected[at : at + numel])).count_nonzero()
        return int(wrong), counts.tolist()


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(pytorch.BITS_DTYPES[values.itemsize])


def _packs(numels: list[int], max_numel: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Split rows into packs of at most max_numel elements: row, start, number of elements, and position in the pack."""
    pack, at = [], 0
    for row, numel in enumerate(numels):
        start = 0
        while start < numel:
            count = min(numel - start, max_numel - at)
            pack.append((row, start, count, at))
            start, at = start + count, at + count
            if at == max_numel:
                yield pack
                pack, at = [], 0
    if pack:
        yield pack


def _subsegment(segment: Segment, start: int, numel: int, out: Operand) -> Segment:
    def later(stream: Operand) -> Operand:
        return stream._replace(address=stream.address + start * FLOAT_SIZES[stream.dtype])

    assert segment.base is not None
    return Segment(numel, later(segment.base), [later(model) for model in segment.models], out)


_current: dict[tuple[Any, ...], Workload] = {}


def shared_workload(
    layout: str, shapes: Shapes, dtype: str, n: int, device: str, rotate: bool = True
) -> Workload:
    """The workload of this description. All candidates share its memory, because bandwidth differs between allocations."""
    key = layout, tuple(shapes.items()), dtype, n, device, rotate
    if key not in _current:
        release()
        _current[key] = Workload(layout, shapes, dtype, n, device, rotate)
    return _current[key]


def release() -> None:
    """Free the current workload, since the next one may not fit beside it."""
    _current.clear()


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    if on_gpu(device):
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.free_memory()


def last_level_cache() -> int:
    """Total bytes of the CPU's last-level caches; 32 MiB if the system does not tell."""
    caches: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (
                (index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        if size.endswith("K"):
            caches[int(level), shared] = int(size[:-1]) * 1024
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or 32 << 20
