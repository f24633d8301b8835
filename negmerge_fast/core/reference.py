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
    wide = torch.float64 if torch.float64 in [base.dtype, *(m.dtype for m in models)] else torch.float32
    b = base.to(wide)
    d = torch.stack(
        [m.to(wide) if task_vectors else m.to(wide) - _rounded(base, m.dtype).to(wide) for m in models]
    )
    required = max(math.ceil(min_agreement * len(models) - 1e-9), len(models) // 2 + 1)
    positive, negative = (d > 0).sum(0), (d < 0).sum(0)
    agree = torch.maximum(positive, negative) >= required
    sign = torch.where(positive >= required, 1.0, -1.0).to(wide)
    total, number = torch.zeros_like(b), torch.zeros_like(b)
    for k in range(len(models)):
        has_sign = d[k] * sign > 0
        total = torch.where(has_sign, total + d[k], total)
        number = number + has_sign.to(wide)
    possible = torch.maximum(positive, negative) + (d == 0).sum(0) >= required
    return b, d, agree, total / number, possible


def _scalar(scale: float, wide: torch.dtype) -> torch.Tensor:
    return torch.tensor(scale, dtype=torch.float64).to(wide)


def _rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to a dtype, from float64 to 16 bits by way of float32. Nothing changes if the dtype holds all of the numbers."""
    if dtype in (torch.float16, torch.bfloat16):
        numbers = numbers.to(torch.float32)
    return numbers.to(dtype)
