"""Opened checkpoints: their tensors, and the files that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ..core.schema import TensorSpec
from .reader import File, Reader

if TYPE_CHECKING:
    from .lora import Adapter

# What the weights of an output can be written in, if it does not mirror the base.
Format: TypeAlias = Literal["safetensors", "pt"]
# What a user asks for: one of these; or the format of the base, unless that is one which only PyTorch reads.
OutputFormat: TypeAlias = Literal["auto", "safetensors", "pt"]
FORMATS = ("auto", "safetensors", "pt")


# There are as many of both as tensors times models: tuples are small, and quickly made.
class ByteRange(NamedTuple):
    """Consecutive bytes of a file."""

    file: File
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def stored_nbytes(self) -> int:
        """Bytes that are read for it: other than nbytes if they are computed from others."""
        return self.file.stored_before(self.end) - self.file.stored_before(self.offset)

    def locate(self) -> ByteRange:
        """The range itself, or that of another file that has the same bytes."""
        return ByteRange(*self.file.locate(self.offset, self.nbytes), self.nbytes)

    def read_into(
        self, reader: Reader, buffer: memoryview, begin: int = 0, release: bool = False
    ) -> bool | None:
        """Fill a buffer with the bytes from `begin` on, and return what Reader.read_into does."""
        return self.file.read_into(reader, self.offset + begin, buffer, release)


class TensorRef(NamedTuple):
    """A tensor of a checkpoint: what it is, and where its bytes are (little-endian, in row-major order)."""

    spec: TensorSpec
    source: ByteRange

    @property
    def numel(self) -> int:
        return self.spec.numel


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened without reading its weights.

    Attributes:
        path: The directory or file.
        kind: "directory", "safetensors", "npy" or "adapter"; "delta" of one that is applied (streaming/expansion.py).
        tensors: The tensors by name. A tensor of a part has the part's name and a slash in front.
        weights: The files that hold them, by names relative to path.
        extra_files: What else belongs to the model (config, tokenizer), by names relative to path.
        skipped_files: Names of files beside them that are not copied: other weights, unknown and hidden files.
        unindexed: Tensors that the weight files hold and their index omits, by name.
        configs: The config.json of each part; empty where there is none.
        notes: What a user should know of how it was opened, a line each.
        undecided: What has to be chosen before it can be the base of a merge, a line each.
        adapter: What it changes of a base, if it is a LoRA adapter. Its tensors are then the factors, by their names in the file.
        held_bytes: Memory that it takes while its tensors are read.
        origin: What it is a translation of (translate.py). Its weights are then files of an output, which do not exist yet.
        format: Of a translation: "safetensors" or "pt".
    """

    path: Path
    kind: str
    tensors: dict[str, TensorRef]
    weights: dict[str, File]
    extra_files: dict[str, File]
    skipped_files: tuple[str, ...] = ()
    unindexed: dict[str, TensorRef] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()
    adapter: Adapter[TensorRef] | None = None
    held_bytes: int = 0
    origin: Checkpoint | None = None
    format: Format | None = None

    @property
    def opened(self) -> Checkpoint:
        """The checkpoint that was opened: this one, or what it is a translation of."""
        return self.origin or self

    @property
    def inputs(self) -> dict[str, File]:
        """The files that are read, by names relative to path."""
        return {**self.opened.weights, **self.opened.extra_files}

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes that a single file like it may have; the first one is usual."""
        return PT_SUFFIXES if self.format == "pt" else (Path(next(iter(self.weights))).suffix,)

    @property
    def aliases(self) -> dict[str, TensorRef]:
        """Tied weights under the names that are not in the files, as safetensors.torch.save_model leaves them."""
        named = ((n, owner) for file in self.weights.values() for n, owner in file.aliases.items())
        held = self.tensors
        return {n: held[owner] for n, owner in named if n not in held and owner in held}

    @property
    def large_files(self) -> dict[str, int]:
        """Files other than weights and indexes that are copied and large, by name, with their bytes."""
        others = ((name, file) for name, file in self.extra_files.items() if not file.header)
        return {name: file.size for name, file in others if file.size > _LARGE_BYTES}

    @property
    def is_directory(self) -> bool:
        return self.kind == "directory"


# What files that torch.load reads are called.
PT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")

# What a user is told of: the size of a small tokenizer, and of weights that would be worth a look.
_LARGE_BYTES = 1 << 20

# The manifest that negmerge writes beside its output, and does not copy from an input.
MANIFEST = "negmerge.json"
