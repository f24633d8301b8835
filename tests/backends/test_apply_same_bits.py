"""Every backend that applies deltas against the plain rule: the same bits, over types, lengths, addresses and hostile values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backend_cases import CASES, BackendCase, to_device
from bits import STORAGE, same_bits
from hostile import HOSTILE

from negmerge_fast.backends import masks
from negmerge_fast.core.delta import RANK_BLOCK, DeltaBatch, DeltaSegment, DeltaSignature, mask_bytes
from negmerge_fast.core.reference import plain_apply

SIGNATURES = [
    DeltaSignature(result, means, arithmetic)
    for result in STORAGE
    for arithmetic in ("F32", "F64")
    for means in (arithmetic, "BF16")
    if (result, arithmetic) != ("F64", "F32")
]

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

KINDS = ["in place", "apart", "saved", "count", "count saved"]


# test_delta.py has the other instruction sets.
@pytest.fixture(params=[each for each in CASES if each.values[0].instruction_set in (None, "avx512")])
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    found: BackendCase = request.param
    if (reason := found.why_not()) is not None:
        pytest.skip(reason)
    with found.chosen():
        yield found


class Delta(NamedTuple):
    """A base, which of its elements are in the mask, and the means of these."""

    base: torch.Tensor
    flags: torch.Tensor
    means: torch.Tensor


def random_delta(signature: DeltaSignature, numel: int, fraction: float, seed: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(numel + seed)

    def numbers(dtype: str, spread: float) -> torch.Tensor:
        drawn = spread * torch.randn(numel, generator=generator, dtype=torch.float64)
        hostile = torch.tensor(HOSTILE, dtype=torch.float64)
        chosen = hostile[torch.randint(len(hostile), (numel,), generator=generator)]
        rare = torch.rand(numel, generator=generator) < 0.1
        return torch.where(rare, chosen, drawn).to(STORAGE[dtype])

    base, means = numbers(signature.result, 1.0), numbers(signature.means, 0.01)
    flags = torch.rand(numel, generator=generator) < fraction
    return Delta(base, flags, means[flags])


class Part(NamedTuple):
    """A segment of a batch: a delta, how it is applied, and the bytes by which base and out are misaligned."""

    delta: Delta
    kind: str
    offset: int = 0


class Memory:
    """The bytes of one array of each segment. They begin at multiples of 64, plus offsets."""

    def __init__(
        self, arrays: Sequence[torch.Tensor], case: BackendCase, offsets: Sequence[int] = (), fill: int = 0xA5
    ):
        places = np.cumsum([0, *(-((array.nbytes + 200) // -64) * 64 for array in arrays)])
        self.starts = [
            int(at) + offset for at, offset in zip(places, offsets or [0] * len(arrays), strict=False)
        ]
        memory = torch.full((int(places[-1]) + 64,), fill, dtype=torch.uint8)
        for start, array in zip(self.starts, arrays, strict=True):
            memory[start : start + array.nbytes] = array.view(torch.uint8)
        self.bytes = to_device(memory, case)

    def __getitem__(self, index: int) -> int:
        return int(self.bytes.data_ptr() + self.starts[index])


class Packed:
    """The memory of a batch."""

    def __init__(self, case: BackendCase, signature: DeltaSignature, parts: Sequence[Part]):
        self.case, self.signature, self.parts = case, signature, parts
        deltas, offsets = [part.delta for part in parts], [part.offset for part in parts]
        packed = [packed_mask(delta) for delta in deltas]
        self.base = Memory([delta.base for delta in deltas], case, offsets)
        self.out = Memory([torch.full_like(delta.base, -1.0) for delta in deltas], case, offsets)
        self.means = Memory([delta.means for delta in deltas], case)
        self.saved = Memory([delta.base[delta.flags] for delta in deltas], case)
        self.masks = Memory([mask for mask, _ in packed], case, fill=0)
        self.ranks = Memory([ranks for _, ranks in packed], case)
        self.held = [self.base, self.out, self.means, self.saved, self.masks, self.ranks]

    def batch(self) -> DeltaBatch:
        return DeltaBatch(
            str(self.base.bytes.device), self.signature, list(map(self.segment, range(len(self.parts))))
        )

    def segment(self, k: int) -> DeltaSegment:
        delta, kind, _ = self.parts[k]
        is_saved = kind.endswith("saved") or kind == "restored"
        out = self.base if kind in ("in place", "restored") else self.out
        return DeltaSegment(
            len(delta.base), self.masks[k], self.means[k], self.ranks[k],
            0 if is_saved else self.base[k],
            self.saved[k] if is_saved or kind == "to save" else 0,
            0 if kind.startswith("count") or kind == "to save" else out[k],
            [each.bytes for each in self.held],
        )  # fmt: skip

    def copy(self) -> list[torch.Tensor]:
        return [each.bytes.cpu().clone() for each in self.held]


def packed_mask(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and its ranks."""
    numel = len(delta.flags)
    bits = np.packbits(delta.flags.numpy(), bitorder="little")
    mask = torch.from_numpy(np.concatenate([bits, np.zeros(mask_bytes(numel) - len(bits), np.uint8)]))
    ranks = torch.zeros(-(numel // -RANK_BLOCK), dtype=torch.int64)
    assert masks.ranks(mask.data_ptr(), numel, ranks.data_ptr()) == len(delta.means)
    return mask, ranks


def plain(delta: Delta, scale: float, arithmetic: str) -> tuple[torch.Tensor, int, int]:
    return plain_apply(*delta, scale, STORAGE[arithmetic])


def check(case: BackendCase, signature: DeltaSignature, parts: Sequence[Part], scale: float = 0.9) -> None:
    """Apply deltas in one batch, and compare all memory with what the plain rule leaves."""
    packed = Packed(case, signature, parts)
    expected, counts = packed.copy(), []
    for k, (delta, kind, _) in enumerate(parts):
        result, *counted = plain(delta, scale, signature.arithmetic)
        counts.append(counted)
        if kind == "saved":
            result = torch.where(delta.flags, result, torch.full_like(delta.base, -1.0))
        if not kind.startswith("count"):
            written = expected[0] if kind == "in place" else expected[1]
            written[packed.base.starts[k] :][: result.nbytes] = result.view(torch.uint8)
    found = case.apply()(packed.batch(), scale).tolist()
    assert [list(row) for row in found] == counts
    for each, right in zip(packed.held, expected, strict=True):
        assert torch.equal(each.bytes.cpu(), right)


def usual(result: str) -> DeltaSignature:
    arithmetic = "F64" if result == "F64" else "F32"
    return DeltaSignature(result, arithmetic, arithmetic)


# Triton's interpreter takes 5 ms for each block of ranks.
LENGTHS = [0, 1, 33, 1023, 1025] if IS_INTERPRETED else [0, 1, 31, 32, 33, 1023, 1024, 1025, 5000]


@pytest.mark.parametrize("signature", SIGNATURES, ids="-".join)
def test_same_bits(case: BackendCase, signature: DeltaSignature) -> None:
    deltas = [random_delta(signature, length, (0.1, 0.7)[k % 2]) for k, length in enumerate(LENGTHS)]
    check(case, signature, [Part(delta, kind) for delta in deltas for kind in KINDS])


@pytest.mark.parametrize("result", STORAGE)
def test_any_address(case: BackendCase, result: str) -> None:
    delta, offsets = random_delta(usual(result), 1001, 0.3), (0, 1, 2, 4, 8, 16, 63)
    check(case, usual(result), [Part(delta, kind, offset) for offset in offsets for kind in KINDS])


@pytest.mark.parametrize("result", STORAGE)
def test_any_scale(case: BackendCase, result: str) -> None:
    delta = random_delta(usual(result), 700, 0.5)
    for scale in (0.0, -0.0, -1.0, 1e-45, 1e30, 1e300):
        check(case, usual(result), [Part(delta, kind) for kind in ("in place", "saved")], scale)


def test_any_fraction(case: BackendCase) -> None:
    signature = usual("BF16")
    deltas = [
        random_delta(signature, length, fraction)
        for fraction in (0.0, 0.001, 0.999, 1.0)
        for length in (5, 1024, 3000)
    ]
    check(case, signature, [Part(delta, kind) for delta in deltas for kind in KINDS])


def test_many_segments_in_one_batch(case: BackendCase) -> None:
    """Empty, tiny, odd and long ones. Nothing between them is written."""
    lengths = [0, 1, 2, 0, 7, 1000, 4096, 1, 8191, 3, 0, 9000, 5, 0] + [1] * 60 + [0] * 3
    deltas = [random_delta(usual("F16"), length, 0.3, k) for k, length in enumerate(lengths)]
    kinds = ("in place", "apart", "saved")
    check(case, usual("F16"), [Part(delta, kinds[k % 3]) for k, delta in enumerate(deltas)])


@pytest.mark.parametrize("result", ["F16", "BF16"])
def test_every_number_of_16_bits(case: BackendCase, result: str) -> None:
    """Each as a base, and each finite one as a mean."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    base, means = every.view(STORAGE[result]), every.roll(12_345).view(torch.bfloat16)
    flags = means.isfinite() & (means != 0)
    check(
        case, DeltaSignature(result, "BF16", "F32"), [Part(Delta(base, flags, means[flags]), "apart")], -0.5
    )


@pytest.mark.parametrize("arithmetic", ["F32", "F64"])
@pytest.mark.parametrize("result", ["F16", "BF16"])
def test_halves_are_rounded_to_even(case: BackendCase, result: str, arithmetic: str) -> None:
    """Results at, just below and just above the middle of two neighbours."""
    few = 37 if IS_INTERPRETED else 1
    numbers = torch.arange((1 << 15) - 1, dtype=torch.int16).view(STORAGE[result]).double()
    middle = ((numbers[:-1] + numbers[1:]) / 2)[::few]
    middle = middle[middle.isfinite()]
    means = torch.cat([middle * (1 + step) for step in (0, 2**-20, -(2**-20))]).to(STORAGE[arithmetic])
    zeros, flags = torch.zeros(len(means), dtype=STORAGE[result]), torch.ones(len(means), dtype=torch.bool)
    check(
        case,
        DeltaSignature(result, arithmetic, arithmetic),
        [Part(Delta(zeros, flags, means), "saved")],
        -1.0,
    )


@pytest.mark.parametrize("result", STORAGE)
def test_elements_are_saved_and_restored(case: BackendCase, result: str) -> None:
    """All others stay as they are, and nothing is counted."""
    deltas = [
        (random_delta(usual(result), n, 0.3), offset) for n in (1, 0, 1500, 3000) for offset in (0, 1, 16)
    ]
    packed = Packed(case, usual(result), [Part(delta, "to save", offset) for delta, offset in deltas])
    before = packed.copy()
    saved = packed.saved.bytes
    for start, (delta, _) in zip(packed.saved.starts, deltas, strict=True):
        saved[start : start + delta.base[delta.flags].nbytes] = 0
    case.save()(packed.batch())
    assert all(map(torch.equal, packed.copy(), before))
    packed.parts = [Part(delta, "restored", offset) for delta, offset in deltas]
    for start, (delta, _) in zip(packed.base.starts, deltas, strict=True):
        other = torch.where(delta.flags, torch.full_like(delta.base, 7.0), delta.base).view(torch.uint8)
        packed.base.bytes[start : start + len(other)] = other.to(saved.device)
    counts = case.apply()(packed.batch(), None).tolist()
    assert [list(row) for row in counts] == [[0, 0]] * len(deltas)
    assert all(map(torch.equal, packed.copy(), before))
    packed.parts = [Part(delta, "in place", offset) for delta, offset in deltas]
    with pytest.raises(ValueError, match="scale: None, expected a number for segments with a base"):
        case.apply()(packed.batch(), None)


def test_an_empty_batch(case: BackendCase) -> None:
    device = "cuda:0" if case.device == "cuda:0" else "cpu"
    batch = DeltaBatch(device, usual("F32"), [])
    found: Any = case.apply()(batch, 0.9)
    assert found.tolist() == []
    case.save()(batch)


def test_payloads_of_nan_and_signs_of_zero_survive_beside_the_mask(case: BackendCase) -> None:
    base = torch.tensor([0x7FC1, 0x7F81, -1, -0x8000, 5] * 400, dtype=torch.int16).view(torch.bfloat16)
    flags = torch.arange(2000) % 3 == 0
    delta = Delta(base, flags, torch.full((int(flags.sum()),), 1e-30))
    for scale in (1.0, -1.0):
        check(case, usual("BF16"), [Part(delta, kind) for kind in KINDS], scale)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_elements_than_32_bits_can_count(backend: str) -> None:
    """A few elements in the mask, on both sides of 2^31 and of 2^32."""
    case = BackendCase(backend, "cuda:0")
    if (reason := case.why_not()) is not None:
        pytest.skip(reason)
    numel = (1 << 32) + 70_000
    if torch.cuda.mem_get_info()[0] < 3 * numel:
        pytest.skip("not enough memory on the device")
    at = torch.tensor([0, 65_535, (1 << 31) - 1, 1 << 31, (1 << 31) + 5, (1 << 32) - 1, 1 << 32, numel - 1])
    mask = torch.zeros(mask_bytes(numel), dtype=torch.uint8)
    mask.index_put_((at // 8,), (1 << at % 8).to(torch.uint8), accumulate=True)
    ranks = torch.zeros(-(numel // -RANK_BLOCK), dtype=torch.int64)
    assert masks.ranks(mask.data_ptr(), numel, ranks.data_ptr()) == len(at)
    base = torch.zeros(numel, dtype=torch.bfloat16, device="cuda:0")
    means = torch.arange(1.0, len(at) + 1, device="cuda:0")
    mask, ranks = mask.to("cuda:0"), ranks.to("cuda:0")
    segment = DeltaSegment(
        numel, mask.data_ptr(), means.data_ptr(), ranks.data_ptr(), base.data_ptr(), 0, base.data_ptr(), [mask, means, ranks, base]
    )  # fmt: skip
    batch = DeltaBatch("cuda:0", DeltaSignature("BF16", "F32", "F32"), [segment])
    assert case.apply()(batch, -1.0).tolist() == [[len(at), 0]]
    assert base[at.to("cuda:0")].tolist() == list(range(1, len(at) + 1))
    assert int(torch.count_nonzero(base)) == len(at)


@pytest.mark.gpu
@pytest.mark.parametrize("repeated", [1, 100])  # the table goes along with the launch, or is uploaded
def test_a_captured_launch_is_repeated(repeated: int) -> None:
    """A live model's move in a CUDA graph."""
    case = BackendCase("cuda", "cuda:0")
    if (reason := case.why_not()) is not None:
        pytest.skip(reason)
    apply = case.apply()
    delta = random_delta(usual("F32"), 5000, 0.3)
    packed = Packed(case, usual("F32"), [Part(delta, "saved")] * repeated)
    before, graph = packed.out.bytes.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = apply(packed.batch(), 0.9)
    result, changed, nonfinite = plain_apply(*delta, 0.9, torch.float32)
    result = torch.where(delta.flags, result, -torch.ones(1))
    for _ in range(2):
        packed.out.bytes.copy_(before)
        graph.replay()
        for start in packed.out.starts:
            assert same_bits(packed.out.bytes[start : start + 20_000].cpu().view(torch.float32), result)
    assert counts[0].tolist() in ([changed, nonfinite], [2 * changed, 2 * nonfinite])
