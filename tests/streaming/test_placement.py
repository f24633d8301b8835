"""Where a merge of checkpoints runs: by measured bandwidths, on the CPU or through a GPU."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import save_model
from gpu_jobs import fails, prepare, run, tensors  # noqa: F401
from late_stream import DEVICE, LateStream, gpu, merge_on_device  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.backends import registry
from negmerge_fast.checkpoints.reader import Reader
from negmerge_fast.cli import text
from negmerge_fast.runtime import device as device_module
from negmerge_fast.streaming import api, placement, probes
from negmerge_fast.streaming.options import MergeOptions
from negmerge_fast.streaming.placement import Throughput


@pytest.mark.parametrize(
    ("found", "device", "why"),
    [
        (
            Throughput(2e9, False, 20e9),
            "cpu",
            r"a GPU would wait for the files as well, and save 0\.0 s at best",
        ),
        (Throughput(50e9, True, 20e9), DEVICE, r"14\.3 GB/s on the CPU, 40\.0 GB/s through cuda:0"),
        (Throughput(50e9, None, 20e9), DEVICE, r"14\.3 GB/s on the CPU, 40\.0 GB/s through cuda:0"),
        (Throughput(5e9, True, 50e9), "cpu", r"4\.5 GB/s on the CPU, 5\.0 GB/s through cuda:0"),
        (Throughput(30e9, False, 4e9), DEVICE, r"4\.0 GB/s on the CPU, 30\.0 GB/s through cuda:0"),
    ],
)
def test_a_job_is_placed_by_its_bandwidths(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, found: Throughput, device: str, why: str
) -> None:  # fmt: skip
    monkeypatch.setattr(placement, "measure_throughput", lambda *_: found)
    monkeypatch.setattr(probes, "h2d_bandwidth", lambda _: 40e9)
    assert prepare(tmp_path, device="auto").placement == ("cpu", "no GPU here", None)
    monkeypatch.setattr(placement, "gpu_may_exist", lambda: True)
    assert prepare(tmp_path, device="auto").placement == ("cpu", "done before a GPU would have begun", None)
    monkeypatch.setattr(placement, "_MIN_JOB_BYTES", 0)
    assert prepare(tmp_path, device="auto").placement == ("cpu", "chunks too short for a GPU", None)
    monkeypatch.setattr(placement, "_MIN_EXTENT_BYTES", 0)
    monkeypatch.setattr(placement, "_GPU_STARTUP_S", 1e3)
    assert "at best" in prepare(tmp_path, device="auto").placement.reason
    monkeypatch.setattr(placement, "_GPU_STARTUP_S", 0.0 if device == DEVICE or "through" in why else 1e-9)
    chosen = prepare(tmp_path, device="auto").placement
    assert chosen.device == device and re.search(why, chosen.reason), chosen
    for backend, there in (("cuda", DEVICE), ("cpu", "cpu"), ("torch", "cpu")):
        assert prepare(tmp_path, device="auto", backend=backend).placement.device == there


def test_a_gpu_that_fails_is_not_used_unless_asked_for(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "measure_throughput", lambda *_: Throughput(50e9, True, 20e9))
    monkeypatch.setattr(placement, "gpu_may_exist", lambda: True)
    for name in ("_MIN_JOB_BYTES", "_MIN_EXTENT_BYTES", "_GPU_STARTUP_S"):
        monkeypatch.setattr(placement, name, 0)
    fake = registry.choose

    def torch_only(backend: str, device: str, *rest: Any) -> Any:
        return ("torch", merge_on_device) if device == DEVICE else fake(backend, device, *rest)

    def refused(backend: str, device: str, *rest: Any) -> Any:
        if device == DEVICE:
            raise nm.InputError("backend 'auto' cannot run here")
        return fake(backend, device, *rest)

    for place, name, planted, why in (
        (LateStream, "lock", fails(RuntimeError("no pages")), "cuda:0 cannot be used: no pages"),
        (device_module, "available_bytes", lambda _: 1 << 20, "only 1,048,576 bytes are free on cuda:0"),
        (registry, "choose", torch_only, "no kernel is usable on cuda:0"),
        (registry, "choose", refused, "cuda:0 cannot be used: backend 'auto' cannot run here"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, planted)
            assert prepare(tmp_path, device="auto").placement[:2] == ("cpu", why)
    monkeypatch.setattr(probes, "h2d_bandwidth", lambda _: 40e9)
    assert prepare(tmp_path, device="auto").placement.device == DEVICE


def test_bandwidths_are_measured(
    tmp_path: Path, tensors: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prepare(tmp_path).throughput()
    assert found and found.cached
    assert min(found.read_bandwidth, found.merge_bandwidth, found.h2d_bandwidth or 0) > 0
    on_cpu = prepare(tmp_path, device="cpu")
    assert on_cpu.throughput() and on_cpu.throughput().h2d_bandwidth is None  # type: ignore[union-attr]
    nothing = prepare(tmp_path, device="cpu", include="empty")
    assert nothing.throughput() is None and "\nbandwidth " not in "\n".join(text.plan_lines([nothing]))
    lines = list(placement.describe([DEVICE]))
    assert len(lines) == 2 and "host to cuda:0 at" in lines[1]
    probes.h2d_bandwidth.cache_clear()
    monkeypatch.setattr(LateStream, "lock", fails(RuntimeError("no pages")))
    assert list(placement.describe([DEVICE]))[1] == "host to cuda:0 cannot be measured: no pages"
    # If one read came from the disk, the disk is measured; if one is unknown and none from the disk, it is unknown.
    for answers, cached in (([True], True), ([True, None], None), ([True, None, False], False)):
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read_into", lambda *_, a=answers: a.pop(0) if len(a) > 1 else a[0])
            assert probes.read_bandwidth(on_cpu.plan, 2)[1] is cached


def test_a_sample_is_spread_over_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_SAMPLE_BYTES", 64)
    names = [f"t{k}" for k in range(40)]
    models = [{n: torch.randn(1 if n != "t7" else 99_999) for n in names} for _ in range(2)]
    save_model(tmp_path / "base", models[0], [names[::2], names[1::2]])
    save_model(tmp_path / "ft", models[1], [names[::-1]])
    plan = api.prepare(tmp_path / "base", [tmp_path / "ft"], tmp_path / "out", MergeOptions(1.0)).plan
    sampled = list(probes._sample(plan, 50))
    assert sum(size > 4 for _, _, size in sampled) >= 48
    assert all(offset + size <= file.size for file, offset, size in sampled)
    assert sampled != list(probes._sample(plan, 50))


def test_garbage_is_collected_while_speeds_are_measured_and_users_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []

    class Watched(type(tmp_path)):  # type: ignore[misc]
        def __fspath__(self) -> str:
            enabled.append(gc.isenabled())
            return super().__fspath__()

    def choose(*args: Any) -> Any:
        enabled.append(gc.isenabled())
        return chosen(*args)

    chosen = api.choose_placement
    monkeypatch.setattr(api, "choose_placement", choose)
    for name in ("base", "ft"):
        save_model(tmp_path / name, {"w": torch.ones(10)})

    class Paths(list[Any]):
        def __iter__(self) -> Any:
            enabled.append(gc.isenabled())
            return super().__iter__()

    nm.merge_checkpoints(
        Watched(tmp_path / "base"), Paths([tmp_path / "ft"]), tmp_path / "out", scale=1.0,
        progress=lambda *_: enabled.append(gc.isenabled()),
    )  # fmt: skip
    assert len(enabled) >= 3 and all(enabled) and gc.isenabled()
