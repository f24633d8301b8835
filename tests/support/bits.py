"""Comparing tensors bit for bit, and measuring the memory that a call takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import xxhash
from torch.profiler import ProfilerActivity, profile

STORAGE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare tensors bit for bit, NaN payloads and the sign of zero included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements, in row-major order."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).view(-1).view(torch.uint8)


# Results of references that are kept: those of one test, of all types and numbers of models.
_REMEMBERED = 512

_P = ParamSpec("_P")
_R = TypeVar("_R")


def remembered(reference: Callable[_P, _R]) -> Callable[_P, _R]:
    """A reference that keeps results by the bits of what it was given: all backends, one after the other, are compared with one."""
    held: dict[bytes, _R] = {}

    @wraps(reference)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        digest = xxhash.xxh3_128()
        _add_bits(digest, [*args, *sorted(options.items())])
        if (key := digest.digest()) not in held:
            if len(held) == _REMEMBERED:
                del held[next(iter(held))]
            held[key] = reference(*args, **options)
        return held[key]

    return call


def _add_bits(digest: Any, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}[".encode())
        for each in value:
            _add_bits(digest, each)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(_bytes(value).numpy())
    else:
        digest.update(f"{value!r},".encode())


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
