"""Comparing tensors bit for bit, and measuring the memory that a call takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

STORAGE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare tensors bit for bit, NaN payloads and the sign of zero included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left_bytes, right_bytes = (
        torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()).view(-1).view(torch.uint8)
        for t in (left, right)
    )
    return torch.equal(left_bytes, right_bytes)


def peak_allocated(call: Callable[[], object]) -> int:
    """The peak of the bytes that torch allocates during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes = [
        (e.start_ns(), e.nbytes())
        for e in profiled.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak
