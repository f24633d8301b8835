"""Deltas between memory and files, in the format of checkpoints/delta.py."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .._version import __version__
from ..backends import masks
from ..backends.pytorch import BITS_DTYPES, TORCH_DTYPES
from ..checkpoints.base import ByteRange
from ..checkpoints.delta import INDEX, MASK, MEAN, DeltaInfo, DeltaTensor, metadata_of, open_delta
from ..checkpoints.reader import Reader
from ..core.delta import MASK_WORD
from ..core.errors import InputError, short_repr
from ..tensors.names import label_of
from .format import file_names
from .packing import Packed, TensorDelta, ranks_of

# Bytes of masks and means in one file; what has more is written to several.
MAX_FILE_BYTES = 5 << 30
# Means at a time whose values are checked.
_CHECKED_AT_ONCE = 1 << 20


def save_delta(path: str | os.PathLike[str], tensors: Mapping[str, TensorDelta], info: DeltaInfo) -> None:
    """Write a delta to a new directory, which appears complete or not at all."""
    path = Path(path)
    for name, delta in tensors.items():
        if delta.box is not None:
            where = label_of("delta")(0, name)
            raise InputError(f"{where}: of a DTensor's shard, expected a delta of whole tensors")
    if os.path.lexists(path):
        raise InputError(f"{path}: exists, expected a new directory")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: no directory {path.absolute().parent}, expected one to write to")
    shards = _shards(tensors)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        weight_map = {}
        for file, names in zip(file_names(len(shards)), shards, strict=True):
            held = {}
            for name in names:
                mask, means, _ = tensors[name].packed
                held[name + MASK], held[name + MEAN] = mask.cpu(), means.cpu()
            metadata = metadata_of(info, {name: tensors[name].info for name in names}, __version__)
            save_file(held, staging / file, metadata)
            weight_map.update(dict.fromkeys(held, file))
        if len(shards) > 1:
            size = sum(_size(delta) for delta in tensors.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (staging / INDEX).write_text(json.dumps(index), encoding="utf-8")
        staging.chmod(0o777 & ~_umask())
        os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _size(delta: TensorDelta) -> int:
    return delta.packed.mask.nbytes + delta.packed.means.nbytes


def _shards(tensors: Mapping[str, TensorDelta]) -> list[list[str]]:
    """Names for each file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, delta in tensors.items():
        if shards[-1] and filled + _size(delta) > MAX_FILE_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(delta)
    return shards


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def read_delta(path: str | os.PathLike[str]) -> tuple[dict[str, TensorDelta], DeltaInfo]:
    """Read a delta from disk, and check all that its header does not tell."""
    opened = open_delta(path)
    with Reader(max_open=8) as reader:
        return {name: _read(reader, name, each) for name, each in opened.tensors.items()}, opened.info


def _read(reader: Reader, name: str, held: DeltaTensor) -> TensorDelta:
    path, numel = held.mask.file.path, held.info.numel
    mask = _bytes(reader, held.mask)
    means = _bytes(reader, held.means.source).view(TORCH_DTYPES[held.means.spec.dtype])
    last = int.from_bytes(mask[-MASK_WORD // 8 :].numpy().tobytes(), "little")
    if numel % MASK_WORD and last >> numel % MASK_WORD:
        raise InputError(
            f"{path}: tensor {short_repr(name + MASK)}: bits set behind element {numel - 1:,}, expected zeros"
        )
    if (found := masks.rank(mask.data_ptr(), 0, numel) if numel else 0) != len(means):
        raise InputError(
            f"{path}: tensor {short_repr(name + MASK)}: {found:,} bits set, expected {len(means):,}, one for each mean"
        )
    if (bad := _first_unusable(means)) is not None:
        raise InputError(
            f"{path}: tensor {short_repr(name + MEAN)}: element {bad}: {float(means[bad])}, expected a finite number but zero"
        )
    return TensorDelta(held.info, Packed(mask, means, ranks_of(mask, numel)))


def _bytes(reader: Reader, source: ByteRange) -> torch.Tensor:
    memory = torch.empty(source.nbytes, dtype=torch.uint8)
    array: Any = memory.numpy()
    source.read_into(reader, memoryview(array))
    return memory


def _first_unusable(means: torch.Tensor) -> int | None:
    """The first mean that is zero or not finite. By their bits: the caller's mode may take subnormals for zero."""
    bits = means.view(BITS_DTYPES[means.itemsize])
    infinity = int(torch.tensor(torch.inf, dtype=means.dtype).view(bits.dtype))
    for start in range(0, len(bits), _CHECKED_AT_ONCE):
        magnitude = bits[start : start + _CHECKED_AT_ONCE] & torch.iinfo(bits.dtype).max
        bad = (magnitude == 0) | (magnitude >= infinity)
        if bad.any():
            return start + int(bad.nonzero()[0])
    return None
