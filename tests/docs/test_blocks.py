"""Every Python and shell block of README and docs runs as it stands.

The blocks of a page run in their order, in one folder and with one set of Python names. The folder has small models:
base, ft-0, ft-1 and ft-2, and copies of them where `make demo` would have written its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import recipe
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Blocks that do not run here, each with its reason.
NOT_RUN = {
    "pip install .": "builds for a minute and needs a network; .ci/run builds and installs a wheel",
    "pip install ~/negmerge_fast\n"
    "cp -r ~/negmerge_fast/examples/open_unlearning negmerge\n"
    "python setup_data.py --eval": "needs a network and open-unlearning; recipe.prepare has made the folder",
    "NEGMERGE_CUDA=0 pip install --no-build-isolation --no-deps -e .": "would replace the installation under test",
    "negmerge mergekit negmerge.yml merged": "mergekit knows only models of transformers; tests/libraries merges one",
}

# Pages whose blocks need transformers and PEFT, or mergekit.
OF_LIBRARIES = {"adapters.md", "mergekit.md"}
# Of so many commands that make slow runs them.
LONG = {"formats.md", "merge-checkpoints.md", "methods.md", "open-unlearning.md"}

# `make` says only what it would do: its targets take minutes, and this is one of them.
PRELUDE = f'make() {{ command make --dry-run --directory "{ROOT}" "$@"; }}\n'

FENCE = re.compile(r"^(?P<mark>```+)(?P<language>.*)\n(?P<code>(?:.*\n)*?)(?P=mark)$", re.MULTILINE)
# A command in an indented block, as of the README; text in lists and tables is not indented so far.
INDENTED = re.compile(r"(?<=\n\n)(?: {4}\S.*\n)+")
SNIPPET = re.compile(r'--8<-- "(.*)"\n')


class Block(NamedTuple):
    language: str
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], text.count("\n", 0, match.start("code")), match["code"])
        for match in FENCE.finditer(text)
    ]
    outside = FENCE.sub(lambda match: re.sub(".", "`", match[0]), text)
    for match in INDENTED.finditer(outside):
        code = "".join(line[4:] for line in match[0].splitlines(keepends=True))
        found.append(Block("sh", text.count("\n", 0, match.start()), code))
    return sorted(found, key=lambda block: block.line)


@pytest.fixture
def folder(tmp_path: Path, models: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a page runs in: small models, the environment's commands on PATH and in .venv/bin."""
    programs = Path(sys.executable).parent
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(programs)
    shutil.copytree(tmp_path / "base", tmp_path / "negmerge-demo" / "seed-0" / "base")
    for k in range(3):
        shutil.copytree(tmp_path / f"ft-{k}", tmp_path / "negmerge-demo" / "seed-0" / f"finetuned-{k}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun would say that it sets it
    return tmp_path


def shell(code: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", PRELUDE + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{code}{done.stdout}"
    return done.stdout


def _marks(page: Path) -> list[pytest.MarkDecorator]:
    if page.name in OF_LIBRARIES:
        return [pytest.mark.libraries]
    # Most blocks are commands: beside the other tests they fill the time of both cores.
    return [pytest.mark.processes, *([pytest.mark.slow] if page.name in LONG else [])]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=_marks(page),
        )
        for page in PAGES
    ],
)
def test_blocks_run_as_they_stand(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name == "open-unlearning.md":
        recipe.prepare(folder, monkeypatch)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for language, line, code in blocks(page):
        where = f"{page.name}:{line}"
        if language == "python":
            exec(compile("\n" * line + code, str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "sh":
            printed = "" if code.strip() in NOT_RUN else shell(code)
        elif language == "output":
            assert code == printed, where
        elif snippet := SNIPPET.fullmatch(code):
            assert snippet[1] in EXAMPLES, f"{where}: is run by tests/examples, or not at all"
        else:
            assert language == "text", where


EXAMPLES = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.py")}


def test_what_is_not_run_stands_in_a_page() -> None:
    every = {block.code.strip() for page in PAGES for block in blocks(page)}
    assert NOT_RUN.keys() <= every


def test_blocks_are_found() -> None:
    """Neither fences nor indented commands escape the test."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(FENCE.findall(text)), page
    gate = [
        block for block in blocks(ROOT / "README.md") if block.code.startswith(".venv/bin/negmerge merge ")
    ]
    assert len(gate) == 1  # .ci/run takes it from there
