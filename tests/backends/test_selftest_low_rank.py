"""The self-test of kernels for low-rank differences: faulty ones fail it, and a backend that fails it is not used."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from backend_cases import expand_on_host

import negmerge_fast as nm
from negmerge_fast.backends import low_rank, native, registry, selftest, selftest_delta, selftest_low_rank
from negmerge_fast.core.batch import Signature
from negmerge_fast.core.low_rank import ExpandBatch, ExpandSignature
from negmerge_fast.core.rule import Rule

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host"
)

F32 = ExpandSignature("F32", "F32")

SIGNATURES = [
    ExpandSignature(arithmetic, result)
    for arithmetic, results in (("F32", (None, "F32", "F16", "BF16")), ("F64", (None, "F64", "F32", "F16", "BF16")))
    for result in results
]  # fmt: skip


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """PyTorch's function with one wrong bit, as if it were the CUDA kernel on the CPU; the list says what is wrong."""
    wrong = ["bits"]

    def faulty(batch: ExpandBatch, uploaded: bool) -> None:
        low_rank.expand(batch)
        if wrong == ["bits"] or (wrong == ["uploaded"] and uploaded):
            batch.segments[0].out.owner[100] ^= 1
        if wrong == ["beyond"]:
            batch.segments[0].out.owner[-1] ^= 1
        if wrong == ["launch"]:
            raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(selftest_low_rank, "_results", {})
    why_not = registry.why_not
    monkeypatch.setattr(
        registry, "why_not", lambda name, device: None if name == "cuda" else why_not(name, device)
    )
    monkeypatch.setattr(native, "expand_cuda_in_few_blocks", faulty)
    return wrong


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bits", r"cuda: not the reference's bits on cpu for low-rank differences of F32 added to F32: byte 100 of the self-test"),
        ("uploaded", r"cuda: not the reference's bits on cpu for low-rank differences of F32 added to F32: byte 100 of the self-test"),
        ("beyond", r"cuda: not the reference's bits on cpu for low-rank differences of F32 added to F32: byte \d+ of the self-test"),
        ("launch", r"cuda: failed its self-test on cpu: RuntimeError: no kernel image$"),
    ],
)  # fmt: skip
def test_kernel_that_fails_its_selftest_is_not_used(wrong_kernel: list[str], what: str, message: str) -> None:
    wrong_kernel[:] = [what]
    for _ in range(2):  # the result is kept
        with pytest.raises(nm.InputError, match=message):
            registry.choose_expand("cuda", "cpu", [F32])
        wrong_kernel[:] = []
    assert registry.choose_expand("auto", "cpu", [F32])[0] in ("cpu", "torch")
    other = ExpandSignature("F32", None)
    assert registry.choose_expand("cuda", "cpu", iter([other])) == ("cuda", native.expand_cuda)
    assert list(selftest_low_rank._results.values())[1:] == [None]


@pytest.mark.parametrize("choose", [registry.choose_low_rank, registry.choose_low_rank_consensus])
def test_a_backend_merges_low_rank_models_only_if_it_passes_both_selftests(
    wrong_kernel: list[str], choose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Signature] = []
    monkeypatch.setattr(selftest, "failure", lambda *given: asked.append(given[3]))
    merged, d = Signature("BF16", ("BF16",) * 2, False), Signature("F32", ("F32",) * 2, True)
    with pytest.raises(nm.InputError, match="cuda: not the reference's bits on cpu for low-rank differences"):
        choose("cuda", "cpu", Rule(0.9), iter([merged, d]))
    assert asked
    assert choose("auto", "cpu", Rule(0.9), iter([merged, d]))[0] in ("cpu", "torch")
    wrong_kernel[:] = []
    selftest_low_rank._results.clear()
    assert choose("cuda", "cpu", Rule(0.9), iter([merged, d]))[0] == "cuda"
    assert [key[2] for key in selftest_low_rank._results] == [
        ExpandSignature("F32", "BF16"),
        ExpandSignature("F32", None),
    ]


def test_info_asks_the_selftest_for_low_rank_differences(
    wrong_kernel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "failure", lambda *_: None)
    monkeypatch.setattr(selftest_delta, "failure", lambda *_: None)
    found = registry.selftest("cuda", "cpu") or ""
    assert found.startswith("not the reference's bits on cpu for low-rank differences of F64 added to F64")


# Each has to be compiled.
FAULTS = {
    "a fused multiply-add": ("sums[i][k] = sums[i][k] + of_left * of_right[k]", "sums[i][k] = __builtin_fma(of_left, of_right[k], sums[i][k])"),
    "only the first tile of a warp": ("tile += kExpandWarps) {", "tile = end) {"),
    "only the first ranks": ("first < rank; first += kExpandRanks", "first < 1; first += kExpandRanks"),
    "a wrong matrix": ("global(box[kRight]) + (matrix * rank", "global(box[kRight]) + (0 * rank"),
    "rows of the wrong matrix": ("global(box[kLeft]) + (matrix * rows + row)", "global(box[kLeft]) + row"),
    "a base that is left out": ("base ? widen<T, S>(stored[k]) + d : d", "d"),
    "s added to each product": ("const T d = scale * sums[i][k];", "const T d = sums[i][k];"),
    "columns beyond the edge": (">= columns) continue;", "> columns) continue;"),
    "rows beyond the edge": ("if (i >= rows) break;", "if (i > rows) break;"),
    "an odd address that is rounded": ("else store_anywhere(out", "else if (rows < 0) store_anywhere(out"),
    "a box begun anew": ("static_cast<unsigned>(tile - args.before(box))", "0u"),
    "a number that is not finite": ("if (!in_range<S>(x)) {", "if (false) {"),
}  # fmt: skip


def host_failure(
    monkeypatch: pytest.MonkeyPatch, signature: ExpandSignature, wrong: Any = None
) -> tuple[str | None, list[Any]]:
    """What the self-test says of the CUDA kernel compiled for the host, and its launches."""
    launches = []

    def launch(batch: ExpandBatch, max_blocks: int, uploaded: bool) -> None:
        launches.append((max_blocks, uploaded))
        expand_on_host(batch, None, max_blocks, wrong)

    monkeypatch.setattr(native, "_launch_expand", launch)
    monkeypatch.setattr(selftest_low_rank, "_results", {})
    return registry._expand_failure("cuda", "cpu", [signature]), launches


@needs_compiler
@pytest.mark.parametrize(
    "fault", [next(iter(FAULTS)), *(pytest.param(f, marks=pytest.mark.slow) for f in list(FAULTS)[1:])]
)
def test_selftest_finds_faults_of_kernels(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = "F16" if "not finite" in fault else "BF16"
    signature = ExpandSignature("F64", None) if "fused" in fault else ExpandSignature("F32", result)
    found, _ = host_failure(monkeypatch, signature, FAULTS[fault])
    assert found and found.startswith("not the reference's"), found


@needs_compiler
@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
def test_selftest_of_cuda_gives_a_warp_several_tiles(
    signature: ExpandSignature, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once the table goes along with the launch, once it is uploaded.
    assert host_failure(monkeypatch, signature) == (None, [(3, False), (3, True)])
