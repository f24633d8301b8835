"""Where an adapter's changes are in a base: by name by how their names end; fewer than all, or what does not fit, is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from negmerge_fast.checkpoints import placing
from negmerge_fast.checkpoints.lora import Adapter, Product, Replacement, read_adapter
from negmerge_fast.checkpoints.memory_names import Location, MemoryNames, Part, Unknown, memory_names
from negmerge_fast.checkpoints.placing import Placed, place
from negmerge_fast.core.errors import InputError

Array = np.ndarray[Any, Any]
Shapes = dict[str, tuple[int, ...]]
LAYERS: Shapes = {f"model.layers.{k}.{name}.weight": (8, 6) for k in range(2) for name in "qkv"}


def array(*shape: int) -> Array:
    return np.arange(math.prod(shape), dtype="f4").reshape(shape)


def factors(module: str, rank: int = 4, rows: int = 8, columns: int = 6) -> dict[str, Array]:
    return {f"{module}.lora_A.weight": array(rank, columns), f"{module}.lora_B.weight": array(rows, rank)}


def read(*tensors: Mapping[str, Array], **config: Any) -> Adapter[Array]:
    named = {f"base_model.model.{name}": value for each in tensors for name, value in each.items()}
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "peft_version": "0.21.2", **config}
    return read_adapter(fields, named, lambda tensor: tensor.shape, "a")


def on(
    shapes: Shapes, *tensors: Mapping[str, Array], base: dict[str, Any] | None = None, **config: Any
) -> Placed[Array]:
    return place(read(*tensors, **config), shapes, base or {}, "BASE")


def test_same_names() -> None:
    placed = on(LAYERS, factors("model.layers.0.q"), factors("model.layers.1.v"))
    assert (
        list(placed.changes) == ["model.layers.0.q.weight", "model.layers.1.v.weight"] and placed.modules == 2
    )
    assert placed.notes == ("a: 2 of 2 adapter modules placed",)


@pytest.mark.parametrize("prefix", ["transformer.", "a.b.", "unet/", "0_Transformer/model."])
def test_by_how_names_end(prefix: str) -> None:
    longer = {prefix + name: shape for name, shape in LAYERS.items()}
    note = "a: 1 of 1 adapter modules placed by how their names end"
    placed = on(longer, factors("model.layers.0.q"))
    assert list(placed.changes) == [f"{prefix}model.layers.0.q.weight"] and placed.notes == (note,)
    placed = on(LAYERS, factors(f"{prefix.replace('/', '.')}model.layers.0.q"))
    assert list(placed.changes) == ["model.layers.0.q.weight"] and placed.notes == (note,)


REFUSED: dict[str, tuple[Shapes, str]] = {
    "no layer": ({"model.layers.1.q.weight": (8, 6)}, "1 of 1 adapter modules have no place in BASE: 'model.layers.0.q'"),
    "two towers": (
        {"text.model.layers.0.q.weight": (8, 6), "vision.model.layers.0.q.weight": (8, 6)},
        "1 of 1 adapter modules have no place in BASE",
    ),
    "another tower": ({"vision.layers.0.q.weight": (8, 6)}, "have no place"),
    "a part of a component": ({"mymodel.layers.0.q.weight": (8, 6)}, "have no place"),
    "the end of a component": ({"odel.layers.0.q.weight": (8, 6)}, "have no place"),
    "a tensor of one component": ({"weight": (8, 6)}, "have no place"),
    "another shape": (
        {"model.layers.0.q.weight": (8, 7)},
        "model.layers.0.q.weight: shape (8, 6), expected (8, 7) as 'model.layers.0.q.weight' in BASE",
    ),
    "another number of dimensions": ({"model.layers.0.q.weight": (48,)}, "expected (48,)"),
    "a convolution": ({"model.layers.0.q.weight": (8, 6, 1)}, "expected (8, 6, 1)"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_no_place(shapes: Shapes, problem: str) -> None:
    with pytest.raises(InputError, match=rf"^a: .*{re.escape(problem)}"):
        on(shapes, factors("model.layers.0.q"))


def test_all_that_have_no_place_are_counted() -> None:
    with pytest.raises(
        InputError,
        match=r"4 of 6 adapter modules .* 'x\.0', 'x\.1', 'x\.2' and 1 more \(its config\.json has no arch",
    ):
        on(
            LAYERS,
            *(factors(f"x.{k}") for k in range(4)),
            factors("model.layers.0.q"),
            factors("model.layers.0.k"),
        )


def test_two_changes_of_a_tensor() -> None:
    with pytest.raises(
        InputError, match=r"layers\.0\.q\.weight and x\.layers\.0\.q\.weight are both 'layers\.0\.q\.weight'"
    ):
        on({"layers.0.q.weight": (8, 6)}, factors("x.layers.0.q"), factors("layers.0.q"))


def test_tied_output() -> None:
    shapes: Shapes = {"model.embed_tokens.weight": (9, 6), **LAYERS}
    head = factors("lm_head", rows=9)
    with pytest.raises(InputError, match=r"'lm_head' has no tensor in BASE, which ties it to its embedding"):
        on(shapes, head, base={"tie_word_embeddings": True})
    with pytest.raises(InputError, match=r"have no place in BASE: 'lm_head'"):
        on(shapes, head, base={"tie_word_embeddings": False})
    embedding = {
        "model.embed_tokens.lora_embedding_A": array(4, 9),
        "model.embed_tokens.lora_embedding_B": array(6, 4),
    }
    first, _ = on(shapes, embedding, base={"tie_word_embeddings": True}).notes
    assert first == "a: model.embed_tokens.weight is the output layer of BASE, too, which changes with it"
    own = {**shapes, "lm_head.weight": (9, 6)}
    assert len(on(own, embedding, head, base={"tie_word_embeddings": True}).notes) == 1


def test_copies() -> None:
    tensors = {
        "e.lora_embedding_A": array(4, 9),
        "e.lora_embedding_B": array(6, 4),
        "e.base_layer.weight": array(9, 6),
    }
    placed = on({"m.e.weight": (9, 6)}, tensors)
    assert list(placed.copies) == ["m.e.weight"] == list(placed.changes)
    resized = {**tensors, "e.base_layer.weight": array(11, 6), "e.lora_embedding_A": array(4, 11)}
    with pytest.raises(InputError, match=r"shape \(11, 6\), expected \(9, 6\)"):
        on({"m.e.weight": (9, 6)}, resized)
    resized["e.lora_embedding_A"] = array(4, 9)
    with pytest.raises(
        InputError, match=r"a copy of 'e\.weight' of shape \(11, 6\), .* a resized embedding is not merged"
    ):
        on({"m.e.weight": (9, 6)}, resized)


def test_rows() -> None:
    tokens = {"e.token_adapter.trainable_tokens_delta": array(2, 6)}
    placed = on({"e.weight": (9, 6)}, tokens, trainable_token_indices=[8, 0])
    [change] = placed.changes.values()
    assert isinstance(change, Replacement) and change.rows == (8, 0)
    for shape in ((8, 6), (9, 7), (9, 6, 1)):
        with pytest.raises(InputError, match="rows up to 8 of 6 elements"):
            on({"e.weight": shape}, tokens, trainable_token_indices=[8, 0])


def test_whole_tensors() -> None:
    assert list(on({"m.n.weight": (6,)}, {"n.weight": array(6)}, modules_to_save=["n"]).changes) == [
        "m.n.weight"
    ]
    with pytest.raises(InputError, match=r"n\.weight: shape \(6,\), expected \(7,\)"):
        on({"m.n.weight": (7,)}, {"n.weight": array(6)}, modules_to_save=["n"])


def transposed(placed: Placed[Array]) -> dict[str, bool]:
    return {name: change.transposed for name, change in placed.changes.items() if isinstance(change, Product)}


def test_fan_in_fan_out_by_shape() -> None:
    """PEFT sets it by the type of each module, and saves that of the last."""
    shapes: Shapes = {"q.weight": (6, 8), "head.weight": (8, 6), "s.weight": (5, 5)}
    two, square = (factors("q"), factors("head")), factors("s", rows=5, columns=5)
    for flag in (False, True):
        assert transposed(on(shapes, *two, fan_in_fan_out=flag)) == {"q.weight": True, "head.weight": False}
        assert transposed(on(shapes, square, fan_in_fan_out=flag)) == {"s.weight": flag}
        with pytest.raises(
            InputError,
            match=r"s\.weight: square, and fan_in_fan_out of the configuration is not what (q|head)",
        ):
            on(shapes, *two, square, fan_in_fan_out=flag)
    assert transposed(on(shapes, factors("q"), square, fan_in_fan_out=True)) == {
        "q.weight": True,
        "s.weight": True,
    }
    embedding = {"s.lora_embedding_A": array(4, 5), "s.lora_embedding_B": array(5, 4)}
    assert transposed(on(shapes, factors("q"), embedding)) == {"q.weight": True, "s.weight": True}


EXPERTS = {"target_parameters": ["experts.up", "experts.down"]}
NESTED = (factors("m.experts.base_layer", 12, 10, 6), factors("m.experts", 12, 6, 5))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_experts(swapped: bool, turned: bool) -> None:
    """Of three experts, by their shapes alone, in any order of names."""
    up, down = ((6, 10), (5, 6)) if turned else ((10, 6), (6, 5))
    first, second = ("down", "up") if swapped else ("up", "down")
    shapes: Shapes = {f"m.experts.{first}": (3, *up), f"m.experts.{second}": (3, *down)}
    placed = on(shapes, *NESTED, **EXPERTS)
    assert transposed(placed) == dict.fromkeys(shapes, turned) and placed.modules == 2
    for name, extent in ((first, 10), (second, 6)):
        product = placed.changes[f"m.experts.{name}"]
        assert isinstance(product, Product) and (product.b.shape[0], product.experts, product.rank) == (
            extent,
            3,
            4,
        )


def test_one_expert() -> None:
    [change] = on({"m.experts.up": (1, 8, 6)}, factors("m.experts"), **EXPERTS).changes.values()
    assert isinstance(change, Product) and (change.experts, change.shape) == (1, (1, 8, 6))


def test_a_convolution_beside_parameters() -> None:
    convolution = {"c.lora_A.weight": array(4, 5, 3), "c.lora_B.weight": array(7, 4, 1)}
    placed = on({"c.weight": (7, 5, 3), "x.up": (8, 6)}, convolution, factors("x"), target_parameters=["up"])
    assert set(placed.changes) == {"c.weight", "x.up"}


def test_experts_that_do_not_fit() -> None:
    good: Shapes = {"m.experts.up": (3, 10, 6), "m.experts.down": (3, 6, 5)}
    for shapes, problem in (
        ({**good, "m.experts.down": (3, 6, 4)}, "do not fit up (3, 10, 6), down (3, 6, 4) of BASE"),
        ({**good, "m.experts.up": (4, 10, 6)}, "do not fit"),
        ({"m.experts.up": (3, 10, 6)}, "1 of 2 adapter modules have no place in BASE: 'm.experts'"),
    ):
        with pytest.raises(InputError, match=re.escape(problem)):
            on(shapes, *NESTED, **EXPERTS)
    same = (factors("m.experts.base_layer", 12, 10, 6), factors("m.experts", 12, 10, 6))
    with pytest.raises(InputError, match=r"fit more than one of up \(3, 10, 6\), down \(3, 10, 6\)"):
        on({"m.experts.up": (3, 10, 6), "m.experts.down": (3, 10, 6)}, *same, **EXPERTS)
    assert list(on({"m.experts.up": (3, 10, 6)}, same[1], **EXPERTS).changes) == ["m.experts.up"]


@pytest.mark.parametrize(
    ("version", "model_type", "expected"),
    [
        ("0.18.1", "olmoe", True),
        ("0.19.0", "olmoe", False),
        ("0.21.2", "gpt_oss", True),
        ("1.0", "olmoe", False),
        (None, "olmoe", None),
    ],
)
def test_square_experts(version: str | None, model_type: str, expected: bool | None) -> None:
    def placed() -> Placed[Array]:
        return on(
            {"m.experts.up": (3, 6, 6)},
            factors("m.experts", 12, 6, 6),
            base={"model_type": model_type},
            peft_version=version,
            **EXPERTS,
        )

    if expected is None:
        with pytest.raises(InputError, match="square experts, and no peft_version"):
            placed()
    else:
        assert transposed(placed()) == {"m.experts.up": expected}


def test_parameters_of_two_dimensions() -> None:
    shapes: Shapes = {"q.weight": (8, 6), "s.weight": (5, 5), "x.up": (8, 6)}
    found = on(
        shapes, factors("q"), factors("s", rows=5, columns=5), target_parameters=["q.weight", "s.weight"]
    )
    assert transposed(found) == {"q.weight": False, "s.weight": False}
    # The name of a parameter alone is that of one in any module: the others are modules of target_modules.
    found = on(shapes, factors("q"), factors("x"), target_parameters=["up"], rank_pattern={"x.up": 4, "x": 3})
    assert set(found.changes) == {"q.weight", "x.up"}


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers loads into one parameter: experts, and rows of each."""
    shapes: Shapes = {f"f.{e}.{name}.weight": (5, 6) for e in range(3) for name in "ab"}
    parts = tuple(
        Part(f"f.{e}.{n}.weight", e, (5 * k, 5 * k + 5)) for k, n in enumerate("ab") for e in range(3)
    )
    locations = {
        "m.experts.up": Location((3, 10, 6), parts),
        "m.n.weight": Location((6, 8), (Part("f.n", transposed=True),)),
    }
    shapes["f.n"] = (8, 6)
    known = MemoryNames(locations, frozenset(), "5.0")
    monkeypatch.setattr(placing, "memory_names", lambda config, shapes, model_class: known)
    placed = on(shapes, factors("m.experts", 12, 10, 6), factors("m.n", rows=6, columns=8), **EXPERTS)
    assert placed.notes == ("a: 2 of 2 adapter modules placed by their names in memory (transformers 5.0)",)
    assert set(placed.changes) == set(shapes) and placed.modules == 2
    for e in range(3):
        for k, n in enumerate("ab"):
            product = placed.changes[f"f.{e}.{n}.weight"]
            assert isinstance(product, Product)
            assert (product.expert, product.rows, product.columns, product.transposed) == (
                e,
                (5 * k, 5 * k + 5),
                None,
                False,
            )
    old = on(shapes, factors("m.experts", 12, 6, 10), **EXPERTS).changes["f.1.b.weight"]
    assert isinstance(old, Product) and (old.rows, old.columns, old.transposed) == (None, (5, 10), True)
    assert transposed(on(shapes, factors("m.n", rows=6, columns=8)))["f.n"]
    with pytest.raises(
        InputError, match=r"m\.n\.weight: a whole tensor, but BASE has it in parts or transposed"
    ):
        on(
            shapes,
            factors("m.experts", 12, 10, 6),
            {"m.n.weight": array(6, 8)},
            modules_to_save=["n"],
            **EXPERTS,
        )


def test_why_names_in_memory_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object, shapes: object, model_class: str) -> None:
        raise Unknown("transformers, which knows names in memory, is not installed")

    monkeypatch.setattr(placing, "memory_names", refuse)
    with pytest.raises(
        InputError,
        match=r"no place in BASE: 'x\.q', 'q' \(transformers, which knows names in memory, is not installed\)$",
    ):
        on(LAYERS, factors("x.q"), factors("q"))


LARGE: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9}, {"text_config": {"n_layers": 2000}}, {"depths": [2, 10**6]}, {"vision_config": {"num_experts": 1 << 70}},
]  # fmt: skip


@pytest.mark.parametrize("config", LARGE)
def test_no_model_of_more_modules_than_tensors_is_made(config: dict[str, Any]) -> None:
    with pytest.raises(Unknown, match=r"its config\.json says .*, and it has 6 tensors"):
        memory_names({"architectures": ["LlamaForCausalLM"], **config}, LAYERS)
    with pytest.raises(Unknown, match="has no architectures"):
        memory_names(config, LAYERS)
