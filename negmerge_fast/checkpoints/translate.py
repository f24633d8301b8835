"""Bases that are not laid out as the output will be: a checkpoint whose files are those of the output, computed from the base's.

What is planned, merged, resumed and verified is then an ordinary base, which the output mirrors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import NamedTuple

from ..core.dtypes import DTYPE_BITS
from ..core.errors import InputError, short_repr
from ..core.hashing import hash_of
from . import zip_layout
from .base import PT_SUFFIXES, ByteRange, Checkpoint, Format, TensorRef
from .composed import ComposedFile
from .pytorch import PyTorchFile
from .reader import File
from .strict_json import parse_json
from .weights import SHARD_OF_RANK

_SAFETENSORS = ".safetensors"
# As the library orders tensors: wider types first, so that all are aligned; then by name.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3",
    "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
_INDEX = re.compile(r"(?P<stem>.+)\.(safetensors|bin)\.index(?P<variant>\.[^.]+)?\.json")
# Of the files of transformers, which have another stem in each format.
_SUFFIXES = {"safetensors": _SAFETENSORS, "pt": ".bin"}
_STEMS = {"safetensors": ("pytorch_model", "model"), "pt": ("model", "pytorch_model")}
_MAX_NAMED = 3
# As transformers cuts what it saves, and the hub advises.
_MAX_SHARD_BYTES = 5 * 10**9


def translation(checkpoint: Checkpoint, wanted: Format) -> Checkpoint:
    """A checkpoint as a base of an output in another format (formats.translate)."""
    return _Translation(checkpoint, wanted).checkpoint()


class _Output(NamedTuple):
    """A file of weights of the output.

    Attributes:
        file: The file of the origin in whose place it is.
        part: What is before the names of its tensors: the part of the model that it is of, and a slash.
        tensors: Its tensors, by their names in it.
    """

    file: File
    part: str
    tensors: dict[str, TensorRef]


class _Translation:
    """A checkpoint that is translated to a format.

    Attributes:
        names: The names of files of the output, by those of the files that they are in place of.
    """

    def __init__(self, origin: Checkpoint, wanted: Format) -> None:
        self.origin, self.format = origin, wanted
        names = [name for name in origin.weights if not _is_of_rank(name)]
        self.names = {name: _name(name, wanted) for name in names}
        if twice := [new for new, count in Counter(self.names.values()).items() if count > 1]:
            raise InputError(f"{origin.path}: two files would become {twice[0]}, expected one")
        for part, config in origin.configs.items():
            explicit = config.get("transformers_weights")
            if origin.is_directory and isinstance(explicit, str) and wanted == "pt":
                raise InputError(
                    f"{origin.path / part / 'config.json'}: transformers_weights is {short_repr(explicit)}, which is copied, "
                    "and the output has files of other names, expected --format auto"
                )

    def checkpoint(self) -> Checkpoint:
        origin = self.origin
        outputs, indexes = self._outputs()
        weights: dict[str, File] = {}
        placed: dict[str, TensorRef] = {}
        tied: set[str] = set()
        for name, (file, part, tensors) in outputs.items():
            if self._is_as_wanted(name, file, tensors):  # of another part
                weights[name], found = file, tensors
            else:
                kept, aliases = _untie(tensors, file)
                weights[name], found = self._lay_out(file, kept, aliases)
                tied.update(part + alias for alias in aliases)
            placed.update({part + n: tensor for n, tensor in found.items()})
        extra_files = {**self._extra_files(tied), **indexes}
        if twice := weights.keys() & extra_files.keys():
            raise InputError(
                f"{origin.path / min(twice)}: would be copied, and the output has a file of this name, "
                f"expected --drop '{min(twice)}'"
            )
        return replace(
            origin,
            tensors={n: placed[n] for n in origin.tensors if n in placed},
            weights=weights,
            extra_files=extra_files,
            unindexed={n: placed[n] for n in origin.unindexed if n in placed},
            origin=origin,
            format=self.format,
        )

    def _outputs(self) -> tuple[dict[str, _Output], dict[str, File]]:
        """The files of weights of the output; and indexes of those that were in parts for ranks."""
        origin = self.origin
        of_path = {file.path: name for name, file in origin.weights.items()}
        held: dict[str, dict[str, TensorRef]] = {name: {} for name in self.names}
        of_ranks: dict[str, TensorRef] = {}
        for name, tensor in {**origin.tensors, **origin.unindexed}.items():
            file = of_path[tensor.source.file.path]
            if file in held:
                held[file][name.removeprefix(self._prefix(file))] = tensor
            else:
                of_ranks[name] = tensor
        outputs = {
            self.names[name]: _Output(origin.weights[name], self._prefix(name), tensors)
            for name, tensors in held.items()
        }
        if not of_ranks:
            return outputs, {}
        whole, indexes = self._consolidated(of_ranks)
        return {**outputs, **whole}, indexes

    def _consolidated(self, tensors: Mapping[str, TensorRef]) -> tuple[dict[str, _Output], dict[str, File]]:
        """Files in place of those that ranks wrote, each of them a part of every tensor; and their index, if there are several."""
        like = next(file for name, file in self.origin.weights.items() if _is_of_rank(name))
        folder = PurePosixPath(next(name for name in self.origin.weights if _is_of_rank(name))).parent
        part = self._prefix(str(folder / "x"))
        shards: list[dict[str, TensorRef]] = []
        remaining = 0
        for name, tensor in tensors.items():
            if tensor.source.nbytes > remaining or not shards:
                shards.append({})
                remaining = _MAX_SHARD_BYTES
            shards[-1][name.removeprefix(part)] = tensor
            remaining -= tensor.source.nbytes
        stem, suffix = _STEMS[self.format][1], _SUFFIXES[self.format]
        if len(shards) == 1:
            return {str(folder / f"{stem}{suffix}"): _Output(like, part, shards[0])}, {}
        names = [f"{stem}-{k:05}-of-{len(shards):05}{suffix}" for k in range(1, len(shards) + 1)]
        total = sum(tensor.source.nbytes for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: file for file, shard in zip(names, shards, strict=True) for n in shard},
        }
        return (
            {
                str(folder / file): _Output(like, part, shard)
                for file, shard in zip(names, shards, strict=True)
            },
            {str(folder / f"{stem}{suffix}.index.json"): _json_file(like, index)},
        )

    def _prefix(self, name: str) -> str:
        """What is before the names of tensors that a file holds: the part that it is of, and a slash."""
        parts = [part for part in self.origin.configs if part and name.startswith(f"{part}/")]
        return f"{max(parts, key=len)}/" if parts else ""

    def _is_as_wanted(self, name: str, file: File, tensors: Mapping[str, TensorRef]) -> bool:
        """Whether a file may stay as it is, beside others that may not."""
        return (
            self.format == "safetensors"
            and self.origin.weights.get(name) is file
            and all(tensor.source.file is file for tensor in tensors.values())
        )

    def _lay_out(
        self, file: File, kept: Mapping[str, TensorRef], aliases: Mapping[str, str]
    ) -> tuple[File, dict[str, TensorRef]]:
        if self.format == "pt":
            wrapper = file.wrapper if isinstance(file, PyTorchFile) else ()
            return zip_layout.lay_out(file, kept, aliases, wrapper)
        return lay_out(file, kept, aliases)

    def _extra_files(self, tied: Collection[str]) -> dict[str, File]:
        """The files beside the weights, with indexes of the new ones."""
        found = {}
        for name, file in self.origin.extra_files.items():
            match = _INDEX.fullmatch(PurePosixPath(name).name) if file.header else None
            if match:
                found[_index_name(name, match, self.format)] = self._index(name, file, tied)
            else:
                found[name] = file
        return found

    def _index(self, name: str, file: File, tied: Collection[str]) -> File:
        index = parse_json(file.read(0, file.size), file.path, "index")
        folder = str(PurePosixPath(name).parent)
        prefix = "" if folder == "." else f"{folder}/"
        omitted = tied if self.format == "safetensors" else ()
        index["weight_map"] = weight_map = {
            name: self.names[prefix + shard].removeprefix(prefix)
            for name, shard in index["weight_map"].items()
            if prefix + name not in omitted
        }
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            held = self.origin.tensors
            sources = {
                held[prefix + n].source for n in weight_map if prefix + n in held
            }  # what is tied counts once
            index["metadata"]["total_size"] = sum(source.nbytes for source in sources)
        return _json_file(file, index)


def _is_of_rank(name: str) -> bool:
    return bool(SHARD_OF_RANK.fullmatch(PurePosixPath(name).name))


def _json_file(like: File, value: object) -> File:
    content = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    return replace(ComposedFile.of(like, [content]), header=hash_of(content))


def format_notes(translated: Checkpoint) -> list[str]:
    """What a user should know of an output in another format than the base's, a line each. None of one that mirrors it."""
    origin = translated.origin
    if origin is None:
        return []
    became = [(old, new) for old, new in zip(origin.weights, translated.weights, strict=False) if old != new]
    if not origin.is_directory:
        found = [
            f"{origin.path}: the output is a {'PyTorch' if translated.format == 'pt' else 'safetensors'} file"
        ]
    else:
        more = f" (of {len(became)} files)" if len(became) > 1 else ""
        found = [f"{origin.path}: {old} becomes {new}{more}" for old, new in became[:1]]
    if translated.format == "safetensors":
        tied = {
            n: owner
            for file in translated.weights.values()
            if file.is_computed
            for n, owner in file.aliases.items()
        }
        named = ", ".join(
            f"{short_repr(n)} is {short_repr(owner)}" for n, owner in [*tied.items()][:_MAX_NAMED]
        )
        more = f" and {len(tied) - _MAX_NAMED} more" if len(tied) > _MAX_NAMED else ""
        found += [f"{origin.path}: tied weights are written once: {named}{more}"] if tied else []
    return found


def _name(name: str, wanted: Format) -> str:
    """The name of a file of weights in a format."""
    path = PurePosixPath(name)
    if (path.suffix == _SAFETENSORS) == (wanted == "safetensors"):
        return name
    stem = path.name.removesuffix(path.suffix)
    if path.suffix == ".tar" and PurePosixPath(stem).suffix in PT_SUFFIXES:
        stem = stem.rpartition(".")[0]
    return str(path.with_name(_stem(stem, wanted) + _SUFFIXES[wanted]))


def _stem(stem: str, wanted: Format) -> str:
    """pytorch_model-00001-of-00002 of model-00001-of-00002, or the other way round; other stems stay as they are."""
    old, new = _STEMS[wanted]
    return new + stem.removeprefix(old) if re.match(rf"{old}([-_.]|$)", stem) else stem


def _index_name(name: str, match: re.Match[str], wanted: Format) -> str:
    index = f"{_stem(match['stem'], wanted)}{_SUFFIXES[wanted]}.index{match['variant'] or ''}.json"
    return str(PurePosixPath(name).with_name(index))


def _untie(tensors: Mapping[str, TensorRef], file: File) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Tensors of which each has bytes of its own, and the names of the others: of which they are.

    Of several names of the same bytes the first one is kept, as transformers does: embeddings, not the head that is tied to them.
    """
    kept: dict[str, TensorRef] = {}
    owners: dict[TensorRef, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(tensor, name) if tensor.source.nbytes else name
        if owner == name:
            kept[name] = tensor
        else:
            aliases[name] = owner
    return kept, {**aliases, **{n: o for n, o in file.aliases.items() if o in kept and n not in kept}}


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a lone surrogate, which pickles may have
        return False
    return True


def lay_out(
    like: File, tensors: Mapping[str, TensorRef], aliases: Mapping[str, str]
) -> tuple[ComposedFile, dict[str, TensorRef]]:
    """Lay out a safetensors file, as safetensors.torch.save_file writes it.

    Args:
        like: The file in whose place it is.
        tensors: The tensors by name.
        aliases: Further names of some of them, which go into the metadata.
    """
    for name in (*tensors, *aliases):
        if name == "__metadata__" or not _is_text(name):
            raise InputError(
                f"{like.path}: a tensor {short_repr(name)}, a name that a safetensors file cannot have"
            )
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].spec.dtype), item[0].encode()))
    header: dict[str, object] = {"__metadata__": {**dict(sorted(aliases.items())), "format": "pt"}}
    at = 0
    for name, (spec, source) in ordered:
        if source.nbytes * 8 != spec.numel * DTYPE_BITS[spec.dtype]:
            raise InputError(
                f"{like.path}: tensor {short_repr(name)}: {source.nbytes} bytes, expected those of its elements"
            )
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + source.nbytes],
        }
        at += source.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    file = ComposedFile.of(like, [start, *(tensor.source for _, tensor in ordered)], aliases=dict(aliases))
    placed, at = {}, len(start)
    for name, (spec, source) in ordered:
        placed[name] = TensorRef(spec, ByteRange(file, at, source.nbytes))
        at += source.nbytes
    return file, placed
