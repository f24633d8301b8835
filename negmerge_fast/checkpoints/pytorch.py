"""PyTorch files: what torch.save wrote, of whatever name.

A zip file of torch 1.6 and later, or the format before it: pickles, then the storages one after the other. Of both the pickle is loaded
by torch.load(weights_only=True), and by nothing else; tensors are then read by position, as of any format. torch is imported where
such a file is opened, not before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.dtypes import DTYPE_BITS, TORCH_NAMES
from ..core.errors import InputError, short_repr, some_names
from ..core.hashing import hash_of
from ..core.pairing import is_extra_state
from ..core.schema import TensorSpec
from .base import ByteRange, Checkpoint, TensorRef
from .gathered import is_row_major, strided
from .lfs import refuse_pointer
from .reader import File
from .weights_only import GlobalError, PickleError, StorageId, inspect_pickle, load_record
from .zip_archive import ZipEntry, read_archive

if TYPE_CHECKING:
    import torch

ZIP = b"PK\3\4"
# The number that the old format begins with, pickled.
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")

# 200 bytes of a pickle are a tensor's.
_MAX_PICKLE_BYTES = 64 << 20

# Under which training scripts save the weights beside other things, and what those are called that average them.
USUAL = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params", "parameters")  # fmt: skip
_AVERAGES = ("ema", "params_ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "swa", "average_model")  # fmt: skip
# Dicts of tensors that are no weights.
_NO_WEIGHTS = ("optim", "sched", "scaler", "rng", "loss", "metric", "criterion")
_MAX_WRAPPERS = 3

# Types of torch that a safetensors file may have, and that are not merged.
_OTHER_DTYPES = {
    "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex64": "C64",
}  # fmt: skip
_DTYPES = {**{torch: name for name, torch in TORCH_NAMES.items()}, **_OTHER_DTYPES}


class PyTorchFile(File):
    """A PyTorch file as it was when it was inspected. What is written in its place has to be laid out anew."""


class Opened(NamedTuple):
    """The weights of a PyTorch file.

    Attributes:
        tensors: The tensors by name, in the order of the dict.
        file: The file.
        notes: What a user should know, a line each.
    """

    tensors: dict[str, TensorRef]
    file: PyTorchFile
    notes: tuple[str, ...]


def is_named(path: Path) -> bool:
    """Whether a file has a name that PyTorch files have. They may have others."""
    return path.name.lower().endswith(_SUFFIXES)


def is_pytorch(head: bytes | bytearray) -> bool:
    """Whether a file begins as one that torch.save wrote."""
    return head.startswith((ZIP, LEGACY))


def open_file(path: Path) -> Checkpoint:
    """Open a PyTorch file."""
    tensors, file, notes = read_file(path)
    return Checkpoint(path, "pytorch", tensors, {path.name: file}, {}, notes=notes)


def read_file(path: Path) -> Opened:
    """Return the weights of a PyTorch file.

    Raises:
        InputError: If it is malformed, holds something else than tensors in a dict, or would run code.
    """
    file = File.at(path)
    head = file.read_head(1024)
    refuse_pointer(path, head)
    try:
        if head.startswith(ZIP):
            loaded, held, header = _load_zip(file)
        elif head.startswith(LEGACY):
            loaded, held, header = _load_legacy(file)
        else:
            raise InputError(f"{path}: {_other_format(head)}, expected a file that torch.save wrote")
    except GlobalError as error:
        raise InputError(
            f"{path}: refers to {error}, which torch.load(weights_only=True) refuses, so nothing of it was run: expected tensors in a dict "
            "(load it where its code is, and safetensors.torch.save_file(model.state_dict(), 'model.safetensors'))"
        ) from None
    except PickleError as error:
        raise InputError(f"{path}: {error}") from None
    found = PyTorchFile(file.path, file.size, file.identity, file.mode, header, file.changed_ns)
    state, notes = _state_dict(path, loaded)
    specs: dict[TensorSpec, TensorSpec] = {}
    tensors = {n: _tensor(found, n, tensor, held, specs) for n, tensor in state.items()}
    ranges = sorted({held_range(t) for t in tensors.values()}, key=lambda each: each.start)
    found.add_tensors(len(ranges), ranges)
    return Opened(tensors, found, tuple(notes))


def held_range(tensor: TensorRef) -> range:
    """Bytes of the file that have all of a tensor."""
    file = tensor.source.file
    if not file.is_computed:
        return range(tensor.source.offset, tensor.source.end)
    return range(0, 0)


def _load_zip(file: File) -> tuple[Any, dict[int, ZipEntry], str]:
    archive = read_archive(file)
    if "constants.pkl" in archive.records:
        raise InputError(
            f"{file.path}: a TorchScript archive, expected a state dict (torch.save(torch.jit.load(…).state_dict(), 'model.pt'))"
        )
    if "byteorder" in archive.records and (order := archive.read("byteorder", 16)) != b"little":
        raise InputError(f"{file.path}: byteorder {short_repr(order)}, expected little")
    pickled = archive.read("data.pkl", _MAX_PICKLE_BYTES)
    inspected = inspect_pickle(pickled)
    if inspected.end != len(pickled):
        raise InputError(f"{file.path}: {len(pickled) - inspected.end} bytes behind the end of its pickle")
    for storage in inspected.storages:
        _refuse_missing(archive.records.get(f"data/{storage.key}"), storage)
    loaded, keys = load_record(pickled, inspected.storages)
    held = {address: archive.records[f"data/{key}"] for address, key in keys.items()}
    return loaded, held, hash_of(pickled, archive.directory)


def _refuse_missing(record: ZipEntry | None, storage: StorageId) -> None:
    if record is None:
        raise PickleError(f"storage {short_repr(storage.key)} is missing, but its pickle names it")
    if storage.numel > record.nbytes:
        raise PickleError(
            f"storage {short_repr(storage.key)} has {record.nbytes} bytes, expected {storage.numel} elements"
        )


def _load_legacy(file: File) -> tuple[Any, dict[int, ZipEntry], str]:
    raise InputError(f"{file.path}: a file of torch 1.5 or older, expected a zip file")


def _other_format(head: bytes | bytearray) -> str:
    """What a file is that is none of PyTorch's."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "a safetensors file (rename it to .safetensors)"
    if head[:1] == b"\x80":
        return "a plain pickle"
    if head[257:262] == b"ustar":
        return "a tar archive (of torch 0.1, or of other files)"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
        return "a compressed file"
    return "no PyTorch file"


def _state_dict(path: Path, loaded: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The dict of weights in what was loaded, and what is to be said of it."""
    notes: list[str] = []
    where = ""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(loaded, dict):
            raise InputError(
                f"{path}: {where or 'holds'} a {type(loaded).__name__}, expected a dict of tensors"
            )
        if (key := _wrapper(path, loaded)) is None:
            break
        if others := [str(name) for name in loaded if name != key]:
            notes.append(f"{path}: its {short_repr(key)} is taken, {some_names(others)} not")
        loaded, where = loaded[key], f"{short_repr(key)} is"
    state = {name: value for name, value in loaded.items() if _is_tensor(value)}
    for name, value in loaded.items():
        if isinstance(value, dict) and _holds_tensors(value) and not is_extra_state(name):
            raise InputError(
                f"{path}: {short_repr(name)} is a dict of tensors beside tensors, expected one dict"
            )
        if name in state and not isinstance(name, str):
            raise InputError(f"{path}: a tensor has the name {short_repr(name)}, expected a text")
    if not state:
        raise InputError(
            f"{path}: no tensors ({some_names([str(name) for name in loaded])}), expected a dict of them"
        )
    if others := [str(n) for n in loaded if n not in state and not is_extra_state(n)]:
        notes.append(f"{path}: {some_names(others)} no tensor: not merged")
    return state, notes


def _wrapper(path: Path, loaded: Mapping[Any, Any]) -> str | None:
    """The key under which the weights are; None if they are at hand."""
    dicts: list[str] = [n for n, value in loaded.items() if isinstance(value, dict) and _holds_tensors(value)]
    dicts = [
        n
        for n in dicts
        if isinstance(n, str) and not is_extra_state(n) and not any(w in n.lower() for w in _NO_WEIGHTS)
    ]
    usual = [name for name in dicts if name in USUAL]
    plain = [name for name in dicts if name not in _AVERAGES]
    has_tensors = any(map(_is_tensor, loaded.values()))
    for choices in (usual, [] if has_tensors else plain, [] if has_tensors else dicts):
        if len(choices) > 1:
            raise InputError(
                f"{path}: {len(choices)} dicts of tensors ({some_names(choices)}), expected one: save the one that is meant by itself "
                f"(torch.save(torch.load(FILE, weights_only=True)[{choices[0]!r}], 'model.pt'))"
            )
        if choices:
            return choices[0]
    return None


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_tensors(value: Mapping[Any, Any], depth: int = _MAX_WRAPPERS) -> bool:
    """Whether a dict is one of weights: tensors under names, or such a dict under one of the usual names."""
    if any(isinstance(name, str) and _is_tensor(item) for name, item in value.items()):
        return True
    return depth > 0 and any(
        isinstance(item, dict) and _holds_tensors(item, depth - 1)
        for name, item in value.items()
        if name in USUAL or name in _AVERAGES
    )


def _tensor(
    file: File,
    name: str,
    tensor: torch.Tensor,
    held: Mapping[int, ZipEntry],
    specs: dict[TensorSpec, TensorSpec],
) -> TensorRef:
    import torch

    def refused(what: str) -> InputError:
        return InputError(f"{file.path}: tensor {short_repr(name)}: {what}, expected a plain tensor")

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise refused(f"a {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise refused(f"a {str(tensor.layout).removeprefix('torch.')} tensor")
    if tensor.is_conj() or tensor.is_neg():
        raise refused("a view that is conjugated or negated")
    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise InputError(
            f"{file.path}: tensor {short_repr(name)}: {tensor.dtype}, expected a type that safetensors has"
        )
    itemsize, shape = DTYPE_BITS[dtype] // 8, tuple(tensor.shape)
    spec = TensorSpec(dtype, shape)
    spec = specs.setdefault(spec, spec)
    nbytes = math.prod(shape) * itemsize
    if not nbytes:
        return TensorRef(spec, ByteRange(file, file.size, 0))
    storage = tensor.untyped_storage()
    record, strides, offset = held.get(storage._cdata), tensor.stride(), int(tensor.storage_offset())
    if record is None:
        raise refused("it has no storage in the file")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (
        storage.nbytes() != record.nbytes
        or min(offset, *strides, 0) < 0
        or (last + 1) * itemsize > record.nbytes
    ):
        raise refused(f"{storage.nbytes()} bytes in a storage of {record.nbytes}")
    begin = record.begin + offset * itemsize
    if is_row_major(shape, strides):
        return TensorRef(spec, ByteRange(file, begin, nbytes))
    return TensorRef(spec, ByteRange(strided(file, begin, itemsize, shape, strides), 0, nbytes))
