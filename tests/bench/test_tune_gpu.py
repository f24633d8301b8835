"""Tuning for a GPU without a GPU: the CUDA kernel compiled for the host, and a clock on which one candidate is the fastest."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from negmerge_fast.backends import pytorch, selftest
from negmerge_fast.benchmark import records
from negmerge_fast.benchmark.bandwidth import Roofline
from negmerge_fast.core.batch import Signature

ROOT = Path(__file__).parents[2]
CANDIDATES = {"as built": [], "another": ["THREADS=128", "TILE=2048"]}


class FakeTime:
    """A device's clock that only tasks advance, and the tasks in their order. A flush takes longer than anything timed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: list[str] = []

    def spend(self, what: str, seconds: float) -> None:
        self.now += seconds
        self.done.append(what)

    def read(self) -> float:
        self.spend("clock", 0.0)
        return self.now

    def takes(self, merge: Any, seconds: float) -> Any:
        def timed(batch: Any, rule: Any, threads: Any = None) -> Any:
            self.spend("merge", seconds)
            return merge(batch, rule)

        return timed


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def tune_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, time: FakeTime) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "tuning"))
    import tune_gpu

    host = [
        "g++",
        "-O0",
        "-ffp-contract=off",
        "-fPIC",
        f"-I{ROOT}/tests/support/cuda_on_host",
        "-w",
        "-x",
        "c++",
    ]
    monkeypatch.setattr(tune_gpu, "compiler", lambda device: host)
    monkeypatch.setattr(tune_gpu, "CUDA", CANDIDATES)
    monkeypatch.setattr(tune_gpu, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune_gpu, "clock", lambda device: time.read)
    monkeypatch.setattr(tune_gpu, "flush", lambda device: time.spend("flush", 100.0))
    # Twice the bytes of a merge in 3 s, so that the roofline of a merge is 1.5 s.
    monkeypatch.setattr(
        tune_gpu,
        "device_copy",
        lambda device, size: Roofline("device copy", 2 * size, lambda: time.spend("copy", 3.0)),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(
        records, "machine", lambda device: {"commit": "abc1234", "device": "A GPU", "driver": "1.2"}
    )
    monkeypatch.setattr(selftest, "_results", {})
    return tune_gpu


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to build the CUDA kernel for the host")
@pytest.mark.slow
def test_the_fastest_right_candidate_wins(
    tune_gpu: Any,
    time: FakeTime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built, another = tune_gpu.cuda_candidates("cpu", str(tmp_path)).values()

    def spoilt(spoil: Any, after: int = 0) -> Any:
        """A merge that is wrong after so many calls on the timed workload, but passes the self-test."""
        calls: Counter[Any] = Counter()

        def merge(batch: Any, rule: Any, threads: Any = None) -> Any:
            counts = another(batch, rule)
            if (numel := batch.segments[0].numel) > 4096:
                calls[batch.signature, numel] += 1
                if calls[batch.signature, numel] > after:
                    spoil(batch, counts)
            return counts

        return time.takes(merge, 0.001)

    def off_by_one(batch: Any, counts: Any) -> None:
        batch.segments[0].out.owner[-1] += 1

    def miscount(batch: Any, counts: Any) -> None:
        counts[0, 1] += 1

    counted: dict[Any, Any] = {}

    def idle(batch: Any, rule: Any, threads: Any = None) -> Any:
        """Merges once. Later it leaves what the previous candidate has written."""
        if (key := (batch.signature, batch.segments[0].numel)) not in counted or len(batch.segments) > 1:
            counted[key] = another(batch, rule)
        return counted[key]

    monkeypatch.setattr(tune_gpu, "FLOAT_SIZES", {"F32": 4, "BF16": 2})
    candidates = {
        "cuda, as built": time.takes(built, 2.0),
        "cuda, another": time.takes(another, 1.0),
        "cuda, wrong": spoilt(off_by_one),
        "cuda, miscounting": spoilt(miscount),
        "cuda, idle later": time.takes(idle, 0.001),
        "cuda, wrong later": spoilt(off_by_one, after=2),
        "cuda, miscounting later": spoilt(miscount, after=3),
    }
    said = tune_gpu.tune("cpu", candidates, False, 1 << 21, 3, tmp_path / "tune_gpu.jsonl")
    timed = "".join(f"{what} " for what in time.done).split("flush clock copy clock flush clock merge clock ")
    printed = capsys.readouterr().out
    elements = "elements that differ from the reference's: "
    for candidate, reason in {
        "wrong": elements + "1",
        "miscounting": "counts differ from the reference's",
        "idle later": elements,
        "wrong later": elements + "1",
        "miscounting later": "counts differ from the reference's",
    }.items():
        assert printed.count(f"cuda, {candidate}, F32, n = 8: no speed, {reason}") == 1
    # Nothing lies between the steps of a round. Other merges belong to checks.
    assert len(timed) == 1 + 2 * 3 * 3 * 5 and not re.search("clock|flush|copy", "".join(timed))
    assert said[-1] == "all types: cuda, another: 1.500 of a device copy; cuda, as built: 0.750"
    rows = [json.loads(line) for line in (tmp_path / "tune_gpu.jsonl").read_text().splitlines()]
    assert {(row["way"], row["dtype"], row["n"]) for row in rows} == {
        (f"cuda, {candidate}", dtype, n)
        for candidate in CANDIDATES
        for dtype in ("F32", "BF16")
        for n in (2, 8, 32)
    }
    for row in rows:
        assert row["bytes"] == (row["n"] + 2) * row["numel"] * (4 if row["dtype"] == "F32" else 2)
        assert row["p50"] == {"cuda, as built": 2.0, "cuda, another": 1.0}[row["way"]]
        assert row["limit GB/s"] == pytest.approx(row["bytes"] / 1.5e9)
        assert (row["suite"], row["device"], row["differing"], row["rounds"]) == ("tune", "A GPU", 0, 3)


def test_a_candidate_that_fails_its_selftest_is_not_timed(
    tune_gpu: Any, time: FakeTime, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(batch: Any, rule: Any, threads: Any = None) -> Any:
        counts = pytorch.merge(batch, rule)
        if len(batch.segments) > 1:
            batch.segments[0].out.owner[0] ^= 1
        return counts

    results = tmp_path / "tune_gpu.jsonl"
    assert tune_gpu.tune("cpu", {"cuda, as built": time.takes(wrong, 1.0)}, False, 1 << 20, 1, results) == []
    assert "cuda, as built, F32, n = 2: no speed, not the reference's bits on cpu" in capsys.readouterr().out
    assert "clock" not in time.done and not results.exists()


def test_lines_for_triton_can_be_pasted_into_its_launch_module(
    tune_gpu: Any, time: FakeTime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from negmerge_fast.kernels.launch import Launch, candidates

    def triton_candidates(signature: Any) -> Any:
        usual, other, *_ = candidates(signature, True)
        names = {"triton, usual": usual, "triton, other": other}
        merges = time.takes(pytorch.merge, 4.0), time.takes(pytorch.merge, 3.0)
        return dict(zip(names, merges, strict=True)), names

    monkeypatch.setattr(tune_gpu, "triton_candidates", triton_candidates)
    monkeypatch.setattr(tune_gpu, "FLOAT_SIZES", {"F16": 2})
    said = tune_gpu.tune("cpu", {}, True, 1 << 20, 2, tmp_path / "rows.jsonl")
    found = eval("{" + said[-1] + "\n}", {"Launch": Launch})
    _, other, *_ = candidates(Signature("F16", ("F16",) * 8, False), True)
    assert found == {("A GPU", "F16", "F16", True): other}
    assert said[0] == "F16: triton, other: 0.500 of a device copy; triton, usual: 0.375"


def test_candidates_for_triton_are_those_of_its_launch_module(
    monkeypatch: pytest.MonkeyPatch, tune_gpu: Any
) -> None:
    pytest.importorskip("triton")
    from negmerge_fast.kernels import launch, merge

    monkeypatch.setattr(merge, "launch_merge", lambda batch, rule, launch: launch)
    signature = Signature("BF16", ("BF16",) * 8, False)
    candidates, launches = tune_gpu.triton_candidates(signature)
    assert list(launches.values()) == list(launch.candidates(signature, True))
    assert {name: candidate(None, None) for name, candidate in candidates.items()} == launches


@pytest.mark.slow
def test_a_message_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "tuning" / "tune_gpu.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch("tune_gpu: .*\n", done.stdout) and not done.stderr
