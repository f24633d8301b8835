"""Commands: their output, their errors, and what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import same_bits
from checkpoint_files import MERGE, check, load_model, nothing_left, save_model
from command import Run, run  # noqa: F401
from safetensors.torch import save_file
from tqdm import tqdm

from negmerge_fast.cli.text import _size
from negmerge_fast.core.reference import plain_merge


def test_merge(run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    status, out, err = run(*MERGE, "--report", "report.json")
    assert (status, err) == (0, "")
    check(tmp_path / "out", models)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(p.name for p in (tmp_path / "base").iterdir()), "negmerge.json",
    }  # fmt: skip
    assert not (tmp_path / ".out.negmerge").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {
        "models", "scale", "min_agreement", "backend", "elements", "agreed", "consensus_ratio", "nonfinite",
        "bytes_read", "bytes_written", "seconds", "tensors",
    } <= set(report)  # fmt: skip
    counted = {t["name"]: t for t in report["tensors"]}
    assert set(counted) == {n for n, t in models[0].items() if t.is_floating_point()}
    for name, row in counted.items():
        _, agreed, nonfinite, vetoed = plain_merge(models[0][name], [m[name] for m in models[1:]], 0.9)
        assert row == {
            "name": name, "elements": models[0][name].numel(), "agreed": agreed, "nonfinite": nonfinite, "vetoed_by_zero": vetoed,
            "masked": None,
        }  # fmt: skip
    assert f"0 non-finite, {report['vetoed_by_zero']:,} vetoed by a zero; " in out
    assert report["vetoed_by_zero"] == sum(t["vetoed_by_zero"] for t in report["tensors"]) > 0
    assert report["agreed"] == sum(t["agreed"] for t in report["tensors"])
    assert f"{report['agreed']:,} of {report['elements']:,} elements agreed" in out


def test_options(run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    assert run(*MERGE, "--min-agreement", "0.6", "--quiet") == (0, "", "")
    check(tmp_path / "out", models, min_agreement=0.6)
    status, _, err = run(*MERGE, "--include", "n|r", "--exclude", "^brain$", "--overwrite", "--threads", "1")
    assert (status, err) == (0, "")
    merged = load_model(tmp_path / "out")
    for name, base in models[0].items():
        chosen = name in ("norm", "scalar")
        expected = plain_merge(base, [m[name] for m in models[1:]], 0.9)[0] if chosen else base
        assert same_bits(merged[name], expected)
    assert not same_bits(merged["norm"], models[0]["norm"])
    status, _, err = run(*MERGE, "--task-vectors", "--overwrite", "--memory-budget", "5MiB")
    assert (status, err) == (0, "")
    check(tmp_path / "out", models, task_vectors=True)


def test_bare_files(run: Run, tmp_path: Path) -> None:
    tensors = [{"w": torch.randn(100, generator=torch.Generator().manual_seed(k))} for k in range(3)]
    vectors = [np.random.default_rng(k).normal(size=1000).astype("f2") for k in range(3)]
    for k in range(3):
        save_file(tensors[k], tmp_path / f"m{k}.safetensors")
        np.save(tmp_path / f"v{k}.npy", vectors[k])
    assert (
        run(
            "merge",
            "m0.safetensors",
            "m1.safetensors",
            "m2.safetensors",
            "-o",
            "o.safetensors",
            "--scale",
            0.9,
        )[0]
        == 0
    )
    (tmp_path / "o").mkdir()
    (tmp_path / "o.safetensors").rename(tmp_path / "o" / "model.safetensors")
    check(tmp_path / "o", tensors)
    for _ in range(2):
        assert (
            run("merge", "v0.npy", "v1.npy", "v2.npy", "-o", "v.npy", "--scale", 0.9, "--overwrite")[0] == 0
        )
    expected = plain_merge(torch.from_numpy(vectors[0]), [torch.from_numpy(v) for v in vectors[1:]], 0.9)[0]
    assert same_bits(torch.from_numpy(np.load(tmp_path / "v.npy")), expected)


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_model(path), **changes}
    save_model(path, {name: t for name, t in tensors.items() if t is not None})


NAN = torch.full((33, 7), 1.0).half()
NAN[4, 2] = float("nan")
BAD: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "missing model": (lambda p: None, ["ft-9"], ["ft-9: no such file or directory"]),
    "resized vocabulary": (
        lambda p: rewrite(p / "ft-2", embed=torch.zeros(51, 16)), [],
        ["ft-2/model.safetensors: tensor 'embed': shape (51, 16), expected (50, 16) like base"],
    ),
    "missing and extra": (
        lambda p: rewrite(p / "ft-2", embed=None, norm=None, more=torch.zeros(1)), [],
        ["tensor 'embed': missing", "tensor 'norm': missing", "tensor 'more': not in base"],
    ),
    "other kind": (
        lambda p: rewrite(p / "ft-0", norm=torch.zeros(16, dtype=torch.int64)), [],
        ["ft-0/model.safetensors: tensor 'norm': dtype I64, expected one of F64, F32, F16, BF16"],
    ),
    "NaN": (
        lambda p: rewrite(p / "ft-2", half=NAN), [],
        ["ft-2/model.safetensors: tensor 'half': nan at (4, 2), expected finite numbers (or --nonfinite keep-base)"],
    ),
    "overflow": (
        lambda p: [
            save_model(p / "base", {"a": torch.full((3,), 6e4).half()}),
            *((p / "base" / f).unlink() for f in ("model.safetensors.index.json",)),
            *(save_model(p / f"ft-{k}", {"a": torch.full((3,), -6e4).half()}) for k in (0, 2)),
            *(f.unlink() for f in (p / "ft-1").iterdir()),
            save_model(p / "ft-1", {"a": torch.full((3,), -6e4).half()}),
        ], [], ["base/model.safetensors: tensor 'a': the result at (0,) is not finite"],
    ),
    "base as fine-tuned": (lambda p: None, ["./ft-0/../base"], ["base: is the base itself"]),
    "scale": (lambda p: None, ["--scale", "embed=inf"], ["scale of 'embed': inf, expected a finite number"]),
    "no scale": (lambda p: None, ["--scale", "much"], ["'much' is not a valid float"]),
    "min_agreement": (lambda p: None, ["--min-agreement", "0.5"], ["min_agreement: 0.5"]),
    "budget": (lambda p: None, ["--memory-budget", "1MiB"], ["memory_budget: 1,048,576 bytes, expected at least"]),
    "size": (lambda p: None, ["--memory-budget", "much"], ["memory_budget: 'much', expected a size such as 512MiB"]),
    "pattern": (lambda p: None, ["--include", "("], ["include: '(' is not a regular expression"]),
    "no choice": (lambda p: None, ["--include", "zzz"], ["no tensor is chosen by include 'zzz'"]),
    "device": (lambda p: None, ["--device", "cuda:99"], ["torch has no device 'cuda:99' here"]),
    "nonsense device": (lambda p: None, ["--device", "abacus"], ["torch has no device 'abacus' here"]),
    "threads": (lambda p: None, ["--threads", "0"], ["threads: 0, expected 1 … 1024"]),
    "many threads": (lambda p: None, ["--threads", "99999999999"], ["threads: 99999999999, expected 1 … 1024"]),
    "a size out of reach": (lambda p: None, ["--memory-budget", "9" * 400], ["expected a size such as 512MiB"]),
    "deep pattern": (lambda p: None, ["--include", "(" * 5000], ["is not a regular expression"]),
    "large pattern": (lambda p: None, ["--include", "a{99999999999}"], ["is not a regular expression"]),
    "root": (lambda p: None, ["--output", "/"], ["/: the root of the file system"]),
    "a name too long for a work directory": (lambda p: None, ["--output", "o" * 250], ["o: File name too long, expected a path"]),
    "a report's name, too long": (lambda p: None, ["--report", "r" * 300], ["r: cannot be written (File name too long)"]),
    "report is a folder": (lambda p: None, ["--report", "r.json/"], ["r.json/: not a regular file"]),
    "report in /proc": (lambda p: None, ["--report", "/proc/r.json"], ["/proc/r.json: cannot be written"]),
    "base in the work directory": (
        lambda p: [(p / ".out.negmerge").mkdir(), (p / "base").rename(p / ".out.negmerge" / "output"),
                   (p / "base").symlink_to(p / ".out.negmerge" / "output")],
        [], ["base: the input is inside"],
    ),
    "an unknown file in the work directory": (
        lambda p: [(p / ".out.negmerge").mkdir(), (p / ".out.negmerge" / "notes").touch()], [], ["notes: not negmerge's"],
    ),
    "another name of the base": (
        lambda p: [(p / "twin").mkdir(), *(os.link(f, p / "twin" / f.name) for f in (p / "base").iterdir())],
        ["twin"], ["twin: is the base itself"],
    ),
    "backend": (lambda p: None, ["--backend", "abacus"], ["'abacus' is not one of"]),
    "kernel of another device": (lambda p: None, ["--backend", "cpu", "--device", "cuda:0"], ["is for tensors on cpu, not on cuda:0"]),
    "output is an input": (lambda p: None, ["--output", "ft-1"], ["the output is the input ft-1"]),
    "output in an input": (lambda p: None, ["--output", "base/out"], ["the output is inside the input base"]),
    "output above": (lambda p: None, ["--output", "."], ["the output is above the input base"]),
    "no parent": (lambda p: None, ["--output", "no/out"], ["no: no such directory, expected one to hold out"]),
    "report in output": (lambda p: None, ["--report", "out/r.json"], ["out/r.json: is inside", "/out, expected another place"]),
    "report on an input": (
        lambda p: None, ["--report", "ft-0/config.json"], ["ft-0/config.json: is inside ft-0, expected another place"],
    ),
    "report nowhere": (lambda p: None, ["--report", "no/r.json"], ["no: no such directory, expected one to hold r.json"]),
    "unknown option": (lambda p: None, ["--fast"], ["No such option"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run: Run, models: Any, tmp_path: Path, case: str) -> None:
    spoil, more, messages = BAD[case]
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*MERGE, *more)
    assert (status, out) == (2, "")
    assert err.startswith("negmerge: ") and err.count("\n") == 1 and "Traceback" not in err
    for message in messages:
        assert message in err
    assert not (tmp_path / "out").exists() and sorted(tmp_path.rglob("*")) == before


def test_no_models(run: Run, models: Any, tmp_path: Path) -> None:
    status, _, err = run("merge", "base", "-o", "out", "--scale", "1")
    assert (status, err) == (2, "negmerge: finetuned: no models, expected at least one\n")


def test_nonfinite_keep_base(run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    models[3]["half"][1, 1] = float("nan")
    save_model(tmp_path / "ft-2", models[3])
    status, out, _ = run(*MERGE, "--nonfinite", "keep-base")
    assert status == 0 and ", 1 non-finite" in out
    check(tmp_path / "out", models)


def test_dry_run(run: Run, models: Any, tmp_path: Path) -> None:
    status, out, err = run(*MERGE, "--dry-run")
    assert (status, err) == (0, "")
    for word in ("segments", "read", "write", "memory", "6 to merge", "1 unchanged", "chunks of at most"):
        assert word in out
    assert nothing_left(tmp_path)


def test_a_dry_run_counts_what_is_read_to_find_bounds(run: Run, models: Any, tmp_path: Path) -> None:
    _, plain, _ = run(*MERGE, "--dry-run")
    status, out, err = run(*MERGE, "--method", "ties", "--dry-run")
    assert (status, err) == (0, "")
    assert " to find bounds" in out and " to find bounds" not in plain


def test_inspect(run: Run, models: Any, tmp_path: Path) -> None:
    status, out, _ = run("inspect", "base", "ft-0", "ft-1")
    assert status == 0 and "2 weight files" in out and "can be merged: 6 tensors" in out
    rewrite(tmp_path / "ft-0", embed=torch.zeros(3))
    status, _, err = run("inspect", "base", "ft-0")
    assert status == 2 and "tensor 'embed': shape (3,)" in err


def test_help_info_and_version(run: Run) -> None:
    assert "Usage: negmerge" in run("--help")[1]
    assert "--memory-budget" in run("merge", "--help")[1]
    assert run("--version")[1].startswith("negmerge, version ")
    status, out, _ = run("info")
    assert status == 0 and "backend torch on cpu: usable" in out


def test_a_small_merge_imports_little(tmp_path: Path, models: Any) -> None:
    # Each of these takes a good part of the time of a small merge, or most of it.
    heavy = {
        "torch", "numpy", "tqdm", "email", "importlib.metadata", "multiprocessing", "subprocess", "concurrent", "logging",
        "tarfile", "zipfile", "pickle", "pickletools", "hashlib", "secrets", "random", "tempfile", "socket",
    } | {f"negmerge_fast.checkpoints.{name}" for name in ("pytorch", "distributed", "translate", "lora")}  # fmt: skip
    code = (
        f"import sys; sys.argv = {['negmerge', *MERGE]!r}\nfrom negmerge_fast.cli import main\n"
        f"try: main.main()\nfinally: print({heavy!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr
    check(tmp_path / "out", models)


@pytest.mark.parametrize("count", [0, 9.994, 9.996, 99.94, 99.96, 999, 999.6, 12_345, 2**40, 2**64])
def test_sizes_are_written_as_in_the_progress_bar(count: float) -> None:
    assert _size(count) == tqdm.format_sizeof(count, "B")


def test_help_and_inspect_wait_for_no_torch(tmp_path: Path, models: Any) -> None:
    for arguments in (["--help"], ["inspect", "base", "ft-0"]):
        code = f"import sys; sys.argv = {['negmerge', *arguments]!r}\nfrom negmerge_fast.cli import main\ntry: main.main()\nfinally: assert 'torch' not in sys.modules"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path).returncode == 0


def test_methods_scales_and_weights(run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    mask = {"embed": torch.arange(800).view(50, 16) % 2 == 0}
    save_file(mask, tmp_path / "mask.safetensors")
    given = ("merge", "base", "ft-0", "ft-1", "ft-2", "--method", "magmax", "--weights", "mask.safetensors")
    chosen = ("--include", "embed|brain", "--add", "--scale", "0.5", "--scale", "embed=0.25")
    status, out, _ = run(*given, *chosen, "-o", "out", "--dry-run")
    assert status == 0 and not (tmp_path / "out").exists()
    assert re.search(
        r"^method +magmax\nweights +mask\.safetensors\nscale +-0\.25 +'embed'\nscale +-0\.5 +''$", out, re.M
    )
    status, out, err = run(*given, *chosen, "-o", "out", "--report", "report.json")
    assert status == 0 and "negmerge: note: mask.safetensors: lacks 'brain'" in err
    assert re.search(r"elements changed \(.*%\), 0 non-finite, \d+ masked; ", out)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scale"] == [["embed", -0.25], ["", -0.5]] and report["vetoed_by_zero"] is None
    assert (report["method"], report["weights"], report["masked"] > 0) == ("magmax", "mask.safetensors", True)
    status, out, err = run(
        "verify", "out", "--against", "base", "ft-0", "ft-1", "ft-2", "--weights", "mask.safetensors"
    )
    assert (status, err) == (0, "") and "merged again" in out
    delta = ("delta", *given[1:], "--include", "embed|brain", "-o", "delta")
    assert run(*delta)[0] == 0
    assert "(magmax, min_agreement 1.0, weights of 'mask.safetensors')" in run("inspect", "delta")[1]
    assert run("apply", "base", "delta", "-o", "applied", "--scale", "embed=-0.25", "--scale", "-0.5")[0] == 0
    for name in load_model(tmp_path / "out"):
        assert same_bits(load_model(tmp_path / "out")[name], load_model(tmp_path / "applied")[name]), name
    assert not same_bits(load_model(tmp_path / "out")["embed"], models[0]["embed"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--density", "0.2"), "density: method negmerge has none, expected one of ties, breadcrumbs"),
        (("--method", "mean", "--seed", "1"), "seed: method mean has none, expected one of dare, dare-ties"),
        (("--method", "ties", "--drop-rate", "0.5"), "drop: method ties has none"),
        (("--method", "ties", "--density", "0"), "density: 0.0, expected more than 0 and at most 1"),
        (("--method", "medium"), "'medium' is not one of"),
        (("--scale", "0.5"), "several numbers, expected one, or RE=NUMBER"),
        (("--scale", "embed=much"), "'embed=much' is not a valid float, nor RE=NUMBER"),
        (("--scale", "(=1"), "scale: '(' is not a regular expression"),
        (("--method", "emr", "--skip-unchanged"), "skip_unchanged: True, expected False"),
        (("--method", "emr", "--min-agreement", "0.7"), "min_agreement: 0.7, expected 1.0"),
        (("--output-adapter", "--add"), "--scale: --output-adapter writes a delta"),
    ],
)
def test_numbers_that_are_not_the_methods(
    run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    status, out, err = run(*MERGE, *arguments)
    assert (status, out) == (2, "") and problem in err and "Traceback" not in err
    assert nothing_left(tmp_path)
