"""Pairing of opened checkpoints: which tensor of a model is the version of which of the base's, and what cannot be merged.

Only tensors that decide this are read: weights that may be tied, and integers, which have to be equal in all versions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..checkpoints.base import Checkpoint, TensorRef
from ..checkpoints.reader import Reader
from ..core import pairing, unmergeable
from ..core.dtypes import FLOAT_SIZES, INTEGER_DTYPES
from ..core.errors import InputError, short_repr
from ..core.schema import TensorSpec, mismatches

if TYPE_CHECKING:
    import numpy as np

    from .low_rank import Placed

Tensors: TypeAlias = Mapping[str, TensorRef]

_CHUNK_BYTES = 1 << 20
_MAX_OPEN_FILES = 16


class Paired(NamedTuple):
    """Tensors by the base's names.

    Attributes:
        base: Those of the base that are merged.
        models: Those of each model; these and perhaps more.
        notes: What was done to pair them, a line each.
        task_vectors: Whether the models' are task vectors.
        placed: How many modules of each adapter have a place, a line each.
        checkpoints: The models, with the tensors of adapters expanded.
    """

    base: Tensors
    models: list[Tensors]
    notes: list[str]
    task_vectors: bool
    checkpoints: list[Checkpoint]
    placed: list[str]


def pair(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    task_vectors: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    rename: pairing.Rename = (),
    patterns: pairing.Patterns = pairing,
    merge_adapters: bool = False,
) -> Paired:
    """Pair the tensors of all checkpoints by name.

    In a list with LoRA adapters all models are task vectors, unless the adapters are merged into the base; if there are only
    adapters, what none of them changes is not merged.

    Args:
        base: The base.
        models: The fine-tuned models, or task vectors.
        task_vectors: Whether models are task vectors.
        include: A regular expression. Only tensors whose name in the base matches are merged.
        exclude: A regular expression. Tensors whose name in the base matches are not merged.
        rename: Regular expressions and what replaces their matches in the models' names.
        patterns: What compiles them.
        merge_adapters: Whether adapters are models, merged into the base, and not task vectors.

    Raises:
        InputError: If names, shapes or types do not fit, or something cannot be merged element by element; the line says what.
    """
    full = [model for model in models if not model.adapter]
    names = chain(base.tensors, *(model.tensors for model in full))
    has_extra_state = any(map(pairing.is_extra_state, names))
    matches = patterns.choice(include, exclude)
    is_chosen = _choice(matches, {*base.unindexed, *base.aliases}, has_extra_state)
    renames, notes = patterns.compile_renames(rename), _Notes()
    adapters = _locate(base, models, renames) if len(full) < len(models) else []
    _refuse_unindexed(base, adapters, matches)
    chosen = _chosen(base.tensors, is_chosen)
    if adapters and not full:
        changed = set().union(*(each.changes for each in adapters))
        chosen = {name: tensor for name, tensor in chosen.items() if name in changed}
    if (matches or adapters) and not chosen:
        given = f"include {short_repr(include)}, exclude {short_repr(exclude)}"
        what = "no tensor that an adapter changes" if adapters and not full else "no tensor"
        raise InputError(f"{base.path}: {what} is chosen by {given}")
    all_of_base = _all(base)
    with Reader(_MAX_OPEN_FILES) as reader:
        held = []
        for model in full:
            tensors = _all(model, all_of_base)
            if renames or tensors.keys() != all_of_base.keys():
                paired = pairing.pair_names(
                    _specs(all_of_base),
                    _specs(tensors),
                    _twins(all_of_base, reader),
                    _twins(tensors, reader),
                    is_chosen or (lambda name: True),
                    renames,
                    str(model.path),
                )
                notes.add(model, pairing.notes(paired))
                tensors = {name: tensors[own] for name, own in paired.names.items()}
            _refuse_untied(base, chosen, model, tensors, reader)
            held.append(_chosen(tensors, is_chosen))
        refuse_unmergeable(base, chosen)
        for model, tensors in zip(full, held, strict=True):
            # Under the base's names there is what there is in the base, or it does not fit.
            refuse_unmergeable(model, {n: tensors[n] for n in sorted(tensors.keys() - chosen.keys())})
        _refuse_misfits(base, chosen, full, held)
        if not task_vectors:
            _refuse_different_integers(base, chosen, full, held, reader)
    merged = {name: tensor for name, tensor in chosen.items() if tensor.spec.dtype in FLOAT_SIZES}
    result = Paired(merged, held, list(notes), task_vectors, list(models), [])
    return _with_adapters(result, adapters, merge_adapters) if adapters else result


def _locate(base: Checkpoint, models: Sequence[Checkpoint], renames: pairing.Renames | None) -> list[Placed]:
    """Find the places of all adapters' changes."""
    from .low_rank import place_adapter  # needs NumPy, which most merges do not

    with Reader(_MAX_OPEN_FILES) as reader:
        return [place_adapter(base, model, renames, reader) for model in models if model.adapter]


def _refuse_unindexed(base: Checkpoint, adapters: Sequence[Placed], matches: pairing.Chosen | None) -> None:
    """Refuse changes of tensors that the base's index omits: they are copied, whatever an adapter adds to them."""
    for adapter in adapters:
        for name in adapter.changes:
            if name in base.unindexed and (matches is None or matches(name)):
                raise InputError(
                    f"{base.path}: tensor {short_repr(name)}: its index omits it, so it is not merged, but {adapter.model.path} "
                    f"changes it, expected it in the index (--exclude '^{re.escape(name)}$' keeps base's)"
                )


def _with_adapters(paired: Paired, adapters: Sequence[Placed], merge_adapters: bool) -> Paired:
    """Put adapters, expanded, among the full models that were paired."""
    from .low_rank import expand_adapter, lay_out, notes_of, subtract_base

    if merge_adapters and paired.task_vectors:
        raise InputError(
            f"{adapters[0].model.path}: adapters as merged models, beside task vectors, expected differences"
        )
    layout = lay_out(paired.base, adapters, paired.models, merge_adapters)
    of_adapter = {id(each.model): each for each in adapters}
    full = iter(paired.models)
    checkpoints, models = [], []
    notes, placed = _Notes(), _Notes()
    for model in paired.checkpoints:
        if adapter := of_adapter.get(id(model)):
            expanded = expand_adapter(layout, adapter)
            tensors: Tensors = expanded.tensors
            notes.add(model, adapter.notes)
            placed.add(model, [adapter.placed])
        else:
            expanded, tensors = model, next(full)
            if not merge_adapters and not paired.task_vectors:
                expanded, tensors = subtract_base(layout, model, tensors)
        checkpoints.append(expanded)
        models.append(tensors)
    said = [*paired.notes, *notes, *notes_of(adapters, layout.base)]
    return Paired(layout.base, models, said, not merge_adapters, checkpoints, list(placed))


def _all(checkpoint: Checkpoint, like: Collection[str] | None = None) -> Tensors:
    """The tensors that are loaded, also those that an index or a file omits; of these, if like is given, only those named in it."""
    omitted = {**checkpoint.unindexed, **checkpoint.aliases}
    if not omitted:
        return checkpoint.tensors
    return {**{n: t for n, t in omitted.items() if like is None or n in like}, **checkpoint.tensors}


def _choice(
    matches: pairing.Chosen | None, unindexed: Collection[str], has_extra_state: bool
) -> pairing.Chosen | None:
    """Whether a tensor is merged, by its name in the base; None if all are. Extra state and what the base's index omits are not."""
    if not unindexed and not has_extra_state:
        return matches
    return lambda name: (
        name not in unindexed and not pairing.is_extra_state(name) and (matches is None or matches(name))
    )


def _chosen(tensors: Tensors, is_chosen: pairing.Chosen | None) -> Tensors:
    return tensors if is_chosen is None else {n: t for n, t in tensors.items() if is_chosen(n)}


def _specs(tensors: Tensors) -> dict[str, TensorSpec]:
    return {name: tensor.spec for name, tensor in tensors.items()}


class _Notes:
    """Lines about models; one that is said of several models is given once."""

    def __init__(self) -> None:
        self._models: dict[str, list[Checkpoint]] = {}

    def add(self, model: Checkpoint, phrases: Sequence[str]) -> None:
        for phrase in phrases:
            self._models.setdefault(phrase, []).append(model)

    def __iter__(self) -> Iterator[str]:
        for phrase, models in self._models.items():
            more = f" and {len(models) - 1} more" if len(models) > 1 else ""
            yield f"{models[0].path}{more}: {phrase}"


def _label(checkpoint: Checkpoint, name: str, tensors: Tensors) -> str:
    path = tensors[name].source.file.path if name in tensors else checkpoint.path
    return f"{path}: tensor {short_repr(name)}"


def refuse_unmergeable(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Raise InputError if tensors of a checkpoint are quantized weights or LoRA factors."""
    for part, config in checkpoint.configs.items():
        if method := unmergeable.quantization_of(config):
            folder = checkpoint.path if checkpoint.is_directory else checkpoint.path.parent
            where = folder / part / "config.json"
            raise InputError(f"{where}: {method}: quantized weights, expected floating-point weights")
    specs = _specs(tensors)
    for refuse in (unmergeable.refuse_factors, unmergeable.refuse_packed):
        refuse(specs, lambda name: _label(checkpoint, name, tensors))


def _refuse_untied(
    base: Checkpoint, chosen: Tensors, model: Checkpoint, tensors: Tensors, reader: Reader
) -> None:
    """Refuse weights that are tied in the base and differ in a model: an output has one of them."""
    tied = {n: owner for file in base.weights.values() for n, owner in file.aliases.items()}
    for name, owner in tied.items():
        both = name in tensors and owner in tensors and owner in chosen and name not in base.tensors
        if both and not _equal(tensors[name], tensors[owner], reader):
            raise InputError(
                f"{_label(model, name, tensors)}: differs from {short_repr(owner)}, to which it is tied in base, expected equal weights "
                f"(--exclude '^{re.escape(owner)}$' keeps base's)"
            )


def _refuse_misfits(
    base: Checkpoint, chosen: Tensors, models: Sequence[Checkpoint], held: Sequence[Tensors]
) -> None:
    def where(k: int | None, name: str) -> str:
        return _label(base, name, chosen) if k is None else _label(models[k], name, held[k])

    problems = mismatches(_specs(chosen), [_specs(tensors) for tensors in held], where)
    if problems:
        hints = (pairing.hint(chosen.keys(), tensors.keys()) for tensors in held)
        problems += [hint for hint in hints if hint][:1]
        raise InputError("; ".join(problems))


def _refuse_different_integers(
    base: Checkpoint,
    chosen: Tensors,
    models: Sequence[Checkpoint],
    held: Sequence[Tensors],
    reader: Reader,
) -> None:
    """Refuse integers that training changed: they are weights in a form of their own, and would stay the base's."""
    for name, tensor in chosen.items():
        if tensor.spec.dtype in INTEGER_DTYPES and not unmergeable.is_counter(name, tensor.spec):
            for model, tensors in zip(models, held, strict=True):
                if name in tensors and not _equal(tensor, tensors[name], reader):
                    raise InputError(
                        f"{_label(model, name, tensors)}: {tensor.spec.dtype}, differs from base, expected equal integers: "
                        f"they are not merged (--exclude '^{re.escape(name)}$' keeps base's)"
                    )


def _twins(tensors: Tensors, reader: Reader) -> pairing.Twins:
    def twins(name: str, others: Collection[str]) -> list[str]:
        """Tensors with the same bytes, if these are not all equal: many a bias is all zeros."""
        this = tensors[name]
        same = [other for other in others if _equal(this, tensors[other], reader)]
        return same if same and not _is_constant(this, reader) else []

    return twins


def _equal(left: TensorRef, right: TensorRef, reader: Reader) -> bool:
    are_integers = {left.spec.dtype, right.spec.dtype} <= INTEGER_DTYPES
    if left.spec.shape != right.spec.shape or (left.spec.dtype != right.spec.dtype and not are_integers):
        return False
    if left.source == right.source:
        return True
    if left.spec.dtype == right.spec.dtype:  # without NumPy: the integers of most models are compared
        return all(a == b for a, b in zip(_chunks(left, reader), _chunks(right, reader), strict=True))
    pairs = zip(_values(left, reader), _values(right, reader), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)


def _is_constant(tensor: TensorRef, reader: Reader) -> bool:
    first = None
    for values in _values(tensor, reader):
        first = values[:1] if first is None else first
        if (values != first).any():
            return False
    return True


def _values(tensor: TensorRef, reader: Reader) -> Iterator[np.ndarray[Any, Any]]:
    """Yield a tensor's elements in chunks: integers as such, all else as bits."""
    import numpy as np

    dtype = _NUMPY_INTEGERS.get(tensor.spec.dtype, f"<u{_size(tensor)}")
    yield from (np.frombuffer(chunk, dtype) for chunk in _chunks(tensor, reader))


def _chunks(tensor: TensorRef, reader: Reader) -> Iterator[bytearray]:
    """Yield a tensor's bytes in chunks of so many elements, whatever their size."""
    size, count = _size(tensor), _CHUNK_BYTES // 8
    for begin in range(0, tensor.numel, count):
        chunk = bytearray(min(count, tensor.numel - begin) * size)
        tensor.source.read_into(reader, memoryview(chunk), begin * size)
        yield chunk


def _size(tensor: TensorRef) -> int:
    return tensor.source.nbytes // max(tensor.numel, 1)


_NUMPY_INTEGERS = {
    name: f"<{name[0].lower()}{int(name[1:]) // 8}" for name in INTEGER_DTYPES if name != "BOOL"
}
