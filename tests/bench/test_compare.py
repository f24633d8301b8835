"""What is noise between two runs, and what is drawn of one: on made-up rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MACHINE = {"commit": "0000001", "date": "2026-01-02T03:04:05+00:00", "device": "A CPU", "torch": "2.4"}


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def row(p50: float = 1.0, share: float | None = 0.5, spread: float = 0.02, **others: Any) -> dict[str, Any]:
    """One of a merge of 10 GB in p50 seconds, at a share of a limit."""
    limit = {"of_limit": share, "limit": "memory read", "limit GB/s": 10 / p50 / share} if share else {}
    return {
        **MACHINE, "suite": "memory", "layout": "one tensor", "way": "cpu", "dtype": "F32", "n": 8, "numel": 250_000_000,
        "bytes": 10_000_000_000, "state": "in memory", "rounds": 7, "p20": p50 * (1 - spread), "p50": p50,
        "p80": p50 * (1 + spread), "GB/s": 10 / p50, **limit, **others,
    }  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> str:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (row(1.0, 0.5), row(1.01, 0.5), "noise"),
        (row(1.0, 0.5), row(0.8, 0.625), "faster"),
        (row(1.0, 0.5), row(1.25, 0.4), "slower"),
        (row(1.0, None), row(0.8, None), "faster"),
        (row(1.0, None), row(1.25, None), "slower"),
        (row(1.0, 0.5, spread=0.2), row(0.8, 0.625, spread=0.2), "noise"),
        # Slower, and no smaller a share: all of the machine is.
        (row(1.0, 0.5), row(1.5, 0.5), "the limit moved"),
        # As fast as it was, where the machine is faster.
        (row(1.0, 0.5), row(1.0, 0.4), "the limit moved"),
        # Faster, but by less than the machine.
        (row(1.0, 0.5), row(0.8, 0.4), "the limit moved"),
        # Both moved, the way by more.
        (row(1.0, 0.5), row(0.5, 0.8), "faster"),
        # The intervals of one just overlap, and the limit moved by less than rounds differ.
        (row(1.0, 0.5), row(1.05, 0.49), "noise"),
        (row(1.0, None, suite="limits"), row(1.5, None, suite="limits"), "the limit moved"),
        (row(1.0, None, suite="limits"), row(1.01, None, suite="limits"), "noise"),
        # Rows from before a limit's speed was written down.
        (row(1.0, 0.5, **{"limit GB/s": None}), row(1.5, 0.5, **{"limit GB/s": None}), "the limit moved"),
    ],
)
def test_verdicts(old: dict[str, Any], new: dict[str, Any], expected: str) -> None:
    from compare import verdict

    assert verdict(old, new) == expected


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from compare import main

    name = "torch.compile max-autotune, and whatever else a way may be called"
    old = write(
        tmp_path / "old.jsonl",
        row(1.0), row(2.0, way=name, numel=8_030_261_248), row(way="gone"), row(9.9, layout="Llama 1B"),
        row(1.0, layout="Llama 1B"),
    )  # fmt: skip
    new = write(tmp_path / "new.jsonl", row(0.5, 1.0, torch="2.5"), row(2.0, way=name, numel=8_030_261_248))
    write(Path(new), row(1.0, layout="Llama 1B"))
    assert main([old, new]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert "torch: 2.4 -> 2.5 and 2.4" in lines
    assert "A CPU, memory, one tensor, in memory" in lines and "A CPU, memory, Llama 1B, in memory" in lines
    assert any(line.split()[-4:] == ["20", "2.00", "1.00", "faster"] for line in lines)
    assert printed.count("noise") == 3  # what was measured twice counts once, as it was last
    assert lines[-2:] == [
        "3 rows in both: 1 faster, 2 noise",
        "1 rows only in the old run, 0 only in the new one",
    ]


def test_one_run_of_a_file_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from compare import main

    later = {"commit": "0000002-dirty", "date": "2026-02-03T04:05:06+00:00"}
    file = write(tmp_path / "suite@home.jsonl", row(1.0), row(1.0, way="torch"), row(0.5, 1.0, **later))
    write(Path(file), row(0.4, 1.0, device="A GPU", commit="0000003"))
    for old, new, counted in (
        (f"{file}@0000001", f"{file}@0000002", "1 rows in both: 1 faster"),
        (f"{file}@2026-01", f"{file}@2026-02-03T04", "1 rows in both: 1 faster"),
        (file, f"{file}@0000003", "1 rows in both: 1 noise"),
        (f"{file}@0000001", file, "0 rows in both"),
    ):
        assert main([old, new]) == 0
        assert counted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("", "no rows"),
        ("{}\n", ":1: device None, expected text"),
        ("\n[1]\n", ":2: list, expected a JSON object"),
        ("nonsense\n", ":1: not a JSON line"),
        (json.dumps(row(p50=1.0, p20=0)) + "\n", ":1: p20 0, expected a positive number"),
        (json.dumps(row(p80=None)) + "\n", ":1: p80 None, expected a positive number"),
        (
            json.dumps(row(commit="0000009")) + "\n",
            "no rows of '0000001', the last ones are of 0000009 (2026-01-02)",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    from compare import main

    good = write(tmp_path / "good.jsonl", row())
    bad = tmp_path / "bad.jsonl"
    if text is not None:
        bad.write_text(text)
    assert main([good, f"{bad}@0000001"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith(str(bad)) and printed.err.endswith(message + "\n")
    assert printed.err.count("\n") == 1


def test_comparing_needs_no_torch(tmp_path: Path) -> None:
    import subprocess

    file = write(tmp_path / "suite.jsonl", row())
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import compare
print(compare.main([{file!r}, {file!r}]), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("1 rows in both: 1 noise\n0 False\n")


def suite(path: Path) -> str:
    """Two devices, two types, and sizes, as the suite measures them."""
    for device, ways in (
        ("A CPU", ("cpu", "torch", "eager formula")),
        ("A GPU", ("cuda", "triton", "torch._foreach formula")),
    ):
        for dtype in ("F32", "BF16"):
            for n in (2, 8, 32):
                write(path, *(row(0.1, 0.8, device=device, dtype=dtype, n=n, way=way) for way in ways))
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
    timeline = {"machine": {**MACHINE, "device": "A GPU"}, "way": "cuda", "spans": spans(stages)}
    (tmp_path / "timeline-cuda.json").write_text(json.dumps(timeline))
    out = tmp_path / "plots"
    assert main(["--results", results, "--output", str(out)]) == 0
    drawn = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(drawn) == {
        "bandwidth-a-cpu.png", "bandwidth-a-gpu.png", "share-a-cpu.png", "share-a-gpu.png", "timeline-cuda-a-gpu.png",
    }  # fmt: skip
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in drawn.values())
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_every_way_is_in_the_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plots import bandwidth, latest, read

    rows = latest(read(Path(suite(tmp_path / "suite.jsonl"))))["A GPU"]
    figure = bandwidth(rows, "A GPU")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "limit: memory read", "cpu", "cuda", "triton", "torch._foreach formula",
    ]  # fmt: skip


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
