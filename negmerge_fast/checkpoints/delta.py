"""The files of a consensus delta (core/delta.py): .safetensors with two tensors for each tensor of the base.

    NAME.mask   U8[mask_bytes(numel)]      which elements agree
    NAME.mean   F64, F32 or BF16[count]    the means of these, in their order

What else has to be known is in `__metadata__`, as JSON: of what base it is, of how many models, by which rule; and of each tensor in
the file its dtype and shape in the base, the type of its arithmetic, what was counted, and the hash of a sample of the base.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..core.delta import FORMAT, mask_bytes
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, short_repr
from ..core.rule import Rule
from ..core.schema import TensorSpec
from ..methods.base import Method
from .base import ByteRange, TensorRef
from .reader import File
from .safetensors import read_all_of_header
from .strict_json import is_shape, parse_json
from .weights import read_index

VERSION = "1"
SINGLE, INDEX = "delta.safetensors", "delta.safetensors.index.json"
MASK, MEAN = ".mask", ".mean"
_SHARD = re.compile(r".*-\d+-of-(?P<count>\d{1,9})\.safetensors")

# Types that means may have for each type of the arithmetic.
MEANS_DTYPES = {"F64": ("F64", "BF16"), "F32": ("F32", "BF16")}

# Bytes in the middle of each tensor of the base: a delta is of a base with these.
SAMPLE_BYTES = 64


class TensorInfo(NamedTuple):
    """What is recorded of a tensor of the base.

    Attributes:
        spec: Its dtype and shape.
        arithmetic: F64 or F32.
        nonfinite: Elements that are not in the mask as something was not finite.
        vetoed_by_zero: Elements that zeros alone keep from the mask.
        sample: The hash of the bytes in its middle (sample_range).
        masked: Elements that only a weight of zero keeps from the mask; None of NegMerge without weights.
    """

    spec: TensorSpec
    arithmetic: str
    nonfinite: int
    vetoed_by_zero: int
    sample: str
    masked: int | None = None

    @property
    def numel(self) -> int:
        return self.spec.numel

    def to_json(self) -> dict[str, Any]:
        (dtype, shape), fields = self.spec, self._asdict()
        del fields["spec"]
        if self.masked is None:
            del fields["masked"]
        return {"dtype": dtype, "shape": list(shape), **fields}


class DeltaTensor(NamedTuple):
    """A tensor of the base, and where its delta is."""

    info: TensorInfo
    mask: ByteRange
    means: TensorRef

    @property
    def agreed(self) -> int:
        """How many elements are in the mask."""
        return self.means.numel


@dataclass(frozen=True)
class DeltaInfo:
    """What is recorded of a delta as a whole.

    Attributes:
        models: The number of models.
        min_agreement: Of their rule.
        inputs: Whether they were "finetuned" or "task_vectors".
        base: The last part of the base's path, and size, header and sample of each of its files by name, as a manifest has them. Empty
            of a delta that was made in memory.
        method: The method, as Method.to_json lists it; None of NegMerge.
        weights: The last part of the path of what had a weight for each element, empty of what was in memory; None if there were none.
    """

    models: int
    min_agreement: float
    inputs: str
    base: Mapping[str, Any]
    method: Mapping[str, Any] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class DeltaCheckpoint:
    """A delta on disk, opened without reading its masks and means.

    Attributes:
        path: The directory or file.
        info: What is recorded of it as a whole.
        tensors: Its tensors, by their names in the base.
        files: The files that hold them, and their index, by names relative to path.
    """

    path: Path
    info: DeltaInfo
    tensors: dict[str, DeltaTensor]
    files: dict[str, File]

    @property
    def elements(self) -> int:
        return sum(tensor.info.numel for tensor in self.tensors.values())

    @property
    def agreed(self) -> int:
        """How many elements are in its masks."""
        return sum(tensor.agreed for tensor in self.tensors.values())


def sample_range(nbytes: int) -> range:
    """The bytes of a tensor whose hash is recorded: all of a short one, else SAMPLE_BYTES in its middle."""
    begin = max(nbytes - SAMPLE_BYTES, 0) // 2
    return range(begin, min(begin + SAMPLE_BYTES, nbytes))


def metadata_of(info: DeltaInfo, tensors: Mapping[str, TensorInfo], version: str) -> dict[str, str]:
    """The `__metadata__` of a file that holds these tensors of a delta. version: of the program that writes it."""
    rule = {"min_agreement": info.min_agreement, "inputs": info.inputs}
    given = {"method": info.method, "weights": info.weights}
    return {
        "format": FORMAT,
        "version": VERSION,
        "negmerge_fast": version,
        "models": json.dumps(info.models),
        "rule": json.dumps(rule | {key: value for key, value in given.items() if value is not None}),
        "base": json.dumps(info.base),
        "tensors": json.dumps({name: each.to_json() for name, each in tensors.items()}),
    }


def is_delta(path: Path) -> bool:
    """Whether a path is the directory of a delta, or a .safetensors file that calls itself one."""
    try:
        if path.is_dir():
            return any(map(is_delta, sorted(path.glob("delta*.safetensors"))[:1]))
        return path.suffix == ".safetensors" and read_all_of_header(path)[2].get("format") == FORMAT
    except (InputError, OSError, ValueError):  # what opens it as something else tells why it cannot be
        return False


def open_delta(path: str | os.PathLike[str]) -> DeltaCheckpoint:
    """Open a delta.

    Raises:
        InputError: If there is none, or it is malformed; the line names the file, and the tensor.
    """
    path = Path(path)
    try:
        found = path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    paths = [path]
    files: dict[str, File] = {}
    weight_map: dict[str, str] = {}
    if found and (path / INDEX).exists():
        files[INDEX], weight_map = read_index(path / INDEX)
        paths = [path / shard for shard in sorted(set(weight_map.values()))]
    elif not found and (shard := _SHARD.fullmatch(path.name)) and int(shard["count"]) > 1:
        raise InputError(f"{path}: one of {int(shard['count'])} shards, expected their directory")
    elif found and (path / SINGLE).exists():
        paths = [path / SINGLE]
    elif found:
        raise InputError(f"{path}: no {SINGLE} and no {INDEX}, expected a consensus delta")
    info: DeltaInfo | None = None
    tensors: dict[str, DeltaTensor] = {}
    for each in paths:
        held, file, metadata = read_all_of_header(each)
        if weight_map and (odd := {n for n, shard in weight_map.items() if shard == each.name} ^ held.keys()):
            raise InputError(
                f"{each}: tensor {short_repr(min(odd))}: in it or in {INDEX}, expected it in both"
            )
        parsed = _info(each, metadata)
        if info is not None and parsed != info:
            raise InputError(f"{each}: of another delta than {paths[0]}, expected shards of one")
        info, files[each.name] = parsed, file
        for name, tensor in _tensors(each, metadata, held):
            tensors[name] = tensor
    assert info  # there is at least one path
    return DeltaCheckpoint(path, info, tensors, files)


def _info(path: Path, metadata: Mapping[str, str]) -> DeltaInfo:
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {short_repr(metadata.get('format'))}, expected {FORMAT}: not a consensus delta"
        )
    if metadata.get("version") != VERSION:
        raise InputError(f"{path}: version {short_repr(metadata.get('version'))}, expected {VERSION}")
    field = _fields(path, metadata)
    models = metadata.get("models", "")
    if not (models.isascii() and models.isdecimal() and len(models) < 10 and int(models)):
        raise InputError(f"{path}: models {short_repr(models)}, expected how many there were")
    rule, base = field("rule"), field("base")
    min_agreement: Any = rule.get("min_agreement")
    inputs: Any = rule.get("inputs")
    try:
        Rule(0.0, min_agreement)
    except (TypeError, InputError) as error:
        raise InputError(f"{path}: {error}") from None
    if inputs not in ("finetuned", "task_vectors"):
        raise InputError(f"{path}: inputs {short_repr(inputs)}, expected finetuned or task_vectors")
    if base and not (isinstance(base.get("path"), str) and _are_files(base.get("files"))):
        raise InputError(
            f"{path}: base {short_repr(base)}, expected its path and its files with size, header and sample"
        )
    method, weights = rule.get("method"), rule.get("weights")
    try:
        if method is not None:
            Method.of_json(method)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: method {short_repr(method)}, expected one ({error})") from None
    if not (weights is None or isinstance(weights, str)):
        raise InputError(f"{path}: weights {short_repr(weights)}, expected the last part of their path")
    return DeltaInfo(int(models), float(min_agreement), inputs, base, method, weights)


def _fields(path: Path, metadata: Mapping[str, str]) -> Callable[[str], dict[str, Any]]:
    def field(key: str) -> dict[str, Any]:
        if key not in metadata:
            raise InputError(f"{path}: no {key} in __metadata__, expected a JSON object")
        # The header, in which it is a text, was checked for what takes much memory. The name of a base need not be UTF-8.
        return parse_json(
            bytearray(metadata[key], "utf-8"), path, f"{key} in __metadata__", surrogates=True, dense=True
        )

    return field


def _are_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(each, dict)
        and each.keys() == {"size", "header", "sample"}
        and type(each["size"]) is int
        and isinstance(each["header"], str)
        and isinstance(each["sample"], str)
        for each in files.values()
    )


def _tensors(
    path: Path, metadata: Mapping[str, str], held: Mapping[str, TensorRef]
) -> Iterator[tuple[str, DeltaTensor]]:
    """The tensors of a file, checked against what its metadata says of them."""
    recorded = _fields(path, metadata)("tensors")
    expected = {f"{name}{suffix}" for name in recorded for suffix in (MASK, MEAN)}
    if odd := sorted(expected ^ held.keys()):
        problem = "missing" if odd[0] in expected else "in the file, but its metadata does not name it"
        raise InputError(f"{path}: tensor {short_repr(odd[0])}: {problem}")
    for name, entry in recorded.items():
        info = _tensor_info(path, name, entry)
        mask, means = held[name + MASK], held[name + MEAN]
        if mask.spec != (wanted := TensorSpec("U8", (mask_bytes(info.numel),))):
            raise InputError(
                f"{path}: tensor {short_repr(name + MASK)}: {_told(mask.spec)}, expected {_told(wanted)}"
            )
        types = MEANS_DTYPES[info.arithmetic]
        if len(means.spec.shape) != 1 or means.numel > info.numel or means.spec.dtype not in types:
            what = f"{' or '.join(types)} and at most {info.numel} in one dimension"
            raise InputError(
                f"{path}: tensor {short_repr(name + MEAN)}: {_told(means.spec)}, expected {what}"
            )
        yield name, DeltaTensor(info, mask.source, means)


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    def refused(what: str) -> InputError:
        return InputError(
            f"{path}: tensor {short_repr(name)} in __metadata__: {short_repr(entry)}, expected {what}"
        )

    keys = {"dtype", "shape", "arithmetic", "nonfinite", "vetoed_by_zero", "sample"}
    if not isinstance(entry, dict) or entry.keys() - {"masked"} != keys:
        raise refused(f"an object with {', '.join(sorted(keys))}")
    dtype, arithmetic = entry["dtype"], entry["arithmetic"]
    if not isinstance(dtype, str) or dtype not in FLOAT_SIZES or arithmetic not in ("F32", "F64"):
        raise refused("types that are merged")
    if dtype == "F64" != arithmetic:
        raise refused("F64 arithmetic of F64")
    if not is_shape(entry["shape"]):
        raise refused("a shape")
    info = TensorInfo(
        TensorSpec(dtype, tuple(entry["shape"])),
        arithmetic,
        *(entry[k] for k in ("nonfinite", "vetoed_by_zero", "sample")),
        **({"masked": entry["masked"]} if "masked" in entry else {}),
    )
    counts: Sequence[Any] = info.nonfinite, info.vetoed_by_zero, entry.get("masked", 0)
    if not all(type(count) is int and 0 <= count <= info.numel for count in counts) or not isinstance(
        info.sample, str
    ):
        raise refused("counts of its elements and the hash of a sample")
    return info


def _told(spec: TensorSpec) -> str:
    return f"{spec.dtype} {spec.shape}"
