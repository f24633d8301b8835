"""The self-test: faulty kernels fail it, and a backend that fails it is not used."""

from __future__ import annotations

import re
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from backend_cases import merge_on_host

import negmerge_fast as nm
import negmerge_fast.ops
from negmerge_fast.backends import native, pytorch, registry, selftest
from negmerge_fast.cli import info
from negmerge_fast.core.batch import Batch, Signature
from negmerge_fast.core.choices import Choices, Election, Gate, Reduction
from negmerge_fast.core.dtypes import FLOAT_SIZES
from negmerge_fast.core.rule import Rule


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU's kernel with one wrong bit, as if it were one that needs a self-test; the list says what is wrong."""
    wrong = ["bits"]
    merge_cpu = native.merge_cpu

    def merge(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        counts = merge_cpu(batch, rule, threads)
        out = batch.segments[0].out
        if wrong == ["bits"] and out:
            out.owner.view(torch.uint8)[100] ^= 1
        if wrong == ["counts"]:
            counts[0, 0] += 1
        if wrong == ["launch"]:
            raise RuntimeError("no kernel image\nfor this device")
        return counts

    monkeypatch.setattr(selftest, "_results", {})
    monkeypatch.setattr(native, "merge_cpu", merge)
    monkeypatch.setattr(registry, "_NEED_SELFTEST", {"cpu"})
    return wrong


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "bits",
            r"cpu: not the reference's bits on cpu for F32 into F32, 2 models: byte 100 of the self-test is 0x",
        ),
        ("counts", r"cpu: not the reference's counts on cpu for F32 into F32, 2 models"),
        ("launch", r"cpu: failed its self-test on cpu: RuntimeError: no kernel image$"),
    ],
)
def test_kernel_that_fails_its_selftest_is_not_used(wrong_kernel: list[str], what: str, message: str) -> None:
    wrong_kernel[:] = [what]
    base, models = torch.zeros(100), [torch.ones(100)] * 2
    with pytest.raises(nm.InputError, match=message):
        nm.merge_(base, models, scale=1.0, backend="cpu")
    assert not base.any()
    # The result is kept and shown; "auto" takes another backend.
    wrong_kernel[:] = []
    with pytest.raises(nm.InputError, match=message):
        nm.merge_(base, models, scale=1.0, backend="cpu")
    assert nm.merge_(base, models, scale=1.0).agreed == 100
    wrong_kernel[:] = [what]
    assert re.search(
        r"^backend cpu on cpu: (not the reference|failed its self-test)", info.text(), re.MULTILINE
    )


FAULTS = {
    "a reciprocal": ("return sum / c.n", "return sum * (T(1) / c.n)"),
    "a subnormal mean that is zero": (
        "N negated_mean(N b, N mean, const Constants<T>& c) {",
        "N negated_mean(N b, N mean, const Constants<T>& c) {"
        " const N tiny = sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022; mean = mean < tiny && mean > -tiny ? N{} : mean;",
    ),
    "a zero that agrees": ("return unity() > N{};", "return unity() >= N{};"),
    "a fused multiply-add": ("return b - c.scale * mean;", "return __builtin_fma(-c.scale, mean, b);"),
    "an infinity that is ignored": ("(greatest < N{} + kInf)", "(greatest == greatest)"),
}


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
@pytest.mark.parametrize("task_vectors", [False, True])
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.slow if d == "F64" else ()) for d in FLOAT_SIZES]
)
@pytest.mark.parametrize(
    "fault",
    ["none", next(iter(FAULTS)), *(pytest.param(f, marks=pytest.mark.slow) for f in list(FAULTS)[1:])],
)  # each has to be compiled
def test_selftest_finds_faults_of_kernels(fault: str, dtype: str, task_vectors: bool) -> None:
    if fault == "a fused multiply-add" and dtype != "F64":
        pytest.skip("the fused operation of doubles does not change floats")

    if fault == "a subnormal mean that is zero" and dtype == "F16":
        pytest.skip("a subnormal of F16 is a normal float")
    merge = partial(merge_on_host, wrong=FAULTS.get(fault))
    found = selftest._run_case(merge, "cpu", Signature(dtype, (dtype,) * 3, task_vectors), Rule(0.9))
    assert (found is None) == (fault == "none"), found


# Of the rule of the other methods: choices, and text of the kernel with what replaces it.
FAMILY_FAULTS = {
    "a number of another element": (
        (Gate.RANDOM, Election.SIGN_OF_SUM, Reduction.MEAN), ("return found >> skipped;", "return found;"),
    ),
    "a weight of zero that changes nothing": (
        (Gate.NONE, Election.AGREEMENT, Reduction.MEAN), ("weighted = w[e] * r[e]", "weighted = w[e] == 0 ? r[e] : w[e] * r[e]"),
    ),
    "a bound that is not passed": (
        (Gate.MAGNITUDE, Election.ALL, Reduction.SUM), ("&& size <= high", ""),
    ),
    "an infinity that no gate passes": (
        (Gate.MAGNITUDE, Election.ALL, Reduction.LARGEST), ("std::fma(p, T(0), product_of_zero[e])", "product_of_zero[e]"),
    ),
    "a second tile that is the first": (
        (Gate.NONE, Election.MASKS, Reduction.SUM), ("element = std::int64_t{tile - first} * kCudaTile", "element = 0"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
@pytest.mark.parametrize("fault", FAMILY_FAULTS)
def test_selftest_finds_faults_of_the_family(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once for all numbers of a method."""
    monkeypatch.setattr(selftest, "_results", {})
    chosen, wrong = FAMILY_FAULTS[fault]
    signature = Signature("F32", ("F32", "BF16", "F32"), False)
    for name, spoilt in (("right", None), ("wrong", wrong)):
        merge = partial(merge_on_host, wrong=spoilt, max_blocks=3)
        for factor in (0.5, 2.0):
            keep = (1 << 31,) * 3 if chosen[0] == Gate.RANDOM else ()
            rule = Rule(0.9, 1.0, Choices(*chosen, factors=(factor,) * 3, votes=(1.0,) * 3, keep=keep))
            found = selftest.failure(name, merge, "cpu", signature, rule)
            assert (found is None) == (spoilt is None), found
    assert len(selftest._results) == 2


# Faults of the loop over the tiles of a block: none shows where each block has one tile.
LOOP_FAULTS = {
    "only the first tile of a segment": ("whole = std::int64_t{last - first}", "whole = std::int64_t{tile + 1 - first}"),
    "only one segment": ("tile = last;", "tile = end;"),
    "a segment begun anew by each block": ("element = std::int64_t{tile - first} * kCudaTile", "element = 0"),
    "nothing after an empty segment": ("const int last =", "if (next == first) break; const int last ="),
}  # fmt: skip


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
@pytest.mark.parametrize(
    "fault",
    [next(iter(LOOP_FAULTS)), *(pytest.param(f, marks=pytest.mark.slow) for f in list(LOOP_FAULTS)[1:])],
)
def test_selftest_of_cuda_gives_a_block_several_tiles(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def launch(batch: Batch, rule: Rule, max_blocks: int, uploaded: bool, wrong: Any = None) -> Any:
        launches.append((max_blocks, uploaded))
        return merge_on_host(batch, rule, wrong=wrong, max_blocks=max_blocks)

    def failure() -> str | None:
        monkeypatch.setattr(selftest, "_results", {})
        return registry._selftest_failure("cuda", "cpu", Rule(0.9), [Signature("F32", ("F32",) * 2, False)])

    monkeypatch.setattr(native, "_launch_cuda", launch)
    # Once the table goes along with the launch, once it is uploaded.
    assert failure() is None and launches == [(3, False), (3, True)]
    monkeypatch.setattr(native, "_launch_cuda", partial(launch, wrong=LOOP_FAULTS[fault]))
    assert "not the reference's" in (failure() or "")


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
@pytest.mark.parametrize(
    ("base", "models"),
    [
        pytest.param("F64", "F32", marks=pytest.mark.slow), pytest.param("F64", "F16", marks=pytest.mark.slow),
        pytest.param("F64", "BF16", marks=pytest.mark.slow),
        ("F32", "F16"), ("F32", "BF16"), ("BF16", "F16"), ("F16", "BF16"),
        ("F32", "F32 BF16"), ("F16", "F32 BF16 F16"),
    ],
)  # fmt: skip
def test_selftest_finds_a_base_that_is_not_rounded_to_the_type_of_a_model(base: str, models: str) -> None:
    """It is content where no model needs that, as with task vectors."""
    merge = partial(merge_on_host, wrong=("kHolds = M::kExponent", "kHolds = true || M::kExponent"))
    signature = Signature(base, tuple(models.split()), False)
    found = selftest._run_case(merge, "cpu", signature, Rule(0.9))
    assert found and found.startswith("not the reference's bits")
    assert selftest._run_case(merge_on_host, "cpu", signature, Rule(0.9)) is None
    for right in (Signature(base, (base, "F64"), False), signature._replace(task_vectors=True)):
        assert selftest._run_case(merge, "cpu", right, Rule(0.9)) is None


@pytest.mark.parametrize("kind", ["in place", "apart", "no base", "count", "odd address"])
def test_selftest_covers_every_kind_of_segment(kind: str) -> None:
    def merge(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        for s in batch.segments:
            is_kind = {
                "in place": s.base and s.out == s.base, "apart": s.out and s.base and s.out != s.base,
                "no base": not s.base, "count": not s.out, "odd address": s.models[0].address % 2,
            }  # fmt: skip
            if s.numel and is_kind[kind]:
                raise ValueError(kind)
        return merge_on_host(batch, rule)

    found = selftest._run_case(merge, "cpu", Signature("BF16", ("BF16",), False), Rule(0.9))
    assert found == f"failed its self-test on cpu: ValueError: {kind}"


@pytest.mark.parametrize("by_operator", [False, True], ids=["functions", "operators"])
def test_the_next_backend_is_selftested_for_all_signatures(
    by_operator: bool, wrong_kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_NEED_SELFTEST", {"cpu", "torch"})
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float64}
    base, model = ({name: torch.full((9,), x, dtype=t) for name, t in dtypes.items()} for x in (0.0, 1.0))

    def merge() -> list[torch.Tensor]:
        if by_operator:
            merged, _ = torch.ops.negmerge.merge(list(base.values()), list(model.values()), 1.0)
            return list(merged)
        return list(nm.merge(base, [model], scale=1.0).values())

    assert all((merged == -1).all() for merged in merge())
    tried = [
        (name, signature.result, why is None) for (name, _, signature, _), why in selftest._results.items()
    ]
    assert tried == [
        ("cpu", "F32", False),
        ("torch", "F32", True),
        ("torch", "BF16", True),
        ("torch", "F64", True),
    ]

    # It is not used either where it fails for the last one.
    def failure(name: str, merge: Any, device: str, signature: Signature, rule: Rule) -> str | None:
        return "is wrong" if name == "cpu" or signature.result == "F64" else None

    monkeypatch.setattr(selftest, "failure", failure)
    with pytest.raises(nm.InputError, match="cpu: is wrong; torch: is wrong"):
        merge()


def test_selftest_runs_once_per_signature_and_rule(wrong_kernel: list[str]) -> None:
    wrong_kernel[:] = []
    base, models = torch.zeros(100), [torch.ones(100)] * 2
    nm.merge(base, models, scale=1.0)
    assert len(selftest._results) == 1
    nm.merge(base, models, scale=0.5)
    assert len(selftest._results) == 1
    nm.merge(base, models, scale=0.5, min_agreement=0.6)  # of two models, both must agree
    nm.merge(base, [*models, base], scale=0.5, min_agreement=0.6)
    nm.merge(base.half(), models, scale=0.5)
    assert len(selftest._results) == 3 and not any(selftest._results.values())


def test_selftest_of_many_models_is_that_of_fewer_with_the_same_code(
    wrong_kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the number of models that must agree would be all of the fewer."""
    wrong_kernel[:] = []
    tested = []
    run_case = selftest._run_case

    def count(merge: Any, device: str, signature: Signature, rule: Rule) -> str | None:
        models = len(signature.models)
        tested.append((models, rule.required(models) == models))
        return run_case(merge, device, signature, rule)

    monkeypatch.setattr(selftest, "_run_case", count)
    for n in (16, 17, 31, 32, 33, 300, 49, 48):
        for rule in (Rule(0.9), Rule(0.9, 0.97)):
            registry._selftest_failure("cpu", "cpu", rule, [Signature("F32", ("F32",) * n, False)])
    assert tested[::2] == [
        *((n, True) for n in (16, 17, 31, 32, 28)),
        *((n, False) for n in (28, 17, 32)),
    ]
    mixed = Signature("F32", ("F32", "BF16") * 20, False)
    registry._selftest_failure("cpu", "cpu", Rule(0.9), [mixed])
    assert tested[-1] == (40, True)


def test_the_reference_computes_once_for_all_backends(
    wrong_kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_kernel[:] = []
    selftest._expected.cache_clear()
    computed, merge = [], pytorch.merge

    def count(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        computed.append(rule.scale)
        return merge(batch, rule)

    monkeypatch.setattr(pytorch, "merge", count)
    for name in ("cpu", "another"):
        signature = Signature("F16", ("F16",) * 3, False)
        assert selftest.failure(name, native.merge_cpu, "cpu", signature, Rule(1.0)) is None
    assert computed == [0.9, -1.0] and len(selftest._results) == 2
