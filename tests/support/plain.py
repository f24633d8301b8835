"""The rule written out plainly, whole tensors at once: what the sceptic compares with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

STORAGE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def plain_merge(
    base: torch.Tensor,
    models: list[torch.Tensor],
    scale: float,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
) -> tuple[torch.Tensor, int, int]:
    """The merged tensor, and how many elements agreed and how many were not finite."""
    wide = torch.float64 if torch.float64 in [base.dtype, *(m.dtype for m in models)] else torch.float32
    b = base.to(wide)
    d = torch.stack([m.to(wide) if task_vectors else m.to(wide) - b for m in models])
    needed = math.ceil(min_agreement * len(models) - 1e-9)
    positive, negative = (d > 0).sum(0), (d < 0).sum(0)
    agree = torch.maximum(positive, negative) >= needed
    chosen = torch.where(positive >= needed, 1.0, -1.0).to(wide)
    total, number = torch.zeros_like(b), torch.zeros_like(b)
    for k in range(len(models)):
        counts_in = d[k] * chosen > 0
        total = torch.where(counts_in, total + d[k], total)
        number = number + counts_in.to(wide)
    t = torch.tensor(scale, dtype=torch.float64).to(wide) * -(total / number)
    result = b + t
    if base.dtype in (torch.float16, torch.bfloat16):
        result = result.to(torch.float32)
    result = result.to(base.dtype)
    nonfinite = ~(b.isfinite() & d.isfinite().all(0) & (result.isfinite() | ~agree))
    agree = agree & ~nonfinite
    out = base.clone()
    out[agree] = result[agree]
    return out, int(agree.sum()), int(nonfinite.sum())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, NaN payloads and the sign of zero included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left_bytes, right_bytes = (
        torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()).view(-1).view(torch.uint8)
        for t in (left, right)
    )
    return torch.equal(left_bytes, right_bytes)


def peak_allocated(call: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out during a call, on top of what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    changes = [
        (e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak
