"""The rule written out over whole tensors: the reference that tests compare every backend with.

    d_k   = x_k - b                        (b rounded to the type of x_k; or x_k itself, of task vectors)
    agree = all d_k > 0  or  all d_k < 0
    out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b

rule.py says it to the bit. Plain and slow on purpose, and without any code of the backends that it is compared with. It
is written in PyTorch because NumPy has no bfloat16. Nothing in the package imports this module, so that the rest of core
needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def plain_merge(
    base: torch.Tensor,
    models: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
) -> tuple[torch.Tensor, int, int, int]:
    """Merge tensors by the rule, one model after another.

    Args:
        base: The weights b, of any floating-point dtype that is merged.
        models: The fine-tuned weights x_1 … x_n, or the task vectors d_1 … d_n, of the base's shape.
        scale: λ.
        min_agreement: The fraction of the models, above 0.5, that must agree on the sign.
        task_vectors: Whether the models are task vectors.

    Returns:
        The merged tensor, the number of elements that agreed, the number that were not finite, and the number of the others
        that would agree if each difference of zero had the sign of the majority.
    """
    b, d, agree, mean, possible = _agreement(base, models, min_agreement, task_vectors)
    t = _scalar(scale, b.dtype) * -mean
    result = _rounded(b + t, base.dtype)
    nonfinite = ~(b.isfinite() & d.isfinite().all(0) & (result.isfinite() | ~agree))
    vetoed = possible & ~agree & ~nonfinite
    agree = agree & ~nonfinite
    out = base.clone()
    out[agree] = result[agree]
    return out, int(agree.sum()), int(nonfinite.sum()), int(vetoed.sum())


def plain_family(
    base: torch.Tensor,
    models: list[torch.Tensor],
    scale: float,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    factors: Sequence[float] = (),
    weight: torch.Tensor | None = None,
    task_vectors: bool = False,
) -> tuple[torch.Tensor, int, int, int]:
    """Merge tensors by another method: the rule of choices.py, of which `reduce` computes r.

    Args:
        base: As of plain_merge.
        models: As of plain_merge.
        scale: λ.
        reduce: Computes r of d_1 … d_n, shape [n, elements]: a method's naive version.
        factors: f_k, which tell with b and w · r what is not finite; () if all are 1.
        weight: w, of the base's shape and any dtype.
        task_vectors: Whether the models are task vectors.

    Returns:
        The merged tensor; then the numbers of elements that were changed, that were not finite, and that only a weight of zero kept.
    """
    b, finite, r, w = _reduced(base, models, reduce, factors, weight, task_vectors)
    t = _scalar(scale, b.dtype) * -(w * r)
    result = _rounded(b + t, base.dtype)
    chosen = w * r != 0
    finite = finite & (result.isfinite() | ~chosen)
    agree, masked = chosen & finite, (r != 0) & (w == 0) & finite
    out = base.clone()
    out[agree] = result[agree]
    return out, int(agree.sum()), int((~finite).sum()), int(masked.sum())


def plain_family_consensus(
    base: torch.Tensor,
    models: list[torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    factors: Sequence[float] = (),
    weight: torch.Tensor | None = None,
    task_vectors: bool = False,
) -> tuple[torch.Tensor, int, int, int]:
    """Find what a delta has of another method: w · r of plain_family in place of means, and +0 elsewhere; then the counts."""
    b, finite, r, w = _reduced(base, models, reduce, factors, weight, task_vectors)
    agree, masked = (w * r != 0) & finite, (r != 0) & (w == 0) & finite
    dense = torch.where(agree, w * r, torch.zeros_like(b))
    return dense, int(agree.sum()), int((~finite).sum()), int(masked.sum())


def plain_consensus(
    base: torch.Tensor, models: list[torch.Tensor], min_agreement: float = 1.0, task_vectors: bool = False
) -> tuple[torch.Tensor, int, int, int]:
    """Find the consensus delta of core/delta.py, dense.

    Returns:
        The means of the elements in the mask, in the arithmetic type, and +0 for the others; then the counts, as plain_merge.
    """
    b, d, agree, mean, possible = _agreement(base, models, min_agreement, task_vectors)
    nonfinite = ~(b.isfinite() & d.isfinite().all(0) & (mean.isfinite() | ~agree))
    vetoed = possible & ~agree & ~nonfinite
    agree = agree & ~nonfinite
    dense = torch.where(agree, mean, torch.zeros_like(mean))
    return dense, int(agree.sum()), int(nonfinite.sum()), int(vetoed.sum())


def plain_pack(dense: torch.Tensor, means_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack dense means; returns the mask, a bool for each element, and the means that are set, as they are stored."""
    stored = _rounded(dense, means_dtype)
    mask = stored.isfinite() & (stored != 0)
    return mask, stored[mask]


def plain_apply(
    base: torch.Tensor, mask: torch.Tensor, means: torch.Tensor, scale: float, wide: torch.dtype
) -> tuple[torch.Tensor, int, int]:
    """Apply a packed delta in an arithmetic type; returns the result, how many elements changed, and how many were not finite."""
    t = _scalar(scale, wide) * -means.to(wide)
    result = _rounded(base[mask].to(wide) + t, base.dtype)
    finite = result.isfinite()
    out = base.clone()
    out[mask] = torch.where(finite, result, base[mask])
    size = base.element_size()
    changed = (out.view(torch.uint8) != base.view(torch.uint8)).view(-1, size).any(1)
    return out, int(changed.sum()), int((~finite).sum())


def _agreement(
    base: torch.Tensor, models: list[torch.Tensor], min_agreement: float, task_vectors: bool
) -> tuple[torch.Tensor, ...]:
    """b, every d_k, whether an element agrees, its mean, and whether it would agree if zeros had the sign of the majority."""
    b, d = _differences(base, models, task_vectors)
    required = max(math.ceil(min_agreement * len(models) - 1e-9), len(models) // 2 + 1)
    positive, negative = (d > 0).sum(0), (d < 0).sum(0)
    agree = torch.maximum(positive, negative) >= required
    sign = torch.where(positive >= required, 1.0, -1.0).to(b.dtype)
    total, number = torch.zeros_like(b), torch.zeros_like(b)
    for k in range(len(models)):
        has_sign = d[k] * sign > 0
        total = torch.where(has_sign, total + d[k], total)
        number = number + has_sign.to(b.dtype)
    possible = torch.maximum(positive, negative) + (d == 0).sum(0) >= required
    return b, d, agree, total / number, possible


def _reduced(
    base: torch.Tensor,
    models: list[torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    factors: Sequence[float],
    weight: torch.Tensor | None,
    task_vectors: bool,
) -> tuple[torch.Tensor, ...]:
    """b, whether b, every p_k and w · r are finite, r, and w."""
    b, d = _differences(base, models, task_vectors)
    r = reduce(d.flatten(1)).view(b.shape)
    w = torch.ones_like(b) if weight is None else weight.to(b.dtype)
    products = [each * _scalar(f, b.dtype) for each, f in zip(d, factors, strict=True)] if factors else d
    finite = b.isfinite() & (w * r).isfinite()
    for p in products:
        finite = finite & p.isfinite()
    return b, finite, r, w


def _differences(
    base: torch.Tensor, models: list[torch.Tensor], task_vectors: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """b, and every d_k, in the arithmetic type."""
    wide = torch.float64 if torch.float64 in [base.dtype, *(m.dtype for m in models)] else torch.float32
    d = [m.to(wide) if task_vectors else m.to(wide) - _rounded(base, m.dtype).to(wide) for m in models]
    return base.to(wide), torch.stack(d)


def _scalar(scale: float, wide: torch.dtype) -> torch.Tensor:
    return torch.tensor(scale, dtype=torch.float64).to(wide)


def _rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to a dtype, from float64 to 16 bits by way of float32. Nothing changes if the dtype holds all of the numbers."""
    if dtype in (torch.float16, torch.bfloat16):
        numbers = numbers.to(torch.float32)
    return numbers.to(dtype)
