"""Whether a kernel gives the reference's bits on this very device: tried on hostile numbers before its first real use.

Kernels that are right on one chip have silently been wrong on a newer one. What was found is kept for the process.
"""

from __future__ import annotations

from typing import Any

import torch

from . import reference
from .rule import FLOAT_SIZES, Batch, InputError, Merge, Rule, Segment, Signature, Stream

# Of the tensors it is tried on: whole tiles, the rest of one, some that are aligned to nothing, single elements.
_LENGTHS = (4096, 1029, 517, 1, 0, 2)

_HOSTILE = [
    0.0, -0.0, 1e-45, -1e-45, 1e-40, 6e-8, 5e-324, 65504.0, 65520.0, 3.4e38, -3.4e38, 1e300,
    float("inf"), -float("inf"), float("nan"),
]  # fmt: skip

_found: dict[tuple[Any, ...], str | None] = {}


def distrust(name: str, merge: Merge, device: str, signature: Signature, rule: Rule) -> str | None:
    """Why a backend is not to be used for a signature on a device; None if it gave the same bits as the reference."""
    models = len(signature.models)
    unanimous = rule.required(models) == models
    key = name, device, signature, unanimous
    if key not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise InputError(
                f"backend {name}: not yet tried on {device}, expected one call before a graph's capture"
            )
        tried = Rule(0.9, 1.0 if unanimous else rule.min_agreement)
        _found[key] = _try(merge, device, signature, tried)
    return _found[key]


def _try(merge: Merge, device: str, signature: Signature, rule: Rule) -> str | None:
    expected = _versions(signature)
    got = [version.to(device, copy=True) for version in expected]  # before the reference writes
    counts = reference.merge(_batch("cpu", signature, expected), rule).tolist()
    try:
        counted = merge(_batch(device, signature, got), rule).tolist()
    except Exception as error:  # a compiler's, or the device's: whatever it is, the kernel cannot be used
        return (
            f"failed when tried on {device}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        )
    what = (
        f"{'+'.join(sorted(set(signature.models)))} into {signature.result}, {len(signature.models)} models"
    )
    wrong = (got[0].cpu() != expected[0]).nonzero()
    if len(wrong):
        at = int(wrong[0])
        return (
            f"not the reference's bits on {device} for {what}: byte {at} of a trial is "
            f"{int(got[0][at]):#04x}, expected {int(expected[0][at]):#04x}"
        )
    if counted != counts:
        return f"not the reference's counts on {device} for {what}: {counted}, expected {counts}"
    return None


def _versions(signature: Signature) -> list[torch.Tensor]:
    """Bytes of the base and of all models: that many numbers that lean to one side, with hostile ones strewn in."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    room = sum(_LENGTHS)

    def random() -> torch.Tensor:
        return torch.randn(room, generator=generator, dtype=torch.float64, device="cpu")

    hostile = torch.tensor(_HOSTILE, dtype=torch.float64, device="cpu")
    base, lean = random(), random()
    rare = min(0.01, 1 / len(signature.models))  # of many models, too, some elements are left to agree
    versions: list[torch.Tensor] = []
    for dtype in (signature.result, *signature.models):
        own = base if not versions else 0.1 * lean + 0.05 * random() + (0 if signature.task_vectors else base)
        chosen = hostile[torch.randint(len(hostile), (room,), generator=generator, device="cpu")]
        strewn = torch.rand(room, generator=generator, device="cpu") < rare
        versions.append(torch.where(strewn, chosen, own).to(reference.DTYPES[dtype]).view(torch.uint8))
    return versions


def _batch(device: str, signature: Signature, versions: list[torch.Tensor]) -> Batch:
    segments, start = [], 0
    for length in _LENGTHS:
        base, *models = [
            Stream(version.data_ptr() + start * FLOAT_SIZES[dtype], dtype, version)
            for dtype, version in zip((signature.result, *signature.models), versions, strict=True)
        ]
        segments.append(Segment(length, base, models, base))
        start += length
    return Batch(device, signature, segments)
