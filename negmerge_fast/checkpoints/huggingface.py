"""A Hugging Face model directory: one .safetensors file, or shards with an index, and the files beside them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..core.errors import InputError, short_repr
from ..core.hashing import hash_of
from .base import MANIFEST, Checkpoint, TensorRef
from .reader import File
from .safetensors import read_header
from .strict_json import parse_json

# The names that transformers looks for, in its order; another name is taken if it is the only one.
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"

# Weights in other formats, and archives, are not copied: they may contain what the merged weights forgot. Any part of a
# name behind a dot tells them: model.onnx.data, model.ckpt.index, model.safetensors.bak.
_OTHER_WEIGHTS = frozenset({
    "safetensors", "bin", "pt", "pth", "ckpt", "h5", "hdf5", "keras", "msgpack", "onnx", "onnx_data", "ort", "gguf",
    "ggml", "npy", "npz", "pkl", "pickle", "joblib", "tflite", "mlmodel", "mlpackage", "ot", "pdparams", "nemo",
    "distcp", "engine", "zip", "tar", "tgz", "gz", "bz2", "xz", "zst", "7z",
})  # fmt: skip

# As for the header of a .safetensors file.
_MAX_INDEX_BYTES = 100_000_000

# The bound of Linux.
_MAX_NAME_BYTES = 255

# Levels of directories below that of a model.
_MAX_DEPTH = 64


def open_directory(path: Path) -> Checkpoint:
    """Open a model directory."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if "adapter_config.json" in names:
        raise InputError(
            f"{path}: holds LoRA factors, expected whole weights: merge each adapter into its model first"
        )
    found = _weights_name(path, names)
    if found.endswith(_INDEX_SUFFIX):
        tensors, weights, index = _read_shards(path, found, names)
        extra_files = {found: index}
    else:
        tensors, file = read_header(path / found)
        weights, extra_files = {found: file}, {}
    skipped_files = _find_extra_files(path, weights, extra_files)
    return Checkpoint(path, "directory", tensors, weights, extra_files, tuple(skipped_files))


def _weights_name(path: Path, names: list[str]) -> str:
    for usual in (_SINGLE, _INDEX):
        if usual in names:
            return usual
    for suffix in (_INDEX_SUFFIX, ".safetensors"):
        fitting = [name for name in names if name.endswith(suffix)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InputError(
                f"{path}: {len(fitting)} files end in {suffix} ({', '.join(fitting[:3])}, …), expected {_INDEX}"
            )
    if not names:
        raise InputError(f"{path}: empty directory, expected {_SINGLE} or {_INDEX}")
    other = next(filter(_is_other_weights, names), None)
    only = f"only {other} and the like" if other else "no weights"
    raise InputError(f"{path}: {only}, expected {_SINGLE} or {_INDEX}")


def _read_shards(
    path: Path, index: str, present: list[str]
) -> tuple[dict[str, TensorRef], dict[str, File], File]:
    """Return the tensors, the shards and the index, given the names in the directory."""
    file = File.at(path / index)
    if file.size > _MAX_INDEX_BYTES:
        raise InputError(f"{file.path}: {file.size} bytes, expected an index of at most {_MAX_INDEX_BYTES}")
    raw = file.read(0, file.size)
    weight_map = parse_json(raw, file.path, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file.path}: no weight_map, expected one of tensor names to shard files")
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or shard in ("", ".", "..", MANIFEST)
            or "/" in shard
            or "\\" in shard
            or "\0" in shard
            or len(shard) > _MAX_NAME_BYTES
        ):
            raise InputError(
                f"{file.path}: tensor {short_repr(name)} is in {short_repr(shard)}, expected a file of this directory"
            )
    tensors: dict[str, TensorRef] = {}
    weights: dict[str, File] = {}
    if missing := set(weight_map.values()).difference(present):
        raise InputError(f"{path / min(missing)}: missing, but named in {index}")
    for shard in sorted(set(weight_map.values())):
        held, weights[shard] = read_header(path / shard)
        for name, tensor in held.items():
            if weight_map.get(name) != shard:
                raise InputError(
                    f"{path / shard}: tensor {short_repr(name)} is not in {index}, expected {index} to name it there"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(f"{path / shard}: tensor {short_repr(name)} is missing, but {index} names it")
    return tensors, weights, replace(file, header=hash_of(raw))


def _is_other_weights(name: str) -> bool:
    return not _OTHER_WEIGHTS.isdisjoint(name.lower().split(".")[1:])


def _find_extra_files(path: Path, weights: dict[str, File], extra_files: dict[str, File]) -> list[str]:
    """Add the files that belong to the model but are no weights to extra_files; return the names of the rest."""
    skipped_files: list[str] = []
    pending = [""]
    while pending:
        folder = pending.pop()
        if folder.count("/") > _MAX_DEPTH:
            raise InputError(f"{path / folder}: expected at most {_MAX_DEPTH} directories in each other")
        try:
            with os.scandir(path / folder) as found:
                entries = sorted(found, key=lambda e: e.name)
            for entry in entries:
                name = folder + entry.name
                if name in weights or name in extra_files:
                    continue
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    pending.append(name + "/")
                # os.path.isfile is False for a link that leads to itself; the entry's method would raise.
                elif entry.name.startswith(".") or _is_other_weights(entry.name) or not os.path.isfile(entry):
                    skipped_files.append(name)
                elif name != MANIFEST:
                    extra_files[name] = File.at(path / name)
        except OSError as error:
            raise InputError(f"{path / folder}: {error.strerror}") from None
    return skipped_files
