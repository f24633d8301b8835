"""The weights of one folder: a .safetensors file or pytorch_model.bin, or shards and the index that names them.

What transformers and diffusers load is taken: .safetensors first. A variant (model.fp16.safetensors), shards without an index and
.safetensors files of other names are taken if there is nothing else, and it is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import InputError, short_repr
from ..core.hashing import hash_of
from . import safetensors
from .base import MANIFEST, TensorRef
from .reader import File
from .strict_json import parse_json

# What transformers looks for, in its order, then diffusers, which prefers the index.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The same with .bin comes next.
USUAL = (
    SINGLE,
    INDEX,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
_USUAL_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# A file in this format is weights by its name only if it begins as these do.
_BIN = ".bin"
_BIN_STEMS = ("pytorch_model", "diffusion_pytorch_model")
_INDEX_NAME = re.compile(r"(?P<stem>.+)\.(safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json")
_SHARD_NAME = re.compile(
    r"(?P<stem>.+)[-_](?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<tail>\.[^.]+)?\.(?P<format>safetensors|bin)"
)
# Of torch.distributed.checkpoint (distributed.py).
SHARD_OF_RANK = re.compile(r"shard-(?P<rank>\d{1,9})-model-\d{1,9}-of-\d{1,9}\.safetensors")
# Of a file with another name than the usual ones.
_VARIANT = re.compile(r".+\.(fp16|fp32|bf16|fp8|float16|float32|bfloat16|ema|non_ema)")

# How PEFT, MLX and the library adapters begin the names of an adapter's weights.
ADAPTERS = ("adapter_model.", "adapters.", "adapter.safetensors", "pytorch_adapter.")

# As for the header of a .safetensors file.
_MAX_INDEX_BYTES = 100_000_000

# The bound of Linux.
_MAX_NAME_BYTES = 255


@dataclass
class Weights:
    """The weights of one folder, by names relative to it.

    Attributes:
        tensors: The tensors that count.
        files: The files that hold them.
        index: The index that names the files, if there is one.
        unindexed: Tensors of these files that the index omits.
        notes: What was chosen that is not plain, a line each.
        unmerged: What is in the files and would stay as it is in an output, a line each.
    """

    tensors: dict[str, TensorRef]
    files: dict[str, File]
    index: dict[str, File] = field(default_factory=dict)
    unindexed: dict[str, TensorRef] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unmerged: list[str] = field(default_factory=list)


class _Choice(NamedTuple):
    """A way to load a folder: an index, a single file, or shards that no index names.

    Attributes:
        name: The index, the file or the first shard.
        is_variant: Whether libraries load it only if they are told to.
        shards: The shards.
        is_distributed: Whether shards are those of ranks, each with a part of each tensor.
    """

    name: str
    is_variant: bool
    shards: tuple[str, ...] = ()
    is_distributed: bool = False


def is_adapter(name: str) -> bool:
    return name.startswith(ADAPTERS)


def is_index(name: str) -> bool:
    """Whether a name is that of an index of shards."""
    return name.endswith(".json") and _INDEX_NAME.fullmatch(name) is not None


def is_inside(name: Any) -> bool:
    """Whether a value is a normalized relative path that cannot leave its folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name or name == MANIFEST:
        return False
    parts = name.split("/")
    return not {"", ".", ".."}.intersection(parts) and max(map(len, parts)) <= _MAX_NAME_BYTES


def refuse_links(root: Path, folder: str, named_by: Path) -> None:
    """Refuse a folder of a model that is a symbolic link: it may lead anywhere, also back."""
    if os.path.realpath(root / folder) != os.path.join(os.path.realpath(root), folder):
        raise InputError(
            f"{root / folder}: a symbolic link, but {named_by} names it, expected a folder of the model"
        )


def read_weights(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> Weights | None:
    """Open the weights of a folder.

    Args:
        folder: The folder.
        names: The names in it that are not hidden.
        config: Its config.json, which may name the file.

    Returns:
        The weights, or None if none are there.

    Raises:
        InputError: If they are malformed, or if it is not plain which are meant.
    """
    choice = _choose(folder, names, config)
    if choice is None:
        return None
    if choice.is_distributed:
        from .distributed import read_shards

        tensors, files, notes = read_shards(folder, choice.shards)
        return Weights(tensors, files, notes=notes)
    if choice.shards:
        return _read_shards(folder, choice)
    if choice.name.endswith(".json"):
        found = _read_indexed(folder, choice.name)
    else:
        found = Weights({}, {})
        found.tensors = _read_file(folder, choice.name, found)
    if choice.is_variant:
        found.notes.append(f"{folder / choice.name}: is taken, as no other variant is there")
    elif (index := f"{choice.name}.index.json") in names and choice.name in (SINGLE, "pytorch_model.bin"):
        found.notes.append(f"{folder / choice.name}: is taken, as transformers does, and {index} is ignored")
    return found


def _read_file(folder: Path, name: str, found: Weights) -> dict[str, TensorRef]:
    """Open a file, add it to the weights of its folder, and return its tensors."""
    if name.endswith(_BIN):
        from .pytorch import read_file

        tensors, found.files[name], notes = read_file(folder / name)
        found.notes += notes
    else:
        tensors, found.files[name] = safetensors.read_header(folder / name)
    return tensors


def _choose(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> _Choice | None:
    explicit = config.get("transformers_weights")
    if isinstance(explicit, str) and explicit.endswith((".safetensors", ".safetensors.index.json")):
        if not is_inside(explicit):
            raise InputError(
                f"{folder / 'config.json'}: transformers_weights is {short_repr(explicit)}, expected a file of this directory"
            )
        return _Choice(explicit, False)
    for usual in USUAL:
        if usual in names:
            return _Choice(usual, False)
    indexes, others = _choices(names)
    is_bin = [choice for choice in (*indexes, *others) if _BIN in choice.name]
    if len(is_bin) < len(indexes) + len(others):  # .safetensors files come first
        indexes, others = ([c for c in choices if c not in is_bin] for choices in (indexes, others))
    for choices in (
        [choice for choice in indexes if not choice.is_variant],
        [choice for choice in others if not choice.is_variant],
        # What an index names is no choice of its own.
        indexes + [choice for choice in others if not (indexes and choice.shards)],
    ):
        if len(choices) > 1:
            found = ", ".join(choice.name for choice in choices[:3]) + (", …" if len(choices) > 3 else "")
            raise InputError(
                f"{folder}: {len(choices)} models ({found}), expected {SINGLE}, {INDEX} or one of them alone: "
                "give the file itself, or move the others away"
            )
        if choices:
            return choices[0]
    return None


def _choices(names: Sequence[str]) -> tuple[list[_Choice], list[_Choice]]:
    """All that might be the weights of a folder: the indexes; the single files and the shards."""
    indexes: list[_Choice] = []
    others: list[_Choice] = []
    shards: dict[tuple[str, str, str, str], dict[int, str]] = {}
    of_ranks = [name for name in names if SHARD_OF_RANK.fullmatch(name)]
    if of_ranks:
        others.append(_Choice(of_ranks[0], False, tuple(of_ranks), is_distributed=True))
    for name in names:
        if name in of_ranks or (_BIN in name and not name.startswith(_BIN_STEMS)):
            continue
        if match := _INDEX_NAME.fullmatch(name):
            indexes.append(_Choice(name, bool(match["variant"]) or _is_variant(match["stem"])))
        elif match := _SHARD_NAME.fullmatch(name):
            key = match["stem"], match["count"], match["tail"] or "", match["format"]
            shards.setdefault(key, {})[int(match["number"])] = name
        elif name.endswith((".safetensors", _BIN)) and not is_adapter(name):
            others.append(_Choice(name, _is_variant(name.rpartition(".")[0])))
    for (stem, _, tail, _), found in shards.items():
        names = tuple(found[number] for number in sorted(found))
        others.append(_Choice(names[0], bool(tail) or _is_variant(stem), names))
    return indexes, others


def _is_variant(stem: str) -> bool:
    usual, _, variant = stem.partition(".")
    return (usual in _USUAL_STEMS and variant != "" and "." not in variant) or (
        _VARIANT.fullmatch(stem) is not None
    )


def _read_shards(folder: Path, choice: _Choice) -> Weights:
    """Open shards that no index names: all of them, and no tensor may be in two."""
    count = int(_SHARD_NAME.fullmatch(choice.name)["count"])  # type: ignore[index]
    if len(choice.shards) != count:
        raise InputError(
            f"{folder}: {len(choice.shards)} of {count} shards ({choice.name}, …) and no index, "
            f"expected all of them, {INDEX}, or one file given by itself"
        )
    found = Weights({}, {})
    for shard in choice.shards:
        held = _read_file(folder, shard, found)
        if twice := held.keys() & found.tensors.keys():
            raise InputError(
                f"{folder / shard}: tensor {short_repr(min(twice))} is in another shard, too, and there is no index: "
                f"expected {INDEX} to say which counts"
            )
        found.tensors.update(held)
    found.notes.append(f"{folder / choice.name}: has no index beside it, all {count} shards are taken")
    return found


def _read_indexed(folder: Path, index: str) -> Weights:
    """Open the shards that an index names. It decides which copy of a tensor counts."""
    file, weight_map = read_index(folder / index)
    shards = sorted(set(weight_map.values()))
    _refuse_missing(folder, index, shards)
    found = Weights({}, {}, {index: file})
    holding: dict[str, str] = {}  # the last shard in the order of names, which is what transformers takes
    superseded: list[str] = []
    for shard in shards:
        held = _read_file(folder, shard, found)
        for name, tensor in held.items():
            holding[name] = shard
            if name not in weight_map:
                found.unindexed[name] = tensor
            elif weight_map[name] == shard:
                found.tensors[name] = tensor
            else:
                superseded.append(name)
    for name, shard in weight_map.items():
        if name not in found.tensors:
            raise InputError(f"{folder / shard}: tensor {short_repr(name)} is missing, but {index} names it")
    for name in superseded:
        if holding[name] != weight_map[name]:
            raise InputError(
                f"{folder / index}: tensor {short_repr(name)} is in {weight_map[name]}, but transformers loads the copy in "
                f"{holding[name]}, expected one: remove the other, or let the index name it"
            )
    if superseded:
        found.unmerged.append(
            f"{folder / index}: {_such_as(superseded)} in other shards than it names, too: those copies are not merged"
        )
    if found.unindexed:
        found.unmerged.append(
            f"{folder / index}: {_such_as(found.unindexed)} in its shards without being named: not merged "
            "(transformers loads what a shard holds)"
        )
    return found


def read_index(path: Path) -> tuple[File, dict[str, str]]:
    """Read an index: the file, and which shard holds each tensor."""
    file = File.at(path)
    if file.size > _MAX_INDEX_BYTES:
        raise InputError(f"{path}: {file.size} bytes, expected an index of at most {_MAX_INDEX_BYTES}")
    raw = file.read(0, file.size)
    weight_map = parse_json(raw, path, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map, expected one of tensor names to shard files")
    checked: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in checked:
            plain = shard.removeprefix("./") if isinstance(shard, str) else shard
            if not is_inside(plain):
                raise InputError(
                    f"{path}: tensor {short_repr(name)} is in {short_repr(shard)}, expected a file of this directory"
                )
            checked[shard] = plain
    return replace(file, header=hash_of(raw)), {name: checked[shard] for name, shard in weight_map.items()}


def _refuse_missing(folder: Path, index: str, shards: Iterable[str]) -> None:
    for shard in shards:
        if not os.path.lexists(folder / shard):
            raise InputError(f"{folder / shard}: missing, but named in {index}")
        if "/" in shard:
            refuse_links(folder, os.path.dirname(shard), folder / index)


def _such_as(names: Iterable[str]) -> str:
    first, *others = dict.fromkeys(names)
    return f"{len(others) + 1} tensors ({short_repr(first)}{', …' if others else ''}) are"
