"""`negmerge merge --config` and `negmerge mergekit` as commands, without mergekit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import load_model, nothing_left, read_manifest
from command import Run, run  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.core.choices import Reduction

FINETUNED = ["ft-0", "ft-1", "ft-2"]


def write(merge_method: str = "ties", **changes: Any) -> None:
    config = {
        "merge_method": merge_method, "base_model": "base", "models": [{"model": model} for model in FINETUNED],
        "parameters": {"weight": 0.5, "density": 0.4, "lambda": 0.8}, **changes,
    }  # fmt: skip
    Path("c.yml").write_text(json.dumps(config))


def test_it_is_a_merge_like_any_other(run: Run, models: list[dict[str, torch.Tensor]]) -> None:
    write()
    command = ("merge", "--config", "c.yml", "--output", "out")
    status, out, err = run(*command, "--report", "report.json")
    assert (status, err) == (0, "") and out
    method = replace(nm.method("ties", density=0.4, over="tensor"), model_weights=(0.5, 0.5, 0.5))
    nm.merge_checkpoints("base", FINETUNED, "expected", scale=-0.8, method=method)
    found, expected = load_model(Path("out")), load_model(Path("expected"))
    assert found.keys() == expected.keys() == models[0].keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert not same_bits(found["embed"], models[0]["embed"])
    assert read_manifest()["scale"] == json.loads(Path("report.json").read_text())["scale"] == -0.8
    assert run("verify", "out", "--against", "base", *FINETUNED, "--quiet") == (0, "", "")
    assert run(*command, "--resume", "--quiet") == (0, "", "")


def test_dare_says_what_differs(run: Run, models: list[dict[str, torch.Tensor]]) -> None:
    write("dare_ties", parameters={"weight": 0.5, "density": 0.5})
    status, _, err = run("merge", "--config", "c.yml", "--output", "out")
    assert status == 0
    assert err.startswith(
        "negmerge: note: dare-ties: other random numbers than mergekit's, from seed 0, and "
    )
    method = replace(nm.method("dare-ties", drop=0.5), model_weights=(0.5, 0.5, 0.5), reduction=Reduction.SUM)
    nm.merge_checkpoints("base", FINETUNED, "expected", scale=-1, method=method)
    found, expected = load_model(Path("out")), load_model(Path("expected"))
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "ft-0"], "[BASE]: the file of --config tells it, expected one of them only"),
        (["--scale", "0.5"], "--scale: the file of --config tells it"),
        (["--method", "ties"], "--method: the file of --config tells it"),
        (["--density", "0.2"], "--density: the file of --config tells it"),
        (["--drop-rate", "0.2"], "--drop-rate: the file of --config tells it"),
        (["--weights", "w.safetensors"], "--weights: the file of --config tells it"),
        (["--add"], "--add: the file of --config tells it"),
        (["--task-vectors"], "--task-vectors: the file of --config tells it"),
        (["--min-agreement", "0.6"], "--min-agreement: the file of --config tells it"),
        (["--output-adapter"], "--output-adapter: the file of --config tells it"),
    ],
)
def test_what_the_file_tells_is_refused_beside_it(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run("merge", *arguments, "--config", "c.yml", "--output", "out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"negmerge: {message}")


def test_bad_files_and_models(run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    command = ("merge", "--config", "c.yml", "--output", "out")
    assert run(*command) == (2, "", "negmerge: c.yml: no such file\n")
    write(slices=[])
    assert run(*command)[2].startswith("negmerge: c.yml: key 'slices' is not served, expected merge_method,")
    write(models=[{"model": "ft-9"}])
    assert run(*command) == (2, "", "negmerge: ft-9: no such file or directory\n")
    write(dtype="float32")  # the base has tensors of all types
    status, out, err = run(*command)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("negmerge: c.yml: dtype: float32, expected ") and "(tensor '" in err
    assert nothing_left(tmp_path)
    write("task_arithmetic", parameters={"weight": 0.5})
    assert run(*command, "--drop", "tokenizer*", "--quiet") == (0, "", "")  # of files, not DARE's
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_without_base_or_config(run: Run) -> None:
    assert run("merge", "--output", "out") == (2, "", "negmerge: Missing argument 'BASE'.\n")


def test_without_mergekit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", None)
    monkeypatch.delitem(sys.modules, "negmerge_fast.integrations.mergekit", raising=False)
    expected = "mergekit 0.1.5 or newer is not installed: pip install 'negmerge_fast[mergekit]'"
    assert run("mergekit", "c.yml", "out", "--quiet") == (2, "", f"negmerge: {expected}\n")
    with pytest.raises(ImportError, match=r"is not installed: pip install 'negmerge_fast\[mergekit\]'$"):
        import negmerge_fast.integrations.mergekit  # noqa: F401


def test_without_pyyaml(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    status, _, err = run("merge", "--config", "c.yml", "--output", "out")
    assert (status, err) == (
        2,
        "negmerge: a file of mergekit's needs PyYAML: pip install 'negmerge_fast[yaml]'\n",
    )
