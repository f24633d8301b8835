"""The self-test of kernels for deltas: faulty ones fail it, and a backend that fails it is not used."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from backend_cases import deltas_on_host

import negmerge_fast as nm
from negmerge_fast.backends import native, pytorch_delta, registry, selftest, selftest_delta
from negmerge_fast.core.delta import DeltaBatch, DeltaSignature
from negmerge_fast.core.descriptors import Act
from negmerge_fast.core.dtypes import FLOAT_SIZES

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host"
)

F32 = DeltaSignature("F32", "F32", "F32")


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """PyTorch's functions with one wrong bit, as if they were the CUDA kernel on the CPU; the list says what is wrong."""
    wrong = ["bits"]

    def faulty(batch: DeltaBatch, act: Act, scale: float) -> Any:
        counts = np.zeros((len(batch.segments), 2), np.int64)
        if act == Act.SAVE:
            pytorch_delta.save(batch)
        else:
            counts = pytorch_delta.apply(batch, scale if act == Act.APPLY else None)
        if wrong == ["bits"] or wrong == [act.name]:
            batch.segments[0].owners[1 if act == Act.SAVE else 0][100] ^= 1
        if wrong == ["counts"]:
            counts[0, 0] += 1
        if wrong == ["launch"]:
            raise RuntimeError("no kernel image\nfor this device")
        return counts

    monkeypatch.setattr(selftest_delta, "_results", {})
    why_not = registry.why_not
    monkeypatch.setattr(
        registry, "why_not", lambda name, device: None if name == "cuda" else why_not(name, device)
    )
    monkeypatch.setattr(native, "deltas_in_few_blocks", faulty)
    return wrong


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("bits", r"cuda: not the reference's bits on cpu to apply a delta of F32 on F32: byte 100 of the self-test is 0x"),
        ("RESTORE", r"cuda: not the reference's bits on cpu to restore a delta of F32 on F32: byte 100 of the self-test is 0x"),
        ("SAVE", r"cuda: not the reference's bits on cpu to save a delta of F32 on F32: byte 100 of the self-test is 0x"),
        ("counts", r"cuda: not the reference's counts on cpu to apply a delta of F32 on F32"),
        ("launch", r"cuda: failed its self-test on cpu: RuntimeError: no kernel image$"),
    ],
)  # fmt: skip
def test_kernel_that_fails_its_selftest_is_not_used(wrong_kernel: list[str], what: str, message: str) -> None:
    wrong_kernel[:] = [what]
    for _ in range(2):  # the result is kept
        with pytest.raises(nm.InputError, match=message):
            registry.choose_apply("cuda", "cpu", [F32])
        wrong_kernel[:] = []
    assert registry.choose_apply("auto", "cpu", [F32])[0] in ("cpu", "torch")
    other = DeltaSignature("BF16", "F32", "F32")
    assert registry.choose_apply("cuda", "cpu", iter([other])) == ("cuda", native.apply_cuda)
    assert registry.save_of("cuda") == native.save_cuda
    assert list(selftest_delta._results.values())[1:] == [None]


def test_info_asks_the_selftest_for_deltas(wrong_kernel: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "failure", lambda *_: None)
    found = registry.selftest("cuda", "cpu") or ""
    assert found.startswith("not the reference's bits on cpu to apply a delta of")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why_in_one_line(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "why_not", lambda name, device: f"no {name} on {device}")
    with pytest.raises(nm.InputError) as error:
        registry.choose_apply(backend, "cpu", [F32])
    assert str(error.value) == f"backend '{backend}' cannot run here: {backend}: no {backend} on cpu"


# Each has to be compiled.
FAULTS = {
    "a saved element that is left out": ("(saved || changed)", "changed"),
    "only the first tile of a warp": ("tile += kApplyWarps) {", "tile = end) {"),
    "the rank of the next element": ("int at = through - own;", "int at = through - own + (threadIdx.x % 32 > 30);"),
    "a fused multiply-add": ("return b - c.scale * mean;", "return __builtin_fma(-c.scale, mean, b);"),
    "a result that is not finite": (": stored[k];", ": static_cast<Bits>(S::template round<typename S::Word>(result));"),
    "a copy that ends early": ("done = count - count % kAtOnce;", "done = count;"),
    "an odd address that is rounded": ("apply_tile<T, S, M, false>(args, row, in_segment, false,", "if (tile < 0) apply_tile<T, S, M, false>(args, row, in_segment, false,"),
    "counts of an earlier segment": ("counts = {};", ""),
    "a segment begun anew": ("in_segment = tile - tiling[0]", "in_segment = 0"),
    "restoring that computes": ("moved = args.act != Act::kApply", "moved = args.act == Act::kSave"),
    "elements saved where they lie": ("store(saved + one * sizeof(Bits),", "store(saved + positions[one] * sizeof(Bits),"),
}  # fmt: skip


def host_failure(
    monkeypatch: pytest.MonkeyPatch, signature: DeltaSignature, wrong: Any = None
) -> tuple[str | None, list[Any]]:
    """What the self-test says of the CUDA kernel compiled for the host, and its launches."""
    launches = []

    def launch(batch: DeltaBatch, act: Act, scale: float, max_blocks: int, uploaded: bool) -> Any:
        launches.append((act, max_blocks, uploaded))
        return deltas_on_host(batch, act, scale, max_blocks, wrong)

    monkeypatch.setattr(native, "_launch_deltas", launch)
    monkeypatch.setattr(selftest_delta, "_results", {})
    return registry._apply_failure("cuda", "cpu", [signature]), launches


@needs_compiler
@pytest.mark.parametrize(
    "fault", [next(iter(FAULTS)), *(pytest.param(f, marks=pytest.mark.slow) for f in list(FAULTS)[1:])]
)
def test_selftest_finds_faults_of_kernels(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = (
        DeltaSignature("F64", "F64", "F64") if "fused" in fault else DeltaSignature("BF16", "F32", "F32")
    )
    found, _ = host_failure(monkeypatch, signature, FAULTS[fault])
    assert found and found.startswith("not the reference's"), found


@needs_compiler
@pytest.mark.parametrize("result", FLOAT_SIZES)
def test_selftest_of_cuda_gives_a_warp_several_tiles(result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = "F64" if result == "F64" else "F32"
    for means in (wide, "BF16"):
        found, launches = host_failure(monkeypatch, DeltaSignature(result, means, wide))
        assert found is None
        # Once the table goes along with the launch, once it is uploaded.
        assert launches == [
            (Act.APPLY, 3, False),
            (Act.APPLY, 3, True),
            (Act.RESTORE, 3, False),
            (Act.SAVE, 3, False),
        ]
