"""Sharded output of training: the .safetensors shards of torch.distributed.checkpoint, read in place, and formats that are not read.

HuggingFaceStorageWriter(save_distributed=True) writes a file for each rank. Its `__metadata__` tells where in the whole tensor the
rank's part of each begins. The other formats are pickles of training states; each has a program that converts it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path

from ..core.dtypes import DTYPE_BITS
from ..core.errors import InputError, short_repr
from ..core.schema import TensorSpec
from .base import TensorRef
from .gathered import Box, gathered
from .reader import File
from .safetensors import read_all_of_header
from .strict_json import are_sizes, parse_json
from .weights import SHARD_OF_RANK

_SHARDING = "DCP_SHARDING_INFO"

_MEGATRON_FILE = re.compile(r"model_optim_rng\.pt|model_rng\.pt")
_DEEPSPEED_FILE = re.compile(
    r"(mp_rank_\d+|zero_pp_rank_\d+_mp_rank_\d+)_(model|optim)_states\.pt|bf16_zero_.*_states\.pt"
)


def read_shards(
    folder: Path, names: Sequence[str]
) -> tuple[dict[str, TensorRef], dict[str, File], list[str]]:
    """Open the shards of all ranks: the whole tensors, the files by name, and what is to be said.

    Raises:
        InputError: If a part of a tensor is missing, or is there twice.
    """
    files: dict[str, File] = {}
    parts: dict[str, list[tuple[TensorSpec, Box]]] = {}
    for name in names:
        path = folder / name
        tensors, files[name], metadata = read_all_of_header(path)
        if _SHARDING not in metadata:
            raise InputError(
                f"{path}: no {_SHARDING} in __metadata__, expected where its parts of tensors begin"
            )
        sharding = parse_json(bytearray(metadata[_SHARDING], "utf-8"), path, _SHARDING)
        for key, (spec, source) in tensors.items():
            entry = sharding.get(key)
            origin = entry.get("saved_offsets") if isinstance(entry, dict) else None
            if not isinstance(origin, list) or not are_sizes(origin) or len(origin) != len(spec.shape):
                raise InputError(
                    f"{path}: tensor {short_repr(key)}: {_SHARDING} has {short_repr(entry)}, expected saved_offsets"
                )
            strides = tuple(prod(spec.shape[k + 1 :]) for k in range(len(spec.shape)))
            box = Box(files[name], source.offset, tuple(origin), spec.shape, strides)
            parts.setdefault(key, []).append((spec, box))
    ranks = {int(match["rank"]) for match in map(SHARD_OF_RANK.fullmatch, names) if match}
    if missing := sorted({*range(1, max(ranks) + 1)} - ranks):
        raise InputError(
            f"{folder}: shards of {len(ranks)} ranks ({names[0]}, …), but none of rank {missing[0]}"
        )
    note = f"{folder / names[0]}: shards of {len(ranks)} ranks are taken as the whole model"
    return {key: _whole(folder, key, found) for key, found in parts.items()}, files, [note]


def _whole(folder: Path, name: str, parts: Sequence[tuple[TensorSpec, Box]]) -> TensorRef:
    """A tensor of which each rank has a part."""
    dtypes = {spec.dtype for spec, _ in parts}
    label = f"{folder}: tensor {short_repr(name)}"
    if len(dtypes) > 1:
        raise InputError(f"{label}: {' and '.join(sorted(dtypes))} in different shards, expected one type")
    boxes = [box for _, box in parts if prod(box.shape)] or [parts[0][1]]
    shape = _tiled(label, boxes)
    spec = TensorSpec(dtypes.pop(), shape)
    bits = DTYPE_BITS[spec.dtype]
    if bits % 8:
        raise InputError(f"{label}: {spec.dtype} in shards, expected whole bytes")
    return TensorRef(spec, gathered(boxes[0].file, shape, bits // 8, boxes))


def _tiled(label: str, boxes: Sequence[Box]) -> tuple[int, ...]:
    """The shape that boxes of a grid make up together."""
    shape = []
    for axis in range(len(boxes[0].shape)):
        extents = {(box.origin[axis], box.shape[axis]) for box in boxes}
        end = 0
        for begin, extent in sorted(extents):
            if begin != end:
                raise InputError(
                    f"{label}: a part begins at {begin} along extent {axis}, expected {end}: a shard is missing, or there twice"
                )
            end += extent
        shape.append(end)
    if sum(prod(box.shape) for box in boxes) != prod(shape) or len({box.origin for box in boxes}) < len(
        boxes
    ):
        raise InputError(
            f"{label}: {len(boxes)} parts that do not make up {tuple(shape)}: a shard is missing, or there twice"
        )
    return tuple(shape)


def conversion_of(path: Path, names: Sequence[str]) -> str | None:
    """What a directory without weights is, if it is output of training in a format that is not read, and what converts it.

    Args:
        path: The directory.
        names: The names in it.
    """
    folders = {name for name in names if (path / name).is_dir()}
    if (
        "latest_checkpointed_iteration.txt" in names
        or any(_MEGATRON_FILE.fullmatch(name) for name in names)
        or any(name.startswith("mp_rank_") for name in folders)
        or {"common.pt", "metadata.json"} <= {*names}
    ):
        return _megatron(path)
    if (
        "zero_to_fp32.py" in names
        or any(name.startswith("global_step") for name in folders)
        or any(_DEEPSPEED_FILE.fullmatch(name) for name in names)
    ):
        return _deepspeed(path)
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return _distcp(path)
    for name in sorted(folders):
        if name.startswith("pytorch_model_fsdp") or (path / name / ".metadata").is_file():
            return _distcp(path / name)
    return None


def refuse_training_state(path: Path) -> None:
    """Raise InputError for a file that is one of several, by its name."""
    if _MEGATRON_FILE.fullmatch(path.name):
        raise InputError(f"{path}: {_megatron(path.parent)}")
    if _DEEPSPEED_FILE.fullmatch(path.name):
        raise InputError(f"{path}: {_deepspeed(path.parent)}")
    if path.suffix == ".distcp":
        raise InputError(f"{path}: {_distcp(path.parent)}")


def _distcp(path: Path) -> str:
    return (
        "sharded output of torch.distributed.checkpoint, whose metadata is a pickle, expected whole tensors: convert it "
        f"(python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt; "
        f"or, of accelerate's FSDP: accelerate merge-weights {path} OUT)"
    )


def _deepspeed(path: Path) -> str:
    is_step = path.name.startswith("global_step")
    folder, tag = (path.parent, f" --tag {path.name}") if is_step else (path, "")
    return (
        "sharded output of DeepSpeed, expected whole tensors: convert it "
        f"(python {folder / 'zero_to_fp32.py'} {folder} OUT --safe_serialization{tag})"
    )


def _megatron(path: Path) -> str:
    return (
        "sharded output of Megatron, expected whole tensors under the names of transformers: convert it (megatron.bridge: "
        f"AutoBridge.from_hf_pretrained(MODEL).export_ckpt('{path}', 'OUT'); or Megatron-LM's tools/checkpoint/convert.py)"
    )
