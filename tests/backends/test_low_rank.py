"""Low-rank differences: every backend against the products written out, bit for bit; and merging them against merging them dense."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, INTERPRETED, ON_HOST, BackendCase, to_device
from bits import STORAGE, same_bits
from hostile import HOSTILE

from negmerge_fast.backends import low_rank, pytorch, registry
from negmerge_fast.core.batch import Batch, Merge, Operand, Segment, Signature
from negmerge_fast.core.descriptors import pack_expand, pack_low_rank
from negmerge_fast.core.low_rank import ExpandBatch, ExpandSegment, Expansion, LowRank, in_panels
from negmerge_fast.core.reference import plain_consensus, plain_merge
from negmerge_fast.core.rule import Rule

NAMES = {dtype: name for name, dtype in STORAGE.items()}
NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

# Matrices, rows, columns, rank: of one element, of one row, of one column, narrow, of whole panels and of some more, of many matrices.
SHAPES = [
    (1, 1, 1, 1), (1, 1, 700, 3), (1, 700, 1, 2), (3, 1, 1, 5), (1, 90, 9, 4), (1, 5, 64, 8), (1, 9, 256, 1),
    (2, 7, 131, 16), (5, 3, 65, 33), (1, 4, 31, 256),
]  # fmt: skip

# What is not marked slow: one of each kind.
QUICK = [
    (SHAPES[0], torch.float32), (SHAPES[1], torch.float32), (SHAPES[2], torch.float64), (SHAPES[5], torch.float32),
    (SHAPES[7], torch.float64),
]  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    found: BackendCase = request.param
    if (reason := found.why_not()) is not None:
        pytest.skip(reason)
    with found.chosen():
        yield found


class Factors:
    """Random factors, some of them hostile, on the CPU."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0, hostile: bool = True
    ) -> None:
        self.shape, self.dtype = shape, dtype
        matrices, rows, columns, rank = shape
        generator = torch.Generator().manual_seed(seed)
        self.left = torch.randn(matrices, rows, rank, generator=generator, dtype=torch.float64)
        self.right = torch.randn(matrices, rank, columns, generator=generator, dtype=torch.float64)
        for values in (self.left, self.right) if hostile else ():
            flat = values.view(-1)
            for _ in range(max(1, len(flat) // 50)):
                place, chosen = (
                    int(torch.randint(k, (), generator=generator)) for k in (len(flat), len(HOSTILE))
                )
                flat[place] = HOSTILE[chosen]
        self.left, self.right = self.left.to(dtype), self.right.to(dtype)
        self.scale = float(torch.tensor(0.37 + seed, dtype=torch.float64).to(dtype))

    def on(self, case: BackendCase, panels: bool = False) -> LowRank:
        owner = to_device(self.left, case), to_device(self.right, case)
        matrices, rows, columns, rank = self.shape
        factors = LowRank(
            owner[0].data_ptr(), owner[1].data_ptr(), matrices, rows, columns, rank, self.scale, owner
        )
        if not panels or not case.instruction_set:
            return factors
        packed = in_panels(self.right.numpy())
        return factors._replace(panels=packed.ctypes.data, owner=(*owner, packed))

    def difference(self) -> torch.Tensor:
        """All elements of d, each product and each sum of a row at once."""
        matrices, rows, columns, rank = self.shape
        left, right, scalar = self.left.numpy(), self.right.numpy(), NUMPY[self.dtype]
        d = np.zeros((matrices, rows, columns), scalar)
        with np.errstate(all="ignore"):
            for g, i, r in itertools.product(range(matrices), range(rows), range(rank)):
                product = left[g, i, r] * right[g, r]
                d[g, i] = d[g, i] + product
            return torch.from_numpy(d * scalar(self.scale)).view(-1)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but of a NaN, which is any of its kind."""
    found, nan = found.cpu(), expected.isnan()
    return torch.equal(found.isnan(), nan) and same_bits(found[~nan], expected[~nan])


def rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (numbers.float() if dtype.itemsize == 2 else numbers).to(dtype)


def unaligned(tensor: torch.Tensor, case: BackendCase, offset: int) -> tuple[torch.Tensor, int]:
    """A copy of a tensor's bytes at an odd place in some memory on a device; the memory, and the address."""
    memory = torch.full((tensor.nbytes + 128,), 0xA5, dtype=torch.uint8)
    memory[offset : offset + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    memory = to_device(memory, case)
    return memory, memory.data_ptr() + offset


def test_the_rows_of_these_tests_are_the_rule_of_single_elements() -> None:
    factors = Factors((2, 3, 5, 7), torch.float32)
    d = factors.difference().view(2, 3, 5)
    with np.errstate(all="ignore"):
        for g, i, m in itertools.product(range(2), range(3), range(5)):
            total = np.float32(0)
            for r in range(7):
                total = total + factors.left.numpy()[g, i, r] * factors.right.numpy()[g, r, m]
            assert same(d[g, i, m : m + 1], torch.from_numpy(np.array([total * np.float32(factors.scale)])))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(
            shape, dtype, id=f"{shape}-{dtype}", marks=() if (shape, dtype) in QUICK else pytest.mark.slow
        )
        for shape in SHAPES
        for dtype in (torch.float32, torch.float64)
    ],
)
def test_every_backend_writes_the_products_written_out(
    case: BackendCase, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    factors = Factors(shape, dtype)
    d, name = factors.difference(), NAMES[dtype]
    spans = {(0, len(d)), (len(d) // 3, len(d) - len(d) // 3), (len(d) // 2, 1), (len(d) // 5, len(d) // 2)}
    for odd, (begin, numel) in enumerate(sorted(spans)):
        memory, address = unaligned(torch.full((numel,), 7.0, dtype=dtype), case, odd)
        on_device = factors.on(case, panels=odd < 2)
        segment = ExpandSegment(numel, Expansion(on_device, begin), None, Operand(address, name, memory))
        case.expand()(ExpandBatch(on(case), name, None, [segment]), 2)
        check_written(memory, odd, d[begin : begin + numel])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(dtype, wide) for dtype in STORAGE.values() for wide in NUMPY if wide.itemsize >= dtype.itemsize],
    ids=str,
)
def test_every_backend_adds_it_to_the_base_and_rounds(
    case: BackendCase, dtype: torch.dtype, wide: torch.dtype
) -> None:
    for shape, (begin, apart) in itertools.product(SHAPES[3:9], ((0, True), (3, True), (1, False))):
        factors = Factors(shape, wide, seed=begin)
        d = factors.difference()
        begin = min(begin, len(d) - 1)
        base = torch.randn(len(d), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for k, value in enumerate(HOSTILE[: len(d) // 3]):
            base[3 * k] = value
        base = base.to(dtype)
        expected = rounded(base.to(wide) + d, dtype)[begin:]
        memory, address = unaligned(base[begin:], case, 2 * dtype.itemsize - 1)
        operand = Operand(address, NAMES[dtype], memory)
        out_memory, out = unaligned(base[begin:], case, dtype.itemsize)
        written = Operand(out, NAMES[dtype], out_memory) if apart else operand
        segment = ExpandSegment(len(d) - begin, Expansion(factors.on(case), begin), operand, written)
        case.expand()(ExpandBatch(on(case), NAMES[wide], NAMES[dtype], [segment, segment][: 1 + apart]))
        if apart:
            check_written(out_memory, dtype.itemsize, expected)
            check_written(memory, 2 * dtype.itemsize - 1, base[begin:])
        else:
            check_written(memory, 2 * dtype.itemsize - 1, expected)


def check_written(memory: torch.Tensor, offset: int, expected: torch.Tensor) -> None:
    """Memory has these elements from an offset on, and nothing else of it was written."""
    memory = memory.cpu()
    end = offset + expected.nbytes
    assert same(memory[offset:end].clone().view(expected.dtype), expected)
    assert bool((memory[:offset] == 0xA5).all()) and bool((memory[end:] == 0xA5).all())


def on(case: BackendCase) -> str:
    return "cpu" if case.device == "host" else case.device


class Merged:
    """A segment of models of which some are low-rank, and what they are dense."""

    def __init__(
        self, case: BackendCase, signature: Signature, shape: tuple[int, int, int, int], low: list[bool], seed: int,
        span: tuple[int, int], hostile: bool = True, with_base: bool = True, count: bool = False, in_place: bool = False,
    ) -> None:  # fmt: skip
        begin, end = span
        self.signature, self.case = signature, case
        wide = STORAGE[signature.arithmetic]
        numel = shape[0] * shape[1] * shape[2]
        generator = torch.Generator().manual_seed(seed)
        self.base = torch.randn(numel, generator=generator).to(STORAGE[signature.result])
        if not with_base:
            self.base.zero_()
        lean = 0.2 * torch.randn(numel, generator=generator, dtype=wide)
        self.models: list[torch.Tensor] = []
        operands: list[Any] = []
        for k, (dtype, is_low) in enumerate(zip(signature.models, low, strict=True)):
            if is_low:
                # The same factors with other signs and scales agree often.
                factors = Factors(shape, wide, seed + k // 4 * 100, hostile)
                factors.scale = float(torch.tensor(0.1 * (k + 1)).to(wide))
                d = factors.difference()
                self.models.append(
                    d if signature.task_vectors else rounded(self.base.to(wide) + d, STORAGE[dtype])
                )
                operands.append(Expansion(factors.on(case, panels=k % 2 == 0), begin))
            else:
                x = lean + 0.01 * torch.randn(numel, generator=generator, dtype=wide)
                x = x if signature.task_vectors else x + self.base.to(wide)
                self.models.append(rounded(x, STORAGE[dtype]))
                held = to_device(self.models[-1][begin:end], case)
                operands.append(Operand(held.data_ptr(), dtype, held))
        self.base = self.base[begin:end].clone()
        self.models = [model[begin:end] for model in self.models]
        self.on_device = to_device(self.base.clone(), case)
        base = Operand(self.on_device.data_ptr(), signature.result, self.on_device)
        self.out = self.on_device if in_place else to_device(torch.full_like(self.base, 7.0), case)
        out = Operand(self.out.data_ptr(), signature.result, self.out)
        self.segment = Segment(end - begin, base if with_base else None, operands, None if count else out)

    def check(self, counts: list[int], rule: Rule) -> None:
        task_vectors = self.signature.task_vectors
        expected, *counted = plain_merge(self.base, self.models, rule.scale, rule.min_agreement, task_vectors)
        assert counts == counted
        if self.segment.out is not None:
            assert same_bits(self.out.cpu(), expected)


def merge_of(case: BackendCase) -> Merge:
    return case.low_rank(Rule(0.9))


MIXES = {
    "differences": Signature("BF16", ("F32",) * 3, True),
    "many differences": Signature("F32", ("F32",) * 11, True),
    "merged": Signature("BF16", ("BF16",) * 3, False),
    "merged halves": Signature("F16", ("F16",) * 9, False),
    "merged F64": Signature("F64", ("F64",) * 2, False),
    "differences F64": Signature("F32", ("F64",) * 3, True),
    "merged, mixed": Signature("BF16", ("BF16", "F32", "BF16", "F16"), False),
    "one": Signature("F32", ("F32",), True),
}


@pytest.mark.parametrize(
    ("signature", "min_agreement"),
    [
        pytest.param(
            signature,
            agreement,
            id=f"{name}-{agreement}",
            marks=()
            if (name, agreement) in {("differences", 1.0), ("merged, mixed", 0.6)}
            else pytest.mark.slow,
        )
        for name, signature in MIXES.items()
        for agreement in (1.0, 0.6)
    ],
)
def test_merging_them_has_the_bits_of_merging_them_dense(
    case: BackendCase, signature: Signature, min_agreement: float
) -> None:
    rule = Rule(0.9, min_agreement)
    n, mixed = len(signature.models), len(set(signature.models)) > 1
    low = [dtype == signature.result for dtype in signature.models] if mixed else [True] * n
    shapes = SHAPES[:8] if case.instruction_set else SHAPES[3:6]
    parts = [
        Merged(case, signature, shape, low, k, (0, shape[0] * shape[1] * shape[2]))
        for k, shape in enumerate(shapes)
    ]
    parts.append(Merged(case, signature, (2, 40, 300, 6), low, 20, (123, 15_111), hostile=False))
    parts.append(
        Merged(
            case,
            signature,
            (1, 9, 70, 6),
            [x and k % 2 == 0 for k, x in enumerate(low)],
            21,
            (0, 630),
            in_place=True,
        )
    )
    parts.append(Merged(case, signature, (1, 9, 70, 6), low, 22, (69, 211), count=True))
    # All of them dense, and one without elements.
    parts.append(Merged(case, signature, (1, 3, 7, 1), [False] * n, 23, (0, 21)))
    parts.append(Merged(case, signature, (1, 3, 7, 1), low, 24, (5, 5)))
    if signature.task_vectors:
        parts.append(Merged(case, signature, (1, 13, 99, 3), low, 25, (1, 900), with_base=False))
    counts = merge_of(case)(Batch(on(case), signature, [part.segment for part in parts]), rule, 2).tolist()
    for part, counted in zip(parts, counts, strict=True):
        part.check(list(counted), rule)
    assert any(counted[0] for counted in counts) and any(counted[1] for counted in counts)


@pytest.mark.parametrize(
    "signature",
    [
        MIXES["differences"],
        *(pytest.param(MIXES[name], marks=pytest.mark.slow) for name in ("merged", "differences F64")),
    ],
    ids=str,
)
def test_their_consensus_is_that_of_dense_models(case: BackendCase, signature: Signature) -> None:
    if case.backend != "cpu":
        merge = partial(low_rank.merge, registry.consensus("torch"), low_rank.expand)
        if case.backend != "torch" or case.device != "cpu":
            pytest.skip("as PyTorch's: made of what is tested above")
    else:
        merge = registry.choose_low_rank_consensus("cpu", "cpu", Rule(1.0))[1]
    part = Merged(case, signature, (2, 40, 300, 6), [True] * len(signature.models), 5, (123, 15_111))
    expected, *counted = plain_consensus(part.base, part.models, 1.0, signature.task_vectors)
    found = torch.full_like(expected, 7.0)
    segment = part.segment._replace(out=Operand(found.data_ptr(), NAMES[found.dtype], found))
    assert [list(row) for row in merge(Batch("cpu", signature, [segment]), Rule(1.0)).tolist()] == [counted]
    assert same_bits(found, expected)


def test_factors_of_other_shapes_of_one_tensor_meet(case: BackendCase) -> None:
    # As those of a tensor whose first model has it as one matrix, and the second as several of other widths.
    signature = MIXES["differences"]
    shapes = [(1, 24, 60, 3), (2, 30, 24, 5), (3, 480, 1, 2)]
    for begin, numel in ((0, 1440), (77, 1111)):
        parts = [Merged(case, signature, shape, [True] * 3, 3, (begin, begin + numel)) for shape in shapes]
        models = [part.segment.models[k] for k, part in enumerate(parts)]
        whole = parts[0]
        whole.models = [part.models[k] for k, part in enumerate(parts)]
        whole.segment = whole.segment._replace(models=models)
        [counted] = merge_of(case)(Batch(on(case), signature, [whole.segment]), Rule(0.9)).tolist()
        whole.check(list(counted), Rule(0.9))


def test_a_large_tensor_is_cut_between_threads(case: BackendCase) -> None:
    if case.backend == INTERPRETED.backend:
        pytest.skip("the interpreter has no threads, and would take minutes")
    signature = Signature("BF16", ("F32",) * 3, True)
    part = Merged(case, signature, (3, 133, 500, 4), [True] * 3, 8, (1001, 199_123), hostile=False)
    for threads in (1, 7):
        counts = merge_of(case)(Batch(on(case), signature, [part.segment]), Rule(0.9), threads).tolist()
        part.check(list(counts[0]), Rule(0.9))


@pytest.mark.parametrize("which", ["expand", "merge"])
def test_subnormals_are_kept_whatever_the_callers_mode_is(case: BackendCase, which: str) -> None:
    if case in (INTERPRETED, ON_HOST):
        pytest.skip("a kernel for GPUs, which have no such mode, runs on the CPU here")
    tiny = torch.full((1, 100, 1), 2.0**-126), torch.full((1, 1, 100), 2.0**-10)
    factors = Factors((1, 100, 100, 1), torch.float32)
    factors.left, factors.right, factors.scale = *tiny, 1.0
    found = to_device(torch.zeros(10_000), case)
    out = Operand(found.data_ptr(), "F32", found)
    expansion: Any = Expansion(factors.on(case), 0)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes none")
    try:
        if which == "expand":
            case.expand()(ExpandBatch(on(case), "F32", None, [ExpandSegment(10_000, expansion, None, out)]))
        else:
            segment = Segment(10_000, None, [expansion], out)
            merge_of(case)(Batch(on(case), Signature("F32", ("F32",), True), [segment]), Rule(1.0))
    finally:
        torch.set_flush_denormal(False)
    expected = 2.0**-136 if which == "expand" else -(2.0**-136)
    assert same_bits(found.cpu(), torch.full((10_000,), expected))


def test_scratch_memory_does_not_grow_with_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a few elements here, so that several segments share it and one takes it several times.
    monkeypatch.setattr(low_rank, "CPU_SCRATCH_BYTES", 3 * 4 * 640)
    case = BackendCase("torch")
    signature = Signature("BF16", ("F32",) * 3, True)
    spans = [(0, 500), (3, 1403), (7, 7), (1, 641)]
    parts = [Merged(case, signature, (2, 10, 80, 3), [True] * 3, k, span) for k, span in enumerate(spans)]
    taken = []

    def merge(batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
        taken.append(sum(segment.numel for segment in batch.segments))
        return pytorch.merge(batch, rule, threads)

    counts = low_rank.merge(
        merge, low_rank.expand, Batch("cpu", signature, [p.segment for p in parts]), Rule(0.9)
    )
    for part, counted in zip(parts, counts.tolist(), strict=True):
        part.check(counted, Rule(0.9))
    assert taken == [640, 640, 640, 620]


def test_what_is_outside_of_the_tensor_or_of_another_type_is_refused() -> None:
    case = BackendCase("torch")
    factors = Factors((1, 3, 4, 2), torch.float32).on(case)
    out = torch.empty(12)
    operand = Operand(out.data_ptr(), "F32", out)
    for begin, numel, changed in ((1, 12, {}), (-1, 3, {}), (0, 1, {"rank": 0})):
        expansion: Any = Expansion(factors._replace(**changed), begin)
        with pytest.raises(ValueError, match="expected some of it"):
            pack_expand(ExpandBatch("cpu", "F32", None, [ExpandSegment(numel, expansion, None, operand)]))
    whole: Any = Expansion(factors, 0)
    with pytest.raises(ValueError, match="expected one exactly if"):
        pack_expand(ExpandBatch("cpu", "F32", "F32", [ExpandSegment(12, whole, None, operand)]))
    for signature, base in (
        (Signature("BF16", ("BF16",), True), operand),
        (Signature("F32", ("F32",), False), None),
    ):
        with pytest.raises(ValueError, match="a low-rank model of"):
            pack_low_rank(Batch("cpu", signature, [Segment(12, base, [whole], operand)]))
