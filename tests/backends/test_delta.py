"""Deltas: the means of the models that agree, packed and applied, give the bits and the counts of a merge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backend_cases import CASES, BackendCase
from bits import STORAGE, same_bits
from hostile import HOSTILE, random_models

from negmerge_fast.backends import masks, native, registry
from negmerge_fast.core.batch import Batch, Operand, Signature, segment_at
from negmerge_fast.core.delta import RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature, mask_bytes
from negmerge_fast.core.reference import plain_apply, plain_consensus, plain_merge, plain_pack
from negmerge_fast.core.rule import Rule

SIGNATURES = [
    ("F32", ("F32",) * 3), ("BF16", ("BF16",) * 3), ("F16", ("F16",) * 2), ("F64", ("F64",) * 2),
    ("F32", ("BF16", "F32")), ("BF16", ("F16", "F64", "BF16")),
]  # fmt: skip
MIXED_TYPES = [
    (result, means, arithmetic)
    for arithmetic, results in (("F32", ("F32", "F16", "BF16")), ("F64", tuple(STORAGE)))
    for result in results
    for means in (arithmetic, "BF16")
]
LENGTHS = [1, 15, 63, 64, 65, 1023, 1025, 4097, 70_001]
STORAGE_NAMES = {dtype: name for name, dtype in STORAGE.items()}
POISON = 0xA5


@pytest.fixture(params=[case for case in CASES if case.values[0][:2] in (("torch", "cpu"), ("cpu", "cpu"))])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendCase]:
    """A backend and an instruction set. Beside "torch" masks are packed with NumPy."""
    found: BackendCase = request.param
    if (reason := found.why_not()) is not None:
        pytest.skip(reason)
    if found.backend == "torch":
        monkeypatch.setattr(masks, "_is_native", lambda: False)
    with found.chosen():
        yield found


class Packed:
    """The delta of a tensor, made by a backend."""

    def __init__(self, dense: torch.Tensor, means_dtype: str) -> None:
        arithmetic = STORAGE_NAMES[dense.dtype]
        numel = self.numel = dense.numel()
        self.mask = torch.full((mask_bytes(numel),), 255, dtype=torch.uint8)
        memory = torch.full((numel,), torch.nan, dtype=STORAGE[means_dtype])
        self.count = masks.pack(
            dense.data_ptr(), numel, arithmetic, means_dtype, self.mask.data_ptr(), memory.data_ptr()
        )
        self.means = memory[: self.count].clone()
        self.ranks = torch.full((-(numel // -RANK_BLOCK),), -1)
        assert masks.ranks(self.mask.data_ptr(), numel, self.ranks.data_ptr()) == self.count

    def segment(
        self, base: int = 0, saved: torch.Tensor | None = None, out: int = 0, owners: object = ()
    ) -> DeltaSegment:
        own = (self.mask, self.means, self.ranks)
        at_saved = saved.data_ptr() if saved is not None else 0
        return DeltaSegment(
            self.numel, *(t.data_ptr() for t in own), base, at_saved, out, owners=[*own, saved, owners]
        )

    @property
    def flags(self) -> torch.Tensor:
        bits = (self.mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).view(-1)
        assert not bits[self.numel :].any()
        return bits[: self.numel].bool()


def consensus_of(
    case: BackendCase,
    base: torch.Tensor,
    models: list[torch.Tensor],
    min_agreement: float = 1.0,
    inputs: str = "",
) -> tuple[torch.Tensor, list[int]]:
    """The dense means of a backend, and its counts."""
    dtypes = tuple(STORAGE_NAMES[m.dtype] for m in models)
    signature = Signature(STORAGE_NAMES[base.dtype], dtypes, inputs == "task_vectors")
    dense = torch.full((len(base),), torch.nan, dtype=STORAGE[signature.arithmetic])
    operands = [base, *models]
    segment = segment_at(len(base), signature, [t.data_ptr() for t in operands], operands)
    segment = segment._replace(out=Operand(dense.data_ptr(), signature.arithmetic, dense))
    rule = Rule(1.0, min_agreement)
    counts = registry.consensus(case.backend)(Batch("cpu", signature, [segment]), rule)
    return dense, counts.tolist()[0]


def misplaced(tensor: torch.Tensor, offset: int) -> tuple[torch.Tensor, int]:
    """Memory with a copy of a tensor at an offset in bytes and some more behind it; and its address."""
    memory = torch.full((offset + tensor.nbytes + 64,), POISON, dtype=torch.uint8)
    memory[offset : offset + tensor.nbytes] = tensor.view(torch.uint8)
    return memory, memory.data_ptr() + offset


@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize(("result", "models"), SIGNATURES)
def test_a_delta_gives_the_bits_and_counts_of_a_merge(
    case: BackendCase, numel: int, result: str, models: tuple[str, ...]
) -> None:
    base, finetuned = random_models(len(models), numel, STORAGE[result], [STORAGE[m] for m in models])
    dense, counts = consensus_of(case, base, finetuned)
    expected_dense, *expected_counts = plain_consensus(base, finetuned)
    assert same_bits(dense, expected_dense) and counts == expected_counts
    arithmetic = STORAGE_NAMES[dense.dtype]
    delta = Packed(dense, arithmetic)
    assert delta.count == counts[0]
    _, apply = registry.choose_apply(case.backend, "cpu")
    kinds = DeltaSignature(result, arithmetic, arithmetic)

    def applied(scale: float | None, **addresses: object) -> list[int]:
        batch = DeltaBatch("cpu", kinds, [delta.segment(**addresses)])  # type: ignore[arg-type]
        return list(apply(batch, scale).tolist()[0])

    saved = torch.full((max(delta.count, 1),), torch.nan, dtype=base.dtype)
    registry.save_of(case.backend)(DeltaBatch("cpu", kinds, [delta.segment(base.data_ptr(), saved)]))
    live = base.clone()
    for scale in (0.9, -1.0, 0.0, 1e38):
        expected, *merged = plain_merge(base, finetuned, scale)
        apart, in_place = torch.full_like(base, 7.0), base.clone()
        changed, nonfinite = applied(scale, base=base.data_ptr(), out=apart.data_ptr())
        assert same_bits(apart, expected)
        assert applied(scale, base=in_place.data_ptr(), out=in_place.data_ptr()) == [changed, nonfinite]
        assert same_bits(in_place, expected)
        assert applied(scale, saved=saved, out=live.data_ptr()) == [changed, nonfinite]
        assert same_bits(live, expected)
        assert applied(scale, base=base.data_ptr()) == applied(scale, saved=saved) == [changed, nonfinite]
        assert merged == [delta.count - nonfinite, counts[1] + nonfinite, counts[2]]
        integers = torch.int64 if base.itemsize == 8 else torch.int32 if base.itemsize == 4 else torch.int16
        assert changed == int((expected.view(integers) != base.view(integers)).sum())
    assert applied(None, saved=saved, out=live.data_ptr()) == [0, 0]
    assert same_bits(live, base)


def hostile_means(numel: int, dtype: torch.dtype, set_fraction: float) -> torch.Tensor:
    """Dense means, a fraction of them not zero: all sizes, next to what BF16 rounds to zero and to infinity, and infinite ones."""
    generator = torch.Generator().manual_seed(numel)
    sizes = torch.empty(numel, dtype=torch.float64).uniform_(-160, 130, generator=generator)
    dense = torch.randn(numel, generator=generator, dtype=torch.float64) * 2.0**sizes
    least, most = (
        2.0**-134,
        2.0**128 - 2.0**119,
    )  # half of BF16's least, and the least that it rounds to infinity
    edges = [x * (1 + e) for x in (least, most, 2.0**-126, 2.0**-149) for e in (-(2.0**-22), 0.0, 2.0**-22)]
    edges += [
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        1 + 2.0**-8 + 2.0**-23,
        torch.inf,
        -torch.inf,
        torch.nan,
        -0.0,
        *HOSTILE,
    ]
    odd = torch.tensor(edges, dtype=torch.float64)[torch.randint(len(edges), (numel,), generator=generator)]
    dense = torch.where(torch.rand(numel, generator=generator) < 0.3, odd, dense).to(dtype)
    return torch.where(torch.rand(numel, generator=generator) < set_fraction, dense, torch.zeros_like(dense))


@pytest.mark.parametrize("flushing", [False, True])
@pytest.mark.parametrize(
    ("numel", "set_fraction"),
    [*((n, set_fraction) for n in LENGTHS for set_fraction in (0.1, 1.0)), (300_001, 0.5)],
)
@pytest.mark.parametrize(
    ("arithmetic", "stored"), [("F32", "F32"), ("F32", "BF16"), ("F64", "F64"), ("F64", "BF16")]
)
def test_packing_and_expanding(
    case: BackendCase, arithmetic: str, stored: str, numel: int, set_fraction: float, flushing: bool
) -> None:
    dense = hostile_means(numel, STORAGE[arithmetic], set_fraction)
    mask, means = plain_pack(dense, STORAGE[stored])
    wide = torch.zeros_like(dense)
    wide[mask] = means.to(dense.dtype)
    torch.set_flush_denormal(flushing)
    try:
        delta = Packed(dense, stored)
        parts = [
            (0, numel),
            *((b, e - b) for b, e in ((7, numel - 7), (64, numel), (65, numel - 1)) if b <= e),
        ]
        found = []
        for begin, length in parts:
            first = (
                delta.means.data_ptr() + masks.rank(delta.mask.data_ptr(), 0, begin) * delta.means.itemsize
            )
            memory, address = misplaced(torch.empty(length, dtype=dense.dtype), 3)
            masks.expand(delta.mask.data_ptr(), begin, length, first, stored, arithmetic, address)
            found.append(memory)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(delta.flags, mask) and same_bits(delta.means, means)
    for (begin, length), memory in zip(parts, found, strict=True):
        assert torch.equal(memory, misplaced(wide[begin : begin + length], 3)[0])
        assert masks.rank(delta.mask.data_ptr(), begin, begin + length) == int(mask[begin:][:length].sum())
    blocks = torch.nn.functional.pad(mask, (0, -numel % RANK_BLOCK)).view(-1, RANK_BLOCK).sum(1)
    assert torch.equal(delta.ranks, blocks.cumsum(0) - blocks)


def test_means_are_packed_in_place(case: BackendCase) -> None:
    """They may be written over the dense ones, which are as long at least."""
    for arithmetic, stored in (("F32", "F32"), ("F32", "BF16"), ("F64", "F64"), ("F64", "BF16")):
        dense = hostile_means(4999, STORAGE[arithmetic], 0.9)
        mask, means = plain_pack(dense, STORAGE[stored])
        flags = torch.zeros(mask_bytes(4999), dtype=torch.uint8)
        count = masks.pack(dense.data_ptr(), 4999, arithmetic, stored, flags.data_ptr(), dense.data_ptr())
        assert count == int(mask.sum())
        assert same_bits(dense.view(torch.uint8)[: means.nbytes].view(STORAGE[stored]), means)


@pytest.mark.parametrize(
    ("numel", "offset"),
    [*((n, (0, 1, 2, 8, 63)[i % 5]) for i, n in enumerate(LENGTHS)), (600_001, 0), (600_001, 2)],
)
@pytest.mark.parametrize(("result", "means", "arithmetic"), MIXED_TYPES)
def test_any_types_and_addresses(
    case: BackendCase, result: str, means: str, arithmetic: str, numel: int, offset: int
) -> None:
    """Nothing but the output is written, in the sizes that stay in cache and in larger ones."""
    delta = Packed(hostile_means(numel, STORAGE[arithmetic], 0.3), means)
    base, _ = random_models(1, numel, STORAGE[result], [STORAGE[result]])
    kinds = DeltaSignature(result, means, arithmetic)
    _, apply = registry.choose_apply(case.backend, "cpu")
    memory, address = misplaced(base, offset)
    saved = torch.full((delta.count + 1,), 7.0, dtype=base.dtype)
    registry.save_of(case.backend)(DeltaBatch("cpu", kinds, [delta.segment(address, saved)]))
    assert same_bits(saved, torch.cat([base[delta.flags], saved[-1:].clone().fill_(7)]))
    scales = (0.9, -1e38) if numel < 10_000 else (0.9,)
    for scale in scales:
        expected, *counts = plain_apply(base, delta.flags, delta.means, scale, STORAGE[arithmetic])
        written, out = misplaced(torch.full_like(base, 7.0), offset)
        for segment in (
            delta.segment(address, None, out, memory),
            delta.segment(address, None, address, memory),
            delta.segment(0, saved, address, memory),
        ):
            found = apply(DeltaBatch("cpu", kinds, [segment]), scale, 2).tolist()
            assert found == [counts]
        for held in (memory, written):
            assert torch.equal(held, misplaced(expected, offset)[0])
        assert apply(DeltaBatch("cpu", kinds, [delta.segment(0, saved, address, memory)]), None).tolist() == [
            [0, 0]
        ]
        assert torch.equal(memory, misplaced(base, offset)[0])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_many_segments_in_one_batch(case: BackendCase, threads: int) -> None:
    """Empty, tiny and long ones, shared by threads."""
    kinds = DeltaSignature("BF16", "F32", "F32")
    lengths = [0, 1, 0, 64, 1000, 1024, 1025, 3, 700_001, 0, 5000, *[7] * 100, 0]
    deltas = [Packed(hostile_means(n, torch.float32, 0.2), "F32") for n in lengths]
    bases = [random_models(1, n, torch.bfloat16, [torch.bfloat16])[0] for n in lengths]
    outs = [torch.full_like(base, 7.0) for base in bases]
    segments = [
        delta.segment(base.data_ptr(), None, out.data_ptr(), (base, out))
        for delta, base, out in zip(deltas, bases, outs, strict=True)
    ]
    _, apply = registry.choose_apply(case.backend, "cpu")
    counts = apply(DeltaBatch("cpu", kinds, segments), 0.9, threads).tolist()
    for row, delta, base, out in zip(counts, deltas, bases, outs, strict=True):
        expected, *counted = plain_apply(base, delta.flags, delta.means, 0.9, torch.float32)
        assert same_bits(out, expected) and row == counted
    assert apply(DeltaBatch("cpu", kinds, []), 0.9).tolist() == []


@pytest.mark.parametrize(("result", "means", "arithmetic"), MIXED_TYPES)
def test_flushing_subnormals_in_the_caller_changes_nothing(
    case: BackendCase, result: str, means: str, arithmetic: str
) -> None:
    tiny = float(torch.finfo(STORAGE[result]).tiny)
    base = torch.full((300_000,), tiny / 2, dtype=STORAGE[result])
    delta = Packed(torch.full((300_000,), tiny / 4, dtype=STORAGE[arithmetic]), means)
    expected, *counts = plain_apply(base, delta.flags, delta.means, 0.5, STORAGE[arithmetic])
    assert counts == [delta.count, 0]
    _, apply = registry.choose_apply(case.backend, "cpu")
    segment = delta.segment(base.data_ptr(), None, base.data_ptr(), base)
    torch.set_flush_denormal(True)
    try:
        assert apply(
            DeltaBatch("cpu", DeltaSignature(result, means, arithmetic), [segment]), 0.5
        ).tolist() == [counts]
        assert float(torch.tensor(5e-324, dtype=torch.float64) * 1.0) == 0, "the caller's mode is given back"
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(base, expected)


def test_nothing_behind_the_last_element_is_touched(case: BackendCase) -> None:
    """Whatever the last word of a mask has there."""
    base = torch.ones(100)
    delta = Packed(torch.ones(100), "F32")
    delta.mask[-3:] = 255
    memory, address = misplaced(base, 0)
    _, apply = registry.choose_apply(case.backend, "cpu")
    kinds = DeltaSignature("F32", "F32", "F32")
    assert apply(DeltaBatch("cpu", kinds, [delta.segment(address, None, address, memory)]), 0.5).tolist() == [
        [100, 0]
    ]
    assert torch.equal(memory, misplaced(base / 2, 0)[0])


def test_compiled_code_is_chosen_where_there_is_some() -> None:
    if native.why_not("cpu", "cpu") is None:
        assert registry.choose_apply("auto", "cpu") == ("cpu", native.apply_cpu)
        assert registry.save_of("cpu") is native.save_cpu and masks._is_native()


def test_a_base_is_never_restored(case: BackendCase) -> None:
    delta, base = Packed(torch.ones(10), "F32"), torch.ones(10)
    _, apply = registry.choose_apply(case.backend, "cpu")
    batch = DeltaBatch("cpu", DeltaSignature("F32", "F32", "F32"), [delta.segment(base.data_ptr())])
    with pytest.raises(ValueError, match="scale: None, expected a number"):
        apply(batch, None)
