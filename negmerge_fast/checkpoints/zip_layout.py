"""The files that torch.load reads: an uncompressed zip file of a pickle and one record for each storage.

Written here, and not by torch.save: the same bytes with every version of torch, and without importing it. Each storage holds one tensor,
and begins at a multiple of 64 bytes, as torch.load(mmap=True) and devices like it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

from ..core.dtypes import DTYPE_BITS, TORCH_NAMES
from ..core.errors import InputError, short_repr
from ..core.schema import TensorSpec
from .base import ByteRange, TensorRef
from .composed import ComposedFile, Crc, Part
from .reader import File

# Types of storages; tensors of other types name theirs.
_STORAGES = {
    "F64": "Double", "F32": "Float", "F16": "Half", "BF16": "BFloat16", "I64": "Long", "I32": "Int", "I16": "Short", "I8": "Char",
    "U8": "Byte", "BOOL": "Bool", "C64": "ComplexFloat",
}  # fmt: skip
# Types that are not merged, and may be copied.
_OTHERS = {
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

_ALIGNMENT = 64
_FOLDER = "archive/"
# Of a local header, of one in the directory, and of what ends it. A size or an offset that does not fit stands in a field of its own.
_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END_64, _LOCATOR_64 = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_MAX_32, _MAX_16 = (1 << 32) - 1, (1 << 16) - 1
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16
# Zip64 fields and padding, which torch calls "FB".
_ZIP_64, _PADDING = 1, 0x4246
_VERSION_64, _UTF_8, _DAY = 45, 1 << 11, 1 << 5 | 1  # 1980-01-01


def lay_out(
    like: File, tensors: Mapping[str, TensorRef], aliases: Mapping[str, str], wrapper: Sequence[str] = ()
) -> tuple[ComposedFile, dict[str, TensorRef]]:
    """Lay out a file of tensors; returns it and where they are in it. The checksums of their records are zeros.

    Args:
        like: The file in whose place it is.
        tensors: The tensors, in the order of the state dict and of the file.
        aliases: Further names of some of them, which share the storage.
        wrapper: The keys under which the state dict is, the outermost first.
    """
    named = {**{name: name for name in tensors}, **aliases}
    keys = {name: str(k) for k, name in enumerate(tensors)}
    specs = {name: tensors[owner].spec for name, owner in named.items()}
    content = _pickle({name: (specs[name], keys[owner]) for name, owner in named.items()}, wrapper, like)
    writer = _Writer()
    for name, data in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
        writer.add(name, data)
    starts = {name: writer.add(f"data/{keys[name]}", tensor.source) for name, tensor in tensors.items()}
    crcs = writer.finish()
    file = ComposedFile.of(like, writer.parts, crcs=crcs, aliases=dict(aliases))
    placed = {
        name: TensorRef(tensor.spec, ByteRange(file, starts[name], tensor.source.nbytes))
        for name, tensor in tensors.items()
    }
    return file, placed


class _Writer:
    """Collects the parts of a zip file."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._position = 0
        self._central: list[bytes] = []
        self._crcs: list[
            tuple[int, int, int, int]
        ] = []  # of storages: offset, bytes, header, number in the directory

    def add(self, name: str, data: bytes | ByteRange) -> int:
        """Add a record; returns where its data begin."""
        raw, header = (_FOLDER + name).encode(), self._position
        size, crc = (len(data), zlib.crc32(data)) if isinstance(data, bytes) else (data.nbytes, 0)
        extra = _zip_64([size, size]) if size >= _MAX_32 else b""
        begin = header + _LOCAL.size + len(raw) + len(extra)
        padding = -(begin + 4) % _ALIGNMENT
        extra += struct.pack("<2H", _PADDING, padding) + bytes(padding)
        short = min(size, _MAX_32)
        fields = _VERSION_64 if size >= _MAX_32 else 20, _UTF_8, 0, 0, _DAY, crc, short, short
        self._put(_LOCAL.pack(b"PK\3\4", *fields, len(raw), len(extra)) + raw + extra)
        if isinstance(data, ByteRange):
            self._crcs.append((self._position, size, header, len(self._central)))
        begin = self._position
        self._put(data)
        wide = [size, size] if size >= _MAX_32 else []
        wide += [header] if header >= _MAX_32 else []
        more = _zip_64(wide) if wide else b""
        version = _VERSION_64 if wide else 20
        self._central.append(
            _CENTRAL.pack(
                b"PK\1\2",
                version,
                version,
                *fields[1:],
                len(raw),
                len(more),
                0,
                0,
                0,
                0,
                min(header, _MAX_32),
            )
            + raw
            + more
        )
        return begin

    def finish(self) -> list[Crc]:
        """Add the directory; returns where the checksums of storages have to stand."""
        begin, count, at = self._position, len(self._central), []
        for entry in self._central:
            at.append(self._position)
            self._position += len(entry)
        size = self._position - begin
        end = b""
        if max(size, begin) >= _MAX_32 or count >= _MAX_16:
            version = _VERSION_64, _VERSION_64
            end = _END_64.pack(b"PK\6\6", _END_64.size - 12, *version, 0, 0, count, count, size, begin)
            end += _LOCATOR_64.pack(b"PK\6\7", 0, self._position, 1)
        counts = [min(count, _MAX_16)] * 2
        end += _END.pack(b"PK\5\6", 0, 0, *counts, min(size, _MAX_32), min(begin, _MAX_32), 0)
        self.parts.append(b"".join(self._central) + end)
        return [
            Crc(offset, nbytes, (header + _CRC_IN_LOCAL, at[number] + _CRC_IN_CENTRAL))
            for offset, nbytes, header, number in self._crcs
        ]

    def _put(self, part: Part) -> None:
        self.parts.append(part)
        self._position += len(part) if isinstance(part, bytes) else part.nbytes


def _zip_64(values: Sequence[int]) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", _ZIP_64, 8 * len(values), *values)


def _pickle(tensors: Mapping[str, tuple[TensorSpec, str]], wrapper: Sequence[str], like: File) -> bytes:
    """The pickle of a dict of tensors, each with its spec and the key of its storage, as torch.save writes it."""
    state = b"}(" + b"".join(_text(n) + _tensor(n, *each, like) for n, each in tensors.items()) + b"u"
    for key in reversed(wrapper):
        state = b"}" + _text(key) + state + b"s"
    return b"\x80\2" + state + b"."


def _tensor(name: str, spec: TensorSpec, key: str, like: File) -> bytes:
    strides, stride = [], 1
    for extent in reversed(spec.shape):
        strides.append(stride)
        stride *= max(extent, 1)
    typed = _STORAGES.get(spec.dtype)
    torch_name = TORCH_NAMES.get(spec.dtype) or _OTHERS.get(spec.dtype)
    if typed is None and torch_name is None:
        raise InputError(
            f"{like.path}: tensor {short_repr(name)}: {spec.dtype}, which torch.load does not read, expected a type of PyTorch"
        )
    storage = _global("torch", f"{typed}Storage") if typed else _global("torch.storage", "UntypedStorage")
    count = spec.numel if typed else spec.numel * DTYPE_BITS[spec.dtype] // 8
    arguments = [
        b"(" + _text("storage") + storage + _text(key) + _text("cpu") + _integer(count) + b"tQ",
        _integer(0),
        _tuple(spec.shape),
        _tuple(reversed(strides)),
        b"\x89",  # requires_grad is False
        _global("collections", "OrderedDict") + b")R",  # no hooks
        *([] if typed else [_global("torch", str(torch_name))]),
    ]
    rebuild = _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    return rebuild + b"(" + b"".join(arguments) + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
