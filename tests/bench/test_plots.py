"""Plots of made-up rows and timelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import ON_A_CPU, row, write


def suite(path: Path) -> str:
    """Write rows of two devices and two dtypes, as the suite measures them."""
    for device, names in (
        ("A CPU", ("cpu", "torch", "blocked eager formula")),
        ("A GPU", ("cuda", "triton", "compiled formula, dynamic")),
    ):
        for dtype in ("F32", "BF16"):
            for n in (2, 8, 32):
                write(path, *(row(0.1, 0.8, device=device, dtype=dtype, n=n, way=way) for way in names))
            sizes = [10**power for power in range(3, 9)]
            write(
                path,
                *(row(0.1, 0.7, device=device, dtype=dtype, numel=size, bytes=40 * size) for size in sizes),
            )
        write(path, row(1.0, None, device=device, suite="limits", way="memory read", n=None))
    return str(path)


def spans(stages: list[str]) -> list[list[Any]]:
    return [
        [worker, stage, at / 1e3 + place / 5e3, at / 1e3 + (place + 1) / 5e3]
        for worker in (0, 1)
        for at in range(200)
        for place, stage in enumerate(stages)
    ]


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from plots import main

    results = suite(tmp_path / "suite.jsonl")
    stages = ["read", "copy in", "merge", "copy out", "write"]
    timeline = {"machine": {**ON_A_CPU, "device": "A GPU"}, "way": "cuda", "spans": spans(stages)}
    (tmp_path / "timeline-cuda.json").write_text(json.dumps(timeline))
    out = tmp_path / "plots"
    assert main(["--results", results, "--output", str(out)]) == 0
    drawn = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(drawn) == {
        "bandwidth-a-cpu.png", "bandwidth-a-gpu.png", "share-a-cpu.png", "share-a-gpu.png", "timeline-cuda-a-gpu.png",
    }  # fmt: skip
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in drawn.values())
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_every_candidate_is_in_the_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plots import bandwidth, latest, read

    rows = latest(read(Path(suite(tmp_path / "suite.jsonl"))))["A GPU"]
    figure = bandwidth(rows, "A GPU")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "limit: memory read", "cpu", "cuda", "triton", "compiled formula, dynamic",
    ]  # fmt: skip


def test_a_message_if_there_is_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from plots import main

    results = tmp_path / "suite.jsonl"
    for rows in ([], [row(1.0, None, suite="limits")]):
        write(results, *rows)
        assert main(["--results", str(results), "--output", str(tmp_path)]) == 0
        assert capsys.readouterr().out.startswith("no plots: ")
    (tmp_path / "timeline-cuda.json").write_text("{}")
    assert main(["--results", str(results), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'timeline-cuda.json'}: not a timeline\n"
    assert not list(tmp_path.glob("*.png"))
