"""Bounds of magnitudes of what is in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..core.batch import Batch
from ..core.bounds import Bounds, Trimming


def bounds_in_memory(
    batches: Iterable[tuple[Batch, Sequence[str]]], method: Trimming, threads: int | None = None
) -> dict[str, Bounds]:
    """Find the exact bounds of each tensor.

    Args:
        batches: Each with the name of the tensor that each segment is of: on any device, of any signature. A tensor may have several
            segments. An Expansion may take the place of an Operand. Outputs are not written; they may be None.
        method: Whose fractions: a Method that needs bounds.
        threads: CPU threads; None is the usual number.
    """
    import torch

    from .pytorch import TORCH_DTYPES, load, rounded

    found: dict[str, list[list[torch.Tensor]]] = {}
    for batch, names in batches:
        wide = TORCH_DTYPES[batch.signature.arithmetic]
        for segment, name in zip(batch.segments, names, strict=True):
            d = found.setdefault(name, [[] for _ in segment.models])
            for k, operand in enumerate(segment.models):
                x = load(operand, 0, segment.numel).to(wide)
                if not batch.signature.task_vectors and segment.base is not None:
                    b = load(segment.base, 0, segment.numel)
                    if batch.signature.rounds_base(operand.dtype):
                        b = rounded(b, TORCH_DTYPES[operand.dtype])
                    x = x - b.to(wide)
                d[k].append(x.abs().double().nan_to_num(math.inf).cpu())
    if method.over == "model":
        whole = [[t for d in found.values() for t in d[k]] for k in range(len(next(iter(found.values()))))]
        bounds = _sorted_bounds(whole, method)
        return dict.fromkeys(found, bounds)
    return {name: _sorted_bounds(d, method) for name, d in found.items()}


def _sorted_bounds(d: Sequence[Sequence[object]], method: Trimming) -> Bounds:
    import torch

    low, high = [], []
    joined = [torch.cat(list(each)).sort().values for each in d]  # type: ignore[arg-type]
    numel = len(joined[0])
    for magnitudes, (bottom, top) in zip(joined, method.ranks(len(d), numel), strict=True):
        low.append(float(magnitudes[bottom]) if bottom else 0.0)
        high.append(float(magnitudes[numel - 1 - top]) if top else math.inf)
    return Bounds(tuple(low), tuple(high))
