"""The files of a delta that is being made: where each mask goes before it is known how many means there are.

A file has a header, the masks of all its tensors, then their means. Numbers in the header only become shorter, so that it is as long
as it can be at most, with spaces at its end, and masks are written where they stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .._version import __version__
from ..checkpoints.delta import MASK, MEAN, SINGLE, DeltaInfo, TensorInfo, metadata_of
from ..core.delta import mask_bytes
from ..core.dtypes import FLOAT_SIZES
from ..core.stats import TensorStats

# safetensors aligns the data that follows a header.
_HEADER_ALIGNMENT = 8


class PlacedTensor(NamedTuple):
    """A tensor of a delta's file.

    Attributes:
        info: What is known of it before it was read.
        means_dtype: How its means are stored.
        mask_offset: Where its mask is, counted from the first mask of the file.
    """

    info: TensorInfo
    means_dtype: str
    mask_offset: int

    @property
    def numel(self) -> int:
        return self.info.numel

    @property
    def mean_size(self) -> int:
        return FLOAT_SIZES[self.means_dtype]


@dataclass(frozen=True)
class DeltaFile:
    """One file of a delta.

    Attributes:
        info: What is recorded of the delta.
        tensors: Its tensors, in the order in which they are read.
        header_bytes: The size of its header, with the 8 bytes of its length.
    """

    info: DeltaInfo
    tensors: dict[str, PlacedTensor]
    header_bytes: int

    @classmethod
    def of(cls, info: DeltaInfo, tensors: Mapping[str, tuple[TensorInfo, str]]) -> DeltaFile:
        """Lay out a file. tensors: what is known of each, and the type of its means."""
        placed, offset = {}, 0
        for name, (known, means_dtype) in tensors.items():
            placed[name] = PlacedTensor(known, means_dtype, offset)
            offset += mask_bytes(known.numel)
        longest = {name: TensorStats(*[t.numel] * 5) for name, t in placed.items()}
        text = cls(info, placed, 0)._text(longest)
        return cls(info, placed, 8 - len(text) // -_HEADER_ALIGNMENT * _HEADER_ALIGNMENT)

    @property
    def masks_end(self) -> int:
        """Where the means begin."""
        return self.header_bytes + sum(mask_bytes(tensor.numel) for tensor in self.tensors.values())

    def mask_position(self, name: str, element: int) -> int:
        """Where the mask of an element is, a multiple of 64 elements."""
        return self.header_bytes + self.tensors[name].mask_offset + element // 8

    def header(self, counted: Mapping[str, TensorStats]) -> bytes:
        """The header, once everything is counted."""
        text = self._text(counted)
        length = self.header_bytes - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def _text(self, counted: Mapping[str, TensorStats]) -> bytes:
        infos = {
            name: tensor.info._replace(
                nonfinite=counted[name].nonfinite,
                vetoed_by_zero=counted[name].vetoed_by_zero,
                masked=None if tensor.info.masked is None else counted[name].masked,
            )
            for name, tensor in self.tensors.items()
        }
        entries: dict[str, object] = {"__metadata__": metadata_of(self.info, infos, __version__)}
        at = 0
        for name, tensor in self.tensors.items():
            end = at + mask_bytes(tensor.numel)
            entries[name + MASK] = {"dtype": "U8", "shape": [end - at], "data_offsets": [at, end]}
            at = end
        for name, tensor in self.tensors.items():
            count = counted[name].agreed
            end = at + count * tensor.mean_size
            entries[name + MEAN] = {"dtype": tensor.means_dtype, "shape": [count], "data_offsets": [at, end]}
            at = end
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


def file_names(count: int) -> list[str]:
    """The names of the files of a delta."""
    if count == 1:
        return [SINGLE]
    return [f"delta-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]


def index_of(files: Mapping[str, DeltaFile]) -> bytes:
    """The index of several files."""
    weight_map = {
        each: name for name, file in files.items() for t in file.tensors for each in (t + MASK, t + MEAN)
    }
    text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2, ensure_ascii=False)
    return f"{text}\n".encode()
