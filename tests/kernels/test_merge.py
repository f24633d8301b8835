"""What Triton's compiler makes of the kernel, without a GPU; and what is asked of a kernel before it is trusted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_cases import merge_on_host
from cuobjdump import tools

import negmerge_fast as nm
from negmerge_fast.backends import native, registry, selftest
from negmerge_fast.cli import info
from negmerge_fast.core.batch import Batch, Signature
from negmerge_fast.core.rule import Rule

triton = pytest.importorskip("triton")

SM_80, SM_90, SM_100, GFX942 = ("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)

UNIFORM = [("F64", "F64"), ("F32", "F32"), ("F16", "F16"), ("BF16", "BF16")]
MIXED = [("F32", "BF16"), ("BF16", "F32"), ("F64", "BF16"), ("F64", "F32"), ("F16", "F64")]

# Target, types of base and models, how many models: all in a group, or a group in a loop and one more. Compiling is all
# that takes time here: but for each type on one target, and each target with one type, that is for `make slow`.
COMPILED = [(SM_90, *types, 9) for types in UNIFORM] + [
    (target, "F32", "F32", 9) for target in (SM_80, SM_100, GFX942)
]
RARER = [(SM_90, *types, n) for types in UNIFORM + MIXED for n in (2, 9)]
RARER += [(target, *types, 9) for types in UNIFORM for target in (SM_80, SM_100, GFX942)]
COMPILED += [pytest.param(*case, marks=pytest.mark.slow) for case in RARER if case not in COMPILED]


@cache
def compiled(target: tuple[Any, ...], result: str, model: str, n: int, unanimous: bool) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from negmerge_fast.kernels import merge as kernel

    signature = Signature(result, (model,) * n, False)
    launch = kernel.usual_launch(signature, unanimous)
    constants = kernel.constants(signature, unanimous, launch)
    types = dict.fromkeys(kernel.merge_tiles.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= {"memory": "*i64", "counts": "*i64", "scale": "*fp64"}
    source = ASTSource(fn=kernel.merge_tiles, signature=types, constexprs=constants)
    return triton.compile(
        source, target=GPUTarget(*target), options=kernel.options(launch, GPUTarget(*target))
    )


def machine_code(cubin: bytes, folder: Path) -> str:
    if (found := tools()) is None:
        pytest.skip("no cuobjdump to read the kernel with")
    (folder / "kernel.cubin").write_bytes(cubin)
    path = os.pathsep.join([found, os.environ.get("PATH", "")])
    done = subprocess.run(
        [f"{found}/cuobjdump", "-sass", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("unanimous", [True, False], ids=["unanimous", "majority"])
@pytest.mark.parametrize(
    ("target", "result", "model", "n"), COMPILED, ids=lambda v: str(v[1]) if isinstance(v, tuple) else str(v)
)
def test_code(
    target: tuple[Any, ...], result: str, model: str, n: int, unanimous: bool, tmp_path: Path
) -> None:
    """16 bytes at a time from every stream, no local memory, IEEE division, nothing fused."""
    kernel = compiled(target, result, model, n, unanimous)
    launch, loads = wide_loads(result, model, n, unanimous)
    double = "F64" in (result, model)
    if target[0] == "hip":
        code = kernel.asm["amdgcn"]
        assert len(re.findall(r"\bglobal_load_dwordx4\b", code)) >= loads
        assert "scratch_" not in code and re.search(r"\.private_segment_fixed_size: 0$", code, re.MULTILINE)
        # What is fused there belongs to the division's own expansion.
        assert f"v_div_fixup_f{64 if double else 32}" in code
        assert not re.search(
            r"\bcontract\b|\bllvm\.fmuladd|\bllvm\.fma|\bfast\b|\barcp\b", kernel.asm["llir"]
        )
        return
    ptx = kernel.asm["ptx"]
    assert f"div.rn.f{64 if double else 32}" in ptx
    assert not re.search(r"\bfma\.|\bmad\.\S*f\d|\bdiv\.(approx|full)|\.ftz|\brcp\.", ptx)
    # Only what is aligned is evicted first.
    widths = re.findall(r"\bld\.global\S*?evict_first\S*?\.((?:v\d\.)?b\d+) ", ptx)
    assert len(widths) >= loads
    narrow = launch.elements * min(SIZES[result], SIZES[model]) < 16
    assert set(widths) <= {"v4.b32", "v2.b64"} | ({"v2.b32"} if narrow else set())
    assert not re.search(r"\b(LDL|STL)\b", machine_code(kernel.asm["cubin"], tmp_path)), "uses local memory"


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def wide_loads(result: str, model: str, n: int, unanimous: bool) -> tuple[Any, int]:
    """How the kernel is launched, and how many loads of 16 bytes, or of what there is, stand in its code."""
    from negmerge_fast.kernels.launch import usual_launch

    launch = usual_launch(Signature(result, (model,) * n, False), unanimous)
    models = n if n <= launch.group else launch.group + n % launch.group
    at_once = [max(1, launch.elements * SIZES[dtype] // 16) for dtype in (result, model)]
    return launch, at_once[0] + models * at_once[1]


def test_launch_parameters_are_searched_and_printed_to_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU, by a clock that likes one of them."""
    from negmerge_fast.kernels import launch as kernel

    signature = Signature("BF16", ("BF16",) * 3, False)
    usual, *others = kernel.candidates(signature, True)
    assert usual == kernel.usual_launch(signature, True) and len({usual, *others}) == 1 + len(others) > 20
    liked, tried = others[5], []

    def launch_merge(batch: Batch, rule: Rule, launch: Any) -> None:
        tried.append(launch)

    def clock(function: Any) -> float:
        function()
        return 1.0 if tried[-1] == liked else 2.0

    monkeypatch.setattr(kernel, "SEARCHED_BYTES", 1 << 20)
    monkeypatch.setattr(kernel, "FOUND", {})
    monkeypatch.setattr(triton.testing, "do_bench", clock)
    monkeypatch.setattr(torch.cpu, "get_device_name", lambda device: "A GPU", raising=False)
    assert kernel.launch_for(signature, True, "cpu", launch_merge) == usual and not tried
    monkeypatch.setenv("NEGMERGE_AUTOTUNE", "1")
    assert kernel.launch_for(signature, True, "cpu", launch_merge) == liked
    assert tried == [usual, *others]
    printed = capsys.readouterr().err
    assert eval("{" + printed + "}", {"Launch": kernel.Launch}) == kernel.FOUND
    assert kernel.launch_for(signature, True, "cpu", launch_merge) == liked
    assert tried == [usual, *others] and not capsys.readouterr().err


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU's kernel with one wrong bit, as if it were one that has to be tried; what is in the list is wrong."""
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
def test_a_kernel_that_differs_is_not_used(wrong_kernel: list[str], what: str, message: str) -> None:
    wrong_kernel[:] = [what]
    base, models = torch.zeros(100), [torch.ones(100)] * 2
    with pytest.raises(nm.InputError, match=message):
        nm.merge_(base, models, scale=1.0, backend="cpu")
    assert not base.any()
    # It is kept, and shown; what asks for no backend by name goes on with another.
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
        "return sum / c.n;",
        "const N m = sum / c.n, tiny = sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022; return m < tiny && m > -tiny ? N{} : m;",
    ),
    "a zero that agrees": ("(least > N{}) |", "(least >= N{}) |"),
    "a fused multiply-add": ("return b + t;", "return __builtin_fma(c.scale, -mean, b);"),
    "an infinity that is ignored": ("(greatest < N{} + kInf)", "(greatest == greatest)"),
}


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
@pytest.mark.parametrize("task_vectors", [False, True])
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize(
    "fault",
    ["none", next(iter(FAULTS)), *(pytest.param(f, marks=pytest.mark.slow) for f in list(FAULTS)[1:])],
)  # each has to be compiled
def test_a_trial_finds_what_goes_wrong_on_chips(fault: str, dtype: str, task_vectors: bool) -> None:
    if fault == "a fused multiply-add" and dtype != "F64":
        pytest.skip("that of doubles is none of floats")

    if fault == "a subnormal mean that is zero" and dtype == "F16":
        pytest.skip("what is subnormal there is a normal float")
    merge = partial(merge_on_host, wrong=FAULTS.get(fault))
    found = selftest._run_case(merge, "cpu", Signature(dtype, (dtype,) * 3, task_vectors), Rule(0.9))
    assert (found is None) == (fault == "none"), found


@pytest.mark.parametrize("job", ["in place", "apart", "no base", "count", "odd address"])
def test_a_trial_takes_every_way(job: str) -> None:
    def merge(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        for s in batch.segments:
            took = {
                "in place": s.base and s.out == s.base, "apart": s.out and s.base and s.out != s.base,
                "no base": not s.base, "count": not s.out, "odd address": s.models[0].address % 2,
            }  # fmt: skip
            if s.numel and took[job]:
                raise ValueError(job)
        return merge_on_host(batch, rule)

    found = selftest._run_case(merge, "cpu", Signature("BF16", ("BF16",), False), Rule(0.9))
    assert found == f"failed its self-test on cpu: ValueError: {job}"


def test_a_kernel_is_tried_once_for_what_it_is_used_for(wrong_kernel: list[str]) -> None:
    wrong_kernel[:] = []
    base, models = torch.zeros(100), [torch.ones(100)] * 2
    nm.merge(base, models, scale=1.0)
    assert len(selftest._results) == 1
    nm.merge(base, models, scale=0.5)
    assert len(selftest._results) == 1
    nm.merge(base, models, scale=0.5, min_agreement=0.6)  # of two, both
    nm.merge(base, [*models, base], scale=0.5, min_agreement=0.6)
    nm.merge(base.half(), models, scale=0.5)
    assert len(selftest._results) == 3 and not any(selftest._results.values())


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_works_the_same_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, negmerge_fast as nm
from negmerge_fast.cli import info
assert nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0).tolist() == [-1, -1, -1]
try:
    nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0, backend="triton")
except nm.InputError as error:
    print(error)
print(info.text())
"""
    printed = python(code)
    assert "backend 'triton' cannot run here: triton: cannot be imported" in printed
    assert re.search(r"^backend triton on .*: cannot be imported", printed, re.MULTILINE)


def test_a_merge_on_the_cpu_imports_no_triton() -> None:
    code = """
import sys, torch, negmerge_fast as nm
before = "triton" in sys.modules
nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0)
print(before, "triton" in sys.modules)
"""
    assert python(code) == "False False\n"


def test_triton_is_for_gpus_unless_it_is_interpreted() -> None:
    with pytest.raises(nm.InputError, match="triton: is for tensors on a GPU"):
        nm.merge(torch.zeros(3), [torch.ones(3)], scale=1.0, backend="triton")
