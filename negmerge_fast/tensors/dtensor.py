"""DTensors: how they lie on their ranks, of which each merges what it holds; torch.distributed is never imported for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..core.errors import InputError


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor: there is none where the module that makes them was not imported."""
    # The second is where it was before torch 2.5.
    modules = map(sys.modules.get, ("torch.distributed.tensor", "torch.distributed._tensor"))
    return any(type(value) is getattr(module, "DTensor", None) for module in modules)


def mismatches(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    where: Callable[[int | None, str], str],
    reference: str,
) -> Iterator[str]:
    """Where a model's tensor does not lie on the ranks as the base's does, one phrase each."""
    for k, model in enumerate(models):
        for name, tensor in base.items():
            if name in model and (problem := difference(tensor, model[name])):
                yield f"{where(k, name)}: {problem} like {reference}"


def difference(base: Any, model: Any) -> str | None:
    """What is found and expected, where two tensors don't lie alike on the ranks.

    All but the last is the same on every rank, so that all refuse it.
    """
    if not is_dtensor(base):
        return "DTensor, expected none" if is_dtensor(model) else None
    if not is_dtensor(model):
        return f"{type(model).__name__}, expected a DTensor"
    if model.shape != base.shape:
        return f"shape {tuple(model.shape)}, expected {tuple(base.shape)}"
    # Not compared as such: some versions of torch call a _StridedShard equal to a Shard.
    if str(model.placements) != str(base.placements):
        return f"placements {model.placements}, expected {base.placements}"
    # Equal ranks are enough: meshes are unequal, too, when made in different threads or with other names.
    if model.device_mesh != base.device_mesh and _ranks(model) != _ranks(base):
        return f"on ranks {_ranks(model)}, expected {_ranks(base)}"
    found, expected = model.to_local().shape, base.to_local().shape
    return None if found == expected else f"a shard of shape {tuple(found)}, expected {tuple(expected)}"


def _ranks(tensor: Any) -> str:
    return f"{tensor.device_mesh.mesh.tolist()} of {tensor.device_mesh.device_type}"


def local_shard(tensor: Any, where: str) -> torch.Tensor:
    """What this rank holds of a DTensor, on the same memory.

    where: what to call it. Raises InputError if the ranks hold summands of the elements.
    """
    if any(placement.is_partial() for placement in tensor.placements):
        raise InputError(f"{where}: placements {tensor.placements}, expected Shard or Replicate")
    held: torch.Tensor = tensor.to_local()
    return held


def on_any_rank(tensors: Iterable[Any], found: bool) -> bool:
    """Whether something was found on any rank that shares one of these DTensors; they all have to ask.

    Nothing else in the package communicates: one number per dimension of each mesh.
    """
    for mesh in {_ranks(tensor): tensor.device_mesh for tensor in tensors}.values():
        if mesh.get_coordinate() is None:  # this rank is not of it
            continue
        flag = torch.tensor(int(found), device=mesh.device_type)
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, mesh.get_group(dimension))
        found = bool(flag)
    return found
