"""Every backend against the plain rule: the same bits, over dtypes, lengths, numbers of models and hostile values."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, INTERPRETED, ON_HOST, BackendCase, to_device
from bits import STORAGE, remembered, same_bits
from hostile import HOSTILE, random_models
from hypothesis import given, settings
from hypothesis import strategies as st

from negmerge_fast import Rule, merge, merge_
from negmerge_fast.backends import registry
from negmerge_fast.backends.pytorch import BITS_DTYPES
from negmerge_fast.core import reference
from negmerge_fast.core.batch import Batch, Operand, Segment, Signature

# Numbers of models: all in one group, a group and some more, many. The interpreter would take minutes for 300.
MODEL_COUNTS = [1, 2, 3, 8, 32, 33, 100] if CASES[0].values[0] == INTERPRETED else [1, 2, 3, 8, 15, 33, 300]

plain_merge, plain_consensus = remembered(reference.plain_merge), remembered(reference.plain_consensus)

POISON = 0xA5
SPELLED = {dtype: name for name, dtype in STORAGE.items()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[BackendCase]:
    found: BackendCase = request.param
    if (reason := found.why_not()) is not None:
        pytest.skip(reason)
    with found.chosen():
        yield found


def check(
    case: BackendCase, base: torch.Tensor, models: list[torch.Tensor], scale: float = 0.9, **options: Any
) -> None:
    expected, *counted = plain_merge(
        base, models, scale, options.get("min_agreement", 1.0), options.get("inputs") == "task_vectors"
    )
    models = [to_device(model, case) for model in models]
    options = {"scale": scale, "backend": case.backend, **options}
    assert same_bits(merge(to_device(base, case), models, **options).cpu(), expected)
    in_place = to_device(base.clone(), case)
    stats = merge_(in_place, models, **options)
    assert same_bits(in_place.cpu(), expected)
    assert [stats.agreed, stats.nonfinite, stats.vetoed_by_zero] == counted and stats.elements == base.numel()
    if case.backend == "cpu":  # the others' means come out of their merges
        check_consensus(
            base, models, options.get("min_agreement", 1.0), options.get("inputs") == "task_vectors"
        )


def check_consensus(
    base: torch.Tensor, models: list[torch.Tensor], min_agreement: float, task_vectors: bool
) -> None:
    """With a base, and with zeros for it where it is none of the differences; written, and only counted."""
    signature = Signature(SPELLED[base.dtype], tuple(SPELLED[m.dtype] for m in models), task_vectors)
    operands = [Operand(t.data_ptr(), SPELLED[t.dtype], t) for t in (base, *models)]
    for b, zero in ((operands[0], False), (None, True))[: 1 + task_vectors]:
        expected, *counted = plain_consensus(
            torch.zeros_like(base) if zero else base, models, min_agreement, task_vectors
        )
        found = torch.full_like(expected, torch.nan)
        out = Operand(found.data_ptr(), SPELLED[found.dtype], found)
        segments = [Segment(len(base), b, operands[1:], each) for each in (out, None)]
        counts = registry.consensus("cpu")(Batch("cpu", signature, segments), Rule(0.9, min_agreement))
        assert counts.tolist() == [counted] * 2 and same_bits(found, expected)


SIZES = [(n, length) for n in MODEL_COUNTS for length in (0, 1, 15, 127, 1024, 4097, 70_001)]


@pytest.mark.parametrize(
    ("n", "length"),
    [pytest.param(*size, marks=[pytest.mark.slow] * (size[0] > 8 and size[1] > 4097)) for size in SIZES],
)
@pytest.mark.parametrize("dtype", STORAGE)
def test_same_bits(case: BackendCase, dtype: str, n: int, length: int) -> None:
    if n > 33 and length > 4097:
        length = 5000  # 100 long models are a benchmark, not a test
    check(case, *random_models(n, length, STORAGE[dtype], [STORAGE[dtype]]))


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_million_elements(case: BackendCase, dtype: str) -> None:
    check(case, *random_models(3, 1_000_003, STORAGE[dtype], [STORAGE[dtype]]))


@pytest.mark.parametrize("options", [{}, {"min_agreement": 0.6}, {"inputs": "task_vectors"}], ids=str)
@pytest.mark.parametrize(
    "model_dtypes",
    [["F64"], ["F32"], ["F16"], ["BF16"], ["BF16", "F32", "F16"], ["F32", "F64"]],
    ids="+".join,
)
@pytest.mark.parametrize("base_dtype", STORAGE)
def test_mixed_storage(
    case: BackendCase, base_dtype: str, model_dtypes: list[str], options: dict[str, object]
) -> None:
    check(case, *random_models(5, 4097, STORAGE[base_dtype], [STORAGE[t] for t in model_dtypes]), **options)


@pytest.mark.parametrize("options", [{}, {"min_agreement": 0.6}], ids=str)
@pytest.mark.parametrize(
    "model_dtypes",
    [
        ["F32"],
        ["BF16"],
        ["F16"],
        ["BF16", "F16"],
        ["F16"] * 9 + ["BF16"] * 2 + ["F32"],
        ["F64", "F16", "F32"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("base_dtype", STORAGE)
def test_base_is_rounded_to_the_types_of_models(
    case: BackendCase, base_dtype: str, model_dtypes: list[str], options: dict[str, object]
) -> None:
    """Bases at, near and far from what 16 bits hold; models are the base as they store it, or the next number to that."""
    dtypes, every = [STORAGE[dtype] for dtype in model_dtypes], torch.arange(-(1 << 15), 1 << 15)[::61]
    numbers = torch.cat([every.to(torch.int16).view(STORAGE[dtype]).double() for dtype in ("F16", "BF16")])
    near = torch.cat([numbers * (1 + step * 2.0**-12) for step in (0, 0.5, 1, 1.5, 2)])
    base = near.to(STORAGE[base_dtype])
    models = [(base.float() if dtype != torch.float64 else base).to(dtype) for dtype in dtypes]
    check(case, base, models, **options)
    for k, model in enumerate(models):
        changed = torch.arange(len(base)) % 4 > 1
        changed[k::97] ^= True
        up = model.view(BITS_DTYPES[model.itemsize]) + changed.to(BITS_DTYPES[model.itemsize])
        models[k] = up.view(model.dtype)
    check(case, base, models, **options)


@pytest.mark.parametrize("n", MODEL_COUNTS)
@pytest.mark.parametrize("min_agreement", [0.51, 0.6, 2 / 3, 0.75, 0.99])
def test_min_agreement(case: BackendCase, n: int, min_agreement: float) -> None:
    check(case, *random_models(n, 4097, torch.float32, [torch.float32]), min_agreement=min_agreement)


@pytest.mark.parametrize(
    "n", [1, 3, 6, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 7, 9, 21, 48))]
)
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_every_kind_of_quotient(case: BackendCase, dtype: str, n: int) -> None:
    """Means of all magnitudes, also next to the middle of two numbers. Every bit of the quotient is stored."""
    wide = STORAGE[dtype]
    limits, generator = torch.finfo(wide), torch.Generator().manual_seed(n)
    drawn = torch.rand(40_000, generator=generator, dtype=wide) + 1
    lowest, highest = (
        torch.tensor(x, dtype=torch.float64).log2() for x in (limits.tiny * limits.eps, limits.max)
    )
    exponents = lowest + torch.rand(40_000, generator=generator, dtype=torch.float64) * (highest - lowest - 8)
    sums = drawn * exponents.floor().exp2().to(wide)
    middle = (drawn + limits.eps) * n  # 1 … 2, in steps: n times the middle of two, rounded
    # Quotients in the middle of two subnormals, where the sum is an odd multiple of half of n steps; and just beside it.
    steps = torch.arange(1, 4001, dtype=wide) * (n / 2) + torch.tensor([[-1], [0], [1]]) - (n - 1)
    subnormal = steps.flatten().clamp(1).to(wide) * (limits.tiny * limits.eps)
    first = torch.cat(
        [sums, -sums, middle * (1 - limits.eps / 2), middle, middle * (1 + limits.eps), subnormal, -subnormal]
    )
    # The other models agree, but are too small to change any but a subnormal sum.
    rest = [torch.copysign(torch.full_like(first, limits.tiny * limits.eps), first)] * (n - 1)
    check(case, torch.zeros_like(first), [first, *rest], scale=-1.0, inputs="task_vectors")


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, 1.0, 1e-45, 1e30, 1e300])
@pytest.mark.parametrize("dtype", STORAGE)
def test_any_scale(case: BackendCase, dtype: str, scale: float) -> None:
    check(case, *random_models(3, 517, STORAGE[dtype], [STORAGE[dtype]]), scale=scale)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("task_vectors", [False, True])
def test_every_number_of_16_bits(case: BackendCase, dtype: str, task_vectors: bool) -> None:
    """Each as a base, as a fine-tuned weight, and as the result of a single model."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(STORAGE[dtype])
    others = every.roll(12_345)
    inputs = "task_vectors" if task_vectors else "finetuned"
    check(case, every, [others, others], inputs=inputs)
    check(case, others, [every], scale=-0.5, inputs=inputs)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("wide", ["F32", "F64"])
def test_every_rounding_to_16_bits(case: BackendCase, dtype: str, wide: str) -> None:
    """Results at, just below and just above the middle of any two neighbours."""
    numbers = torch.arange((1 << 15) - 1, dtype=torch.int32).to(torch.int16).view(STORAGE[dtype]).double()
    middle = (numbers[:-1] + numbers[1:]) / 2
    middle = middle[middle.isfinite()]
    step = STORAGE[wide]
    around = torch.cat([middle, middle * (1 + 2**-20), middle * (1 - 2**-20)]).to(step)
    check(case, torch.zeros(len(around), dtype=STORAGE[dtype]), [around], scale=-1.0)


def test_a_sum_that_overflows_without_agreement_is_not_counted_as_nonfinite(case: BackendCase) -> None:
    """Nothing is stored without agreement. An infinite weight is counted as non-finite all the same."""
    most = torch.finfo(torch.float32).max
    base = torch.zeros(40)
    models = [torch.full((40,), most), torch.full((40,), most), torch.full((40,), -1.0)]
    check(case, base, models)
    models[2][3] = -float("inf")
    models[1][5] = float("inf")
    models[0][7] = float("nan")
    check(case, base, models)
    check(case, base, models, min_agreement=0.6)


@pytest.mark.parametrize("inputs", ["finetuned", "task_vectors"])
@pytest.mark.parametrize("min_agreement", [1.0, 0.75, 0.51])
@pytest.mark.parametrize("dtypes", [["F64"], ["F32"], ["F16"], ["BF16"], ["F32", "BF16"]], ids="+".join)
def test_vetoes_by_zero(case: BackendCase, dtypes: list[str], min_agreement: float, inputs: str) -> None:
    """All combinations of negative, zero, positive and non-finite differences of four models, with zeros of both signs."""
    values = [-1.0, -0.0, 0.0, 1.0, float("inf"), float("nan")]
    differences = torch.cartesian_prod(*[torch.tensor(values)] * 4).T.contiguous()
    types = [STORAGE[dtypes[k % len(dtypes)]] for k in range(4)]
    for b in (0.0, -0.0, 2.0):
        base = torch.full((differences.shape[1],), b, dtype=STORAGE[dtypes[0]])
        models = [
            (d if inputs == "task_vectors" else d + b).to(dtype)
            for d, dtype in zip(differences, types, strict=True)
        ]
        check(case, base, models, min_agreement=min_agreement, inputs=inputs)


def run_batch(case: BackendCase, batch: Batch, rule: Rule) -> list[list[int]]:
    with case.chosen() as run:
        return [list(row) for row in run(batch, rule).tolist()]


def placed(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> Operand:
    """Copy a tensor into memory, at an offset in bytes."""
    memory[offset : offset + tensor.nbytes] = tensor.view(torch.uint8).to(memory.device)
    return Operand(memory.data_ptr() + offset, SPELLED[tensor.dtype], memory)


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", range(1, 18))
@pytest.mark.parametrize("dtype", STORAGE)
def test_every_group_of_models_and_every_rest_of_elements(
    case: BackendCase, dtype: str, n: int, in_place: bool
) -> None:
    """Kernels take models in groups and elements in packs: segments of 1 to 130 elements leave every rest of both."""
    lengths = list(range(1, 131, 7 if case in (ON_HOST, INTERPRETED) else 1))
    base, models = random_models(n, sum(lengths), STORAGE[dtype], [STORAGE[dtype]], seed=n)
    tensors = [base.clone(), *models] if in_place else [base.clone(), *models, torch.zeros_like(base)]
    held = [to_device(t, case) for t in tensors]
    segments, expected, at = [], [], 0
    for length in lengths:
        operands = [Operand(t[at:].data_ptr(), dtype, t) for t in held]
        segments.append(Segment(length, operands[0], operands[1 : n + 1], operands[0 if in_place else -1]))
        part = slice(at, at + length)
        expected.append(list(plain_merge(base[part], [model[part] for model in models], 0.9)[1:]))
        at += length
    batch = Batch(str(held[0].device), Signature(dtype, (dtype,) * n, False), segments)
    assert run_batch(case, batch, Rule(0.9)) == expected
    assert same_bits(held[0 if in_place else -1].cpu(), plain_merge(base, models, 0.9)[0])


@pytest.mark.parametrize("inputs", ["finetuned", "task_vectors"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("dtype", STORAGE)
def test_one_odd_number_at_each_place(case: BackendCase, dtype: str, n: int, inputs: str) -> None:
    """The base or one model is odd; all others agree, are equal, or disagree."""
    kind = torch.finfo(STORAGE[dtype])
    odd = [0.0, -0.0, kind.tiny / 4, -kind.tiny, kind.max, -kind.max, torch.inf, -torch.inf, torch.nan]
    columns = []
    for others in ([2.0] * n, [0.5] * n, [1.0] * n, [2.0, 0.5] * n, [1.0, *[2.0] * n], [1.0, *[0.5] * n]):
        for place in range(n + 1):
            for number in odd:
                columns.append([1.0, *others[:n]])
                columns[-1][place] = number
    base, *models = torch.tensor(columns, dtype=torch.float64).to(STORAGE[dtype]).T.contiguous()
    check(case, base, models, inputs=inputs)


@pytest.mark.parametrize("inputs", ["finetuned", "task_vectors"])
@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", STORAGE)
def test_every_order_of_signs_and_zeros(case: BackendCase, dtype: str, n: int, inputs: str) -> None:
    """Differences of both signs, of zero, whose sign depends on the zeros they are between, and next to zero, in every order."""
    least = torch.finfo(STORAGE[dtype]).tiny * torch.finfo(STORAGE[dtype]).eps
    some = list(itertools.product([0.0, -0.0], *[[0.0, -0.0, 1.0, -1.0, least, -least]] * min(n, 3)))
    columns = [[*some_of, *(some_of[-1:] * (n - 3))] for some_of in some] + [
        [some_of[0], *(some_of[1:2] * (n - 3)), *some_of[1:]] for some_of in some
    ]
    base, *models = torch.tensor(columns, dtype=torch.float64).to(STORAGE[dtype]).T.contiguous()
    check(case, base, models, inputs=inputs)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 16, 63])
@pytest.mark.parametrize("dtype", STORAGE)
def test_any_address(case: BackendCase, dtype: str, offset: int) -> None:
    other = STORAGE["F32" if dtype == "BF16" else "BF16"]
    base, models = random_models(3, 1001, STORAGE[dtype], [STORAGE[dtype], other])
    expected, *counted = plain_merge(base, models, 0.9)
    memories = [to_device(torch.empty(10_000, dtype=torch.uint8), case) for _ in range(4)]
    operands = [placed(t, memory, offset) for t, memory in zip([base, *models], memories, strict=True)]
    signature = Signature(dtype, tuple(s.dtype for s in operands[1:]), False)
    segment = Segment(1001, operands[0], operands[1:], operands[0])
    counts = run_batch(case, Batch(str(memories[0].device), signature, [segment]), Rule(0.9))
    assert counts == [counted]
    assert same_bits(memories[0].cpu()[offset : offset + base.nbytes], expected.view(torch.uint8))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", STORAGE)
def test_many_segments_in_one_batch(case: BackendCase, dtype: str, in_place: bool) -> None:
    """Empty, tiny, odd and long segments, one after the other in memory. What lies between them is not written."""
    lengths = [0, 1, 2, 0, 7, 16, 17, 1000, 4096, 1, 8191, 3, 0, 20_000, 5, 0]
    lengths += [1] * 300
    size = STORAGE[dtype].itemsize
    made = [
        random_models(2, length, STORAGE[dtype], [STORAGE[dtype]], seed)
        for seed, length in enumerate(lengths)
    ]
    memories = [to_device(torch.full((200_000 * size,), 0xA5, dtype=torch.uint8), case) for _ in range(4)]
    segments, expected, at = [], [], 3 * size
    wanted = memories[0].cpu().clone() if in_place else memories[3].cpu().clone()
    for base, models in made:
        operands = [placed(t, memory, at) for t, memory in zip([base, *models], memories, strict=False)]
        out = operands[0] if in_place else Operand(memories[3].data_ptr() + at, dtype, memories[3])
        segments.append(Segment(len(base), operands[0], operands[1:], out))
        result, *counted = plain_merge(base, models, 0.9)
        expected.append(counted)
        wanted[at : at + base.nbytes] = result.view(torch.uint8)
        at += base.nbytes + size * (len(base) % 3)
    batch = Batch(str(memories[0].device), Signature(dtype, (dtype, dtype), False), segments)
    written = memories[0] if in_place else memories[3]
    assert run_batch(case, batch, Rule(0.9)) == expected
    assert same_bits(written.cpu(), wanted)


@pytest.mark.parametrize("inputs", ["finetuned", "task_vectors"])
@pytest.mark.parametrize("n", [1, 8, 9, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7, 17))])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [("F64", "F64"), ("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("BF16", "F64"), ("F32", "BF16")],
)
def test_means_of_every_rest_of_elements_at_any_address(
    case: BackendCase, dtype: str, other: str, n: int, inputs: str
) -> None:
    """In one batch, with a caller who flushes subnormals. What lies between the means is not written."""
    if case.backend != "cpu":
        pytest.skip("their means come out of their merges")
    signature = Signature(dtype, (other,) * n, inputs == "task_vectors")
    wide = STORAGE[signature.arithmetic]
    memories = [torch.full((100_000,), POISON, dtype=torch.uint8) for _ in range(n + 2)]
    wanted, segments, expected, at = memories[-1].clone(), [], [], 1
    for length in (*range(1, 131, 3), 0, 999):
        base, models = random_models(n, length, STORAGE[dtype], [STORAGE[other]], seed=length)
        operands = [placed(t, memory, at) for t, memory in zip([base, *models], memories, strict=False)]
        dense, *counted = plain_consensus(base, models, task_vectors=signature.task_vectors)
        out = Operand(memories[-1].data_ptr() + at, signature.arithmetic, memories[-1])
        segments.append(Segment(length, operands[0], operands[1:], out))
        wanted[at : at + dense.nbytes] = dense.view(torch.uint8)
        expected.append(counted)
        at += length * wide.itemsize + length % 3
    torch.set_flush_denormal(True)
    try:
        counts = registry.consensus("cpu")(Batch("cpu", signature, segments), Rule(0.0))
    finally:
        torch.set_flush_denormal(False)
    assert counts.tolist() == expected and torch.equal(memories[-1], wanted)


def test_no_base_means_zeros_and_no_output_means_counting(case: BackendCase) -> None:
    base, models = random_models(2, 1500, torch.float32, [torch.bfloat16, torch.float32])
    expected, *counts_once = plain_merge(torch.zeros_like(base), models, -1.0, task_vectors=True)
    held = [to_device(t, case) for t in (base, *models)]
    operands = [Operand(t.data_ptr(), SPELLED[t.dtype], t.view(torch.uint8)) for t in held]
    signature = Signature("F32", ("BF16", "F32"), True)
    merged = Segment(1500, None, operands[1:], operands[0])
    counted = Segment(1500, None, operands[1:], None)
    counts = run_batch(case, Batch(str(held[0].device), signature, [merged, counted]), Rule(-1.0))
    assert counts == [counts_once] * 2
    assert same_bits(held[0].cpu(), expected)


def test_count_only_writes_nothing(case: BackendCase) -> None:
    base, models = random_models(2, 500, torch.float32, [torch.float32])
    _, *counted = plain_merge(base, models, 0.9)
    held = [to_device(t.clone(), case) for t in (base, *models)]
    operands = [Operand(t.data_ptr(), "F32", t) for t in held]
    segment = Segment(500, operands[0], operands[1:], None)
    batch = Batch(str(held[0].device), Signature("F32", ("F32", "F32"), False), [segment])
    assert run_batch(case, batch, Rule(0.9)) == [counted]
    assert all(same_bits(t.cpu(), before) for t, before in zip(held, (base, *models), strict=True))


def test_an_empty_batch(case: BackendCase) -> None:
    device = "cuda:0" if case.device == "cuda:0" else "cpu"
    assert run_batch(case, Batch(device, Signature("F32", ("F32",), False), []), Rule(0.9)) == []


def test_nan_payload_and_sign_of_zero_survive(case: BackendCase) -> None:
    for dtype, integer in (
        ("F32", torch.int32),
        ("F16", torch.int16),
        ("BF16", torch.int16),
        ("F64", torch.int64),
    ):
        mantissa = 1 << {"F32": 23, "F16": 10, "BF16": 7, "F64": 52}[dtype]
        infinity = int(torch.tensor(float("inf"), dtype=STORAGE[dtype]).view(integer))
        bits = torch.tensor([infinity + 1, infinity + mantissa // 2 + 3, -1, 0, 5] * 20, dtype=integer)
        bits[60:] = torch.tensor(-0.0, dtype=STORAGE[dtype]).view(integer)
        base = bits.view(STORAGE[dtype])
        out = merge(
            to_device(base, case), [to_device(base.clone(), case)] * 2, scale=1.0, backend=case.backend
        )
        assert torch.equal(out.cpu().view(integer), bits)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_flushing_subnormals_in_the_caller_changes_nothing(case: BackendCase, dtype: str) -> None:
    if case in (ON_HOST, INTERPRETED):
        pytest.skip("a GPU knows nothing of the caller's mode; this stand-in does")
    tiny = torch.finfo(STORAGE[dtype]).tiny
    base = torch.zeros(200_000, dtype=STORAGE[dtype])
    models = [torch.full_like(base, tiny / 8), torch.full_like(base, tiny / 4)]
    on_device = [to_device(t, case) for t in (base, *models)]
    expected = merge(on_device[0], on_device[1:], scale=1.0, backend=case.backend)
    assert expected.abs().max() > 0
    torch.set_flush_denormal(True)
    try:
        assert same_bits(merge(on_device[0], on_device[1:], scale=1.0, backend=case.backend), expected)
        assert float(torch.tensor(5e-324, dtype=torch.float64) * 1.0) == 0, "the caller's mode is given back"
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("param", CASES)
def test_any_floats(param: BackendCase) -> None:
    if (reason := param.why_not()) is not None:
        pytest.skip(reason)

    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(
        values=st.lists(
            st.tuples(*[st.floats(width=32) | st.sampled_from(HOSTILE)] * 4), min_size=1, max_size=40
        ),
        scale=st.floats(-4, 4),
        min_agreement=st.sampled_from([0.6, 1.0]),
        dtype=st.sampled_from(sorted(STORAGE)),
    )
    def check_values(values: list[tuple[float, ...]], scale: float, min_agreement: float, dtype: str) -> None:
        base, *models = torch.tensor(values, dtype=torch.float64).to(STORAGE[dtype]).T.contiguous()
        check(param, base, models, scale, min_agreement=min_agreement)

    with param.chosen():
        check_values()


@pytest.mark.parametrize("threads", [1, 2, pytest.param(3, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("n", [2, 9])
def test_threads_change_no_bit(case: BackendCase, n: int, threads: int) -> None:
    """With enough elements for all threads, and with more threads than processors."""
    if case.device != "cpu" or case.backend == "triton":
        pytest.skip("it does not use the CPU's threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numel = 1_500_001 if case.backend == "cpu" else 300_001
        check(case, *random_models(n, numel, torch.bfloat16, [torch.float32]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "baseline"])
def test_more_elements_than_32_bits_can_count(instruction_set: str) -> None:
    """A few elements that differ, on both sides of 2^31 and of 2^32, in memory that is otherwise never written."""
    numel = (1 << 32) + 70_000
    positions = [0, 65_535, (1 << 31) - 1, 1 << 31, (1 << 31) + 5, (1 << 32) - 1, 1 << 32, numel - 1]
    case = BackendCase("cpu", instruction_set=instruction_set)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    held = [np.frombuffer(mmap.mmap(-1, 2 * numel, flags=flags), np.uint16) for _ in range(2)]
    held[1][positions] = 0x3F80  # 1.0 in bf16
    operands = [Operand(memory.ctypes.data, "BF16", memory) for memory in held]
    # All elements are counted. Only those up to a little over 2^31 are written, because they take real memory: 4 GiB.
    written = (1 << 31) + 70_000
    segments = [
        Segment(numel, operands[0], operands[1:], None),
        Segment(written, operands[0], operands[1:], operands[0]),
    ]
    signature = Signature("BF16", ("BF16",), False)
    with case.chosen() as run:
        counts = [run(Batch("cpu", signature, [segment]), Rule(-1.0)).tolist() for segment in segments]
    changed = [position for position in positions if position < written]
    assert counts == [
        [[len(positions), 0, numel - len(positions)]],
        [[len(changed), 0, written - len(changed)]],
    ]
    assert np.flatnonzero(held[0][:written]).tolist() == changed
    assert (held[0][changed] == 0x3F80).all()
