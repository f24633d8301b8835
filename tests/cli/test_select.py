"""negmerge select: λ chosen by the scores that a command prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bits import same_bits
from checkpoint_files import load_model
from command import Run, run  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.core.errors import InputError
from negmerge_fast.search.harness import run_command, scores_in

# Forgets more and more, and breaks the floor beyond λ = 0.5. It leaves a file in the model's directory, as harnesses do.
SCORE = r"""
echo "$1" >> models.txt
touch "$1/cache" || exit 3
case $2 in 0.[0-4]* | 0.5) retain=1 ;; *) retain=0.5 ;; esac
printf '%s\n' '{"not": "these"}' '{' ' "forget":' "-$2, \"retain\": $retain" '}' done
"""
EVAL = ("--eval", "sh score.sh {model} {scale}")


@pytest.fixture
def folder(tmp_path: Path, models: list[dict[str, torch.Tensor]]) -> Path:
    """base, its delta D, and score.sh."""
    nm.consensus_delta(models[0], models[1:]).save(tmp_path / "D")
    (tmp_path / "score.sh").write_text(SCORE)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"base", "ft-0", "ft-1", "ft-2", "D", "score.sh"}


def check(out: Path, models: list[dict[str, torch.Tensor]], scale: float) -> None:
    merged = load_model(out)
    expected = nm.merge(models[0], models[1:], scale=scale)
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.items())


def test_a_grid(run: Run, folder: Path, models: list[dict[str, torch.Tensor]]) -> None:
    status, out, err = run("select", "base", "D", *EVAL, "--output", "out", "--report", "report.json")
    assert status == 0 and all(line.startswith("negmerge: note: ") for line in err.splitlines())
    assert names(folder) == {"out", "out.points.jsonl", "report.json", "models.txt"}
    check(folder / "out", models, 0.5)
    assert not (folder / "out" / "cache").exists()
    paths = (folder / "models.txt").read_text().splitlines()
    assert paths == [str(folder / "out.scales" / f"out-{k / 20}") for k in range(21)]
    assert out.splitlines()[-1] == (
        "out: λ 0.5, the lowest forget score with a retain score ≥ 0.95 (0.95 of the base's 1); points in out.points.jsonl"
    )
    assert [line.split() for line in out.splitlines()[1:12]][-1] == ["0.5", "-0.5", "1", "chosen"]
    report = json.loads((folder / "report.json").read_text())
    assert report["scale"] == 0.5 and len(report["points"]) == 21


def test_a_search_goes_on_with_the_points_of_another(run: Run, folder: Path) -> None:
    (folder / "score.sh").write_text("case $2 in 0.15) exit 7;; esac\n" + SCORE)
    status, out, err = run("select", "base", "D", *EVAL, "-o", "out", "-q")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "negmerge: --eval: 'sh score.sh " in err and "exit status 7, expected 0" in err
    assert names(folder) == {"out.points.jsonl", "models.txt"}
    (folder / "score.sh").write_text(SCORE)
    assert run("select", "base", "D", *EVAL, "-o", "out", "-q") == (0, "", "")
    assert len((folder / "models.txt").read_text().splitlines()) == 21
    # With all scores at hand another rule costs nothing but the model.
    status, out, _ = run("select", "base", "D", *EVAL, "-o", "out", "--overwrite", "--forget-target", "-0.18")
    assert status == 0 and "out: λ 0.2, the first scale with a forget score ≤ -0.18" in out
    assert len((folder / "models.txt").read_text().splitlines()) == 21


def test_a_bracket_and_its_models(run: Run, folder: Path, models: list[dict[str, torch.Tensor]]) -> None:
    arguments = ("--search", "bracket", "--keep-models", "--points", "p.jsonl", "--quiet")
    assert run("select", "base", "D", *EVAL, "-o", "out", *arguments) == (0, "", "")
    assert names(folder) == {"out", "out.scales", "p.jsonl", "models.txt"}
    kept = {path.name.removeprefix("out-") for path in (folder / "out.scales").iterdir()}
    assert {"0.0", "0.5", "1.0", "0.75"} <= kept and len(kept) <= 9
    for scale in kept:
        check(folder / "out.scales" / f"out-{scale}", models, float(scale))
    check(folder / "out", models, 0.5)


def test_models_that_torch_loads(run: Run, folder: Path) -> None:
    tensors = [{"w": torch.randn(3, 4)} for _ in range(3)]
    torch.save(tensors[0], folder / "b.pt")
    nm.consensus_delta(tensors[0], tensors[1:]).save(folder / "pt")
    (folder / "load.py").write_text(
        "import sys, torch; torch.load(sys.argv[1], weights_only=True)['w']; print('{\"forget\": -%s, \"retain\": 1}' % sys.argv[2])"
    )
    command = f"{sys.executable} load.py {{model}} {{scale}}"
    arguments = ("select", "b.pt", "pt", "--eval", command, "--scale", "0.5", "--output", "out.pt")
    assert run(*arguments)[0] == 2  # a safetensors file has another suffix
    status, _, err = run(*arguments, "--format", "pt")
    assert status == 0, err
    merged = nm.merge(tensors[0], tensors[1:], scale=0.5)
    loaded = torch.load(folder / "out.pt", weights_only=True)
    assert same_bits(loaded["w"], merged["w"])


def test_scales(run: Run, folder: Path) -> None:
    scales = ("--scale", "0.25", "--scale", "0.5")
    status, out, _ = run("select", "base", "D", *EVAL, "-o", "out", *scales)
    assert status == 0 and len(out.splitlines()) == 5


def test_a_path_may_have_any_characters(run: Run, folder: Path) -> None:
    out = "o {scale} 'q\" $x"
    assert run("select", "base", "D", *EVAL, "-o", out, "--scale", "0.25", "-q") == (0, "", "")
    assert f"{out}.scales/{out}-0.25" in (folder / "models.txt").read_text()


def test_nothing_qualifies(run: Run, folder: Path) -> None:
    command = """: {model}; echo '{"forget": 0.5, "retain": 1}'"""
    status, out, err = run("select", "base", "D", "--eval", command, "-o", "out", "--scale", "1")
    assert status == 1 and names(folder) == {"out.points.jsonl"}
    assert err.splitlines()[-1].startswith("negmerge: no scale of 1 that has a retain score ≥ 0.95")
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo nothing", "--eval: 'echo nothing', expected {model} in it"),
        ("echo {model}", "expected JSON with forget and retain"),
        (": {model}", "--eval at λ 0: printed '' at last, expected JSON with forget and retain"),
        ("echo '{\"forget\": 1}'; : {model}", "JSON with 'forget', expected retain, too"),
        ('echo \'{"forget": NaN, "retain": 1}\'; : {model}', "forget at λ 0: nan, expected a finite number"),
        ('echo \'{"forget": "1", "retain": 1}\'; : {model}', "forget at λ 0: '1', expected a number"),
    ],
)
def test_scores_that_are_refused(run: Run, folder: Path, command: str, message: str) -> None:
    status, out, err = run("select", "base", "D", "--eval", command, "-o", "out", "-q")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err and names(folder) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "D", "-o", "ft-0"), "ft-0"),
        (("base", "ft-0", "-o", "out"), "ft-0"),
        (("ft-1", "D", "-o", "out"), "ft-1"),
        (("base", "D", "-o", "out", "--search", "bracket", "--retain-floor", "0"), "retain_floor"),
        (("base", "D", "-o", "out", "--report", "no/report.json"), "no"),
        (("base", "D", "-o", "out", "--points", "ft-0"), "ft-0: not a regular file"),
        (("base", "D", "-o", "out", "--points", "out"), "--points: out is OUT"),
        (("base", "D", "-o", "out", "--points", "p", "--report", "p"), "--report: p is the file of points"),
        (("base", "D", "-o", "out", "--report", "out.points.jsonl"), "is the file of points"),
    ],
)
def test_what_is_wrong_is_told_before_any_evaluation(
    run: Run, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run("select", *arguments, *EVAL, "-q")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err and names(folder) == set()


def test_the_last_json_object_is_taken() -> None:
    text = '{"forget": 1, "retain": 2}\n{"results": {\n {"forget": 3},\n"x": 0}}\nlog\n  {"forget": 4,\n"retain": 5, "more": {\n"forget": 6}}\nend'
    assert scores_in(text, 0.5) == {"forget": 4, "retain": 5, "more": {"forget": 6}}
    assert scores_in("x" * (2 << 20) + text, 0.5)["forget"] == 4
    with pytest.raises(InputError):
        scores_in("{" * 100_000, 0.5)


def test_a_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def check() -> None:
        if pids.exists() and len(pids.read_text().split()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command(f"sh -c 'echo $$ >> {pids}; exec sleep 600' & echo $$ >> {pids}; wait", check)
    wait_for(lambda: not any(map(is_alive, map(int, pids.read_text().split()))))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.01)


@pytest.mark.processes
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_during_an_evaluation(folder: Path, number: int, status: int) -> None:
    (folder / "score.sh").write_text("case $2 in 0.1) echo $$ > pid; exec sleep 600;; esac\n" + SCORE)
    command = [sys.executable, "-m", "negmerge_fast", "select", "base", "D", *EVAL, "-o", "out", "-q"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(
        lambda: (
            process.poll() is not None or ((folder / "pid").exists() and (folder / "pid").read_text() != "")
        )
    )
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert err in ("negmerge: interrupted\n", "negmerge: terminated\n")
    assert names(folder) == {"out.points.jsonl", "models.txt", "pid"}
    assert not is_alive(int((folder / "pid").read_text()))
    assert len((folder / "out.points.jsonl").read_text().splitlines()) == 3


def test_what_a_killed_run_left_is_replaced_and_what_others_wrote_is_not(run: Run, folder: Path) -> None:
    left = folder / "out.scales" / "out-0.25"
    left.parent.mkdir()
    with pytest.warns(nm.MergeWarning, match="was made in memory"):
        nm.apply_delta(folder / "base", folder / "D", left, scale=0.5)
    (left / "cache").touch()
    scales = ("--scale", "0.25", "--scale", "0.5")
    assert run("select", "base", "D", *EVAL, "-o", "out", *scales, "-q")[0] == 0
    assert not (folder / "out.scales").exists()
    os.makedirs(left)
    (left / "mine").touch()
    (folder / "out.points.jsonl").unlink()
    status, _, err = run("select", "base", "D", *EVAL, "-o", "out", *scales, "-q", "--overwrite")
    assert status == 2 and "out-0.25" in err and (left / "mine").exists()
