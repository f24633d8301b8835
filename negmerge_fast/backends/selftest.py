"""The self-test of a kernel: the reference's bits, on hostile numbers, on the device that it will be used on.

Kernels that are right on one chip have silently been wrong on a newer one. Results are kept for the process, by what a kernel is
compiled for: many models are one self-test with fewer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from ..core.batch import Batch, Merge, Operand, Segment, Signature, segment_at
from ..core.choices import WEIGHT_SIZES, Choices, Gate, Terms
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, first_line
from ..core.rule import Rule
from . import pytorch

# The segments of the self-test: elements, kind, and bytes by which the addresses are misaligned. The first two are aligned to
# 16 bytes. The CUDA kernel has 9 tiles of them: of its 3 blocks one goes on from a segment to two tiles of the next, one begins
# within that, one has the empty segment on its way.
_SEGMENTS = (
    (1031, "apart", 0), (4355, "in place", 0), (517, "no base", 0), (300, "in place", 1), (1, "apart", 0),
    (0, "in place", 0), (2, "count", 0), (259, "count", 1),
)  # fmt: skip

HOSTILE = [
    0.0, -0.0, 1e-45, -1e-45, 1e-40, 6e-8, 5e-324, 65504.0, 65520.0, 3.4e38, -3.4e38, 1e300,
    float("inf"), -float("inf"), float("nan"),
]  # fmt: skip

# No kernel takes more models at a time, and all groups divide it: 33 models are computed by the code for 17, 49 and so on.
_MAX_GROUP = 16

_results: dict[tuple[Any, ...], str | None] = {}


def failure(name: str, merge: Merge, device: str, signature: Signature, rule: Rule) -> str | None:
    """Self-test a backend for a signature on a device; returns why it must not be used, None if it passes."""
    unanimous = rule.required(len(signature.models)) == len(signature.models)
    tested = _with_few_models(signature)
    choices = rule.choices and _choices(rule.choices, len(tested.models))
    key = name, device, tested, (unanimous, choices)
    if key not in _results:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise InputError(
                f"backend {name}: not yet self-tested on {device}, expected one call before a graph's capture"
            )
        # Of fewer models, a min_agreement close to 1 could ask for all.
        min_agreement = 1.0 if unanimous else rule.min_agreement if tested == signature else 0.6
        rules = (Rule(scale, min_agreement, choices) for scale in (0.9, -1.0))
        failures = (_run_case(merge, device, tested, each) for each in rules)
        _results[key] = next(filter(None, failures), None)
    return _results[key]


def _choices(choices: Choices, models: int) -> Choices:
    """Choices that the same code computes, with numbers that differ between models: one self-test for all numbers of a method."""
    return replace(
        choices,
        factors=tuple((1.0, 0.7, 1.6)[k % 3] for k in range(models)),
        votes=tuple((1.0, 2.0, 0.3)[k % 3] for k in range(models)),
        keep=tuple((1 << 31, 3 << 30, 1 << 32)[k % 3] for k in range(models)) if choices.keep else (),
        seed=0xFEDCBA9876543210,
        mask_scale=0.4,
    )


def _with_few_models(signature: Signature) -> Signature:
    """The signature with the fewest models, more than a group of them, that the same code merges."""
    models = len(signature.models)
    if models <= 2 * _MAX_GROUP or len(set(signature.models)) > 1:
        return signature
    return signature._replace(models=signature.models[: _MAX_GROUP + (models % _MAX_GROUP or _MAX_GROUP)])


def _run_case(merge: Merge, device: str, signature: Signature, rule: Rule) -> str | None:
    """Compare a merge function with the PyTorch backend on the CPU; returns how they differ."""
    got = [version.to(device, copy=True) for version in _memory(signature)]
    expected, counts = _expected(signature, rule)
    try:
        counted = merge(_batch(device, signature, got, rule), rule).tolist()
    except torch.cuda.OutOfMemoryError:  # says nothing of the kernel
        raise
    except Exception as error:  # the compiler's or the device's: the kernel cannot be used
        return f"failed its self-test on {device}: {type(error).__name__}: {first_line(error)}"
    kinds = "+".join(sorted(set(signature.models)))
    what = f"{kinds} into {signature.result}, {len(signature.models)} models"
    for actual, expected_bytes in zip(got, expected, strict=True):
        if len(wrong := (actual.cpu() != expected_bytes).nonzero()):
            at = int(wrong[0])
            found, right = int(actual[at]), int(expected_bytes[at])
            return f"not the reference's bits on {device} for {what}: byte {at} of the self-test is {found:#04x}, expected {right:#04x}"
    if counted != counts:
        return f"not the reference's counts on {device} for {what}: {counted}, expected {counts}"
    return None


@lru_cache(maxsize=2)  # the scales of one signature, for the next backend that has a self-test
def _expected(signature: Signature, rule: Rule) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The bytes that the reference leaves, and its counts."""
    memory = [version.clone() for version in _memory(signature)]
    counts: list[list[int]] = pytorch.merge(_batch("cpu", signature, memory, rule), rule).tolist()
    return memory, counts


@lru_cache(maxsize=1)
def _memory(signature: Signature) -> list[torch.Tensor]:
    """The bytes of the base, of all models, and of the outputs that are not the base."""
    numel = sum(length + 1 for length, *_ in _SEGMENTS)
    with torch.device("cpu"):
        versions = _numbers(signature, numel, torch.Generator().manual_seed(0))
        out = torch.full((numel * FLOAT_SIZES[signature.result],), 0xA5, dtype=torch.uint8)
    return [*(version.view(torch.uint8) for version in versions), out]


def _numbers(signature: Signature, numel: int, generator: torch.Generator) -> list[torch.Tensor]:
    """The base and all models. Eight kinds of element alternate; in most of them the models lean to one side."""

    def random() -> torch.Tensor:
        return torch.randn(numel, generator=generator, dtype=torch.float64)

    base, lean, kind = random(), random(), torch.arange(numel) % 8
    types = [pytorch.TORCH_DTYPES[dtype] for dtype in (signature.result, *signature.models)]
    # On a base of zero every bit of the mean is stored.
    base = torch.where((kind >= 3) & (kind < 7), 0.0, base)
    base = torch.where((kind == 5) & (lean > 0), -0.0, base)
    # Half-way between two neighbours in the result's dtype, and just beside it.
    stored = lean.to(types[0])
    bits = stored.view(pytorch.BITS_DTYPES[stored.itemsize])
    middle = (stored.double() + (bits + 1).view(types[0]).double()) / 2
    middle = middle * (1 + (torch.arange(numel) // 8 % 3 - 1) * 2.0**-20)
    hostile, rare = torch.tensor(HOSTILE, dtype=torch.float64), min(0.3, 1 / len(types))
    versions = [base]
    for k, dtype in enumerate(types[1:]):
        step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest subnormal
        d = 0.1 * lean + 0.05 * random()
        d = torch.where(kind == 3, lean * (1 + random().abs()), d)
        d = torch.where((kind == 4) | (kind == 5), step * (1 + random().abs() * 99).floor() * lean.sign(), d)
        d = torch.where(kind == 6, middle, d)
        d = torch.where((kind == 1) & (k == torch.arange(numel) // 8 % len(types)), 0.0, d)
        x = d if signature.task_vectors else torch.where(d == 0, versions[0], versions[0] + d)
        versions.append(x)
    for k, values in enumerate(versions):
        is_hostile = (kind == 7) & (torch.rand(numel, generator=generator) < rare)
        chosen = hostile[torch.randint(len(hostile), (numel,), generator=generator)]
        versions[k] = torch.where(is_hostile, chosen, values)
    return [values.to(dtype) for values, dtype in zip(versions, types, strict=True)]


def _batch(device: str, signature: Signature, memory: list[torch.Tensor], rule: Rule) -> Batch:
    sizes = [FLOAT_SIZES[dtype] for dtype in (signature.result, *signature.models, signature.result)]
    segments, start = [], 0
    for length, kind, misalignment in _SEGMENTS:
        *addresses, out = [
            held.data_ptr() + start * size + misalignment for held, size in zip(memory, sizes, strict=True)
        ]
        segment = segment_at(length, signature, addresses, memory[:-1])
        if kind != "in place":
            apart = Operand(out, signature.result, memory[-1])
            segment = segment._replace(out=None if kind == "count" else apart)
        segments.append(segment._replace(base=None) if kind == "no base" else segment)
        start += length + 1
    terms = _terms(device, segments, rule, rule.choices) if rule.choices else None
    return Batch(device, signature, segments, terms)


def _terms(device: str, segments: list[Segment], rule: Rule, choices: Choices) -> list[Terms]:
    """Terms of each segment: with one of the two scales there are weights, of all types."""
    generator, found = torch.Generator().manual_seed(1), []
    for number, segment in enumerate(segments):
        models = len(segment.models)
        terms = Terms(begin=number << 33 | 3 * number, key=0x9E3779B1 * number & 0xFFFFFFFF)
        if choices.gate == Gate.MAGNITUDE:
            terms = terms._replace(
                low=[0.02 * (k % 3) for k in range(models)], high=[0.1 + 0.1 * (k % 3) for k in range(models)]
            )
        if rule.scale > 0 and number < 7:  # the last has none
            terms = terms._replace(weight=_weight(device, number, segment, generator))
        found.append(terms)
    return found


def _weight(device: str, number: int, segment: Segment, generator: torch.Generator) -> Operand:
    """Weights of a segment, as aligned as its models: zeros, and numbers of both signs that are rarely not finite."""
    dtype = list(WEIGHT_SIZES)[(number + len(segment.models)) % len(WEIGHT_SIZES)]
    values = torch.randn(segment.numel, generator=generator, dtype=torch.float64, device="cpu")
    values = torch.where(values.abs() < 0.2, 0.0, torch.where(values > 3, 1e300, values))
    if dtype not in FLOAT_SIZES:
        values = (values * 2).abs().clamp(max=1 if dtype == "BOOL" else 255)
    weights = values.to(pytorch.TORCH_DTYPES[dtype])
    offset = segment.models[0].address % 2
    owner = torch.nn.functional.pad(weights.view(torch.uint8), (offset, 0)).to(device)
    return Operand(owner.data_ptr() + offset, dtype, owner)
