"""The demonstration with small sizes; its methods on numbers worked by hand."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from negmerge_fast import InputError, demo
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.demo import Settings
from negmerge_fast.methods.catalogue import NAMES


def test_candidates_on_vectors_worked_by_hand() -> None:
    """Each method takes off, at λ = 1, what it makes of the task vectors."""
    network = torch.nn.Linear(5, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    vectors = [[4.0, -1.0, 0.0, 3.0, 0.25], [2.0, 5.0, 0.0, -4.0, 0.5]]
    finetuned = [{"weight": torch.tensor([each])} for each in vectors]

    def made(name: str) -> list[list[float]]:
        found = []
        for delta in demo._candidates(name, network, finetuned):
            with delta.live(network) as live:
                live.scale = -1.0
                found += network.weight.tolist()
        return found

    assert made("best single") == vectors
    assert made("uniform mean") == [[3.0, 2.0, 0.0, -0.5, 0.375]]
    assert made("TIES (top 20 %)") == [[4.0, 5.0, 0.0, 0.0, 0.0]]  # one of five is kept in each
    assert made("MagMax") == [[4.0, 5.0, 0.0, -4.0, 0.5]]
    assert made("conflicting only") == [[0.0, 2.0, 0.0, -0.5, 0.0]]
    assert made("NegMerge") == [[3.0, 0.0, 0.0, 0.0, 0.375]]


def test_methods_are_those_of_the_package() -> None:
    assert {name for name in demo.METHODS.values() if name} <= set(NAMES)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(models=3, base_epochs=3, max_epochs=2, grid=(0.0, 0.5, 1.0))
    calls: list[int] = []
    report = tmp_path / "out" / "report.json"
    result = demo.run(1, tmp_path / "out", report, lambda: calls.append(1), quiet=True, settings=settings)
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines()[:-1])
    assert json.loads(report.read_text()) == result
    methods = [row["method"] for row in result["summary"]]
    assert methods[:2] == ["original", "retrained"] and methods[2:] == list(demo.METHODS)
    assert all(method in printed for method in methods)
    assert "of one seed" in printed and "±" not in printed
    assert len(calls) > 20
    assert (tmp_path / "out" / "forgetting.png").read_bytes().startswith(b"\x89PNG")

    seed = tmp_path / "out" / "seed-0"
    held = [
        load_file(seed / name / "model.safetensors")
        for name in ("base", *(f"finetuned-{k:02d}" for k in range(3)))
    ]
    merged = load_file(seed / "merged" / "model.safetensors")
    (row,) = (row for row in result["rows"] if row["method"] == "NegMerge")
    for name, base in held[0].items():
        assert torch.equal(merged[name], plain_merge(base, [h[name] for h in held[1:]], row["lambda"])[0])
    assert (seed / "merged" / "config.json").exists()


def test_several_seeds_have_a_deviation() -> None:
    scores = ((0, 0.1), (1, 0.3))
    rows = [
        {
            "method": "x",
            "seed": seed,
            "forget": forget,
            "retain": 1.0,
            "lambda": None,
            "consensus_ratio": None,
        }
        for seed, forget in scores
    ]
    table = demo._table([demo._summarise("x", rows)], len(scores), Settings())
    assert "mean ± deviation over 2 seeds" in table
    assert table.splitlines()[-1].split() == ["x", "20.0", "±", "10.0", "100.0", "±", "0.0", "-", "-"]


@pytest.mark.parametrize(
    ("output", "report", "message"),
    [("file", None, "file: not a directory"), ("no/out", None, "no: no such directory"), ("out", "no/r.json", "no: no such directory")],
)  # fmt: skip
def test_bad_paths_are_refused_before_any_training(
    tmp_path: Path, output: str, report: str | None, message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        demo.run(1, tmp_path / output, tmp_path / report if report else None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'negmerge_fast\[demo\]'"):
        demo.run(1, tmp_path / "out")
