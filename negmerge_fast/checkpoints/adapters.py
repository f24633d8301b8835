"""LoRA adapters on disk, as PEFT saves them: adapter_config.json, and adapter_model.safetensors or .bin beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.dtypes import FLOAT_SIZES, INTEGER_DTYPES
from ..core.errors import InputError, short_repr, some_names
from ..core.hashing import hash_of
from .base import Checkpoint, TensorRef
from .reader import File, Reader
from .safetensors import read_header
from .side_files import ADAPTER_CONFIG
from .strict_json import parse_json
from .weights import is_adapter, is_index

if TYPE_CHECKING:
    import numpy as np

    from .lora import Change

KIND = "adapter"
_SINGLE, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"

_MAX_CONFIG_BYTES = 1 << 24
# Elements that are compared at a time.
_COMPARED = 1 << 18


def is_adapter_directory(path: Path) -> bool:
    """Whether a directory holds an adapter and no whole weights, or folders with adapters only."""
    names = _list(path)
    if ADAPTER_CONFIG in names:
        return not any(map(_is_whole, names))
    if any(_is_whole(name) or is_adapter(name) or name.endswith(".json") for name in names):
        return False
    return bool(_folders(path, names))


def _is_whole(name: str) -> bool:
    """Whether a file holds weights of a whole model, as far as its name tells, or names such files."""
    if is_index(name):
        return True
    return (name.endswith(".safetensors") and not is_adapter(name)) or name.startswith(
        ("pytorch_model", "diffusion_pytorch_model")
    )


def _list(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _folders(path: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if os.path.isfile(path / name / ADAPTER_CONFIG)]


def open_directory(path: Path) -> Checkpoint:
    """Open the adapter of a directory.

    Raises:
        InputError: If there is none, or it is none that is read.
    """
    names = _list(path)
    folders = _folders(path, names)
    if ADAPTER_CONFIG not in names:
        raise InputError(
            f"{path}: adapters in folders ({some_names(folders)}), expected one of them: {path / folders[0]}"
        )
    if weights := next((name for name in (_SINGLE, _PICKLE) if name in names), None):
        opened = _open(path / weights, path)
    else:
        found = [name for name in names if is_adapter(name)]
        raise InputError(
            f"{path}: {f'only {found[0]}' if found else 'no weights'} beside {ADAPTER_CONFIG}, expected {_SINGLE}"
        )
    if folders:
        notes = (
            *opened.notes,
            f"{path}: the adapters in its folders ({some_names(folders)}) are others, and not merged",
        )
        opened = replace(opened, notes=notes)
    return opened


def is_adapter_file(path: Path) -> bool:
    """Whether a file has an adapter's configuration beside it, and an adapter's name, or factors as PEFT names them."""
    if not os.path.isfile(path.parent / ADAPTER_CONFIG):
        return False
    from .lora import has_factors

    return is_adapter(path.name) or has_factors(_read(path)[0])


def open_file(path: Path) -> Checkpoint:
    """Open an adapter by the file of its weights."""
    return _open(path, path)


def _read(weights: Path) -> tuple[dict[str, TensorRef], File, tuple[str, ...]]:
    """The tensors of a file, the file, and notes of it."""
    if weights.suffix == ".safetensors":
        return (*read_header(weights), ())
    from .pytorch import read_file

    return read_file(weights)


def _open(weights: Path, path: Path) -> Checkpoint:
    from .lora import Product, read_adapter  # slow to import, for few checkpoints

    held, file, notes = _read(weights)
    config, config_file = _read_config(weights.parent / ADAPTER_CONFIG)
    adapter = read_adapter(config, held, lambda tensor: tensor.spec.shape, str(path))
    for change in (
        *adapter.changes.values(),
        *(Product(*level, 1, 1.0) for each in adapter.nested.values() for level in each.levels),
    ):
        _refuse_integers(weights, held, change)
    # Counters are copied from the base.
    changes = {name: change for name, change in adapter.changes.items() if not _is_counter(change)}
    return Checkpoint(
        path,
        KIND,
        held,
        {weights.name: file},
        {ADAPTER_CONFIG: config_file},
        notes=(*notes, *adapter.notes),
        undecided=(f"{path}: a LoRA adapter, expected a whole model as the base",),
        adapter=replace(adapter, changes=changes),
    )


def _refuse_integers(path: Path, held: Mapping[str, TensorRef], change: object) -> None:
    """Refuse factors that are no floating-point numbers. A whole tensor may be an integer: a counter of BatchNorm."""
    from .lora import Product, Shift

    values = change[:2] if isinstance(change, Product) else change[:1] if isinstance(change, Shift) else ()
    for value in values:
        if value.spec.dtype not in FLOAT_SIZES:
            name = next(name for name, tensor in held.items() if tensor is value)
            raise InputError(
                f"{path}: tensor {short_repr(name)}: dtype {value.spec.dtype}, expected {', '.join(FLOAT_SIZES)}"
            )


def _is_counter(change: Change[TensorRef]) -> bool:
    from .lora import Replacement

    return isinstance(change, Replacement) and change.value.spec.dtype in INTEGER_DTYPES


def _read_config(path: Path) -> tuple[dict[str, Any], File]:
    file = File.at(path)
    if file.size > _MAX_CONFIG_BYTES:
        raise InputError(
            f"{path}: {file.size} bytes, expected a configuration of at most {_MAX_CONFIG_BYTES}"
        )
    raw = file.read(0, file.size)
    return parse_json(raw, path, "configuration"), replace(file, header=hash_of(raw))


def have_equal_numbers(first: TensorRef, second: TensorRef, reader: Reader) -> bool:
    """Whether two tensors of a shape have the same numbers, whatever their type.

    PEFT saves an embedding beside factors of it, in the type that the model had when it was trained.
    """
    if first.spec.dtype not in FLOAT_SIZES or second.spec.dtype not in FLOAT_SIZES:
        return first.spec.dtype == second.spec.dtype
    import numpy as np  # which opening a checkpoint does not need

    for begin in range(0, first.numel, _COMPARED):
        end = min(begin + _COMPARED, first.numel)
        one, other = (_numbers(reader, each, begin, end) for each in (first, second))
        if not np.array_equal(one, other, equal_nan=True):
            return False
    return True


def _numbers(
    reader: Reader, tensor: TensorRef, begin: int, end: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    import numpy as np

    size = FLOAT_SIZES[tensor.spec.dtype]
    data = bytearray((end - begin) * size)
    tensor.source.read_into(reader, memoryview(data), begin * size)
    if tensor.spec.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, f"<f{size}").astype(np.float64)
