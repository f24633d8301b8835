"""What an opened checkpoint is: tensors, and the files that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.schema import TensorSpec
from .reader import File


@dataclass(frozen=True, slots=True)  # there are as many as tensors times models
class TensorRef:
    """Where the bytes of a tensor are: little-endian, in row-major order."""

    spec: TensorSpec
    file: File
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

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
