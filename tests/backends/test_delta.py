"""Deltas: the means of the models that agree, packed and applied, give the bits and the counts of a merge."""

from __future__ import annotations

import pytest
import torch

from negmerge_fast.backends import masks, pytorch, registry
from negmerge_fast.core.batch import Batch, Operand, Signature, segment_at
from negmerge_fast.core.delta import RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature, mask_bytes
from negmerge_fast.core.rule import Rule

TYPES = pytorch.TORCH_DTYPES
SIGNATURES = [
    ("F32", ("F32",) * 3), ("BF16", ("BF16",) * 3), ("F16", ("F16",) * 2), ("F64", ("F64",) * 2),
    ("F32", ("BF16", "F32")), ("BF16", ("F16", "F64", "BF16")),
]  # fmt: skip
HOSTILE = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 65504.0, 3.4e38, -3.4e38, float("inf"), float("nan")]


def versions(numel, result, models):
    generator = torch.Generator().manual_seed(numel)
    base = torch.randn(numel, generator=generator, dtype=torch.float64)
    lean = torch.randn(numel, generator=generator, dtype=torch.float64)
    made = [base]
    for _ in models:
        made.append(base + 0.1 * lean + 0.05 * torch.randn(numel, generator=generator, dtype=torch.float64))
    for k, values in enumerate(made):
        hostile = torch.rand(numel, generator=generator) < 0.05
        chosen = torch.tensor(HOSTILE, dtype=torch.float64)[
            torch.randint(len(HOSTILE), (numel,), generator=generator)
        ]
        made[k] = torch.where(hostile, chosen, values)
    return [values.to(TYPES[dtype]) for values, dtype in zip(made, (result, *models), strict=True)]


class Packed:
    """The delta of a tensor, made by a backend."""

    def __init__(self, backend, signature, base, models, rule):
        numel = self.numel = base.numel()
        self.arithmetic = signature.arithmetic
        dense = torch.full((numel,), float("nan"), dtype=TYPES[self.arithmetic])
        operands = [base, *models]
        segment = segment_at(numel, signature, [t.data_ptr() for t in operands], operands)
        segment = segment._replace(out=Operand(dense.data_ptr(), self.arithmetic, dense))
        self.counts = registry.consensus(backend)(Batch("cpu", signature, [segment]), rule).tolist()[0]
        self.mask = torch.full((mask_bytes(numel),), 255, dtype=torch.uint8)
        self.means = torch.full((numel,), float("nan"), dtype=dense.dtype)
        self.count = masks.pack(
            dense.data_ptr(),
            numel,
            self.arithmetic,
            self.arithmetic,
            self.mask.data_ptr(),
            self.means.data_ptr(),
        )
        self.ranks = torch.full((-(numel // -RANK_BLOCK),), -1)
        assert masks.ranks(self.mask.data_ptr(), numel, self.ranks.data_ptr()) == self.count
        self.dense = dense

    def segment(self, base=None, saved=None, out=None):
        held = (base, saved, out)
        at = [0 if t is None else t.data_ptr() for t in held]
        own = (self.mask, self.means, self.ranks)
        return DeltaSegment(
            self.numel, *(t.data_ptr() for t in own), *at, owners=[t for t in (*own, *held) if t is not None]
        )


def same(left, right):
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1023, 1025, 4097, 300_001])
@pytest.mark.parametrize(("result", "models"), SIGNATURES)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_delta_gives_the_bits_and_counts_of_a_merge(numel, result, models, backend):
    if reason := registry.why_not(backend, "cpu"):
        pytest.skip(reason)
    base, *finetuned = versions(numel, result, models)
    signature = Signature(result, models, False)
    delta = Packed(backend, signature, base, finetuned, Rule(1.0))
    bits = torch.zeros(numel, dtype=delta.dense.dtype)
    masks.expand(
        delta.mask.data_ptr(),
        0,
        numel,
        delta.means.data_ptr(),
        delta.arithmetic,
        delta.arithmetic,
        bits.data_ptr(),
    )
    assert same(bits, delta.dense) and delta.count == delta.counts[0]
    if numel > 70:
        before = masks.rank(delta.mask.data_ptr(), 0, 7)
        part = torch.full((numel - 14,), float("nan"), dtype=bits.dtype)
        first = delta.means.data_ptr() + before * bits.itemsize
        masks.expand(
            delta.mask.data_ptr(), 7, numel - 14, first, delta.arithmetic, delta.arithmetic, part.data_ptr()
        )
        assert same(part, bits[7:-7])
    _, apply = registry.choose_apply(backend, "cpu")
    kinds = DeltaSignature(result, delta.arithmetic, delta.arithmetic)

    def applied(scale, **addresses):
        batch = DeltaBatch("cpu", kinds, [delta.segment(**addresses)])
        return apply(batch, scale).tolist()[0]

    saved = torch.full((max(delta.count, 1),), float("nan"), dtype=base.dtype)
    registry.save_of(backend)(DeltaBatch("cpu", kinds, [delta.segment(base=base, saved=saved)]))
    live = base.clone()
    for scale in (0.9, -1.0, 0.0, 1e38):
        expected = base.clone()
        segment = segment_at(
            numel, signature, [t.data_ptr() for t in (expected, *finetuned)], [expected, *finetuned]
        )
        counts = pytorch.merge(Batch("cpu", signature, [segment]), Rule(scale)).tolist()[0]
        apart, in_place = torch.full_like(base, 7.0), base.clone()
        changed, nonfinite = applied(scale, base=base, out=apart)
        assert same(apart, expected)
        assert applied(scale, base=in_place, out=in_place) == [changed, nonfinite] and same(
            in_place, expected
        )
        assert applied(scale, saved=saved, out=live) == [changed, nonfinite] and same(live, expected)
        assert applied(scale, base=base) == [changed, nonfinite]
        assert counts == [delta.count - nonfinite, delta.counts[1] + nonfinite, delta.counts[2]]
        wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.itemsize]
        assert changed == int((expected.view(wide) != base.view(wide)).sum())
    applied(None, saved=saved, out=live)
    assert same(live, base)
