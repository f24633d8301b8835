"""Batches packed into integers for the kernels, which know neither torch nor NumPy."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from .batch import Batch, Operand, Operands, Signature
from .choices import KEEP_ALL, WEIGHT_CODES, Choices
from .delta import DeltaBatch, DeltaSegment
from .dtypes import DTYPE_CODES, FLOAT_SIZES
from .low_rank import ExpandBatch, ExpandSegment, Expansion, LowRank

if TYPE_CHECKING:
    import numpy as np
    import torch


def pack_descriptors(batch: Batch) -> array[int]:
    """Pack a batch as int64[segments, 3 + n]: elements, then the addresses of base, out and the models, or 0.

    Without NumPy: a merge of files on the CPU needs nothing else of it, and it takes longer to import than a small one takes.
    """
    integers: list[int] = []
    for numel, base, models, out in batch.segments:
        integers += (numel, base.address if base else 0, out.address if out else 0)
        integers += models.addresses if type(models) is Operands else [address for address, _, _ in models]
    if len(integers) != len(batch.segments) * (3 + len(batch.signature.models)):
        raise ValueError(f"segments of other numbers of models, expected {len(batch.signature.models)}")
    return array("Q", integers)  # unsigned: an address may have its highest bit set


def pack_terms(batch: Batch) -> array[int]:
    """Pack a batch's terms as int64[segments, 4 + 2n]: begin, key, the weights' address, or 0, and their code; low and high, as float64."""
    if batch.terms is None or len(batch.terms) != len(batch.segments):
        raise ValueError(f"terms: {batch.terms}, expected those of each segment")
    n = len(batch.signature.models)
    no_bounds = array("d", (0.0,) * n + (math.inf,) * n).tobytes()
    integers = array("Q")  # unsigned: an address may have its highest bit set
    for begin, key, weight, low, high in batch.terms:
        address, code = (weight.address, WEIGHT_CODES[weight.dtype]) if weight else (0, 0)
        integers.extend((begin, key, address, code))
        if not low and not high:
            integers.frombytes(no_bounds)
            continue
        bounds = array("d", (*(low or (0.0,) * n), *(high or (math.inf,) * n)))
        if len(bounds) != 2 * n:
            raise ValueError(f"bounds of other numbers of models, expected {n}")
        integers.frombytes(bounds.tobytes())
    return integers


def pack_numbers(choices: Choices) -> array[float]:
    """Pack what choices have for each model as float64[3, n]: factors, votes, and what keep has, or 2^32."""
    return array("d", (*choices.factors, *choices.votes, *(choices.keep or (KEEP_ALL,) * len(choices.votes))))


def has_expansions(batch: Batch) -> bool:
    """Whether some models are an Expansion in place of an Operand."""
    return any(
        type(models) is not Operands and Expansion in map(type, models) for _, _, models, _ in batch.segments
    )


def pack_low_rank(batch: Batch) -> tuple[array[int], array[int]]:
    """Pack a batch that has expansions.

    Returns:
        What pack_descriptors returns, with the address 0 for an Expansion; and int64[segments, n], behind which the expansions
        stand: for each model where its expansion is in this array, or 0.
    """
    integers: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    size = len(batch.segments) * len(batch.signature.models)
    for numel, base, models, out in batch.segments:
        integers += (numel, base.address if base else 0, out.address if out else 0)
        for dtype, model in zip(batch.signature.models, models, strict=True):
            if isinstance(model, Expansion):
                check_expansion(batch.signature, dtype, base)
                integers.append(0)
                positions.append(size + len(rows))
                rows += _expansion_row(model, numel)
            else:
                integers.append(model.address)
                positions.append(0)
    return array("Q", integers), array("Q", positions + rows)


def check_expansion(signature: Signature, dtype: str, base: Operand | None) -> None:
    """Refuse an Expansion as a model of another type, and one that is to be added to no base."""
    expected = signature.arithmetic if signature.task_vectors else signature.result
    if dtype != expected or (base is None and not signature.task_vectors):
        raise ValueError(f"a low-rank model of {dtype} on base {base}, expected {expected} on a base")


def pack_expand(batch: ExpandBatch) -> array[int]:
    """Pack as int64[segments, 12]: elements, the addresses of base, or 0, and out, and the expansion."""
    integers: list[int] = []
    for numel, expansion, base, out in batch.segments:
        _check_base(batch, base)
        integers += (numel, base.address if base else 0, out.address, *_expansion_row(expansion, numel))
    return array("Q", integers)


def _check_base(batch: ExpandBatch, base: Operand | None) -> None:
    if (base is None) != (batch.result is None):
        raise ValueError(
            f"base: {base}, expected one exactly if there is a type of the result, {batch.result}"
        )


def _expansion_row(expansion: Expansion, numel: int) -> list[int]:
    (*integers, scale, _, panels), begin = expansion
    if min(integers[2:]) < 1 or begin < 0 or begin + numel > expansion.factors.numel:
        raise ValueError(f"elements {begin} … {begin + numel} of {expansion.factors}, expected some of it")
    return [*integers, *struct.unpack("<Q", struct.pack("<d", scale)), panels, begin]


def pack_deltas(batch: DeltaBatch) -> array[int]:
    """Pack a batch of deltas as int64[segments, 7]: the fields of DeltaSegment, without the owners."""
    integers: list[int] = []
    for segment in batch.segments:
        integers += segment[:-1]
    return array("Q", integers)  # unsigned: an address may have its highest bit set


def pack_for_device(batch: Batch, tile: int) -> tuple[np.ndarray[Any, Any], int]:
    """Pack a batch for a kernel on a device. A segment is cut into tiles of `tile` elements, the last one shorter.

    Returns:
        One array of int64, and the number of tiles. In the array come int64[segments + 1, 2], the number of tiles before
        each segment and whether all its addresses are multiples of 16; then the descriptors; then the models' storage
        types, a byte each.
    """
    import numpy as np

    packed = np.asarray(pack_descriptors(batch))
    descriptors = packed.view(np.int64).reshape(len(batch.segments), 3 + len(batch.signature.models))
    tiles = _tiling(descriptors[:, 0], descriptors[:, 1:], tile)
    dtypes = bytes(DTYPE_CODES[dtype] for dtype in batch.signature.models)
    padded = np.frombuffer(dtypes.ljust(-(len(dtypes) // -8) * 8, b"\0"), np.int64)
    return np.concatenate([tiles.ravel(), descriptors.ravel(), padded]), int(tiles[-1, 0])


def pack_family_for_device(batch: Batch, choices: Choices, tile: int) -> tuple[np.ndarray[Any, Any], int]:
    """Pack a batch with terms, as pack_for_device does, and behind that what pack_numbers and pack_terms pack.

    A segment is aligned if the address of its weights is a multiple of 16, too.
    """
    import numpy as np

    table, tiles = pack_for_device(batch, tile)
    segments, fields = len(batch.segments), 4 + 2 * len(batch.signature.models)
    terms = np.asarray(pack_terms(batch)).view(np.int64).reshape(segments, fields)
    table[1 : 2 * segments : 2] &= terms[:, 2] % 16 == 0
    numbers = np.asarray(pack_numbers(choices)).view(np.int64)
    return np.concatenate([table, numbers, terms.ravel()]), tiles


class Act(IntEnum):
    """What a kernel does with a batch of deltas: Act of csrc/delta.h."""

    APPLY = 0
    RESTORE = 1
    SAVE = 2


def act_of(batch: DeltaBatch, scale: float | None) -> tuple[Act, float]:
    """What applying with a scale does, and the number that a kernel is given."""
    if scale is not None:
        return Act.APPLY, scale
    if any(segment.base for segment in batch.segments):
        raise ValueError("scale: None, expected a number for segments with a base")
    return Act.RESTORE, 0.0


def pack_delta_for_device(batch: DeltaBatch, tile: int) -> tuple[np.ndarray[Any, Any], int]:
    """Pack a batch of deltas for a kernel on a device, as pack_for_device: it asks whether base and out are multiples of 16."""
    import numpy as np

    fields = len(DeltaSegment._fields) - 1
    descriptors = np.asarray(pack_deltas(batch)).view(np.int64).reshape(len(batch.segments), fields)
    columns = [DeltaSegment._fields.index(name) for name in ("base", "out")]
    tiles = _tiling(descriptors[:, 0], descriptors[:, columns], tile)
    return np.concatenate([tiles.ravel(), descriptors.ravel()]), int(tiles[-1, 0])


def pack_expand_for_device(
    batch: ExpandBatch, tile_rows: int, tile_columns: int
) -> tuple[np.ndarray[Any, Any], int, int]:
    """Pack low-rank differences for a kernel on a device. Segments are cut into boxes, and these into tiles.

    Returns:
        One array of int64, the number of boxes, and that of tiles. In the array come int64[boxes + 1], the number of tiles before each
        box; then int64[boxes, 9]: the addresses of its first row of the left factor, its first column of the right one, its first
        element in base and out; how many rows and columns it has; how many columns the matrix has; the rank; the bits of s as float64.
    """
    import numpy as np

    size = FLOAT_SIZES[batch.arithmetic]
    stored = FLOAT_SIZES[batch.result or batch.arithmetic]
    tiles, descriptors = array("q", [0]), array("Q")  # unsigned: an address may have its highest bit set
    cut: dict[tuple[int, ...], list[tuple[int, ...]]] = {}  # the models of a tensor are cut alike
    for segment in batch.segments:
        _check_base(batch, segment.base)
        left, right, *shape, scale, _, begin = _expansion_row(segment.expansion, segment.numel)
        base, out = segment.base.address if segment.base else 0, segment.out.address
        key = segment.numel, begin, *shape
        if key not in cut:
            cut[key] = [_offsets(segment, box, tile_rows, tile_columns) for box in boxes(segment)]
        for of_left, of_right, of_out, rows, columns, count in cut[key]:
            moved = of_out * stored
            descriptors.extend((
                left + of_left * size, right + of_right * size, base and base + moved, out + moved,
                rows, columns, shape[2], shape[3], scale,
            ))  # fmt: skip
            tiles.append(tiles[-1] + count)
    packed = np.concatenate([np.asarray(tiles), np.asarray(descriptors).view(np.int64)])
    return packed, len(tiles) - 1, tiles[-1]


def _offsets(
    segment: ExpandSegment, box: tuple[int, int, int, int], tile_rows: int, tile_columns: int
) -> tuple[int, ...]:
    """The elements before a box in left factor, right factor and output, its rows and columns, and its number of tiles."""
    (factors, begin), (at, matrices, rows, columns) = segment.expansion, box
    row, column = divmod(at, factors.columns)
    right = row // factors.rows * factors.rank * factors.columns + column
    tiles = matrices * -(rows // -tile_rows) * -(columns // -tile_columns)
    return row * factors.rank, right, at - begin, rows, columns, tiles


def boxes(segment: ExpandSegment) -> Iterator[tuple[int, int, int, int]]:
    """Cut a segment into whole matrices, whole rows of one matrix and parts of one row: seven at most.

    Yields:
        The first element of a box, and how many matrices, rows and columns it has.
    """
    (factors, at), end = segment.expansion, segment.expansion.begin + segment.numel
    while at < end:
        matrices, rows, columns = _box(factors, at, end - at)
        yield at, matrices, rows, columns
        at += matrices * rows * columns


def _box(factors: LowRank, at: int, numel: int) -> tuple[int, int, int]:
    """The largest box that begins at an element and has at most so many."""
    row, column = divmod(at, factors.columns)
    row %= factors.rows
    if column or numel < factors.columns:
        return 1, 1, min(factors.columns - column, numel)
    if row or numel < factors.rows * factors.columns:
        return 1, min(factors.rows - row, numel // factors.columns), factors.columns
    return numel // (factors.rows * factors.columns), factors.rows, factors.columns


def _tiling(
    lengths: np.ndarray[Any, Any], addresses: np.ndarray[Any, Any], tile: int
) -> np.ndarray[Any, Any]:
    """int64[segments + 1, 2] of pack_for_device."""
    import numpy as np

    tiles = np.zeros((len(lengths) + 1, 2), np.int64)
    np.cumsum(-(lengths // -tile), out=tiles[1:, 0])
    tiles[:-1, 1] = np.bitwise_or.reduce(addresses, axis=1) % 16 == 0
    return tiles


def upload(memory: np.ndarray[Any, Any], device: str) -> torch.Tensor:
    """Copy int64 to a device, ordered with the device's current stream; waits for nothing."""
    import torch

    target_device = torch.device(device)
    if target_device.type == "cpu":
        return torch.from_numpy(memory)
    if target_device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return upload_in_launches(memory, target_device)
    # Pinned memory, or the copy would wait for the whole stream. torch's allocators reuse neither the pinned nor the
    # device memory before this stream is done with it.
    return torch.from_numpy(memory).pin_memory().to(target_device, non_blocking=True)


def upload_in_launches(memory: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """upload into a CUDA graph. The graph would repeat a copy from memory freed by then; a launch keeps the numbers."""
    import torch

    on_device = torch.zeros(len(memory), dtype=torch.int64, device=device)
    torch._foreach_add_(list(on_device.unbind()), memory.tolist())
    return on_device
