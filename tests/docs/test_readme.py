"""README and docs: their length, their numbers and their links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from benchmark_rows import row, write

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_generated_tables_are_those_of_the_latest_rows() -> None:
    command = [sys.executable, str(ROOT / "bench" / "docs.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run bench/docs.py, or drop the rows"


def test_rows_of_code_that_was_taken_back_are_not_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import docs

    rows = [row for row in docs.read(docs.TUNER) if row["commit"] in ("d0fa4c0", "d19b937")]
    [(_, tuned)] = docs.latest_tuned(rows).items()
    commits = {(docs.kernel_of(row), row["dtype"]): row["commit"] for row in tuned}
    assert commits.pop(("triton", "F64")) == "d0fa4c0" and set(commits.values()) == {"d19b937"}
    # A run that measures all of it again takes the place of both.
    again = [{**row, "commit": "abc1234"} for row in tuned]
    assert docs.latest_tuned([*tuned, *again]) == {again[0]["device"]: again}


def test_tables_have_the_best_form_of_the_compiled_formula_and_none_that_are_superseded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import docs

    measured = [
        row(1.0, way="cpu, in place", driver=None, first_call=0.1),
        row(4.0, way="compiled formula", driver=None, first_call=2.5),
        row(2.0, way="compiled formula, dynamic", driver=None, first_call=57.0),
        *(row(9.0, way=name, driver=None) for name in docs.SUPERSEDED),
    ]
    suite = tmp_path / "suite.jsonl"
    write(
        suite, *({**each, "suite": name, "threads": 2} for each in measured for name in ("memory", "layouts"))
    )
    text = docs.text(suite, tmp_path / "tune_gpu.jsonl")
    assert [re.sub(r"\W*\|.*", "", line[2:]) for line in text.splitlines() if re.match(r"\| (\*\*)?(cpu|best|comp|eager)", line)] == [
        "**cpu, in place", "best compiled formula", "**cpu, in place, F32", "**cpu, in place", "best compiled formula",
    ]  # fmt: skip
    assert "`cpu, in place` ÷ best compiled formula: 2 (F32)." in text
    assert "The first call of a compiled formula took 2.5 to 57 s." in text
    assert not any(name in text for name in docs.SUPERSEDED - {"eager formula"})
    peers = tmp_path / "peers.jsonl"
    found = {
        "driver": None,
        "threads": 2,
        "differing": None,
        "peak MB": 5943.0,
        "suite": "peers",
        "times ours": 11.9,
    }
    write(
        peers, row(9.3, way="mergekit ties", **found), row(9.3, way="load_file, formula, save_file", **found)
    )
    lines = [line for line in docs.processes(peers).splitlines() if line.startswith("| ")]
    assert lines[2:] == ["| mergekit ties | 9.3 | 11.9 | 5.9 GB | – |"]


def in_memory() -> list[str]:
    """GB/s and share of the limit of one tensor, as the generated tables have them."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    found = []
    for first_column, column in (("cpu", 2), ("cpu", 4)):
        line = re.search(rf"^\| \*\*{first_column}\*\* \| (.*) \|$", page, re.MULTILINE)
        assert line
        found.append(line[1].split(" | ")[column - 1])
    for candidate in ("cuda, F32", "cuda, BF16"):
        line = re.search(rf"^\| \*\*{candidate}\*\* \| (.*) \|$", page, re.MULTILINE)
        assert line
        found.append(line[1].split(" | ")[1])  # of 8 models
    return [re.sub(r" \((.*)\)", r" GB/s, \1", cell) for cell in found]


def whole_processes() -> list[str]:
    """Seconds and peak memory of the first of the merges within 1 GiB, and of the last one of warm files."""
    out_of_core = next(row for row in rows("outofcore.jsonl") if row["way"] == "negmerge")
    warm = [row for row in rows("peers.jsonl") if row["way"] == "negmerge merge"][-1]
    return [
        f"{out_of_core['p50']:.1f} s, peak memory {out_of_core['peak MB']:.0f} MB",
        f"{warm['p50']:.2f} s, peak memory {warm['peak MB']:.0f} MB",
    ]


def of_deltas() -> list[str]:
    """Lines of the tables of docs/benchmarks.md."""

    def cells(row: dict[str, Any]) -> str:
        limit = f"{row['of_limit']:.2f}" if "of_limit" in row else "–"
        return f"{1000 * row['p50']:.1f} | {limit} | {row['of_merge']:.2f}"

    found = [row for row in rows("delta.jsonl") if not row["way"].startswith(("eager", "memory"))]
    pairs = [[row for row in found if row["way"] == name] for name in ("merge", "live move", "live restore")]
    lines = [f"{cells(f32)} | {cells(bf16)} |" for f32, bf16 in pairs]
    for name in ("delta", "delta --half", "apply", "apply, 3 scales"):
        f32, bf16 = (row for row in rows("deltas.jsonl") if row["way"] == name)
        sizes = [row["of a dense model"] for row in (f32, bf16)]
        texts = [
            f"{row['p50']:.2f} | {row['times the other']:.2f} of {row['compared with']} |{f' {size:.3f} ' if size else ' '}|"
            for row, size in zip((f32, bf16), sizes, strict=True)
        ]
        lines.append(f"| **{name}** | {texts[0]} {texts[1]}")
    return lines


def test_tables_of_deltas_are_those_of_committed_rows() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for line in of_deltas():
        assert line in page, line


def live() -> list[str]:
    moved = next(row for row in rows("delta.jsonl") if (row["way"], row["dtype"]) == ("live move", "F32"))
    return [f"{1000 * moved['p50']:.1f} ms, {moved['of_merge']:.2f} of a merge"]


def forgetting() -> list[str]:
    found = json.loads((RESULTS / "forgetting.json").read_text(encoding="utf-8"))["rows"]

    def percent(method: str, what: str) -> str:
        return f"{100 * mean(row[what] for row in found if row['method'] == method):.1f} %"

    return [f"{percent('original', what)} → {percent('NegMerge', what)}" for what in ("forget", "retain")]


@pytest.mark.parametrize("measured", [in_memory, whole_processes, live, forgetting])
def test_numbers_in_readme_are_those_of_committed_rows(measured: Any) -> None:
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## What it is measured at") : text.index("## Beside other tools")]
    for number in measured():
        assert number in table, number


def test_the_site_begins_with_the_formula_of_readme() -> None:
    readme, index = (page.read_text(encoding="utf-8") for page in (README, ROOT / "docs" / "index.md"))
    formula = readme[readme.index("d_k ") : readme.index("else b\n")]
    assert len(formula.splitlines()) == 3 and formula in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """In a checkout; mkdocs looks after those of the site, and after anchors."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target = link.partition("#")[0]
        if target and "://" not in link:
            assert (page.parent / target).exists(), f"{page.name}: {link}"


def test_every_command_is_in_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "negmerge_fast", "--help"], capture_output=True, text=True, check=True
    )
    commands = re.findall(r"^  (\w+)", done.stdout.partition("Commands:")[2], re.MULTILINE)
    assert len(commands) >= 6
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    for command in commands:
        assert f"<!-- negmerge {command} --help -->" in page


def test_every_public_name_is_in_the_reference() -> None:
    import negmerge_fast

    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    for name in set(negmerge_fast.__all__) - {"__version__"}:
        assert f"::: negmerge_fast.{name}\n" in page
