"""What a file beside the weights is: weights in another form, which must not be copied, or something that a model needs.

Its content decides, a few megabytes at most; its name only where content does not tell.

1. What a format of weights begins with, or is named by, is not copied.
2. A known kind is copied, whatever its size: text, pictures, sound, fonts, tokenizers, n-grams; arrays and pickles that can't
   be weights of the model; archives of these.
3. What is unknown is copied if it is too small for weights, and is not otherwise.

Nothing is unpickled and no array is read.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from ..core.errors import InputError
from .base import TensorRef
from .lfs import is_pointer, refuse_pointer
from .npy import read_array_header
from .reader import File

# Formats that hold weights and nothing else.
_WEIGHTS = frozenset({
    "safetensors", "h5", "hdf5", "keras", "msgpack", "onnx", "onnx_data", "ort", "gguf", "ggml", "pb", "tflite", "mlmodel",
    "mlpackage", "mlmodelc", "ot", "pdparams", "pdiparams", "nemo", "distcp", "engine", "pte", "torchscript", "caffemodel", "mnn",
    "rknn", "llamafile",
})  # fmt: skip
# Names of weights that other files have, too: .pt is Portuguese, and a .bin may be text or a SentencePiece model.
_MAYBE_WEIGHTS = frozenset({"bin", "pt", "pth", "ckpt"})
# Names of what may hold weights, and is skipped if it is something else than it says.
_HOLDERS = frozenset({
    "npy", "npz", "pkl", "pickle", "joblib", "dill", "zip", "tar", "gz", "bz2", "xz", "tgz", "tbz2", "txz", "zst", "7z", "rar",
    "lz4", "br",
})  # fmt: skip
# OpenVINO's tokenizers are arrays of text in the format of its weights.
_TOKENIZERS = frozenset({"openvino_tokenizer.bin", "openvino_detokenizer.bin"})

# What is put behind the name of a file: model.ckpt.index, model.onnx.data, model.bin.old, model.gguf.part1, model.pt.2.
_TAIL = re.compile(
    r"bak|backup|old|orig|original|new|tmp|temp|copy|partial|incomplete|crdownload|download|data|index|meta|lock|"
    r"part\d*(of\d+)?|v?\d[\d_-]*(-?of-?\d+)?|gz|bz2|xz|zst|lz4|zip"
)
_INDEX = re.compile(r"(.+)\.index(\.[^.]+)?\.json")  # of shards in any format
_TENSORFLOW = re.compile(r"data-\d+-of-\d+")
_FORMAT = re.compile(r"([a-z0-9_]+?)(_\d+|-\d+| ?\(\d+\)| copy)?")

# How weights begin, and archives that the standard library cannot open: GGUF and its forerunners, HDF5, MXNet, TensorRT,
# RKNN, RTen, llamafile; Zstandard, LZ4, 7-Zip, RAR. TensorFlow Lite and ExecuTorch have theirs behind four bytes.
_WEIGHTS_BEGIN = (
    b"GGUF", b"lmgg", b"fmgg", b"tjgg", b"\x89HDF\r\n\x1a\n", b"\x12\1\0\0\0\0\0\0", b"ptrt", b"ftrt", b"RKNN", b"RTEN", b"MZqFpD",
    b"\x28\xb5\x2f\xfd", b"\4\x22\x4d\x18", b"7z\xbc\xaf\x27\x1c", b"Rar!",
)  # fmt: skip
_WEIGHTS_FOLLOW = re.compile(rb"TFL3|ET\d\d")
_MAX_HEADER_BYTES = 100_000_000

# Pictures, sound, films, documents and fonts; the n-grams of KenLM, tries of MARISA, and automata of OpenFst.
_KNOWN_BEGIN = (
    b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3",
    b"\x1aE\xdf\xa3", b"%PDF-", b"OTTO", b"wOFF", b"wOF2", b"ttcf", b"mmap lm http://kheafield.com/code", b"We love Marisa.",
    b"\xd6\xfd\xb2\x7e",
)  # fmt: skip
_KNOWN = re.compile(
    rb"....ftyp|BM.{4}\x00{4}|\x00\x01\x00\x00\x00[\x04-\x40]"  # films; pictures; fonts
    # A SentencePiece model is a list of pieces and their scores.
    rb"|\n.\n.{1,120}?\x15.{4}(\x18.)?\n|\n.{0,60}(<unk>|<s>|<pad>)",
    re.DOTALL,
)

_HEAD_BYTES = 4096
_SAMPLES = 16
_MAX_TOKEN_BYTES = 16  # in a pickle: longer ones may be a small tensor
_MAX_BYTES_READ, _MAX_BYTES_UNPACKED = 16 << 20, 48 << 20
_COMPRESSED_BEGIN = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"

# Bytes that text has none of; a vocabulary may list a few. Of weights they are a tenth.
_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
_MAX_CONTROLS = 0.001
# Of a long text in any encoding; a short one has to be UTF-8.
_MIN_UNDECODED = 4096
# Numbers, and what is between them; each byte of a number becomes a 0.
_NUMERIC = b"0123456789.+-eE"
_BETWEEN = b",;:[](){} \t\r\n"
_TO_ZERO = bytes(48 if byte in _NUMERIC else 32 for byte in range(256))
_BASE64 = re.compile(rb"(?=[A-Za-z+/]{0,59}[0-9])[A-Za-z0-9+/]{60,}")
_PICTURES_IN_TEXT = b"image/", b"audio/", b'"cells"'

# Weights may be cast to bytes. Fewer bytes than a hundredth of the elements are not the model; 64 KiB are a head at most, and it
# would have the size of a tensor.
_MAX_SMALL_BYTES = 64 << 10
# Arrays of fewer elements are weights only if a tensor of the model has as many: filters, means and tables are small.
_MIN_ELEMENTS, _MIN_FRACTION = 1 << 20, 0.01

# Pickles that name anything of these hold arrays; but for types and single numbers.
_ARRAY_PACKAGES = frozenset({
    "numpy", "torch", "jax", "jaxlib", "flax", "tensorflow", "keras", "paddle", "mxnet", "mlx", "cupy", "sklearn", "scipy",
    "pandas", "joblib", "xgboost", "lightgbm", "array",
})  # fmt: skip
_NO_ARRAYS = re.compile(r"dtype|scalar|device|Size|b?float\d+|u?int\d+|bool_?")


@dataclass(frozen=True)
class ModelSizes:
    """What files are compared with: how many elements the tensors of a model have.

    Attributes:
        tensors: Of each tensor.
        matrices: Of each one with two extents or more, and of all tensors together.
        numel: Of all tensors together.
    """

    tensors: frozenset[int]
    matrices: frozenset[int]
    numel: int

    @classmethod
    def of(cls, tensors: Iterable[TensorRef]) -> ModelSizes:
        each = [(sum(extent != 1 for extent in t.spec.shape), t.numel) for t in tensors if t.numel]
        numel = sum(count for _, count in each)
        matrices = {count for extents, count in each if extents > 1}
        return cls(frozenset(count for _, count in each), frozenset({*matrices, numel} - {0}), numel)

    def match(self, counts: list[int]) -> bool:
        """Whether arrays of so many elements may be the model's weights."""
        total = sum(counts)
        return not self.matrices.isdisjoint(counts) or total >= max(_MIN_ELEMENTS, _MIN_FRACTION * self.numel)

    def outsize(self, nbytes: int) -> bool:
        """Whether so many bytes are too few for weights of the model."""
        is_tensor = any(nbytes % width == 0 and nbytes // width in self.tensors for width in (1, 2, 4, 8))
        return nbytes <= min(_MAX_SMALL_BYTES, _MIN_FRACTION * self.numel) and not is_tensor


def may_be_weights(name: str) -> bool:
    """Whether a name is one that weights have, or what may hold them."""
    return _format_of(name) in _WEIGHTS | _MAYBE_WEIGHTS | _HOLDERS or _suffix(name) in _HOLDERS


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
    try:
        head = file.read(0, min(file.size, _HEAD_BYTES))
    except InputError:
        if kind in _MAYBE_WEIGHTS:
            return True  # it may not be read, and need not be
        raise
    if kind in _MAYBE_WEIGHTS and is_pointer(head):
        return True
    refuse_pointer(file.path, head)
    try:
        return not _Inspection(model).is_harmless(_Content(file.read, file.size), name)
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

    def head(self, size: int = _HEAD_BYTES) -> bytes:
        return bytes(self.read(0, min(self.size, size)))

    def sample(self) -> bytes:
        """Blocks from the first to the last, or all of a short file."""
        if self.size <= _SAMPLES * _HEAD_BYTES:
            return self.head(self.size)
        last = self.size - _HEAD_BYTES
        return b"".join(self.read(last * k // (_SAMPLES - 1), _HEAD_BYTES) for k in range(_SAMPLES))


class _Inspection:
    """The look into one file, and into what it holds."""

    def __init__(self, model: ModelSizes) -> None:
        self._model = model
        self._left = _MAX_BYTES_UNPACKED
        self._arrays: list[int] = []

    def is_harmless(self, content: _Content, name: str, inside: bool = False) -> bool:
        """Whether something is of a known kind, or too small for weights.

        Args:
            content: Its bytes.
            name: The last part of its name.
            inside: Whether it is an entry of an archive.
        """
        head, kind = content.head(), _format_of(name)
        is_suspicious = kind in _MAYBE_WEIGHTS | _HOLDERS or _suffix(name) in _HOLDERS
        if inside and kind in _WEIGHTS | _MAYBE_WEIGHTS:
            return False
        if not head:
            return not is_suspicious
        # A long header and little data may look like text.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES:
            return False
        if head.startswith(b"\x93NUMPY"):
            self._arrays.append(_array_numel(io.BytesIO(head)))
            return not self._model.match(self._arrays)
        if head.startswith((b"PK\3\4", b"PK\5\6")) or head[257:262] == b"ustar":
            return self._entries_are_harmless(content)
        if head.startswith(_COMPRESSED_BEGIN):
            unpacked = _decompress(content.head(_MAX_BYTES_READ), _MAX_BYTES_READ)
            self._unpack(len(unpacked))
            is_cut_archive = len(unpacked) == _MAX_BYTES_READ and unpacked[257:262] == b"ustar"
            return not is_cut_archive and self.is_harmless(_Content.of(unpacked), "")
        if (holds_arrays := self._pickle_holds_arrays(content, head)) is not None:
            return not holds_arrays
        sample = content.sample()
        if _is_text(sample):
            return (kind in _MAYBE_WEIGHTS or not is_suspicious) and self._text_is_harmless(content, sample)
        if head.startswith(_WEIGHTS_BEGIN) or _WEIGHTS_FOLLOW.match(head, 4):
            return False
        if head.startswith(_KNOWN_BEGIN) or _KNOWN.match(head) or name in _TOKENIZERS:
            return True
        return not is_suspicious and self._model.outsize(content.size)

    def _entries_are_harmless(self, content: _Content) -> bool:
        if content.size > _MAX_BYTES_READ:
            return False
        for name, size, read in _entries(content.head(content.size)):
            self._unpack(size)
            is_pytorch = name.endswith("/data.pkl")
            if is_pytorch or not self.is_harmless(_Content.of(read()), name.rpartition("/")[2], True):
                return False
        return True

    def _unpack(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError("an archive of more than a few megabytes")

    def _text_is_harmless(self, content: _Content, sample: bytes) -> bool:
        """Whether a text does not spell weights, as numbers or in base64."""
        if len(sample.translate(None, _NUMERIC + _BETWEEN)) <= len(sample) // 10:
            text = content.head(content.size) if content.size <= _MAX_BYTES_READ else sample
            count = (b" " + text.translate(_TO_ZERO)).count(b" 0") * content.size // len(text)
            return not self._model.match([count])
        encoded = sum(map(len, _BASE64.findall(sample)))
        is_base64 = encoded > len(sample) // 2 and not any(picture in sample for picture in _PICTURES_IN_TEXT)
        return not is_base64 or self._model.outsize(content.size * 3 // 4)

    def _pickle_holds_arrays(self, content: _Content, head: bytes) -> bool | None:
        """Whether a pickle builds arrays, or holds bytes or numbers that may be weights; None if it is no pickle."""
        is_binary = re.match(rb"\x80[\2-\5]", head) is not None
        if content.size > _MAX_BYTES_READ or content.read(content.size - 1, 1) != b".":
            return True if is_binary else None
        try:
            names, arguments, end = _pickled(content.head(content.size))
        except Exception:  # of many types
            return True if is_binary else None
        floats = sum(isinstance(argument, float) for argument in arguments)
        has_bytes = any(
            isinstance(argument, (bytes, bytearray))
            and len(argument) > _MAX_TOKEN_BYTES
            and not self._model.outsize(len(argument))
            for argument in arguments
        )
        return (
            names is None
            or any(map(_is_array, names))
            or has_bytes
            or self._model.match([floats])
            or end != content.size
        )


def _suffix(name: str) -> str:
    return name.lower().rpartition(".")[2] if "." in name else ""


def _format_of(name: str) -> str:
    """The last suffix of a name that is no tail."""
    suffixes = name.lower().rstrip("~#").split(".")[1:]
    if suffixes and _TENSORFLOW.fullmatch(suffixes[-1]):
        return "ckpt"
    while len(suffixes) > 1 and _TAIL.fullmatch(suffixes[-1]):
        suffixes.pop()
    match = _FORMAT.fullmatch(suffixes[-1]) if suffixes else None
    return match[1] if match else ""


def _is_text(sample: bytes) -> bool:
    if len(sample) - len(sample.translate(None, _CONTROLS)) > _MAX_CONTROLS * len(sample):
        return False
    try:
        return len(sample) >= _MIN_UNDECODED or bool(sample.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _entries(packed: bytes) -> Iterable[tuple[str, int, Callable[[], bytes]]]:
    """The files in a zip or tar archive: the name, size and content of each."""
    if packed.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, lambda entry=entry: archive.read(entry)  # type: ignore[misc]
        return
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, member.size, tar.extractfile(member).read  # type: ignore[union-attr]


def _decompress(packed: bytes, size: int) -> bytes:
    """The first bytes of compressed data."""
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(packed, size)
    if packed.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(packed, size)
    return lzma.LZMADecompressor(memlimit=256 << 20).decompress(packed, size)


def _array_numel(head: io.BytesIO) -> int:
    try:
        shape, _, dtype = read_array_header(head)
    except InputError as error:
        raise ValueError(str(error)) from None
    if dtype.hasobject:
        raise ValueError("an array of pickled objects")
    return prod(shape)


def _is_array(name: str) -> bool:
    module, _, name = name.partition(" ")
    return module.partition(".")[0] in _ARRAY_PACKAGES and not _NO_ARRAYS.fullmatch(name)


def _pickled(raw: bytes) -> tuple[list[str] | None, list[Any], int]:
    """What a pickle calls (None if it hides a name), its values, and where it ends. Nothing is unpickled."""
    names: list[str] = []
    values: list[Any] = []
    pushed: list[Any] = [None, None]  # the last two, if they are text
    memo: dict[Any, Any] = {}
    argument: Any
    end = 0
    for opcode, argument, position in pickletools.genops(raw):
        end = (position or 0) + 1
        if opcode.name in ("GLOBAL", "INST"):
            names.append(argument)
        elif opcode.name == "STACK_GLOBAL":
            if None in pushed:
                return None, [], end
            names.append(" ".join(pushed))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
            continue
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = pushed[-1]
            continue
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed = [pushed[-1], memo.get(argument)]
            continue
        elif not opcode.stack_after:
            continue
        else:
            values.append(argument)
            pushed = [pushed[-1], argument if isinstance(argument, str) else None]
            continue
        pushed = [pushed[-1], None]
    return names, values, end
