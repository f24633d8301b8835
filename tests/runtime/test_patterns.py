"""Regular expressions of a file, in a process of their own: the same answers as in this one, and an end to all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from negmerge_fast.core import pairing
from negmerge_fast.core.errors import InputError
from negmerge_fast.runtime import patterns
from negmerge_fast.runtime.patterns import BoundedPatterns

HOSTILE = r"^(([a-z0-9_.])+)+!$"
NAME = "model.layers.0.self_attn.q_proj.weight"
NAMES = [NAME, "a", "", "lm_head.weight", "\ud800", "\N{SNOWMAN}\n\x1b", "a" * 2_000]


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], BoundedPatterns]:
    monkeypatch.setattr(patterns, "_CPU_S", 1)
    return lambda: BoundedPatterns(Path("out/negmerge.json"))


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize(
    ("include", "exclude"),
    [(None, None), ("a", None), (None, r"\.weight$"), ("[aeiou]", "^lm"), ("", "(?s:.)")],
)
def test_the_same_names_are_chosen(
    bounded: Callable[[], BoundedPatterns], include: str | None, exclude: str | None
) -> None:
    expected = pairing.choice(include, exclude)
    with bounded() as found:
        chosen = found.choice(include, exclude)
        assert (chosen is None) == (expected is None)
        for name in NAMES * 2 if chosen and expected else ():
            assert chosen(name) is expected(name)


@pytest.mark.parametrize(
    "rename", [(), [("^", "x.")], [("a", "b"), ("b", "c")], {r"(\w+)\.weight": r"\g<1>.w"}]
)
def test_the_same_names_are_made(bounded: Callable[[], BoundedPatterns], rename: pairing.Rename) -> None:
    expected = pairing.compile_renames(rename)
    with bounded() as found:
        renamed = found.compile_renames(rename)
        assert (renamed is None) == (expected is None)
        for name in NAMES if renamed and expected else ():
            assert renamed(name) == expected(name)


def test_no_process_without_patterns_and_none_is_left(bounded: Callable[[], BoundedPatterns]) -> None:
    before = children()
    with bounded() as found:
        assert found.choice(None, None) is None and found.compile_renames(()) is None
        assert children() == before
        found.choice("a", None)
        assert len(children()) == len(before) + 1
    assert children() == before
    with pytest.raises(KeyboardInterrupt), bounded() as found:
        found.choice("a", None)
        raise KeyboardInterrupt
    assert children() == before


BAD: dict[str, tuple[Callable[[BoundedPatterns], object], str]] = {
    "include": (lambda p: p.choice("(", None), r"include: '\(' is not a regular expression"),
    "exclude": (lambda p: p.choice(None, "a{99999999999}"), r"exclude: .a\{99999999999\}. is not a regular expression"),
    "rename": (lambda p: p.compile_renames([("a", r"\1")]), "rename: 'a' to '.*': invalid group reference"),
    "a search without end": (lambda p: p.choice(HOSTILE, None)(NAME), "include, exclude, rename and scale take too long"),  # type: ignore[misc]
    "another": (lambda p: p.choice(None, HOSTILE)(NAME), "include, exclude, rename and scale take too long"),  # type: ignore[misc]
    "a replacement without end": (lambda p: p.compile_renames([(HOSTILE, "")])(NAME), "include, exclude, rename and scale take too long"),  # type: ignore[misc]
    "a compilation without end": (lambda p: p.choice("|".join(f"a{k}(b|c)*" for k in range(1 << 20)), None), "include, exclude, rename and scale take too long"),
    "a long name": (lambda p: p.compile_renames([("a", "b" * 70_000)])("a"), "makes a name of 70,000 characters, expected at most 65,536"),  # type: ignore[misc]
    "a name that fills the memory": (lambda p: p.compile_renames([(".+", r"\g<0>" * 2)] * 40)("a"), "fill the memory|take too long"),  # type: ignore[misc]
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(bounded: Callable[[], BoundedPatterns], case: str) -> None:
    before = children()
    ask, message = BAD[case]
    with pytest.raises(InputError, match=f"^out/negmerge.json: .*({message})") as error, bounded() as found:
        ask(found)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert children() == before


def test_a_process_that_gets_no_time(
    bounded: Callable[[], BoundedPatterns], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that does other things it is not waited for for ever."""
    monkeypatch.setattr(patterns, "_CPU_S", 1000)
    monkeypatch.setattr(patterns, "_WAIT_S", 0.5)
    with bounded() as found, pytest.raises(InputError, match="take too long"):
        found.choice(HOSTILE, None)(NAME)  # type: ignore[misc]


@pytest.mark.parametrize("executable", [None, "", "/no/such/python"])
def test_no_process_can_be_started(
    bounded: Callable[[], BoundedPatterns], monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with bounded() as found, pytest.raises(InputError, match="need a process of their own"):
        found.choice("a", None)


def test_nothing_of_the_current_folder_is_imported(
    bounded: Callable[[], BoundedPatterns], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("json", "re", "select", "sitecustomize"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with bounded() as found:
        chosen = found.choice("a", None)
        assert chosen and chosen("a")
