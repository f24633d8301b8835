"""DTensors: their placements on ranks, and the shard that each rank merges. torch.distributed is never imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..core.errors import InputError


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor. Where the module that defines them was not imported there is none."""
    return type(value) is getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def mismatches(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    where: Callable[[int | None, str], str],
    reference: str,
) -> Iterator[str]:
    """Differences between placements of the models' tensors and of the base's, one phrase each."""
    for k, model in enumerate(models):
        for name, tensor in base.items():
            if name in model and (problem := difference(tensor, model[name])):
                yield f"{where(k, name)}: {problem} like {reference}"


def difference(base: Any, model: Any) -> str | None:
    """The difference between the placements of two tensors: what is found and what is expected.

    Every rank finds the same difference, and refuses it, except for the last one: shards of different shapes.
    """
    if not is_dtensor(base):
        return "DTensor, expected none" if is_dtensor(model) else None
    if not is_dtensor(model):
        return f"{type(model).__name__}, expected a DTensor"
    if model.shape != base.shape:
        return f"shape {tuple(model.shape)}, expected {tuple(base.shape)}"
    # Compared as text: some versions of torch call a _StridedShard equal to a Shard.
    if str(model.placements) != str(base.placements):
        return f"placements {model.placements}, expected {base.placements}"
    # Equal ranks are enough: meshes made in different threads or with other names are unequal, too.
    if model.device_mesh != base.device_mesh and _ranks(model) != _ranks(base):
        return f"on ranks {_ranks(model)}, expected {_ranks(base)}"
    found, expected = model.to_local().shape, base.to_local().shape
    return None if found == expected else f"a shard of shape {tuple(found)}, expected {tuple(expected)}"


def _ranks(tensor: Any) -> str:
    return f"{tensor.device_mesh.mesh.tolist()} of {tensor.device_mesh.device_type}"


def local_shard(tensor: Any, where: str) -> torch.Tensor:
    """This rank's shard of a DTensor, on the same memory. Raises InputError if the ranks hold partial sums."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise InputError(f"{where}: placements {tensor.placements}, expected Shard or Replicate")
    held: torch.Tensor = tensor.to_local()
    return held


class Box(NamedTuple):
    """The part of a tensor that a rank holds: in each dimension its first index and its extent."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def slices(self, first: int = 0) -> tuple[slice, ...]:
        """Its indices, from a dimension on."""
        spans = zip(self.offset[first:], self.shape[first:], strict=True)
        return tuple(slice(offset, offset + extent) for offset, extent in spans)


def box_of(tensor: Any, where: str) -> Box | None:
    """The part of a DTensor that this rank holds; None if that is all of it. Raises InputError if torch cannot tell."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    held = tuple(tensor.to_local().shape)
    if held == tuple(tensor.shape):
        return None
    if 0 in held:
        return Box((0,) * len(held), held)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) != held:
        raise InputError(f"{where}: a shard of shape {held}, expected {tuple(shape)} by its placements")
    return Box(tuple(offset), held)


def on_any_rank(tensors: Iterable[Any], found: bool) -> bool:
    """Whether something was found on any rank that has a shard of these DTensors; all of these ranks have to call.

    One number is exchanged for each dimension of each mesh. Nothing else in tensors/ communicates.
    """
    for mesh in {_ranks(tensor): tensor.device_mesh for tensor in tensors}.values():
        if mesh.get_coordinate() is None:  # this rank is not in the mesh
            continue
        flag = torch.tensor(int(found), device=mesh.device_type)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, mesh.get_group(dimension))
        found = bool(flag)
    return found
