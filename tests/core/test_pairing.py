"""Pairing by name: spellings of libraries, tied weights, integers that one side lacks, renames; and what must not be paired."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import pytest

from negmerge_fast.core.errors import InputError
from negmerge_fast.core.pairing import Pairing, compile_renames, hint, notes, pair_names
from negmerge_fast.core.schema import TensorSpec

WEIGHT, IDS = TensorSpec("F32", (4, 4)), TensorSpec("I64", (1, 7))


def specs(*names: str) -> dict[str, TensorSpec]:
    return {name: IDS if name.endswith("ids") else WEIGHT for name in names}


def twins(groups: Collection[Collection[str]]):
    """Tied weights in groups of names."""
    return lambda name, others: [o for o in others for group in groups if {name, o} <= set(group)]


def pair(
    base: Collection[str],
    model: Collection[str],
    base_ties: Collection[Collection[str]] = (),
    model_ties: Collection[Collection[str]] = (),
    rename: Mapping[str, str] | None = None,
) -> Pairing:
    return pair_names(
        specs(*base),
        specs(*model),
        twins(base_ties),
        twins(model_ties),
        renames=compile_renames(rename or {}),
    )


SPELLINGS = {
    "DataParallel": (["a.w", "b.w"], ["module.a.w", "module.b.w"]),
    "torch.compile": (["a.w", "b.w"], ["_orig_mod.a.w", "_orig_mod.b.w"]),
    "both, either way around": (["a.w", "b.w"], ["module._orig_mod.a.w", "module._orig_mod.b.w"]),
    "compiled parts": (["a.0.w", "b.0.w"], ["a._orig_mod.0.w", "b.0.w"]),
    "activation checkpointing": (["a.0.w", "b.w"], ["a._checkpoint_wrapped_module.0.w", "b.w"]),
    "FSDP": (["a.0.w", "b.w"], ["_fsdp_wrapped_module.a._fsdp_wrapped_module.0.w", "_fsdp_wrapped_module.b.w"]),
    "base was wrapped": (["module.a.w", "module.b.w"], ["a.w", "b.w"]),
    "a prefix": (["a.w", "b.w"], ["bert.a.w", "bert.b.w"]),
    "a prefix of two components": (["a.w", "b.w"], ["model.model.a.w", "model.model.b.w"]),
    "base has the prefix": (["bert.a.w", "bert.b.w"], ["a.w", "b.w"]),
    "more than the prefix is shared": (["layers.0.w", "layers.0.v"], ["model.layers.0.w", "model.layers.0.v"]),
    "a prefix in a wrapper": (["a.w", "b.w"], ["module.bert.a.w", "module.bert.b.w"]),
    "a folder": (["0_Transformer/a.w", "0_Transformer/b.w"], ["a.w", "b.w"]),
    "TensorFlow's names": (["n.weight", "n.bias"], ["n.gamma", "n.beta"]),
    "TensorFlow's names in base": (["n.gamma", "n.beta"], ["n.weight", "n.bias"]),
    "weight_norm": (
        ["c.weight_g", "c.weight_v", "c.bias"],
        ["c.parametrizations.weight.original0", "c.parametrizations.weight.original1", "c.bias"],
    ),
    "all at once": (["n.weight", "c.weight_g"], ["module.bert.n.gamma", "module.bert.c.parametrizations.weight.original0"]),
}  # fmt: skip


@pytest.mark.parametrize(("base", "model"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_other_spellings(base: list[str], model: list[str]) -> None:
    pairing = pair(base, model)
    assert pairing.names == dict(zip(base, model, strict=True))
    changed = next((m, b) for b, m in pairing.names.items() if b != m)
    assert notes(pairing)[0].startswith(f"{changed[0]!r} is taken for {changed[1]!r}")


UNPAIRED = {
    "a name is missing": (["a.w", "b.w", "c.w"], ["module.a.w", "module.b.w"]),
    "a name is left": (["a.w", "b.w"], ["bert.a.w", "bert.b.w", "bert.head.w"]),
    "one lacks the prefix": (["a.w", "b.w", "c.w"], ["bert.a.w", "bert.b.w", "c2.w"]),
    "two prefixes": (["a.w", "b.w"], ["x.a.w", "y.b.w"]),
    "two would become one": (["n.weight", "x"], ["n.weight", "n.gamma"]),
    "half a component": (["a.w", "b.w"], ["xa.w", "xb.w"]),
}


@pytest.mark.parametrize(("base", "model"), UNPAIRED.values(), ids=UNPAIRED.keys())
def test_names_that_do_not_all_match_stay(base: list[str], model: list[str]) -> None:
    pairing = pair(base, model)
    assert pairing.names == {name: name for name in model} and not notes(pairing)


def test_names_as_they_are_come_first() -> None:
    """A module may be called module, and have a weight called gamma."""
    names = ["module.a.w", "module.gamma", "a.w2"]
    assert pair(names, names[::-1]).names == {name: name for name in names}


def test_a_tied_weight_that_a_model_lacks() -> None:
    pairing = pair(["embed", "head", "w"], ["module.embed", "module.w"], [["embed", "head"]])
    assert pairing.names == {"embed": "module.embed", "head": "module.embed", "w": "module.w"}
    assert notes(pairing)[1] == "lacks 'head', which base ties to 'embed': that is taken"
    assert len(notes(pairing, ties=False)) == 1


def test_a_tied_weight_that_the_base_lacks() -> None:
    pairing = pair(["embed", "w"], ["embed", "head", "w"], (), [["embed", "head"]])
    assert pairing.names == {"embed": "embed", "w": "w"}
    assert notes(pairing) == ["'head' is not in base, but tied to 'embed': skipped"]


def test_a_tied_weight_outside_of_the_prefix() -> None:
    """A model with its output layer, whose other weights are in a module of their own; base is that module, or the reverse."""
    inner, outer = ["wte", "h.0", "h.1"], ["transformer.wte", "transformer.h.0", "transformer.h.1", "head"]
    found = pair(inner, outer, (), [["transformer.wte", "head"]])
    assert found.names == dict(zip(inner, outer, strict=False)) and found.surplus == {
        "head": "transformer.wte"
    }
    found = pair(outer, inner, [["transformer.wte", "head"]])
    assert found.names == {**dict(zip(outer, inner, strict=False)), "head": "wte"}
    assert pair(inner, outer).names == {name: name for name in outer}


def test_a_prefix_whose_end_is_another_name() -> None:
    assert pair(["a", "b", "c"], ["x.a", "x.b", "x.c", "c"]).names.keys() == {"x.a", "x.b", "x.c", "c"}


def test_a_tied_weight_whose_versions_are_not_tied() -> None:
    """The base ties three; a model has two of them, and they differ: which is the third?"""
    base, model, ties = ["a", "b", "c", "w"], ["a", "b", "w"], [["a", "b", "c"]]
    assert "c" not in pair(base, model, ties).names
    assert pair(base, model, ties, [["a", "b"]]).names["c"] == "a"


def test_a_missing_weight_that_nothing_is_tied_to() -> None:
    assert pair(["embed", "head"], ["embed"]).names == {"embed": "embed"}
    assert set(pair(["embed"], ["embed", "head"]).names) == {"embed", "head"}


def test_integers_that_one_side_lacks() -> None:
    pairing = pair(["w", "x.ids"], ["module.w", "module.y.ids"])
    assert pairing.names["w"] == "module.w" and "x.ids" not in pairing.names
    assert notes(pairing)[1:] == [
        "lacks 'x.ids': base has integers there, which are kept",
        "'module.y.ids' of integers: not in base, skipped",
    ]


def test_only_chosen_tensors_must_match() -> None:
    base, model = specs("a.w", "b.w", "head"), specs("module.a.w", "module.b.w", "module.classifier")

    def no_twins(name: str, others: Collection[str]) -> list[str]:
        return []

    pairing = pair_names(base, model, no_twins, no_twins, lambda name: name.endswith(".w"))
    assert pairing.names["a.w"] == "module.a.w" and "head" not in pairing.names


def test_renames() -> None:
    pairing = pair(["a.w", "b.w"], ["x.1.w", "x.2.w"], rename={r"^x\.": "", "1": "a", r"^(2)(.*)": r"b\2"})
    assert pairing.names == {"a.w": "x.1.w", "b.w": "x.2.w"}
    assert pair(["a", "b"], ["ab", "b"], rename={"^ab$": "a"}).names == {"a": "ab", "b": "b"}
    with pytest.raises(InputError, match="model: rename makes 'x' of 'a' and 'b', expected different names"):
        pair(["x", "y"], ["a", "b"], rename={"[ab]": "x"})


@pytest.mark.parametrize(("pattern", "text"), [("(", ""), ("a", r"\1"), ("a", r"\g<no>"), ("(a)", r"\2")])
def test_renames_that_are_none(pattern: str, text: str) -> None:
    with pytest.raises(InputError, match=r"^rename: "):
        compile_renames({pattern: text})


def test_the_hint_shows_both_sides_and_the_prefixes() -> None:
    base = specs("model.a.q.w", "model.b.q.w", "model.c")
    assert hint(base, specs("bert.a.q.w", "bert.b.q.w", "d")) == (
        r"'bert.a.q.w' may be 'model.a.q.w', with the prefix 'bert.' for 'model.' (rename '^bert\.=model.')"
    )
    assert "prefix '0_T/' for ''" in (hint(specs("a.q.w", "b.w"), specs("0_T/a.q.w", "c.w")) or "")
    assert hint(base, base) is None and hint(base, specs("x", "y")) is None


def test_a_hint_can_be_followed() -> None:
    base, model = ["model.a.w", "model.b.w"], ["bert.a.w", "bert.b.w", "model.ids"]
    found = re.search("rename '(.*)=(.*)'", hint(base, model) or "")
    assert found is not None and set(pair(base, model).names) == set(model)
    renamed = pair(base, model, rename={found[1]: found[2]})
    assert renamed.names == {"model.a.w": "bert.a.w", "model.b.w": "bert.b.w", "model.ids": "model.ids"}
