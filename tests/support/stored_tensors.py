"""Tensors of opened checkpoints, read as a merge reads them."""

from __future__ import annotations

import torch
from bits import same_bits

from negmerge_fast.checkpoints.base import Checkpoint, TensorRef
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.core.dtypes import TORCH_NAMES


def read(tensor: TensorRef, step: int = 1 << 30) -> torch.Tensor:
    """Read a tensor in strides of some bytes."""
    spec, source = tensor
    data = bytearray(source.nbytes)
    with Reader(4) as reader:
        for begin in range(0, len(data), step):
            source.read_into(reader, memoryview(data)[begin : begin + step], begin)
    dtype = getattr(torch, TORCH_NAMES[spec.dtype] or "")
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(spec.shape)


def check(opened: Checkpoint, expected: dict[str, torch.Tensor], step: int = 1 << 30) -> None:
    assert list(opened.tensors) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(read(opened.tensors[name], step), tensor.detach().contiguous()), name
