"""Benchmarks of whole processes: what they make, that a wrong result gets no number, and one small run of each."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import load_model
from transformers import AutoConfig, AutoModelForCausalLM

import negmerge_fast as nm
from negmerge_fast.benchmark.workload import SCALE

SMALL = ["--layers", "2", "--shrink", "32", "--rounds", "2"]
Run = Callable[..., list[dict[str, Any]]]


def test_the_models_are_llamas(script: Callable[[str], Any], tmp_path: Path) -> None:
    llamas = script("llamas")
    model = script("outofcore").MODEL.shrunk(32)._replace(layers=2)
    base, *_ = llamas.make(tmp_path, model, 1, 100_000)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).state_dict()
    tensors = load_model(base)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(llamas.weights(base)) > 3
    assert script("outofcore").MODEL.numel == 1_100_048_384


def test_a_partial_fine_tuning_changes_every_third_tensor(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    llamas = script("llamas")
    model = script("baselines").MODEL.shrunk(32)._replace(layers=3)
    base, *models = map(load_model, llamas.make(tmp_path, model, 2, 1 << 20, partial=True))
    for k, name in enumerate(model.shapes):
        assert base[name].isfinite().all()
        for tensors in models:
            assert torch.equal(tensors[name], base[name]) == (k % 3 > 0), name


def test_a_process_is_measured_without_its_parent(script: Callable[[str], Any]) -> None:
    process = script("process")
    held = bytearray(b"x" * (300 << 20))
    small = process.ended([sys.executable, "-c", "print('said')"])
    large = process.ended([sys.executable, "-c", "x = bytearray(b'x' * (100 << 20)); raise SystemExit(3)"])
    assert len(held) > 100 << 20 < large.peak and small.peak < 100 << 20
    assert (small.status, small.said, large.status) == (0, "said\n", 3)
    with pytest.raises(process.Failed, match="exit status 1: ValueError: why"):
        process.done([sys.executable, "-c", "raise ValueError('why')"])


def test_out_of_core(run: Run, script: Callable[[str], Any]) -> None:
    limited = script("process").why_not() is None
    rows = run("outofcore", *SMALL, "--models", "3", "--shard", "100KB", "--limit", "256MiB")
    assert [row["way"] for row in rows] == ["read and write, synced", "negmerge"]
    floor, ours = rows
    assert floor["of_limit"] == 1 and ours["n"] == 3 and ours["rounds"] == 2
    assert 0.99 < ours["read"] <= 1 and 0 < ours["own seconds"] < ours["p80"]
    assert ours["state"] == f"cold, {'within 268,435,456 bytes' if limited else 'no limit'}"
    assert 0 < (ours["group's peak MB"] or 1) < 269 and 0 < ours["peak MB"] < 269


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "second", "most_read", "missing"),
    [
        ("--partial", "negmerge, skipping", 0.7, "`negmerge merge` has no --skip-unchanged here"),
        ("--ranks", "negmerge, 2 ranks", 1, "negmerge_fast has no ranks here"),
    ],
)
def test_out_of_core_with_skipping_and_ranks(
    run: Run, capsys: pytest.CaptureFixture[str], option: str, second: str, most_read: float, missing: str
) -> None:
    rows = run("outofcore", *SMALL, "--models", "8", "--rounds", "1", "--limit", "1GiB", option)
    if not rows:
        assert capsys.readouterr().out == f"outofcore: {missing}\n"
        return
    assert [row["way"] for row in rows] == ["read and write, synced", "negmerge", second]
    assert 0 < rows[2]["read"] <= most_read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain.py", "released.py"])
def test_scripts_have_the_bits_of_the_reference(
    script: Callable[[str], Any], tmp_path: Path, name: str
) -> None:
    """On models of several files, and tensors of several blocks."""
    llamas, baselines = script("llamas"), script("baselines")
    model = baselines.MODEL.shrunk(16)._replace(layers=1, vocabulary=8000)
    base, *models = llamas.make(tmp_path, model, 3, 1 << 20)
    assert len(llamas.weights(base)) > 1 and max(map(math.prod, model.shapes.values())) > 1 << 18
    inputs = {path: path.read_bytes() for folder in (base, *models) for path in llamas.weights(folder)}
    command = [
        sys.executable,
        str(baselines.SCRIPTS / name),
        "--scale",
        str(SCALE),
        str(tmp_path / "out"),
        str(base),
    ]
    subprocess.run([*command, *map(str, models)], check=True)
    assert llamas.differing(tmp_path / "out", base, models) == 0
    assert {path: path.read_bytes() for path in inputs} == inputs


def test_the_formula_of_the_scripts(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that is compiled, here without the compiler; on zeros of both signs and subnormals."""
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    formula = script("formula")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1000, 3, generator=generator)
    base[:100], base[100:200] = -0.0, 1e-40
    models = [base + torch.randn(1000, 3, generator=generator) * base.abs() for _ in range(3)]
    expected = nm.merge(base, models, scale=SCALE)
    for apply in (formula.Formula(SCALE), formula.compiled(SCALE)):
        out = base.clone()
        apply(out, models)
        assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.slow
def test_baselines_without_tools(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("baselines", *SMALL, "--rounds", "1", "--environments", "/proc", "--tmpfs", str(tmp_path))
    assert [row["way"] for row in rows] == [
        "read and write", "negmerge merge", "plain script", "compiled script", "released loops",
    ]  # fmt: skip
    assert rows[1]["times ours"] == 1 and rows[2]["peak MB"] > rows[1]["peak MB"]
    assert [row["differing"] for row in rows] == [None, 0, 0, 0, 0]
    said = capsys.readouterr().out
    for tool in ("mergekit", "sd-mecha", "fusion-bench"):
        assert re.search(
            f"^baselines: {tool} is not measured: exit status 1: .*/proc/{tool}", said, re.MULTILINE
        )


@pytest.mark.slow
def test_a_tool_that_fails_is_not_measured(
    run: Run, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(
        script("baselines"),
        "TOOLS",
        {"sd-mecha": ("sd-mecha", "plain.py"), "mergekit": ("mergekit", "none.py")},
    )
    environments = Path(sys.prefix).parent
    monkeypatch.setattr(script("baselines"), "environment", lambda folder, package: Path(sys.prefix))
    monkeypatch.setattr(script("baselines"), "PLAIN", {})
    rows = run(
        "baselines", *SMALL, "--rounds", "1", "--environments", str(environments), "--tmpfs", str(tmp_path)
    )
    assert [row["way"] for row in rows] == ["read and write", "negmerge merge", "sd-mecha negmerge"]
    assert rows[2]["differing"] == 0
    said = capsys.readouterr().out
    assert "baselines: mergekit negmerge is not measured: exit status 2: " in said
    assert "baselines: mergekit ties is not measured: " in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outofcore", "baselines"])
def test_a_wrong_result_gets_no_number(
    run: Run, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(script("llamas"), "SCALE", SCALE + 0.1)
    options = ["--without-tools", "--tmpfs", str(tmp_path)] if name == "baselines" else []
    with pytest.raises(SystemExit, match="elements differ from the reference's, no speed"):
        run(name, *SMALL, *options)
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.slow
def test_adapters_beside_the_materialising_way(run: Run) -> None:
    rows = run("adapters", *SMALL, "--rounds", "1", "--adapters", "3", "--methods", "lean")
    floor, ours, merged, lean = rows
    assert [row["way"] for row in rows] == [
        "cp, sync", "negmerge merge", "negmerge merge, adapters as merged", "lean",
    ]  # fmt: skip
    assert ours["times ours"] == 1 and ours["n"] == 3
    assert floor["disk MB"] is None and 0 < ours["disk MB"] == merged["disk MB"] < lean["disk MB"]
    assert lean["differing"] < 0.01
