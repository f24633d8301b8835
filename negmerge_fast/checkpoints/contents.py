"""What a file beside the weights is: weights in another format, which must not be copied, or something that a model needs.

1. A known kind is copied, whatever its size: text, pictures, sound, fonts, tokenizers, n-grams; arrays and pickles that
   cannot be weights of the model; archives of these.
2. What begins as a format of weights does, or has its name, is not.
3. What is unknown is copied only if it is too small to be weights.

Content decides, a few megabytes of it at most; names do where content does not tell. Nothing is unpickled, no array is read.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

from ..core.errors import InputError
from .base import TensorRef
from .lfs import is_pointer, refuse_pointer
from .npy import read_array_header
from .pickles import read_pickle
from .reader import File

# Formats that hold weights and nothing else.
_WEIGHTS = frozenset({
    "safetensors", "h5", "hdf5", "keras", "msgpack", "onnx", "onnx_data", "ort", "gguf", "ggml", "pb", "tflite", "mlmodel",
    "mlpackage", "mlmodelc", "ot", "pdparams", "pdiparams", "nemo", "distcp", "engine", "pte", "torchscript", "caffemodel", "mnn",
    "rknn", "llamafile",
})  # fmt: skip
# Names of weights that other files have, too: .pt is Portuguese, and a .bin may be text or a SentencePiece model.
_MAYBE_WEIGHTS = frozenset({"bin", "pt", "pth", "ckpt"})
# Names of what may hold weights. A file that is something else than its name says is not copied.
_CONTAINERS = frozenset({
    "npy", "npz", "pkl", "pickle", "joblib", "dill", "zip", "tar", "gz", "bz2", "xz", "tgz", "tbz2", "txz", "zst", "7z", "rar",
    "lz4", "br",
})  # fmt: skip
# What is put behind the name of a file: model.ckpt.index, model.onnx.data, model.bin.old, model.gguf.part1, model.pt.2.
_TAIL = re.compile(
    r"bak|backup|old|orig|original|new|tmp|temp|copy|partial|incomplete|crdownload|download|data|index|meta|lock|"
    r"part\d*(of\d+)?|v?\d[\d_-]*(-?of-?\d+)?|gz|bz2|xz|zst|lz4|zip"
)
_INDEX = re.compile(r"(.+)\.index(\.[^.]+)?\.json")  # of shards in any format
_TENSORFLOW = re.compile(r"data-\d+-of-\d+")
_FORMAT = re.compile(r"([a-z0-9_]+?)(_\d+|-\d+| ?\(\d+\)| copy)?")
# OpenVINO's tokenizers are in the format of its weights.
_TOKENIZERS = frozenset({"openvino_tokenizer.bin", "openvino_detokenizer.bin"})

# GGUF and its forerunners, HDF5, MXNet, TensorRT, RKNN, RTen, llamafile, TensorFlow Lite, ExecuTorch; and archives that the
# standard library cannot open: Zstandard, LZ4, 7-Zip, RAR.
_WEIGHTS_BEGIN = re.compile(
    rb"GGUF|lmgg|fmgg|tjgg|\x89HDF\r\n|\x12\x01\0{6}|ptrt|ftrt|RKNN|RTEN|MZqFpD|....TFL3|....ET\d\d"
    rb"|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18|7z\xbc\xaf|Rar!",
    re.DOTALL,
)
# Pictures; sound and films; documents and fonts; n-grams of KenLM, tries of MARISA, automata of OpenFst; and SentencePiece models:
# lists of tokens, each with a score.
_KNOWN_BEGIN = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|II\*\0|MM\0\*|BM.{4}\0{4}|RIFF|fLaC|OggS|ID3|\xff\xfb|\xff\xf3|....ftyp|\x1aE\xdf\xa3"
    rb"|%PDF-|OTTO|wOFF|wOF2|ttcf|\x00\x01\x00\x00\x00[\x04-\x40]|mmap lm http://kheafield.com/code|We love Marisa\.|\xd6\xfd\xb2\x7e"
    rb"|\n.\n.{1,120}?\x15.{4}(\x18.)?\n|\n.{0,60}(<unk>|<s>|<pad>)",
    re.DOTALL,
)
_ARCHIVE_BEGIN = re.compile(rb"PK\x03\x04|PK\x05\x06|.{257}ustar", re.DOTALL)
_COMPRESSED_BEGIN = re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ\0")
_PICKLE_BEGIN = re.compile(rb"\x80[\x02-\x05]")
_MAX_HEADER_BYTES = 100_000_000  # of safetensors

_SAMPLES, _SAMPLE_BYTES = 16, 4096
_MAX_BYTES_READ, _MAX_BYTES_UNPACKED = 16 << 20, 48 << 20

# Control characters are a tenth of the bytes of weights. Text has none, but for a vocabulary that lists them. A short text has to be
# UTF-8, too.
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
_MAX_CONTROLS, _MIN_UNDECODED = 0.001, 4096
# Most bytes of other encodings than UTF-8 may be no UTF-8, as those of weights; but their texts have lines.
_MAX_UNDECODED, _MIN_LINES = 0.1, 0.005
# Weights may be spelled as numbers, each with a point or in C's hexadecimal form, or in base64 as pictures are.
_DIGITS, _BETWEEN = b"0123456789.+-xXabcdefABCDEF", b",;:[](){} \t\r\n"
_NGRAMS = b"\\data\\"  # how n-grams in the ARPA format begin, which have a number or two each
_BASE64 = re.compile(rb"(?=[A-Za-z+/]{0,59}[0-9])[A-Za-z0-9+/]{60,}")
_PICTURES = re.compile(rb'image\\?/|audio\\?/|video\\?/|font\\?/|"cells"')

# A byte per element is the least that weights take: a file of fewer bytes than a hundredth of the elements is not the model. A file
# of 64 KiB may be a bias or a head, and has its size then.
_MAX_SMALL_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 16
# Arrays of fewer elements are weights only if a matrix of the model has as many: filters, means and tables are small.
_MIN_ELEMENTS, _MIN_FRACTION = 1 << 20, 0.01
_MAX_ITEM_BYTES = 4096  # of a text in an array


@dataclass(frozen=True)
class ModelSizes:
    """What files are compared with: the counts of elements that are in a model.

    Attributes:
        tensors: Of each tensor.
        matrices: Of each tensor of two extents or more, and of all tensors together.
        numel: Of all tensors together.
    """

    tensors: frozenset[int]
    matrices: frozenset[int]
    numel: int

    @classmethod
    def of(cls, tensors: Iterable[TensorRef]) -> ModelSizes:
        each = [(tensor.numel, sum(extent != 1 for extent in tensor.spec.shape)) for tensor in tensors]
        numel = sum(count for count, _ in each)
        matrices = {count for count, extents in each if extents > 1}
        return cls(frozenset(count for count, _ in each), frozenset({*matrices, numel} - {0}), numel)

    def match(self, *counts: int) -> bool:
        """Whether arrays of so many elements may be the model's weights."""
        total = sum(counts)
        return not self.matrices.isdisjoint(counts) or total >= max(_MIN_ELEMENTS, _MIN_FRACTION * self.numel)

    def outsize(self, nbytes: int) -> bool:
        """Whether so many bytes are too few for the model's weights, and none of its tensors in any type."""
        is_tensor = any(nbytes % width == 0 and nbytes // width in self.tensors for width in (1, 2, 4, 8))
        return nbytes <= min(_MAX_SMALL_BYTES, _MIN_FRACTION * self.numel) and not is_tensor


def may_be_weights(name: str) -> bool:
    """Whether a name is one that weights have, or what may hold them."""
    return _format_of(name) in _WEIGHTS or _is_suspicious(name)


def is_weights(file: File, name: str, model: ModelSizes) -> bool:
    """Whether a file holds weights, or may hold them.

    Args:
        file: The file.
        name: The last part of its name.
        model: The sizes of the model.

    Raises:
        InputError: If it cannot be read, or if it is a Git LFS pointer to something that a model may need.
    """
    kind, index = _format_of(name), _INDEX.fullmatch(name.lower())
    if kind in _WEIGHTS or (index and _format_of(index[1]) in _WEIGHTS | _MAYBE_WEIGHTS):
        return True
    content = _Content(file.read, file.size)
    try:
        head = content.head()
    except InputError:
        if kind in _MAYBE_WEIGHTS:
            return True  # it may not be read, and need not be
        raise
    if kind in _MAYBE_WEIGHTS and is_pointer(head):
        return True
    refuse_pointer(file.path, head)
    try:
        return not _Inspection(model).is_harmless(content, name)
    except InputError:
        raise
    except Exception:  # malformed in one of many ways: what cannot be looked into may hold weights
        return True


class _Content(NamedTuple):
    """The bytes of a file, or of an entry of an archive."""

    read: Callable[[int, int], bytes | bytearray]
    size: int

    @classmethod
    def of(cls, data: bytes) -> _Content:
        return cls(lambda offset, size: data[offset : offset + size], len(data))

    def head(self, size: int = _SAMPLE_BYTES) -> bytes:
        return bytes(self.read(0, min(self.size, size)))

    def sample(self) -> bytes:
        """Blocks from the first to the last, or all of a short file."""
        if self.size <= _SAMPLES * _SAMPLE_BYTES:
            return self.head(self.size)
        last = self.size - _SAMPLE_BYTES
        return b"".join(self.read(last * k // (_SAMPLES - 1), _SAMPLE_BYTES) for k in range(_SAMPLES))


class _Inspection:
    """A look into one file, and into what is packed in it."""

    def __init__(self, model: ModelSizes) -> None:
        self._model = model
        self._left = _MAX_BYTES_UNPACKED
        self._arrays: list[int] = []

    def is_harmless(self, content: _Content, name: str) -> bool:
        """Whether something is of a known kind without weights, or too small for them."""
        head = content.head()
        if not head:
            return not _is_suspicious(name)
        # First of all: a long header and little data may look like text.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES:
            return False
        if head.startswith(b"\x93NUMPY"):
            self._arrays.append(_array_numel(head, content.size))
            return not self._model.match(*self._arrays)
        if _ARCHIVE_BEGIN.match(head):
            return content.size <= _MAX_BYTES_READ and all(
                self._entry_is_harmless(*entry) for entry in _entries(content.head(content.size))
            )
        if _COMPRESSED_BEGIN.match(head):
            unpacked = _decompress(content.head(_MAX_BYTES_READ))
            self._unpack(len(unpacked))
            return self.is_harmless(_Content.of(unpacked), "")
        if _PICKLE_BEGIN.match(head) or content.read(content.size - 1, 1) == b".":
            is_harmless = self._pickle_is_harmless(content)
            if is_harmless is not None or _PICKLE_BEGIN.match(head):
                return bool(is_harmless)
        if _is_text(sample := content.sample()):
            is_misnamed = _is_suspicious(name) and _format_of(name) not in _MAYBE_WEIGHTS
            return not is_misnamed and self._text_is_harmless(content, sample)
        if _WEIGHTS_BEGIN.match(head):
            return False
        if _KNOWN_BEGIN.match(head) or name in _TOKENIZERS:
            return True
        return not _is_suspicious(name) and self._model.outsize(content.size)

    def _unpack(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("an archive of more than a few megabytes")

    def _entry_is_harmless(self, name: str, size: int, read: Callable[[], bytes]) -> bool:
        self._unpack(size)
        is_weights = name.endswith("/data.pkl") or _format_of(name) in _WEIGHTS | _MAYBE_WEIGHTS
        return not is_weights and self.is_harmless(_Content.of(read()), name.rpartition("/")[2])

    def _pickle_is_harmless(self, content: _Content) -> bool | None:
        """Whether a pickle has no arrays, nor bytes or numbers that may be weights; None if it is no pickle."""
        if content.size > _MAX_BYTES_READ:
            return None
        try:
            found = read_pickle(content.head(content.size))
        except Exception:  # of many types
            return None
        has_bytes = found.longest > _MAX_TOKEN_BYTES and not self._model.outsize(found.longest)
        return not (found.builds_arrays or has_bytes or self._model.match(found.floats))

    def _text_is_harmless(self, content: _Content, sample: bytes) -> bool:
        """Whether a text does not spell weights."""
        if _NGRAMS in sample[:_SAMPLE_BYTES]:
            return True
        if len(sample.translate(None, _DIGITS + _BETWEEN)) <= len(sample) // 10:
            is_long = content.size > _MAX_BYTES_READ
            text = sample if is_long else content.head(content.size)
            numbers = text.count(b".") + text.count(b"0x")
            if numbers and (is_long or self._model.match(numbers)):
                return False
        encoded = sum(map(len, _BASE64.findall(sample)))
        if encoded > len(sample) // 2:
            text = content.head(content.size) if content.size <= _MAX_BYTES_READ else sample
            return bool(_PICTURES.search(text)) or self._model.outsize(content.size * 3 // 4)
        return True


def _format_of(name: str) -> str:
    """The last suffix of a name that is no tail."""
    suffixes = name.lower().rstrip("~#").split(".")[1:]
    if suffixes and _TENSORFLOW.fullmatch(suffixes[-1]):
        return "ckpt"
    while len(suffixes) > 1 and _TAIL.fullmatch(suffixes[-1]):
        suffixes.pop()
    match = _FORMAT.fullmatch(suffixes[-1]) if suffixes else None
    return match[1] if match else ""


def _is_suspicious(name: str) -> bool:
    """Whether a name is one of what may be weights, or of what may hold them."""
    return _format_of(name) in _MAYBE_WEIGHTS | _CONTAINERS or name.lower().rpartition(".")[2] in _CONTAINERS


def _is_text(sample: bytes) -> bool:
    if len(sample) - len(sample.translate(None, _CONTROLS)) > _MAX_CONTROLS * len(sample):
        return False
    undecoded = sample.decode("utf-8", "replace").count("\ufffd")
    if len(sample) < _MIN_UNDECODED or undecoded <= _MAX_UNDECODED * len(sample):
        return not undecoded or len(sample) >= _MIN_UNDECODED
    return sample.count(b"\n") >= _MIN_LINES * len(sample)


def _entries(packed: bytes) -> Iterable[tuple[str, int, Callable[[], bytes]]]:
    """The files in a zip or tar archive: the name and size of each, and what reads it."""
    # Libraries of archives are imported where one is found: together they take as long as a small merge.
    if packed.startswith(b"PK"):
        import zipfile

        archive = zipfile.ZipFile(io.BytesIO(packed))
        return [
            (e.filename, e.file_size, partial(archive.read, e)) for e in archive.infolist() if not e.is_dir()
        ]
    import tarfile

    tar = tarfile.TarFile(fileobj=io.BytesIO(packed))
    return ((e.name, e.size, tar.extractfile(e).read) for e in tar if e.isfile())  # type: ignore[union-attr]


def _decompress(packed: bytes) -> bytes:
    """Compressed data, or a byte more of it than is looked at.

    Raises:
        ValueError: If something follows, or if the end is missing.
    """
    decompressor: Any
    if packed.startswith(b"\x1f\x8b"):
        decompressor = zlib.decompressobj(31)
    elif packed.startswith(b"BZh"):
        import bz2

        decompressor = bz2.BZ2Decompressor()
    else:
        import lzma

        decompressor = lzma.LZMADecompressor(memlimit=256 << 20)
    unpacked: bytes = decompressor.decompress(packed, _MAX_BYTES_READ + 1)
    if decompressor.unused_data.strip(b"\0") or (not decompressor.eof and len(unpacked) <= _MAX_BYTES_READ):
        raise ValueError("more than one stream, or less")
    return unpacked


def _array_numel(head: bytes, size: int) -> int:
    file = io.BytesIO(head)
    try:
        shape, _, dtype = read_array_header(file)
    except InputError as error:
        raise ValueError(str(error)) from None
    if dtype.hasobject or dtype.names or dtype.itemsize > _MAX_ITEM_BYTES:
        raise ValueError("an array of objects, records or long bytes")
    if file.tell() + prod(shape) * dtype.itemsize != size:
        raise ValueError("something else follows, such as another array")
    return prod(shape)
