"""What a file beside the weights is: weights in another form, which must not be copied, or something that a model needs.

The last suffix of a name decides, or the one before a known tail (model.safetensors.bak). Where a suffix says little, the
file is looked at, a few megabytes at most. Nothing is unpickled and no array is read.
"""

from __future__ import annotations

import bz2
import io
import lzma
import pickletools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from ..core.errors import InputError
from .base import TensorRef
from .lfs import is_pointer, refuse_pointer
from .npy import read_array_header
from .reader import File

# Formats that hold weights and nothing else.
_WEIGHTS = frozenset({
    "safetensors", "h5", "hdf5", "keras", "msgpack", "onnx", "onnx_data", "ort", "gguf", "ggml", "pb", "tflite", "mlmodel",
    "mlpackage", "mlmodelc", "ot", "pdparams", "pdiparams", "nemo", "distcp", "engine",
})  # fmt: skip
# Suffixes of weights that other files have, too: .pt is Portuguese, and a .bin may be text or a SentencePiece model.
_MAYBE_WEIGHTS = frozenset({"bin", "pt", "pth", "ckpt"})
_PICKLES = frozenset({"pkl", "pickle", "joblib", "dill"})
_COMPRESSED = frozenset({"gz", "bz2", "xz", "tgz", "tbz2", "txz"})
# Archives that the standard library cannot look into.
_CLOSED_ARCHIVES = frozenset({"zst", "7z", "rar", "lz4", "br"})
_ARCHIVES = _COMPRESSED | _CLOSED_ARCHIVES | {"zip", "tar"}
_SUSPICIOUS = _WEIGHTS | _MAYBE_WEIGHTS | _PICKLES | _ARCHIVES | {"npy", "npz"}

# What is put behind the name of a file: model.ckpt.index, model.onnx.data, model.bin.old, model.gguf.part1, model.pt.2.
_TAIL = re.compile(
    r"bak|backup|old|orig|original|new|tmp|temp|copy|partial|incomplete|crdownload|download|data|index|meta|"
    r"part\d*(of\d+)?|v?\d[\d_-]*(-?of-?\d+)?|gz|bz2|xz|zst|lz4|zip"
)
_INDEX = re.compile(r"(.+)\.index(\.[^.]+)?\.json")  # of shards in any format
_TENSORFLOW = re.compile(r"data-\d+-of-\d+")
_FORMAT = re.compile(r"([a-z0-9_]+?)(_\d+|-\d+| ?\(\d+\)| copy)?")

_HEAD_BYTES = 4096
_MAX_BYTES_READ = 8 << 20
_MAX_PICKLE_BYTES = 16 << 20
_MAX_UNPACKED_BYTES = 16 << 20
_MAX_COMPRESSED_HEAD = 1 << 20  # a block of bzip2 is at most 900 kB

# Arrays of fewer elements are weights only if a tensor of the model has their shape: filters, means and tables are small.
_MIN_ELEMENTS, _MIN_FRACTION = 1 << 20, 0.01

# Pickles that name anything of these hold arrays; but for types and single numbers.
_ARRAY_PACKAGES = frozenset({
    "numpy", "torch", "jax", "jaxlib", "flax", "tensorflow", "keras", "paddle", "mxnet", "mlx", "cupy", "sklearn", "scipy",
    "pandas", "joblib", "xgboost", "lightgbm", "array",
})  # fmt: skip
_NO_ARRAYS = re.compile(r"dtype|scalar|device|Size|b?float\d+|u?int\d+|bool_?")


@dataclass(frozen=True)
class ModelShapes:
    """What arrays are compared with: the shapes of a model's matrices, without extents of one, in any order; and its size."""

    shapes: frozenset[tuple[int, ...]]
    numel: int

    @classmethod
    def of(cls, tensors: Iterable[TensorRef]) -> ModelShapes:
        shapes, numel = set(), 0
        for tensor in tensors:
            shapes.add(_squeezed(tensor.spec.shape))
            numel += tensor.numel
        return cls(frozenset(shape for shape in shapes if len(shape) > 1), numel)

    def match(self, arrays: Iterable[tuple[int, ...]]) -> bool:
        """Whether arrays of these shapes may be the model's weights."""
        count = 0
        for shape in arrays:
            squeezed = _squeezed(shape)
            count += prod(shape)
            if squeezed in self.shapes or squeezed == (self.numel,):
                return True
        return count >= _MIN_ELEMENTS and count >= _MIN_FRACTION * self.numel


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(extent for extent in shape if extent != 1))


def is_weights_format(name: str) -> bool:
    """Whether a name is one that only weights have."""
    return _format_of(name) in _WEIGHTS


def may_be_weights(name: str) -> bool:
    """Whether a name is one that weights have, or what may hold them."""
    return _format_of(name) in _SUSPICIOUS or name.lower().rpartition(".")[2] in _ARCHIVES


def is_weights(file: File, name: str, model: ModelShapes) -> bool:
    """Whether a file holds weights, or may hold them.

    Args:
        file: The file.
        name: The last part of its name.
        model: The shapes of the model.

    Raises:
        InputError: If it cannot be read, or if it is a Git LFS pointer to something that a model may need.
    """
    suffix, kind = name.lower().rpartition(".")[2] if "." in name else "", _format_of(name)
    if kind in _WEIGHTS or suffix in _CLOSED_ARCHIVES or _is_index(name):
        return True
    try:
        head = bytes(file.read(0, min(file.size, _HEAD_BYTES)))
    except InputError:
        if kind in _MAYBE_WEIGHTS:
            return True  # it may not be read, and need not be
        raise
    if kind in _MAYBE_WEIGHTS and suffix not in _ARCHIVES:
        return not head or is_pointer(head) or not _is_something_else(head)
    refuse_pointer(file.path, head)
    kind = suffix if suffix in _ARCHIVES else "npy" if head.startswith(b"\x93NUMPY") else kind
    try:
        return _look_into(file, kind, head, model)
    except InputError:
        raise
    except Exception:  # malformed in one of many ways: what cannot be looked into may hold weights
        return True


def _look_into(file: File, kind: str, head: bytes, model: ModelShapes) -> bool:
    if kind in _COMPRESSED:
        return _compressed_holds_weights(file)
    if kind == "zip":
        return _any_weights(zipfile.ZipFile(_BoundedFile(file)).namelist())
    if kind == "tar":
        with tarfile.open(fileobj=_BoundedFile(file), mode="r:") as archive:
            return _any_weights(archive.getnames())
    if kind == "npz":
        return _npz_holds_weights(file, model)
    if kind == "npy":
        return model.match([_array_shape(io.BytesIO(head))])
    if kind in _PICKLES:
        return file.size > _MAX_PICKLE_BYTES or _pickle_holds_arrays(bytes(file.read(0, file.size)))
    return _begins_as_weights(head, file.size)


def _is_index(name: str) -> bool:
    """Whether a name is that of an index of shards, in any format."""
    match = _INDEX.fullmatch(name.lower())
    return match is not None and _format_of(match[1]) in _WEIGHTS | _MAYBE_WEIGHTS


def _format_of(name: str) -> str:
    """The last suffix of a name that is no tail."""
    suffixes = name.lower().rstrip("~").split(".")[1:]
    if suffixes and _TENSORFLOW.fullmatch(suffixes[-1]):
        return "ckpt"
    while len(suffixes) > 1 and _TAIL.fullmatch(suffixes[-1]):
        suffixes.pop()
    match = _FORMAT.fullmatch(suffixes[-1]) if suffixes else None
    return match[1] if match else ""


def _any_weights(names: Iterable[str]) -> bool:
    """Whether entries of an archive are weights, or archives and arrays that may hold some."""
    return any(may_be_weights(name.rpartition("/")[2]) for name in names)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not only cut within a character
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(c.isprintable() or c.isspace() for c in text)


def _is_something_else(head: bytes) -> bool:
    """Whether a file whose name might be one of weights plainly is none: text, a SentencePiece model, or n-grams of KenLM."""
    is_sentencepiece = head[:1] == b"\n" and any(token in head[:64] for token in (b"<unk>", b"<s>", b"<pad>"))
    return _is_text(head) or is_sentencepiece or head.startswith(b"mmap lm http://kheafield.com/code")


def _begins_as_weights(head: bytes, size: int) -> bool:
    """Whether the beginning of a file is that of weights, whatever its name."""
    length = int.from_bytes(head[:8], "little")
    is_safetensors = head[8:10] == b'{"' and 8 + length <= size
    is_pytorch = head.startswith(b"PK\3\4") and b"data.pkl" in head[30:200]
    # What torch.save wrote before it wrote archives begins with a number of its own.
    is_old_pytorch = head.startswith(b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    is_other = head.startswith((b"GGUF", b"\x89HDF\r\n\x1a\n")) or head[4:8] == b"TFL3"
    return is_safetensors or is_pytorch or is_old_pytorch or is_other


def _compressed_holds_weights(file: File) -> bool:
    packed = bytes(file.read(0, min(file.size, _MAX_COMPRESSED_HEAD)))
    head = _decompress(packed, _HEAD_BYTES)
    if head[257:262] != b"ustar":
        return not _is_text(head) or is_pointer(head)
    if file.size > _MAX_BYTES_READ:
        return True
    unpacked = _decompress(bytes(file.read(0, file.size)), _MAX_UNPACKED_BYTES)
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
        names = archive.getnames()
    return len(unpacked) == _MAX_UNPACKED_BYTES or _any_weights(names)


def _decompress(packed: bytes, size: int) -> bytes:
    """The first bytes of compressed data."""
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(packed, size)
    if packed.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(packed, size)
    return lzma.LZMADecompressor(memlimit=256 << 20).decompress(packed, size)


def _npz_holds_weights(file: File, model: ModelShapes) -> bool:
    with zipfile.ZipFile(_BoundedFile(file)) as archive:
        shapes = []
        for name in archive.namelist():
            with archive.open(name) as array:
                shapes.append(_array_shape(io.BytesIO(array.read(_HEAD_BYTES))))
    return model.match(shapes)


def _array_shape(head: io.BytesIO) -> tuple[int, ...]:
    try:
        shape, _, dtype = read_array_header(head)
    except InputError as error:
        raise ValueError(str(error)) from None
    if dtype.hasobject:
        raise ValueError("an array of pickled objects")
    return shape


def _pickle_holds_arrays(raw: bytes) -> bool:
    """Whether a pickle calls something of a package for arrays. Nothing is unpickled."""
    pushed: list[Any] = [None, None]  # the last two, if they are text
    memo: dict[Any, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = argument.partition(" ")
        elif opcode.name == "STACK_GLOBAL":
            module, name = pushed
            if module is None or name is None:
                return True
        else:
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = pushed[-1]
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                pushed = [pushed[-1], memo.get(argument)]
            elif opcode.stack_after:
                pushed = [pushed[-1], argument if isinstance(argument, str) else None]
            continue
        if module.partition(".")[0] in _ARRAY_PACKAGES and not _NO_ARRAYS.fullmatch(name):
            return True
        pushed = [pushed[-1], None]
    return False


class _BoundedFile(io.RawIOBase):
    """A file for libraries that read archives. It raises OSError when they read much."""

    def __init__(self, file: File) -> None:
        self._file, self._position, self._left = file, 0, _MAX_BYTES_READ

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._file.size - self._position))
        self._left -= size
        if self._left < 0:
            raise OSError("more than a few megabytes")
        buffer[:size] = self._file.read(self._position, size)
        self._position += size
        return size
