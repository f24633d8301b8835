"""A Hugging Face model directory: weights in .safetensors files, in one or several parts, and the files beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import InputError, short_repr
from .base import Checkpoint, TensorRef
from .contents import ModelSizes, is_weights, may_be_weights
from .parts import CONFIG, find_parts, read_config
from .reader import File
from .side_files import ADAPTER_CONFIG, Globs, SideFiles
from .weights import INDEX, SINGLE, Weights, is_adapter, read_weights


class _Part(NamedTuple):
    """A folder with weights; what it holds has names relative to it."""

    weights: Weights
    config: dict[str, Any]
    names: list[str]


def open_directory(
    path: Path, keep: Sequence[str] = (), drop: Sequence[str] = (), extra_files: bool = True
) -> Checkpoint:
    """Open a model directory.

    Args:
        path: The directory.
        keep: Patterns for files to copy that would be skipped.
        drop: Patterns for files to skip that would be copied.
        extra_files: Whether to look for the files beside the weights.
    """
    kept, dropped = Globs("--keep", keep), Globs("--drop", drop)
    parts = _open_parts(path, kept)
    tensors = _tensors(path, parts)
    weights = {_join(part, n): f for part, held in parts.items() for n, f in held.weights.files.items()}
    indexes = {_join(part, n): f for part, held in parts.items() for n, f in held.weights.index.items()}
    notes = [note for held in parts.values() for note in held.weights.notes]
    side = SideFiles(path)
    if extra_files:
        notes += [note for held in parts.values() for note in held.weights.unmerged]
        model = ModelSizes.of(tensors.values())
        side.find({*weights, *indexes}, kept, dropped, lambda file, name: is_weights(file, name, model))
    else:
        notes += [note for part, held in parts.items() for note in _adapters(path / part, held.names)]
    notes += _links_out(path, [*weights, *indexes, *side.copied, *(_join(part, CONFIG) for part in parts)])
    return Checkpoint(
        path,
        "directory",
        tensors,
        weights,
        {**indexes, **side.copied},
        tuple(side.skipped),
        unindexed={
            _join(part, n): t for part, held in parts.items() for n, t in held.weights.unindexed.items()
        },
        configs={part: held.config for part, held in parts.items()},
        notes=(*notes, *side.notes),
        undecided=tuple(side.undecided),
    )


def _join(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _open_parts(path: Path, kept: Globs) -> dict[str, _Part]:
    """Open the weights of each part of a model."""
    listed = _list(path)
    parts: dict[str, _Part] = {}
    for part, named_by in find_parts(path).items():
        names = [name for name in (_list(path / part) if part else listed) if not name.startswith(".")]
        config = read_config(path / part)
        weights = read_weights(path / part, names, config)
        if weights is not None:
            parts[part] = _Part(weights, config, names)
        elif named_by is not None:
            _refuse_other_weights(path, part, names, named_by, kept)
    if not parts:
        raise _no_weights(path, listed)
    return parts


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None


def _refuse_other_weights(path: Path, part: str, names: Sequence[str], named_by: Path, kept: Globs) -> None:
    """Refuse a part whose weights cannot be merged and would be skipped, unless they are copied as they are."""
    folder = path / part
    if any(map(is_adapter, names)):
        raise _only_adapter(folder)
    others = [name for name in names if _is_other_weights(folder, name)]
    for name in others:
        if not kept.match(_join(part, name)):
            raise InputError(
                f"{folder / name}: other weights than .safetensors, but {named_by.name} names their folder: expected {SINGLE}, "
                f"or --keep '{_join(part, name)}' to copy them as they are"
            )


def _is_other_weights(folder: Path, name: str) -> bool:
    """Whether a file holds weights in another format than .safetensors."""
    return (
        may_be_weights(name)
        and os.path.isfile(folder / name)
        and is_weights(File.at(folder / name), name, ModelSizes.of(()))
    )


def _tensors(path: Path, parts: dict[str, _Part]) -> dict[str, TensorRef]:
    if list(parts) == [""]:
        return parts[""].weights.tensors
    tensors: dict[str, TensorRef] = {}
    for part, held in parts.items():
        named = {_join(part, name): tensor for name, tensor in held.weights.tensors.items()}
        if twice := named.keys() & tensors.keys():
            raise InputError(f"{path / part}: tensor {short_repr(min(twice))} is in another part, too")
        tensors.update(named)
    return tensors


def _links_out(path: Path, names: Sequence[str]) -> list[str]:
    """Tell of files that are links and lead out of a model. In a cache of the hub all lead to its blobs."""
    root = os.path.realpath(path)
    cache, _, _ = f"{root}/".rpartition("/snapshots/")
    inside = [os.path.join(root, "")]
    if os.path.basename(cache).startswith("models--"):
        blobs = os.path.realpath(os.path.join(cache, "blobs"))  # may be on another disk
        inside.append(os.path.join(blobs, ""))
    links = [name for name in dict.fromkeys(names) if os.path.islink(path / name)]
    real = {name: os.path.realpath(path / name) for name in links}
    out = [name for name in links if not real[name].startswith(tuple(inside))]
    if not out:
        return []
    others = f" (and {len(out) - 1} others do)" if len(out) > 1 else ""
    return [
        f"{path / out[0]}: a link that leads out of the model, to {real[out[0]]}{others}: its content is taken"
    ]


def _adapters(folder: Path, names: Sequence[str]) -> list[str]:
    """Say which adapters lie beside the weights of a fine-tuned model."""
    adapters = [name for name in names if is_adapter(name)] if ADAPTER_CONFIG in names else []
    return [f"{folder / name}: an adapter beside the weights, not merged" for name in adapters]


def _only_adapter(folder: Path) -> InputError:
    return InputError(
        f"{folder}: holds LoRA factors, expected whole weights, or an adapter as PEFT saves it, with {ADAPTER_CONFIG}"
    )


def _no_weights(path: Path, names: Sequence[str]) -> InputError:
    """The error of a directory in which no part has weights."""
    from .distributed import conversion_of
    from .pytorch import is_named

    if ADAPTER_CONFIG in names or any(map(is_adapter, names)):
        return _only_adapter(path)
    if not names:
        return InputError(f"{path}: empty directory, expected {SINGLE} or {INDEX}")
    if conversion := conversion_of(path, names):
        return InputError(f"{path}: {conversion}")
    other = next((name for name in names if not name.startswith(".") and may_be_weights(name)), None)
    only = f"only {other} and the like" if other else "no weights"
    hint = f" (or the file itself: {path / other})" if other and is_named(path / other) else ""
    return InputError(f"{path}: {only}, expected {SINGLE}, pytorch_model.bin or an index of shards{hint}")
