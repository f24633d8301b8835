"""The safetensors format: 8 bytes of header length, a JSON header, the tensors back to back.

The safetensors library does not tell offsets, so the header is parsed here, as strictly as there; a test compares the two.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.delta import FORMAT
from ..core.dtypes import DTYPE_BITS
from ..core.errors import InputError, short_repr
from ..core.hashing import hash_of
from ..core.schema import TensorSpec
from .base import ByteRange, Checkpoint, TensorRef
from .lfs import refuse_pointer
from .reader import File
from .strict_json import are_sizes, is_shape, parse_json

# How a zip file and a file of the format before it begin.
PYTORCH_BEGINNINGS = b"PK\3\4", bytes.fromhex("80028a0a6cfc9c46")

# The library's own bound.
_MAX_HEADER_BYTES = 100_000_000

_KEYS = {"dtype", "shape", "data_offsets"}

# Levels of lists and objects in the value of an unknown key. The library takes 128, the header's own included.
_MAX_DEPTH = 100


def open_file(path: Path) -> Checkpoint:
    """Open a .safetensors file."""
    tensors, file = read_header(path)
    return Checkpoint(path, "safetensors", tensors, {path.name: file}, {})


def read_header(path: Path) -> tuple[dict[str, TensorRef], File]:
    """Return the tensors of a .safetensors file in the order of their bytes, and the file."""
    tensors, file, metadata = read_all_of_header(path)
    if metadata.get("format") == FORMAT:
        raise InputError(f"{path}: a consensus delta, expected the weights of a model")
    return tensors, file


def read_all_of_header(path: Path) -> tuple[dict[str, TensorRef], File, dict[str, str]]:
    """read_header, and the metadata."""
    file = File.at(path)
    if file.size < 8:
        raise InputError(f"{path}: {file.size} bytes, expected a safetensors header")
    head = file.read(0, 8)
    if head == b"version ":
        refuse_pointer(path, file.read(0, min(file.size, 99)))
    if head.startswith(PYTORCH_BEGINNINGS):
        raise InputError(f"{path}: a PyTorch file, not a safetensors file (rename it to {path.stem}.pt)")
    length = int.from_bytes(head, "little")
    if length > _MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: header of {length} bytes, expected at most {_MAX_HEADER_BYTES}: not a safetensors file"
        )
    if 8 + length > file.size:
        raise InputError(f"{path}: {file.size} bytes, expected at least {8 + length}: truncated")
    raw = file.read(8, length)
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: header does not start with '{{': not a safetensors file")
    header = parse_json(raw, path, "header")
    metadata = header.pop("__metadata__", {})
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise InputError(f"{path}: __metadata__ is not a mapping of strings to strings")
    aliases = {n: owner for n, owner in (metadata or {}).items() if owner in header and n not in header}
    file = replace(file, header=hash_of(head, raw), aliases=aliases)
    specs: dict[TensorSpec, TensorSpec] = {}  # equal specs are one object
    tensors = {
        sys.intern(name): _tensor(file, 8 + length, name, entry, specs) for name, entry in header.items()
    }
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].source[1:]))
    position = 8 + length
    for name, (_, (_, offset, nbytes)) in ordered.items():
        if offset != position:
            raise InputError(
                f"{path}: tensor {short_repr(name)} begins at byte {offset}, expected {position}: offsets overlap or leave holes"
            )
        position += nbytes
    if position != file.size:
        problem = "truncated" if position > file.size else "bytes left over"
        raise InputError(f"{path}: {file.size} bytes, expected {position}: {problem}")
    sources = (tensor.source for tensor in ordered.values())
    file.add_tensors(len(ordered), (range(source.offset, source.end) for source in sources))
    return ordered, file, metadata or {}


def _tensor(file: File, start: int, name: str, entry: Any, specs: dict[TensorSpec, TensorSpec]) -> TensorRef:
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        raise _malformed(file, name, "expected dtype, shape and data_offsets in the header")
    if len(entry) > len(_KEYS) and not all(_is_ignored(entry[key]) for key in entry.keys() - _KEYS):
        raise _malformed(file, name, "expected only dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _malformed(file, name, f"unknown dtype {short_repr(dtype)}")
    if not is_shape(shape):
        expected = "expected non-negative integers, no product over 2^64"
        raise _malformed(file, name, f"shape {short_repr(shape)}, {expected}")
    if not are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(file, name, f"data_offsets {short_repr(offsets)}, expected a begin and an end")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        expected = f"expected {-(-bits // 8)} for {dtype} of shape {tuple(shape)}"
        raise _malformed(file, name, f"{offsets[1] - offsets[0]} bytes, {expected}")
    spec = TensorSpec(sys.intern(dtype), tuple(shape))
    source = ByteRange(file, start + offsets[0], offsets[1] - offsets[0])
    return TensorRef(specs.setdefault(spec, spec), source)


def _is_ignored(value: Any, depth: int = 0) -> bool:
    """Whether the library ignores the value of an unknown key: it counts levels, and refuses infinite numbers."""
    if isinstance(value, (list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return depth < _MAX_DEPTH and all(_is_ignored(item, depth + 1) for item in items)
    return not isinstance(value, float) or math.isfinite(value)


def _malformed(file: File, name: str, problem: str) -> InputError:
    return InputError(f"{file.path}: tensor {short_repr(name)}: {problem}")
