"""PyTorch files: what torch.save wrote, of whatever name.

A zip file of torch 1.6 and later, or the format before it: pickles, then the storages one after the other. Of both the pickle is loaded
by torch.load(weights_only=True), and by nothing else; tensors are then read by position, as of any format. torch is imported where
such a file is opened, not before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..core.dtypes import DTYPE_BITS, TORCH_NAMES
from ..core.errors import InputError, short_repr, some_names
from ..core.hashing import hash_of
from ..core.pairing import is_extra_state
from ..core.schema import TensorSpec
from .base import ByteRange, Checkpoint, TensorRef
from .gathered import is_row_major, strided
from .lfs import refuse_pointer
from .reader import File
from .safetensors import PYTORCH_BEGINNINGS
from .weights_only import (
    CutError,
    GlobalError,
    Inspection,
    PickleError,
    StorageId,
    inspect_pickle,
    load_entry,
    load_legacy,
)
from .zip_archive import ZipEntry, read_archive

if TYPE_CHECKING:
    import torch

ZIP, LEGACY = PYTORCH_BEGINNINGS

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")

# What small entries have to be. torch takes versions from 1 to 10.
_SMALL_ENTRIES = {
    "version": (re.compile(rb"([1-9]|10)\n?"), "1 to 10"),
    ".storage_alignment": (re.compile(rb"\d{1,9}"), "a number"),
    "byteorder": (re.compile(b"little"), "little"),
    ".data/serialization_id": (re.compile(rb"[ -~]*"), "a number"),
}
_MAX_SMALL_BYTES = 64

# 200 bytes of a pickle are a tensor's.
_MAX_PICKLE_BYTES = 64 << 20
# Pickles of the old format: the number, its version, the machine, the object, the names of the storages. They are read from the
# beginning, so many bytes at first.
_LEGACY_PICKLES, _LEGACY_PROTOCOL, _FIRST_BYTES = 5, 1001, 1 << 18

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


class Storage(NamedTuple):
    """Where a storage is in a file."""

    begin: int
    end: int


# Storages by their address in memory.
_Held: TypeAlias = Mapping[int, "Storage | ZipEntry"]


@dataclass(frozen=True, eq=False)
class PyTorchFile(File):
    """A PyTorch file as it was when it was inspected. What is written in its place has to be laid out anew.

    Attributes:
        wrapper: The keys under which its weights are, the outermost first.
    """

    wrapper: tuple[str, ...] = ()


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
    return head.startswith(PYTORCH_BEGINNINGS)


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
    if not is_pytorch(head):
        raise InputError(f"{path}: {_other_format(head)}, expected a file that torch.save wrote")
    try:
        loaded, held, header = (_load_zip if head.startswith(ZIP) else _load_legacy)(file)
    except GlobalError as error:
        raise InputError(
            f"{path}: refers to {short_repr(str(error))}, which torch.load(weights_only=True) refuses, so nothing of it was run: expected "
            "tensors in a dict (load it where its code is, and safetensors.torch.save_file(model.state_dict(), 'model.safetensors'))"
        ) from None
    except PickleError as error:
        raise InputError(f"{path}: {error}") from None
    state, wrapper, notes = _state_dict(path, loaded)
    found = PyTorchFile(
        file.path,
        file.size,
        file.identity,
        file.mode,
        header=header,
        changed_ns=file.changed_ns,
        wrapper=wrapper,
    )
    layout = _Layout(found, held)
    tensors = {name: layout.find(name, tensor) for name, tensor in state.items()}
    found.add_tensors(len(layout.ranges), sorted(layout.ranges, key=lambda each: each.start))
    return Opened(tensors, found, tuple(notes))


def _load_zip(file: File) -> tuple[Any, _Held, str]:
    """Load the pickle of a zip file: what it holds, where its storages are, and the hash of what tells that."""
    archive = read_archive(file)
    pickled = archive.read("data.pkl", _MAX_PICKLE_BYTES)
    for name in ("version", *(_SMALL_ENTRIES.keys() & archive.entries.keys())):
        pattern, expected = _SMALL_ENTRIES[name]
        if not pattern.fullmatch(found := archive.read(name, _MAX_SMALL_BYTES)):
            raise InputError(f"{file.path}: {name} {short_repr(found)}, expected {expected}")
    inspected = inspect_pickle(pickled)
    if inspected.end != len(pickled):
        raise InputError(f"{file.path}: {len(pickled) - inspected.end} bytes behind the end of its pickle")
    for storage in inspected.storages:
        _refuse_misfit(archive.entries.get(f"data/{storage.key}"), storage)
    loaded, storages = load_entry(pickled, inspected.storages)
    held = {address: archive.entries[f"data/{each.key}"] for address, each in storages.items()}
    for address, each in storages.items():
        if each.nbytes != held[address].nbytes:
            raise PickleError(
                f"storage {short_repr(each.key)} has {held[address].nbytes} bytes, expected {each.nbytes}"
            )
    return loaded, held, hash_of(pickled, archive.directory)


def _refuse_misfit(entry: ZipEntry | None, storage: StorageId) -> None:
    """Refuse storages that are not in the file before torch makes them."""
    if entry is None:
        raise PickleError(f"storage {short_repr(storage.key)} is missing, but its pickle names it")
    if storage.numel > entry.nbytes:
        raise PickleError(
            f"storage {short_repr(storage.key)} has {entry.nbytes} bytes, expected {storage.numel} elements"
        )


def _load_legacy(file: File) -> tuple[Any, _Held, str]:
    """_load_zip for the old format: five pickles; then of each storage the number of its elements, and these."""
    raw, parts = _read_pickles(file)
    _, _, _, pickled, names = parts
    keys, end = names.value, names.end
    storages = list(dict.fromkeys(pickled.storages))
    listed = keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else None
    if listed is None or sorted(listed) != sorted(each.key for each in storages):
        raise PickleError("other storages than its pickle names")
    if sum(each.numel for each in storages) > file.size:
        raise InputError(f"{file.path}: {file.size} bytes, expected those of all its storages: truncated")
    loaded, made = load_legacy(raw[:end], storages)
    sizes = {each.key: each.nbytes for each in made.values()}
    counts = {each.key: each.numel for each in storages}
    positions: dict[str, Storage] = {}
    for key in listed:
        positions[key] = Storage(end + 8, end + 8 + sizes[key])
        end = positions[key].end
    if end != file.size:
        problem = "truncated" if end > file.size else "bytes left over"
        raise InputError(f"{file.path}: {file.size} bytes, expected {end}: {problem}")
    told = file.read_ranges([range(positions[key].begin - 8, positions[key].begin) for key in listed])
    for k, key in enumerate(listed):
        if (count := int.from_bytes(told[8 * k : 8 * k + 8], "little")) != counts[key]:
            raise InputError(
                f"{file.path}: storage {short_repr(key)} has {count} elements, expected {counts[key]}"
            )
    return (
        loaded,
        {address: positions[each.key] for address, each in made.items()},
        hash_of(raw[: parts[-1].end]),
    )


def _read_pickles(file: File) -> tuple[bytes, list[Inspection]]:
    """The pickles of a legacy file. How long they are is known when they have been followed to their end."""
    size = _FIRST_BYTES
    while True:
        raw = bytes(file.read_head(size))
        parts: list[Inspection] = []
        try:
            for _ in range(_LEGACY_PICKLES):
                parts.append(inspect_pickle(raw, parts[-1].end if parts else 0))
        except CutError:
            if size >= min(file.size, _MAX_PICKLE_BYTES):
                raise
            size *= 8
        else:
            break
    if parts[1].value != _LEGACY_PROTOCOL:
        raise PickleError(f"protocol {short_repr(parts[1].value)}, expected {_LEGACY_PROTOCOL}")
    return raw, parts


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


def _state_dict(path: Path, loaded: Any) -> tuple[dict[str, torch.Tensor], tuple[str, ...], list[str]]:
    """The dict of weights in what was loaded, the keys under which it was, and what is to be said of it."""
    notes: list[str] = []
    where, keys = "", []
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(loaded, dict):
            raise InputError(
                f"{path}: {where or 'what it holds is'} of the type {type(loaded).__name__}, expected a dict of tensors"
            )
        if (key := _wrapper(path, loaded)) is None:
            break
        if others := [str(name) for name in loaded if name != key]:
            notes.append(f"{path}: its {short_repr(key)} is taken, {some_names(others)} not")
        loaded, where = loaded[key], f"{short_repr(key)} is"
        keys.append(key)
    state = {name: value for name, value in loaded.items() if _is_tensor(value)}
    if not state:
        raise InputError(
            f"{path}: no tensors ({some_names([str(name) for name in loaded])}), expected a dict of them"
        )
    for name, value in loaded.items():
        if isinstance(value, dict) and _holds_tensors(value) and not is_extra_state(name):
            raise InputError(
                f"{path}: {short_repr(name)} is a dict of tensors beside tensors, expected one dict"
            )
        if name in state and not _is_text(name):
            raise InputError(f"{path}: a tensor has the name {short_repr(name)}, expected a text")
    if others := [str(n) for n in loaded if n not in state and not is_extra_state(n)]:
        notes.append(f"{path}: {some_names(others)} no tensor: not merged")
    if lost := [
        str(n) for n, value in loaded.items() if value is not None and n not in state and is_extra_state(n)
    ]:
        notes.append(f"{path}: {some_names(lost)} no tensor: an output does not have it")
    return state, tuple(keys), notes


def _is_text(name: Any) -> bool:
    """Whether a name is a text that UTF-8 can encode, as other formats do."""
    return isinstance(name, str) and not any("\ud800" <= character <= "\udfff" for character in name)


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


class _Layout:
    """Where the tensors of a file are.

    Args:
        file: The file.
        held: Its storages.

    Attributes:
        ranges: The bytes from the first to the last of each tensor.
    """

    def __init__(self, file: File, held: _Held) -> None:
        self.file, self.ranges = file, set[range]()
        self._held = held
        self._specs: dict[TensorSpec, TensorSpec] = {}
        self._gathered: dict[tuple[int, TensorSpec, tuple[int, ...]], ByteRange] = {}

    def find(self, name: str, tensor: torch.Tensor) -> TensorRef:
        """Find a tensor. Two that are the same elements of a storage have equal sources."""
        label = f"{self.file.path}: tensor {short_repr(name)}"
        spec = _spec_of(tensor, label)
        spec = self._specs.setdefault(spec, spec)
        itemsize = DTYPE_BITS[spec.dtype] // 8
        nbytes = spec.numel * itemsize
        if not nbytes:
            return TensorRef(spec, ByteRange(self.file, self.file.size, 0))
        # Not tensor.stride(): a pickle may have given the tensor an attribute of that name.
        held = self._held.get(type(tensor).untyped_storage(tensor)._cdata)
        strides = tuple(map(int, type(tensor).stride(tensor)))
        offset = int(type(tensor).storage_offset(tensor))
        last = offset + sum((n - 1) * stride for n, stride in zip(spec.shape, strides, strict=True))
        if held is None or min(offset, *strides, 0) < 0 or (last + 1) * itemsize > held.end - held.begin:
            raise InputError(f"{label}: is not within a storage of the file, expected its numbers there")
        begin = held.begin + offset * itemsize
        self.ranges.add(range(begin, held.begin + (last + 1) * itemsize))
        if is_row_major(spec.shape, strides):
            return TensorRef(spec, ByteRange(self.file, begin, nbytes))
        key = begin, spec, strides
        if key not in self._gathered:
            self._gathered[key] = strided(self.file, begin, itemsize, spec.shape, strides)
        return TensorRef(spec, self._gathered[key])


def _spec_of(tensor: torch.Tensor, label: str) -> TensorSpec:
    """The type and shape of a tensor; one that is more or less than numbers in memory is refused."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        problem = f"a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        problem = f"a {str(tensor.layout).removeprefix('torch.')} tensor"
    elif torch.Tensor.is_conj(tensor) or torch.Tensor.is_neg(tensor):
        problem = "a view that is conjugated or negated"
    elif (dtype := _DTYPES.get(str(tensor.dtype).removeprefix("torch."))) is None:
        raise InputError(f"{label}: {tensor.dtype}, expected a type that safetensors has")
    else:
        return TensorSpec(dtype, tuple(tensor.shape))
    raise InputError(f"{label}: {problem}, expected a plain tensor")
