"""The suite in bench/ and `negmerge bench`: what they refuse, what a row holds, how time is taken. No speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import Run, run  # noqa: F401

from negmerge_fast.backends import native
from negmerge_fast.benchmark import append, bandwidth, candidates, machine, quick, table, timers, timing
from negmerge_fast.benchmark import workload as works
from negmerge_fast.benchmark.records import line
from negmerge_fast.benchmark.shapes import LAYOUTS, one_tensor
from negmerge_fast.benchmark.timing import Trial, trial_of

ROOT = Path(__file__).parents[2]

MACHINE = {"commit", "date", "device", "driver", "threads", "negmerge_fast", "torch", "triton", "python"}
WORK = {"suite", "layout", "way", "dtype", "n", "numel", "bytes", "state"}
FOUND = {"rounds", "p20", "p50", "p80", "GB/s", "limit", "limit GB/s", "of_limit", "differing"}

# Of every BF16 merge on the CPU the last element is wrong, by one bit.
PLANTED = """
from negmerge_fast.backends import native
right = native.merge_cpu

def wrong(batch, rule, threads=None):
    counts = right(batch, rule, threads)
    if batch.signature.result == "BF16":
        out = batch.segments[-1].out.owner.view(-1)[-1:]
        out.view(dtype=__import__("torch").int16).bitwise_xor_(1)
    return counts

native.merge_cpu = wrong
"""


def suite(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--size",
        "tiny",
        "--results",
        "rows.jsonl",
        *arguments,
    ]
    command[command.index("rows.jsonl")] = str(tmp_path / "rows.jsonl")
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.skipif(native.why_not("cpu", "cpu") is not None, reason="no CPU kernel")
def test_a_wrong_kernel_gets_no_speed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    # Where there is a GPU, its cases are run, and are right.
    which = "not gpu and " if torch.cuda.is_available() else ""
    done = suite(tmp_path, "-p", "planted", "-k", which + "one_tensor and (F32-2x or -BF16-2x)")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path / "rows.jsonl")
    assert {(row["way"], row["dtype"]) for row in rows} == {
        ("cpu", "F32"), ("cpu, in place", "F32"), ("torch", "F32"), ("torch", "BF16"),
    }  # fmt: skip
    for way in ("cpu", "cpu, in place"):
        refused = f"{way}: 1 element differs from the reference's, no speed (one tensor, BF16, n = 2)"
        assert refused in done.stdout
    for row in rows:
        assert set(row) == MACHINE | WORK | FOUND
        assert (row["suite"], row["layout"], row["n"], row["state"]) == (
            "memory",
            "one tensor",
            2,
            "in memory",
        )
        assert row["bytes"] == 4 * row["numel"] * {"F32": 4, "BF16": 2}[row["dtype"]]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["GB/s"] == pytest.approx(row["bytes"] / row["p50"] / 1e9)
        assert (row["rounds"], row["differing"]) == (3 if row["way"] == "torch" else 7, 0)
        assert row["limit"] == "memory read"
        assert row["of_limit"] > 0 < row["limit GB/s"]
    assert (
        max(
            map(
                len, done.stdout.split("one tensor, F32, in memory")[1].split("rows appended")[0].splitlines()
            )
        )
        <= 100
    )
    if not torch.cuda.is_available():
        assert "left out: no CUDA device: " in done.stdout


def test_a_kernel_that_is_right_only_once_gets_no_speed() -> None:
    work = works.Work("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    way = candidates.way(work, "torch")
    candidates.check(work, way)
    timed = trial_of(work, replace(way, run=lambda: (way.run(), work.out[-1:].zero_())[0]), "memory")
    with pytest.raises(candidates.Refused, match="torch: 1 element differs from the reference's, no speed"):
        timed.result(timed.measure(0, 2))


def test_files_that_are_merged_wrong_get_no_speed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED.replace('"BF16"', '"F32"').replace("int16", "int32").replace(
        ".view(-1)[-1:]\n        out.view(dtype=__import__(\"torch\").int32).bitwise_xor_(1)", "\n        out[0] ^= 1"
    ))  # fmt: skip
    done = suite(tmp_path, "-p", "planted", "-k", "16_tensors and warm and cpu")
    assert done.returncode == 1, done.stdout
    assert "elements differ from the reference's, no speed (files)" in done.stdout
    assert {row["way"] for row in rows_of(tmp_path / "rows.jsonl")} == {
        "torch",
        "load_file, formula, save_file",
    }


def test_a_backend_that_failed_its_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from negmerge_fast.backends import registry

    monkeypatch.setattr(registry, "_distrust", lambda *_: "not the reference's bits")
    work = works.Work("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    with pytest.raises(candidates.Refused, match="torch: not the reference's bits"):
        candidates.way(work, "torch")


def test_cases_of_gpus_are_collected_everywhere(tmp_path: Path) -> None:
    found = suite(tmp_path, "--collect-only").stdout.splitlines()
    for way in ("cuda", "cuda_in_place", "triton", "torch.compile_max-autotune", "torch._foreach_formula"):
        assert any(
            text.startswith("bench/test_memory.py")
            and "[gpu-one_tensor-BF16-8x" in text
            and text.endswith(f"-{way}]")
            for text in found
        ), way
    for case in (
        "test_layouts.py::test_layout[gpu-Llama_8B-BF16-n2-cuda]",
        "test_layouts.py::test_layout[gpu-2000_tensors-F32-n8-merge_]",
        "test_files.py::test_files[gpu-16_tensors_in_files-F32-n8-cold-cuda]",
        "test_limits.py::test_limit[gpu-device_copy]",
    ):
        assert f"bench/{case}" in found, case
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("name", ["eager formula", "torch._foreach formula", "dense two-step"])
def test_peers_compute_the_formula(dtype: str, name: str) -> None:
    shapes = {"a": (7, 11), "b": (), "c": (5000,)}
    work = works.Work("three tensors", shapes, dtype, 3, "cpu", rotate=False)
    differing, _ = candidates.check(work, candidates.way(work, name))
    # A sum in another order may be another number.
    assert differing == 0 or (name == "dense two-step" and differing < 0.5 * work.numel)


@pytest.mark.parametrize("name", ["torch", "merge_"])
def test_a_way_on_copies_that_take_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "last_level_cache", lambda: 1 << 16)
    work = works.Work("three tensors", {"a": (7, 11), "b": (), "c": (500,)}, "BF16", 2, "cpu")
    assert work.copies > 10 and len(work.versions[0]) >= work.copies * work.numel
    way = candidates.way(work, name)
    candidates.check(work, way)
    timed = trial_of(work, way, "layouts")
    row = timed.result(timed.measure(0, 2), work.copies, differing=0)
    assert row["bytes"] == 4 * 578 * 2 and row["rounds"] == 2


def test_one_wrong_element_anywhere_or_one_wrong_count_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "_COMPARED_BYTES", 1000)
    work = works.Work("two tensors", {"a": (300,), "b": (41, 17)}, "F32", 3, "cpu", rotate=False)
    way = candidates.way(work, "torch")
    assert candidates.check(work, way)[0] == 0
    for at, tensor in ((0, 0), (299, 0), (0, 1), (696, 1), (350, 1)):
        wrong = work.tensors(work.out)[tensor].view(-1)[at : at + 1].view(torch.int32)
        wrong.bitwise_xor_(1)
        assert work.compare(work.tensors(work.out))[0] == 1
        wrong.bitwise_xor_(1)

    with pytest.raises(candidates.Refused, match="counts differ"):
        candidates.check(work, replace(way, counts=lambda _: [[1, 0], [2, 0]]))


def test_versions_agree_as_often_as_is_said() -> None:
    work = works.Work("one tensor", one_tensor(1 << 18), "F32", 8, "cpu", rotate=False)
    (_, ((agreed, nonfinite),)) = work.compare(work.tensors(work.out))
    assert nonfinite == 0 and agreed / work.numel == pytest.approx(2 / 9, abs=0.01)


def test_what_does_not_fit_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "free_memory", lambda device: 10**9)
    with pytest.raises(works.Lacking, match=r"Llama 8B, F32, n = 8: 322 GB needed, 1 GB free on cpu"):
        works.Work("Llama 8B", LAYOUTS["Llama 8B"](), "F32", 8, "cpu")
    work = works.Work("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    monkeypatch.setattr(candidates, "free_memory", lambda device: 1000)
    with pytest.raises(works.Lacking, match=r"eager formula of one tensor, F32, n = 2: .* needed"):
        candidates.way(work, "eager formula")


def test_reasons_of_peers_are_one_line() -> None:
    assert candidates.failure(torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to")) == "out of memory"
    assert (
        candidates.failure(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
        == "out of memory"
    )
    assert candidates.failure(ValueError("one\ntwo")) == "ValueError: one"


def test_sizes_of_layouts() -> None:
    totals = {name: sum(map(prod, make().values())) for name, make in LAYOUTS.items()}
    assert totals == {
        "2,000 tensors": 2_000_000,
        "2,000 large tensors": 200_000_000,
        "ViT-B/32": 113_448_705,
        "Llama 1B": 1_235_814_400,
        "Llama 8B": 8_030_261_248,
    }


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("Llama 1B", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}),
        ("Llama 8B", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    ],
)  # fmt: skip
def test_llamas_are_those_of_transformers(layout: str, settings: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, **settings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == LAYOUTS[layout]()


def test_the_vision_transformer_is_clip_without_its_text_transformer() -> None:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())  # whose defaults are ViT-B/32's
    left = {
        name: p.numel() for name, p in model.named_parameters() if ".encoder." not in name or "vision" in name
    }
    assert sum(left.values()) == sum(map(prod, LAYOUTS["ViT-B/32"]().values()))


class FakeEvent:
    """An event of a stream on which time passes by one with each record; done once it was waited for."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self, stream: str) -> None:
        assert stream == "the stream of cuda:1"
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, later: FakeEvent) -> float:
        assert later.done  # which the earlier one is before it
        return 1000.0 * (later.at - self.at)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    return waits


def test_moments_wait_only_when_they_are_subtracted(fake_gpu: list[str]) -> None:
    now = timers.clock("cuda:1")
    began = now()
    middle, ended = now(), now()
    assert not began.event.done and not ended.event.done and not fake_gpu
    assert ended - began == 2.0 and ended.event.done and not middle.event.done
    assert middle - began == 1.0


def test_nothing_waits_between_limit_and_work_on_a_gpu(
    fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("negmerge_fast.benchmark.timing.machine", lambda device: {})
    done: list[str] = []
    limit = bandwidth.Limit("device copy", 8 * 10**9, lambda: done.append("limit"))
    row = {"suite": "memory", "bytes": 4 * 10**9}
    trial = Trial(
        lambda: done.append("run"),
        row,
        limit,
        "cuda:1",
        before=lambda: done.append("before"),
        between=lambda: done.append("flush"),
    )
    began_ended = []
    for _ in range(3):
        trial.setup()
        began = trial.now()
        trial.run()
        began_ended.append((began, trial.now()))
    assert done == 3 * ["before", "limit", "flush", "run"] and not fake_gpu
    found = trial.result([ended - began for began, ended in began_ended])
    assert (found["p50"], found["GB/s"], found["limit GB/s"], found["of_limit"]) == (1.0, 4.0, 8.0, 0.5)


def test_a_gpu_is_kept_busy_for_as_long_as_the_host_takes(
    fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    seconds = iter(range(0, 1000, 10))  # each look at the host's clock is ten seconds later
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(timing, "flush", flushed.append)
    monkeypatch.setattr(
        timing, "of_merge", lambda device, inputs, size: bandwidth.Limit("device copy", size, list)
    )
    work = works.Work("one tensor", one_tensor(4096), "F32", 2, "cpu", rotate=False)
    way = candidates.way(work, "torch, in place")
    work.device = "cuda:1"
    made = trial_of(work, way, "memory")
    assert len(flushed) == 2 and fake_gpu == ["cuda:1", "cuda:1"]
    made.setup()
    # A flush takes a second of the fake stream's time, and asking ten of the host's; one more is for the limit.
    assert flushed == (2 + 1 + 16) * ["cuda:1"] and len(fake_gpu) == 2


def test_a_device_copy_moves_as_much_as_the_work_but_never_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000)
    )
    monkeypatch.setattr(bandwidth, "_COPIED_BYTES", 512)
    bandwidth._pair.cache_clear()
    try:
        assert bandwidth.device_copy("cpu", 10).bytes == 2 * 4000
        copy = bandwidth.device_copy("cpu", 20_000)
        copy.run()
        assert copy.bytes == 16_000 and bandwidth._pair("cpu")[1].all()
        bandwidth.flush("cpu")  # reads
        assert bandwidth._pair("cpu")[0].all() and bandwidth._pair("cpu")[1].all()
    finally:
        bandwidth._pair.cache_clear()


def test_where_a_row_was_measured(tmp_path: Path) -> None:
    found = machine("cpu")
    assert set(found) == MACHINE and found["driver"] is None and found["torch"] == torch.__version__
    append(tmp_path / "new" / "rows.jsonl", [found])
    append(tmp_path / "new" / "rows.jsonl", [found])
    assert rows_of(tmp_path / "new" / "rows.jsonl") == [found, found]


def test_a_table_fits_100_columns() -> None:
    row = {
        "device": "NVIDIA H100 80GB HBM3", "suite": "layouts", "layout": "Llama 8B", "way": "torch.compile max-autotune",
        "dtype": "BF16", "n": 32, "numel": 8_030_261_248, "state": "in memory", "p20": 12.3451, "p50": 12.4, "p80": 13.999,
        "GB/s": 3012.3, "limit": "device copy", "limit GB/s": 2999.9, "of_limit": 0.9876, "differing": 1_234_567_890,
    }  # fmt: skip
    limit = {
        **row,
        "suite": "limits",
        "n": None,
        "way": "host to device, pageable",
        "limit": None,
        "of_limit": None,
    }
    text = table([limit, row, {**row, "n": 2, "limit": None, "of_limit": None, "differing": None}])
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "n = 32, 8,030,261,248 elements",
        "12,400 (12,345 … 13,999)",
        "0.99",
        "1,234,567,890",
        "limit: device copy",
    ):
        assert part in text
    assert max(len(line(row)), len(line(limit))) <= 110


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(quick, "SECONDS", 0.0)
    monkeypatch.setattr(quick, "MODELS", (2,))
    monkeypatch.setattr(quick, "COMPARED", {("F32", 2): ("eager formula",)})
    monkeypatch.setattr(quick, "FLOAT_SIZES", {"F32": 4, "BF16": 2})
    monkeypatch.setattr(works, "last_level_cache", lambda: 1 << 18)
    monkeypatch.setattr("negmerge_fast.benchmark.timing.rest", lambda device: None)


def test_negmerge_bench(run: Run, small: None, tmp_path: Path) -> None:
    status, out, err = run("bench", "--device", "cpu", "--report", "rows.jsonl")
    assert (status, err) == (0, "")
    rows = rows_of(tmp_path / "rows.jsonl")
    assert {row["way"] for row in rows} >= {"memory read", "memory copy", "torch", "eager formula"}
    assert all(set(row) == MACHINE | WORK | FOUND for row in rows)
    assert "one tensor, BF16, in memory" in out and "left out: backend triton on cpu: is for GPUs" in out
    status, out, err = run("bench", "--device", "cuda:77")
    assert (status, out) == (2, "") and err.startswith("negmerge: device: 'cuda:77'") and err.count("\n") == 1
    status, out, err = run("bench", "--device", "cpu", "--report", "nowhere/rows.jsonl")
    assert (status, out, err.count("\n")) == (2, "", 1) and "nowhere" in err


def test_negmerge_bench_refuses_a_wrong_kernel(
    run: Run, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from negmerge_fast.backends import pytorch

    def wrong(right: Any, *arguments: Any) -> Any:
        counts = right(*arguments)
        counts[0, 0] += 1
        return counts

    monkeypatch.setattr(
        "negmerge_fast.backends.registry._merge_of", lambda name: partial(wrong, pytorch.merge)
    )
    status, out, err = run("bench", "--device", "cpu")
    assert (
        status == 1 and "torch: counts differ from the reference's, no speed" in err and err.count("\n") == 1
    )
    assert "eager formula" in out and "  torch  " not in out


def test_negmerge_bench_is_interrupted_with_one_line(
    run: Run, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    def interrupt(self: Trial) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trial, "run", interrupt)
    assert run("bench", "--device", "cpu", "--quiet") == (130, "", "negmerge: interrupted\n")
