"""Linear regular expressions find what Python's find, and end where those do not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from negmerge_fast.core import regex
from negmerge_fast.core.errors import InputError
from negmerge_fast.core.regex import LinearPattern

PATTERNS = [
    r"(.*\.)?(q_proj)$", r"(.*\.)?(.*\.gate_up_proj)$", r"(.*\.)?(model\.layers\.\d+\.(q|k)_proj)$", r"(.*\.)?(^layers.0.q)$",
    r"(.*\.)?(layers\.[0-3]\.q)$", r"(.*\.)?([^0-9.]+)$", r"(.*\.)?(a{2,3}?b*|\bq\b)$", r"(.*\.)?(\w+\.\S\D)$", r"", r"a|", r"x?y+?",
    r"(.*\.)?(layers\.1)$", r"(.*\.)?(\Aq\Z)$", r"(.*\.)?(q\B_)",
]  # fmt: skip
NAMES = [
    "", "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.q_proj", "mlp.experts.gate_up_proj", "layers.0.q", "x.layers.0.q",
    "layers.2.q", "aab", "x.aaabbb", "a.q", "q", "q_", "abc.de", "y", "xyy", "layers.1", "layers.11", "q_proj\n", "a\nb.q_proj",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_as_python(pattern: str) -> None:
    ours = LinearPattern(pattern)
    assert [ours.match(name) for name in NAMES] == [bool(re.match(pattern, name)) for name in NAMES]


@given(st.text("ab.(|)*+?[]^$\\d{1,2}", max_size=10), st.lists(st.text("ab.1\n", max_size=8), min_size=1))
def test_any_pattern(pattern: str, names: list[str]) -> None:
    try:
        expected = [bool(re.match(pattern, name)) for name in names]
    except re.error:
        with pytest.raises(InputError, match="no regular expression"):
            LinearPattern(pattern)
        return
    try:
        ours = LinearPattern(pattern)
    except InputError as error:
        assert "not supported here" in str(error)
        return
    assert [ours.match(name) for name in names] == expected


def test_python_would_not_end() -> None:
    assert not LinearPattern(r"(.*\.)?((a+)+b)$").match("a" * 4000)
    assert not LinearPattern(r"(.*\.)?((.*a){20}b)$").match("a" * 200)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"(a)\1", "groupref"), ("(?=a)", "assert"), ("(?!a)", "assert not"), ("(?i:a)", "a flag"), ("(?i)a", "a flag"),
        ("a{1000000}", "so many repetitions"), ("(a{100}){100}", "so many repetitions"), ("(" * 50 + "a*" + "){9}" * 50, "so many"),
        ("(", "no regular expression"), ("*", "no regular expression"), ("(" * 5000 + ")" * 5000, "no regular|nesting"),
    ],
)  # fmt: skip
def test_refused(pattern: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        LinearPattern(pattern)


def test_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "_MAX_STEPS", 1_000_000)
    pattern = LinearPattern("(.*a){50}b")
    with pytest.raises(InputError, match="takes too long"):
        for _ in range(100):
            pattern.match("a" * 4000)
    with pytest.raises(InputError, match=r"5,000 characters, expected at most 4,096"):
        LinearPattern("a").match("a" * 5000)
