"""NegMerge on tensors that are on a GPU: one Triton kernel, one launch for many tensors. arXiv 2410.05583.

    d_k   = x_k - b                        (b rounded to the type of x_k; or x_k itself, of task vectors)
    agree = all d_k > 0  or  all d_k < 0
    out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b

core/rule.py says it to the bit. Elements that are not finite keep the base's bits. Files, modules, sharded tensors and other methods
are in the package negmerge_fast, whose kernel this is.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton

from .core.batch import COUNTED, Signature
from .core.dtypes import DTYPE_CODES, TORCH_NAMES
from .core.rule import Rule
from .kernels.launch import usual_launch
from .kernels.merge import MAX_TILES_PER_PROGRAM, constants, interpreted, merge_tiles, options

__all__ = ["merge", "merge_"]

_NAMES = {getattr(torch, TORCH_NAMES[name]): name for name in DTYPE_CODES}


def merge(
    base: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    scale: float,
    *,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
) -> torch.Tensor:
    """Merge the versions of one tensor.

    Args:
        base: b, of float64, float32, float16 or bfloat16.
        finetuned: x_1 … x_n, of the base's shape and device, each of any of these dtypes.
        scale: λ.
        min_agreement: The fraction of the versions, above 0.5, that must agree on the sign.
        task_vectors: Whether the versions are d_1 … d_n.

    Returns:
        A new tensor of the base's dtype.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit, or a number is out of range.
    """
    out = base.detach().clone(memory_format=torch.contiguous_format)
    merge_(
        [out], [[each] for each in finetuned], scale, min_agreement=min_agreement, task_vectors=task_vectors
    )
    return out


@torch.no_grad()
def merge_(
    bases: Sequence[torch.Tensor],
    finetuned: Sequence[Sequence[torch.Tensor]],
    scale: float,
    *,
    min_agreement: float = 1.0,
    task_vectors: bool = False,
) -> list[torch.Tensor]:
    """Merge many tensors in place, in one launch for those of one device and the same dtypes.

    Args:
        bases: Contiguous tensors, which are written to.
        finetuned: For each version, its tensors in the order of the bases.
        scale, min_agreement, task_vectors: As of merge.

    Returns:
        For each base int64[3] on its device: how many elements agreed, were not finite, and did not agree for a difference of zero only.
    """
    rule = Rule(scale, min_agreement)
    if not finetuned or any(len(each) != len(bases) for each in finetuned):
        raise ValueError(
            f"finetuned: {[len(each) for each in finetuned]} tensors, expected {len(bases)} in each version"
        )
    batches: dict[tuple[torch.device, Signature], list[int]] = {}
    versions = [list(map(torch.Tensor.contiguous, each)) for each in zip(*finetuned, strict=True)]
    for i, (base, models) in enumerate(zip(bases, versions, strict=True)):
        for k, each in enumerate((base, *models)):
            what = f"finetuned[{k - 1}][{i}]" if k else f"bases[{i}]"
            if each.dtype not in _NAMES:
                raise ValueError(f"{what}: {each.dtype}, expected one of {', '.join(map(str, _NAMES))}")
            if (each.shape, each.device) != (base.shape, base.device):
                raise ValueError(
                    f"{what}: {tuple(each.shape)} on {each.device}, expected {tuple(base.shape)} on {base.device}"
                )
        if not base.is_contiguous():
            raise ValueError(f"bases[{i}]: not contiguous, expected a contiguous tensor")
        if base.is_cpu and not interpreted():
            raise ValueError(
                f"bases[{i}]: on cpu, expected a tensor on a GPU (on the CPU with TRITON_INTERPRET=1, to test it)"
            )
        signature = Signature(_NAMES[base.dtype], tuple(_NAMES[each.dtype] for each in models), task_vectors)
        batches.setdefault((base.device, signature), []).append(i)
    counts: dict[int, torch.Tensor] = {}
    for (device, signature), chosen in batches.items():
        found = _launch(device, signature, [(bases[i], versions[i]) for i in chosen], rule)
        counts.update(zip(chosen, found, strict=True))
    return [counts[i] for i in range(len(bases))]


def _launch(
    device: torch.device,
    signature: Signature,
    segments: list[tuple[torch.Tensor, list[torch.Tensor]]],
    rule: Rule,
) -> torch.Tensor:
    """Launch a merge of one signature on the device's current stream; returns int64[segments, 3] without waiting."""
    models = len(signature.models)
    required = rule.required(models)
    launch = usual_launch(signature, required == models)
    if interpreted():  # programs run one after another, so that few and large ones are faster
        launch = launch._replace(threads=1024, programs=3)
    memory, tiles = _packed(signature, segments, launch.tile)
    at = len(memory)
    narrow = "d" if signature.arithmetic == "F64" else "f"
    (reciprocal,) = struct.unpack(narrow, struct.pack(narrow, 1 / models))
    memory.frombytes(struct.pack("dd", rule.scale, reciprocal) + bytes(8 * len(COUNTED) * len(segments)))
    host = torch.frombuffer(memory, dtype=torch.int64)
    with nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device):
        # Pinned, or the copy would wait for the whole stream.
        on_device = host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
        counts = on_device[at + 2 :].view(-1, len(COUNTED))
        tiles_per_program = max(1, min(MAX_TILES_PER_PROGRAM, tiles // launch.programs))
        if tiles:
            merge_tiles[(-(tiles // -tiles_per_program),)](
                on_device, counts, on_device[at : at + 2].view(torch.float64), len(segments), tiles, tiles_per_program,
                models, required,
                **constants(signature, required == models, launch),
                **({} if interpreted() else options(launch, triton.runtime.driver.active.get_current_target())),
            )  # fmt: skip
    return counts


def _packed(
    signature: Signature, segments: list[tuple[torch.Tensor, list[torch.Tensor]]], tile: int
) -> tuple[array[int], int]:
    """What merge_tiles takes as its memory, and the number of tiles: as pack_for_device of negmerge_fast/core/descriptors.py."""
    starts, rows, tiles = array("Q"), array("Q"), 0  # unsigned: an address may have its highest bit set
    for base, versions in segments:
        addresses = [base.data_ptr(), base.data_ptr(), *(each.data_ptr() for each in versions)]
        starts.extend((tiles, all(address % 16 == 0 for address in addresses)))
        rows.extend((base.numel(), *addresses))
        tiles += -(base.numel() // -tile)
    starts.extend((tiles, 0))
    codes = bytes(DTYPE_CODES[dtype] for dtype in signature.models)
    starts.extend(rows)
    starts.frombytes(codes.ljust(-(len(codes) // -8) * 8, b"\0"))
    return starts, tiles
