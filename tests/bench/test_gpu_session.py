"""A session on a GPU, without one: variants that hang, crash or are wrong, and a time that does not suffice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import TimeoutError as NotReady
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from negmerge_fast.backends import low_rank, pytorch, pytorch_delta, selftest
from negmerge_fast.benchmark.bandwidth import Roofline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_session(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "tuning"))
    import gpu_session

    return gpu_session


def printing(*rows: tuple[str, int, str, float], then: str = "") -> list[str]:
    """A command that prints rows, then does something else."""
    lines = [
        json.dumps({"way": "a", "dtype": dtype, "n": n, "state": state, "of_limit": fraction})
        for dtype, n, state, fraction in rows
    ]
    return [sys.executable, "-c", f"import sys, time\nfor line in {lines}: print(line, flush=True)\n{then}"]


DELTAS = ["live move of a delta", "delta applied to a copy"]
LOW_RANK = ["low-rank models merged", "low-rank difference written"]
FAMILY = ["merged by mean", "merged by ties", "merged by dare"]

WHOLE = [
    ("F32", 2, "kernel", 0.5),
    ("F32", 2, "as called", 0.4),
    ("BF16", 2, "kernel", 0.125),
    ("BF16", 2, "as called", 0.1),
]


@pytest.mark.slow
def test_a_variant_costs_no_other_its_numbers(gpu_session: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def not_compiled(seconds: float) -> list[str]:
        raise RuntimeError("error: no such constant\nand more")

    lines = {
        "right": printing(*WHOLE),
        "hangs": printing(*WHOLE[:2], then="time.sleep(1000)"),
        "crashes": printing(*WHOLE[:1], then="sys.exit('CUDA error: an illegal address')"),
        "wrong": printing(then="print('wrong, F32, n = 2: no speed, elements that differ: 3')"),
    }
    commands = {name: lambda seconds, line=line: line for name, line in lines.items()}
    recorded: list[Any] = []
    began = time.monotonic()
    results, remaining = gpu_session.session(
        {**commands, "not compiled": not_compiled}, 1000.0, limit_s=3.0, on_rows=recorded.extend
    )
    assert time.monotonic() - began < 500 and not remaining
    assert {name: (len(result.rows), result.reason) for name, result in results.items()} == {
        "right": (4, None),
        "hangs": (2, "took more than 3 s"),
        "crashes": (1, "ended with exit status 1: CUDA error: an illegal address"),
        "wrong": (0, "wrong, F32, n = 2: no speed, elements that differ: 3"),
        "not compiled": (0, "error: no such constant"),
    }
    assert len(recorded) == 7
    printed = gpu_session.table(results, ["later"]).splitlines()
    assert "| right | 0.250 | 0.125 (BF16, n = 2) | 0.200 | 2 of 2 |" in printed
    assert "| hangs | 0.500 | 0.500 (F32, n = 2) | 0.400 | 1 of 2 |" in printed
    assert "| wrong | – | – | – | 0 of 2 |" in printed
    assert printed[-5:] == [
        *(f"{name}: {result.reason}" for name, result in results.items() if result.reason),
        "later: not measured, the time is up",
    ]


def test_variants_for_which_there_is_no_time_are_remaining(gpu_session: Any) -> None:
    passed = [0.0]

    def takes(seconds: float) -> Any:
        def command(left: float) -> list[str]:
            if seconds > left:
                raise NotReady
            passed[0] += seconds
            return printing(WHOLE[0])

        return command

    commands = {"a": takes(30.0), "slow to compile": takes(80.0), "b": takes(69.5), "c": takes(0.0)}
    results, remaining = gpu_session.session(commands, 100.0, now=lambda: passed[0])
    assert list(results) == ["a", "b"] and remaining == ["slow to compile", "c"]


def test_bits_are_compared_before_and_after_the_rounds(
    gpu_session: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tune_gpu

    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(tune_gpu, "flush", lambda device: None)
    monkeypatch.setattr(
        tune_gpu, "device_copy", lambda device, size: Roofline("device copy", size, lambda: spend(2.0))
    )
    monkeypatch.setattr(selftest, "_results", {})
    monkeypatch.setattr(gpu_session, "MODELS", (2, 3))
    calls = [0]

    def merge(batch: Any, rule: Any, threads: Any = None) -> Any:
        spend(4.0)
        counts = pytorch.merge(batch, rule)
        if batch.signature.result == "F16" and len(batch.segments) == 1:
            calls[0] += 1
            if calls[0] == 3:  # one check and two rounds
                batch.segments[0].out.owner[-1] += 1
        return counts

    clocks = {"kernel": lambda: now[0], "as called": lambda: now[0]}
    gpu_session.measure_variant("triton, usual", merge, "cpu", 4096, 2, clocks)
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert {row["of_limit"] for row in rows} == {0.5}
    measured = [(row["dtype"], row["n"], row["state"]) for row in rows]
    every = [
        (t, n, s) for n in (2, 3) for t in ("F64", "F32", "F16", "BF16") for s in ("kernel", "as called")
    ]
    assert measured == [cell for cell in every if cell != ("F16", 2, "kernel")]
    assert [line for line in lines if not line.startswith("{")] == [
        "triton, usual, F16, n = 2: no speed, elements that differ from the reference's: 1"
    ]


@pytest.mark.parametrize("task", DELTAS)
def test_deltas_are_measured_beside_a_copy_and_a_merge(
    gpu_session: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    import gpu_deltas

    now, wrong = [0.0], [False]

    def spending(seconds: float, function: Any) -> Any:
        def spend(batch: Any = None, *given: Any) -> Any:
            now[0] += seconds
            found = function(batch, *given)
            if wrong[0] and batch and batch.signature.result == "F16":
                gpu_deltas_out[0].out[-1] += 1
            return found

        return spend

    gpu_deltas_out: list[Any] = []
    prepare = gpu_deltas.DeltaWorkload.prepare

    def remember(self: Any) -> None:
        gpu_deltas_out[:] = [self]
        prepare(self)

    monkeypatch.setattr(gpu_deltas.DeltaWorkload, "prepare", remember)
    monkeypatch.setattr(gpu_deltas, "flush", lambda device: None)
    monkeypatch.setattr(
        gpu_deltas,
        "device_copy",
        lambda device, size: Roofline("device copy", size, spending(2.0, lambda _: None)),
    )
    monkeypatch.setattr(gpu_deltas.registry, "choose", lambda *_: ("torch", spending(16.0, pytorch.merge)))
    monkeypatch.setattr(
        gpu_deltas.registry, "choose_apply", lambda *_: ("torch", spending(4.0, pytorch_delta.apply))
    )
    clocks = {"kernel": lambda: now[0], "as called": lambda: now[0]}
    gpu_deltas.measure_variant("cuda", task, "cpu", 8192, 2, clocks)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["dtype"], row["state"]) for row in rows] == [
        (dtype, state) for dtype in ("F64", "F32", "F16", "BF16") for state in clocks
    ]
    for row in rows:
        assert (row["way"], row["n"], row["of_limit"], row["of_merge"]) == (f"cuda, {task}", 8, 0.5, 0.25)
        size = {"F64": 8, "F32": 4}.get(row["dtype"], 2)
        base, least = 8192 * size, 8192 // 8 + 8 * 8
        assert (row["bytes"] > 2 * base + least) == (task != DELTAS[0])
    printed = gpu_session.table({f"cuda, {task}": gpu_session.Result(rows, None)}, [])
    assert f"cuda, {task}: 0.250 of the time of a merge of 8 models, at most 0.250" in printed.splitlines()
    wrong[0] = True
    gpu_deltas.measure_variant("cuda", task, "cpu", 8192, 2, clocks)
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert said == [f"cuda, {task}, F16: no speed, other bits than PyTorch's"]


@pytest.mark.parametrize("task", FAMILY)
def test_other_methods_are_measured_beside_a_copy_and_a_merge(
    gpu_session: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    import gpu_family

    now, wrong, merged = [0.0], [False], []

    def merge(batch: Any, rule: Any, threads: int | None = None) -> Any:
        now[0] += 4.0 if rule.choices else 16.0
        counts = pytorch.merge(batch, rule)
        if rule.choices:
            merged.append(rule.choices)
        if wrong[0] and rule.choices and batch.signature.result == "BF16":
            counts[0, 0] += 1
        return counts

    def copied(device: str, size: int) -> Roofline:
        return Roofline("device copy", size, lambda: now.__setitem__(0, now[0] + 2.0))

    monkeypatch.setattr(gpu_family, "flush", lambda device: None)
    monkeypatch.setattr(gpu_family, "device_copy", copied)
    monkeypatch.setattr(gpu_family.registry, "choose", lambda *_: ("torch", merge))
    clocks = {"kernel": lambda: now[0], "as called": lambda: now[0]}
    gpu_family.measure_variant("cuda", task, "cpu", 4096, 2, clocks)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["dtype"], row["state"]) for row in rows] == [
        (t, state) for t in ("F32", "BF16") for state in clocks
    ]
    assert len(set(merged)) == 1
    for row in rows:
        assert (row["way"], row["n"], row["of_limit"], row["of_merge"]) == (f"cuda, {task}", 8, 0.5, 0.25)
    wrong[0] = True
    gpu_family.measure_variant("cuda", task, "cpu", 4096, 2, clocks)
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert said == [f"cuda, {task}, BF16: no speed, other counts than PyTorch's"]


@pytest.mark.parametrize("task", LOW_RANK)
def test_low_rank_models_are_measured_beside_a_copy_and_a_merge(
    gpu_session: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    import gpu_low_rank

    now, wrong = [0.0], [False]

    def spending(seconds: float, function: Any) -> Any:
        def spend(batch: Any = None, *given: Any) -> Any:
            now[0] += seconds
            found = function(batch, *given)
            if wrong[0] and batch:
                batch.segments[0].out.owner[-1] += 1
            return found

        return spend

    merge = partial(low_rank.merge, pytorch.merge, low_rank.expand)
    monkeypatch.setattr(gpu_low_rank, "flush", lambda device: None)
    monkeypatch.setattr(gpu_low_rank, "COLUMNS", 64)
    monkeypatch.setattr(
        gpu_low_rank,
        "device_copy",
        lambda device, size: Roofline("device copy", size, spending(2.0, lambda _: None)),
    )
    registry = gpu_low_rank.registry
    monkeypatch.setattr(registry, "choose", lambda *_: ("torch", spending(16.0, pytorch.merge)))
    monkeypatch.setattr(registry, "choose_low_rank", lambda *_: ("torch", spending(4.0, merge)))
    monkeypatch.setattr(registry, "choose_expand", lambda *_: ("torch", spending(4.0, low_rank.expand)))
    clocks = {"kernel": lambda: now[0], "as called": lambda: now[0]}
    gpu_low_rank.measure_variant("cuda", task, "cpu", 4 * 8192, 2, clocks)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    is_merge = task == gpu_low_rank.MERGED
    every = [(t, n, s) for n in ((8, 30) if is_merge else (8,)) for t in ("BF16", "F32") for s in clocks]
    assert [(row["dtype"], row["n"], row["state"]) for row in rows] == every
    for row in rows:
        assert (row["way"], row["of_limit"], row["of_merge"]) == (f"cuda, {task}", 0.5, 0.25)
        size = {"F32": 4, "BF16": 2}[row["dtype"]]
        factors = 4 * 16 * (128 + 64) * (row["n"] if is_merge else 1)
        assert row["bytes"] == factors + 8192 * (2 * size if is_merge else 4)
        row["of_arithmetic"] = 0.5  # no GPU, no rate
    printed = gpu_session.table({f"cuda, {task}": gpu_session.Result(rows, None)}, []).splitlines()
    models = "8 or 30" if is_merge else "8"
    assert f"cuda, {task}: 0.250 of the time of a merge of {models} models, at most 0.250" in printed
    assert f"cuda, {task}: 0.500 of the rate of unfused operations of float32" in printed
    wrong[0] = True
    gpu_low_rank.measure_variant("cuda", task, "cpu", 4 * 8192, 2, clocks)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"cuda, {task}, BF16, n = 8: no speed, other bits than PyTorch's"
    assert len(said) == len(every) // 2


def test_every_variant_of_triton_is_a_launch_of_its_own(
    gpu_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from negmerge_fast.core.batch import Batch, Signature
    from negmerge_fast.kernels import merge

    monkeypatch.setattr(merge, "launch_merge", lambda batch, rule, launch: launch)
    batch = Batch("cuda:0", Signature("BF16", ("BF16",) * 8, False), [])
    launches = [gpu_session.merge_of(f"triton, {name}", "")(batch, None) for name in gpu_session.TRITON]
    assert len(set(launches)) == len(launches)
    assert set(gpu_session.VARIANTS) == {
        *(f"triton, {name}" for name in [*gpu_session.TRITON, *DELTAS, *LOW_RANK, *FAMILY]),
        *(f"cuda, {name}" for name in [*gpu_session.CUDA, *DELTAS, *LOW_RANK, *FAMILY]),
    }  # fmt: skip


def test_a_message_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = str(ROOT / "bench" / "tuning" / "gpu_session.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "gpu_session: torch finds no GPU here, nothing was measured\n" and not done.stderr
