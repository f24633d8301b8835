"""What identifies a consensus delta: its tensors, masks and means, whether it is in memory or in files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..checkpoints.base import ByteRange
from ..checkpoints.delta import DeltaCheckpoint, TensorInfo
from ..checkpoints.reader import Reader
from ..core.hashing import hash_of

if TYPE_CHECKING:
    from ..deltas.memory import Delta

_CHUNK_BYTES = 1 << 20


def identity_of(delta: Delta) -> str:
    """The hash of a delta in memory."""
    import torch

    def parts() -> Iterator[Any]:
        for name, held in sorted(delta.tensors.items()):
            yield _head(name, held.info)
            for each in (held.packed.mask, held.packed.means):
                yield each.cpu().contiguous().view(torch.uint8).numpy()

    return hash_of(*parts())


def identity_of_files(delta: DeltaCheckpoint) -> str:
    """The hash of a delta in files, the same as in memory."""

    def chunks(reader: Reader, source: ByteRange) -> Iterator[bytearray]:
        for begin in range(0, source.nbytes, _CHUNK_BYTES):
            buffer = bytearray(min(_CHUNK_BYTES, source.nbytes - begin))
            source.read_into(reader, memoryview(buffer), begin)
            yield buffer

    def parts() -> Iterator[Any]:
        with Reader(max_open=8) as reader:
            for name, tensor in sorted(delta.tensors.items()):
                yield _head(name, tensor.info)
                yield from chunks(reader, tensor.mask)
                yield from chunks(reader, tensor.means.source)

    return hash_of(*parts())


def _head(name: str, info: TensorInfo) -> bytes:
    return json.dumps([name, info.spec.dtype, info.spec.shape, info.arithmetic, info.sample]).encode()
