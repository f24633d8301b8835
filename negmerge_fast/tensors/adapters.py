"""Adapters among the models of a call: what PEFT holds in memory, or has written, as changes of the base's tensors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch

from ..backends.pytorch import DTYPE_NAMES, TORCH_DTYPES
from ..checkpoints.base import TensorRef
from ..checkpoints.lora import Adapter, Change, Product, parts_of, read_adapter, refuse_others, refuse_types
from ..checkpoints.placing import place
from ..checkpoints.reader import Reader
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError
from ..core.pairing import Renames, is_extra_state
from . import dtensor, peft
from .aliasing import memory, same_bits
from .arrays import as_tensor, is_array
from .flatten import plain
from .names import specs_of, viewed

Changes: TypeAlias = "Mapping[str, Change[torch.Tensor]]"
_NO_ADAPTERS = frozenset([torch.Tensor, torch.nn.Parameter, dict, OrderedDict])
# What holds a whole model in another one: DDP, torch.compile, FSDP 1.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")


class Version(NamedTuple):
    """A fine-tuned model of a call.

    Attributes:
        label: What errors call it.
        model: A tensor, a mapping or a module; or an adapter, in memory or on disk.
    """

    label: str
    model: Any

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.model, Adapter)


def may_be_adapters(model: object) -> bool:
    """Whether a model is a path, or a module with adapters. A merge of small tensors takes little longer than to ask all its models."""
    return type(model) not in _NO_ADAPTERS and (is_path(model) or wrapped_part(model) is not None)


def is_path(model: object) -> bool:
    return isinstance(model, (str, os.PathLike))


def versions_of(models: Sequence[Any], where: Callable[[int], str]) -> list[Version]:
    """List the models of a call, each adapter of a wrapped module and each one on disk as a version of its own.

    Args:
        models: What the caller passed.
        where: What errors call one of these, given its number.

    Raises:
        InputError: If something is no adapter that can be merged.
    """
    versions: list[Version] = []
    for k, model in enumerate(models):
        if is_path(model):
            versions.append(Version(f"{where(k)}: {os.fspath(model)}", _open(model, where(k))))
        elif (wrapped := wrapped_part(model)) is not None:
            peft.refuse_merged(wrapped, where(k))
            adapters = list(_live(wrapped, where(k)))
            versions += [Version(adapter.name, adapter) for adapter in adapters]
        else:
            versions.append(Version(where(k), model))
    return versions


def wrapped_part(model: object) -> torch.nn.Module | None:
    """The module that PEFT has wrapped: a model, or the one that DDP or torch.compile holds. None if there is none."""
    if not isinstance(model, torch.nn.Module) or not peft.is_wrapped(model):
        return None
    part: torch.nn.Module = model
    while inner := next(
        (c for n in _WRAPPERS if isinstance(c := part._modules.get(n), torch.nn.Module)), None
    ):
        part = inner
    return part


def _live(module: torch.nn.Module, where: str, is_base: bool = False) -> Iterator[Adapter[torch.Tensor]]:
    """Yield the adapters of a wrapped module. Of a base their tensors and scales may be any."""
    found = []
    for adapter, config, tensors in peft.adapters_of(module, where):
        label = f"{where}: adapter {adapter!r}"
        refuse_others(config, label)
        found.append((adapter, config, tensors, label))
    for adapter, config, tensors, label in found:
        if not is_base:
            tensors = {name: _plain(tensor, f"{label}: {name!r}") for name, tensor in tensors.items()}
        read = read_adapter(config, tensors, _shape, label)
        if not is_base:
            _refuse_other_scales(read, peft.scales_of(module, adapter))
        yield read


def _refuse_other_scales(
    adapter: Adapter[torch.Tensor], scales: Iterable[tuple[str, str | None, float]]
) -> None:
    """Raise InputError if a layer has another scale than its configuration: which of them is meant, only its user knows."""
    for module, parameter, scale in scales:
        for expected in _scales(adapter, module, parameter):
            if scale != expected:
                raise InputError(
                    f"{adapter.name}: {module!r}: scale {scale} (set_scale), expected {expected} as its configuration has"
                )


def _scales(adapter: Adapter[torch.Tensor], module: str, parameter: str | None) -> Iterator[float]:
    """Yield the scale that a parameter of a module has by the configuration."""
    change = adapter.changes.get(f"{module}.{parameter or 'weight'}")
    if isinstance(change, Product):
        yield change.scale
    if (nested := adapter.nested.get(module)) is not None:
        for each in nested.parameters:
            if each.is_weight if parameter is None else each.name == parameter:
                yield each.scale


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _plain(value: Any, where: str) -> torch.Tensor:
    if dtensor.is_dtensor(value):
        raise InputError(
            f"{where}: a DTensor, expected whole tensors of adapters: save the adapter, and pass its path"
        )
    return plain(value, where)


def _open(path: Any, where: str) -> Adapter[TensorRef]:
    """Open an adapter on disk, or of the hub."""
    from ..checkpoints.formats import open_checkpoint  # all formats, which most merges do without
    from ..checkpoints.hub import find

    found = find(path)
    opened = open_checkpoint(found.path)
    if opened.adapter is None:
        raise InputError(
            f"{where}: {os.fspath(path)}: a whole model on disk, expected an adapter: "
            "load it, or merge files with merge_checkpoints"
        )
    notes = opened.adapter.notes if found.note is None else (*opened.adapter.notes, found.note)
    return replace(opened.adapter, notes=notes)


def state_of(model: Any, where: str) -> Any:
    """The base's tensors: of a module its state dict, without what PEFT has put into it."""
    if (wrapped := wrapped_part(model)) is None:
        return model.state_dict() if isinstance(model, torch.nn.Module) else model
    peft.refuse_merged(wrapped, where)
    for _ in _live(wrapped, where, is_base=True):  # each is refused if its kind changes the base's weights
        pass
    return peft.plain_state(model)


def config_of(model: Any) -> Mapping[str, Any]:
    """The configuration of transformers' models; empty if there is none."""
    config = getattr(model, "config", None) if isinstance(model, torch.nn.Module) else None
    to_dict = getattr(config, "to_dict", None)
    found = to_dict() if callable(to_dict) else None
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Placed:
    """The adapters of a call, with the places of their changes in the base.

    Attributes:
        changes: Of each version what it changes, by the base's names; nothing of one that is no adapter.
        notes: What a user should know, and of which versions.
    """

    changes: Sequence[Changes]
    notes: Mapping[str, list[int]]

    def of(self, names: Sequence[str], versions: Sequence[Version]) -> list[Change[torch.Tensor] | None]:
        """What each version changes of a tensor of the base, which has several names if it is tied.

        Raises:
            InputError: If an adapter changes tied weights in different ways.
        """
        found = []
        for version, changes in zip(versions, self.changes, strict=True):
            those = {name: changes[name] for name in names if name in changes}
            first = next(iter(those), None)
            for name in those:
                if first is not None and not _same(those[first], those[name]):
                    raise InputError(
                        f"{version.label}: {name!r}: changes it otherwise than {first!r}, expected equal changes of tied weights"
                    )
            found.append(None if first is None else those[first])
        return found

    def half_of_ties(self, names: Sequence[str], reference: str) -> dict[str, list[int]]:
        """What is said of versions that change one of tied weights alone; trained tokens are of both."""
        notes: dict[str, list[int]] = {}
        for k, changes in enumerate(self.changes):
            those = [name for name in names if name in changes]
            if those and len(those) < len(names) and getattr(changes[those[0]], "rows", None) is None:
                other = next(name for name in names if name not in changes)
                phrase = (
                    f"changes {those[0]!r}, but not {other!r}, to which {reference} ties it: both are changed"
                )
                notes.setdefault(phrase, []).append(k)
        return notes


def _same(left: Change[torch.Tensor], right: Change[torch.Tensor]) -> bool:
    """Whether two changes are the same, to the bit."""
    if type(left) is not type(right):
        return False
    pairs: Any = zip(left, right, strict=True)
    return all(same_bits(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def labelled_parts(change: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a change, and what to call each."""
    labels = (" (lora_A)", " (lora_B)") if isinstance(change, Product) else ("",)
    yield from zip(labels, parts_of(change), strict=False)


def place_all(
    versions: Sequence[Version],
    base: Mapping[str, Any],
    config: Mapping[str, Any],
    renames: Renames | None,
    reference: str,
) -> Placed:
    """Find the places of all adapters in a base, and read those that are on disk into main memory.

    Args:
        versions: The fine-tuned models.
        base: The base's tensors.
        config: The configuration of the base's model.
        renames: What the adapters' names are changed to first.
        reference: What errors call the base.

    Raises:
        InputError: If a change has no place, or another shape.
    """
    specs = {
        name: spec
        for name, spec in specs_of(base).items()
        if isinstance(name, str) and not is_extra_state(name)
    }
    shapes = {name: spec.shape for name, spec in specs.items()}
    types = {name: spec.dtype for name, spec in specs.items()}
    changes: list[Changes] = []
    notes: dict[str, list[int]] = {}
    with Reader(max_open=8) as reader:
        for k, version in enumerate(versions):
            if not version.is_adapter:
                changes.append({})
                continue
            adapter = version.model.renamed(renames) if renames else version.model
            found = place(adapter, shapes, config, reference)
            refuse_types(found.changes, _type_of, types, version.label, lambda name: f"{reference}[{name!r}]")
            made = {name: _in_memory(change, reader) for name, change in found.changes.items()}
            _refuse_own_memory(version.label, made, base, reference)
            copies = {name: _loaded(value, reader) for name, value in found.copies.items()}
            _refuse_other_copies(version.label, copies, base, reference)
            changes.append(made)
            for note in (*version.model.notes, *found.notes):
                if not note.endswith(" placed"):
                    notes.setdefault(note.removeprefix(f"{version.model.name}: "), []).append(k)
    return Placed(changes, notes)


def _type_of(value: torch.Tensor | TensorRef) -> str:
    return (
        DTYPE_NAMES.get(value.dtype, str(value.dtype))
        if isinstance(value, torch.Tensor)
        else value.spec.dtype
    )


def _in_memory(change: Any, reader: Reader) -> Change[torch.Tensor]:
    if isinstance(change, Product):
        return change._replace(a=_loaded(change.a, reader), b=_loaded(change.b, reader))
    made: Change[torch.Tensor] = change._replace(value=_loaded(change.value, reader))
    return made


def _loaded(value: Any, reader: Reader) -> torch.Tensor:
    """A tensor of an adapter: as it is, or read from its file."""
    if isinstance(value, torch.Tensor):
        return value
    spec, source = value
    if spec.dtype not in TORCH_DTYPES:
        raise InputError(f"{source.file.path}: {spec.dtype}, expected one of {', '.join(FLOAT_SIZES)}")
    bits = torch.empty(source.nbytes, dtype=torch.uint8, device="cpu")
    array: Any = bits.numpy()
    source.read_into(reader, memoryview(array))
    return bits.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def _refuse_own_memory(label: str, changes: Changes, base: Mapping[str, Any], reference: str) -> None:
    """Raise InputError for a change that is the base's own tensor: biases are trained where they are."""
    for name, change in changes.items():
        value = getattr(change, "value", None)
        if value is None or not value.numel() or (held := viewed(base[name])) is None:
            continue
        if memory(value) == memory(held):
            raise InputError(
                f"{label}: {name!r}: trained in the memory of {reference} itself (bias), "
                "expected a base from before the training"
            )


def _refuse_other_copies(
    label: str, copies: Mapping[str, torch.Tensor], base: Mapping[str, Any], reference: str
) -> None:
    """Raise InputError if an adapter was saved with weights of its base that are not this base's."""
    for name, value in copies.items():
        tensor, where = base[name], f"{reference}[{name!r}]"
        if is_array(tensor):
            tensor = as_tensor(tensor, where, written=False)
        elif dtensor.is_dtensor(tensor):
            box = dtensor.box_of(tensor, where)
            tensor, value = tensor.to_local(), value if box is None else value[box.slices()]
        if not same_bits(tensor.detach().to("cpu", value.dtype), value.to("cpu")):
            raise InputError(
                f"{label}: has a copy of its base's {name!r}, which differs from {reference}[{name!r}], expected its base"
            )
