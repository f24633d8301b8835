"""What an opened checkpoint is: tensors, and the files that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..core.schema import TensorSpec
from .reader import File, Reader


# There are as many of both as tensors times models: tuples are small, and quickly made.
class ByteRange(NamedTuple):
    """Consecutive bytes of a file."""

    file: File
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def read_into(
        self, reader: Reader, buffer: memoryview, begin: int = 0, release: bool = False
    ) -> bool | None:
        """Fill a buffer with the bytes from `begin` on, and return what Reader.read_into does."""
        return reader.read_into(self.file, self.offset + begin, buffer, release)


class TensorRef(NamedTuple):
    """A tensor of a checkpoint: what it is, and where its bytes are (little-endian, in row-major order)."""

    spec: TensorSpec
    source: ByteRange

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.spec.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by name. weights: the files that hold them; others: what else belongs to the model (config, tokenizer);
    left_out: what lies beside them but is neither. The last three name files relative to path, or path itself."""

    path: Path
    kind: str
    tensors: dict[str, TensorRef]
    weights: dict[str, File]
    extra_files: dict[str, File]
    skipped_files: tuple[str, ...] = ()

    @property
    def is_directory(self) -> bool:
        return self.kind == "directory"


# What negmerge writes beside the weights of its output; it speaks of that output only.
MANIFEST = "negmerge.json"
