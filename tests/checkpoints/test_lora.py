"""What a LoRA adapter of PEFT changes, read from its configuration and keys; everything that is not understood is refused by name."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negmerge_fast.checkpoints.lora import Adapter, Product, Replacement, Shift, matrices, read_adapter
from negmerge_fast.checkpoints.placing import place
from negmerge_fast.core import regex
from negmerge_fast.core.errors import InputError

Array = np.ndarray[Any, Any]
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
Q = "model.layers.0.q_proj"


def array(*shape: int) -> Array:
    return np.arange(math.prod(shape), dtype="f4").reshape(shape)


def factors(module: str, rank: int = 4, rows: int = 8, columns: int = 6) -> dict[str, Array]:
    return {f"{module}.lora_A.weight": array(rank, columns), f"{module}.lora_B.weight": array(rows, rank)}


def read(tensors: Mapping[str, Array], prefix: str = PREFIX, **config: Any) -> Adapter[Array]:
    named = {prefix + name: value for name, value in tensors.items()}
    return read_adapter({**CONFIG, **config}, named, lambda tensor: tensor.shape, "a")


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_plain_factors(prefix: str) -> None:
    tensors = {**factors(Q), **factors("score", rows=2)}
    adapter = read(tensors, prefix, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    assert (adapter.name, adapter.modules, adapter.notes, adapter.copies) == ("a", 2, (), {})
    assert adapter.owner_of == {f"{Q}.weight": Q, "score.weight": "score"}
    product = adapter.changes[f"{Q}.weight"]
    assert isinstance(product, Product) and product.a is tensors[f"{Q}.lora_A.weight"]
    assert (product.rank, product.scale, product.transposed, product.experts) == (4, 1.5, False, 1)


SCALES: dict[str, tuple[dict[str, Any], int, float]] = {
    "rsLoRA": ({"use_rslora": True}, 4, 3.0),
    "no alpha": ({"lora_alpha": None}, 4, 1.0),
    "no alpha, rsLoRA": ({"lora_alpha": None, "use_rslora": True}, 4, 2.0),
    "negative": ({"lora_alpha": -2}, 4, -0.5),
    "zero": ({"lora_alpha": 0}, 4, 0.0),
    "a fraction": ({"lora_alpha": 0.5}, 4, 0.125),
    "rank": ({"rank_pattern": {"q_proj": 2}}, 2, 3.0),
    "rank, rsLoRA": ({"rank_pattern": {"q_proj": 9}, "use_rslora": True}, 9, 2.0),
    "alpha": ({"alpha_pattern": {"q_proj": 10}}, 4, 2.5),
    "the first of two": ({"alpha_pattern": {"layers.0.q_proj": 1, "q_proj": 2}}, 4, 0.25),
    "the first of two, the other way round": ({"alpha_pattern": {"q_proj": 2, "layers.0.q_proj": 1}}, 4, 0.5),
    "both": ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"model\.layers\.\d+\..*_proj": 12}}, 3, 4.0),
    "no alpha, rank": ({"rank_pattern": {"q_proj": 3}, "lora_alpha": None}, 3, 1.0),
    "a whole component only": ({"rank_pattern": {"proj": 9, "_proj": 9, "ayers.0.q_proj": 9}}, 4, 1.5),
    "not the end": ({"rank_pattern": {"layers.0": 9, "model": 9}}, 4, 1.5),
    "anchored": ({"rank_pattern": {"^layers.0.q_proj": 9, r"^model\.layers\.0\.q_proj": 2}}, 2, 3.0),
    "a dot is any character": ({"rank_pattern": {"layers.0.q.proj": 2}}, 2, 3.0),
    "alternatives": ({"rank_pattern": {"k_proj|q_proj": 2}}, 2, 3.0),
    "not in groups": ({"rank_pattern": {"xq_proj|k_proj": 2}}, 4, 1.5),
    "a number of a layer": ({"rank_pattern": {r"layers\.1\.q_proj": 9}}, 4, 1.5),
}  # fmt: skip


@pytest.mark.parametrize(("config", "rank", "scale"), SCALES.values(), ids=SCALES.keys())
def test_scales(config: dict[str, Any], rank: int, scale: float) -> None:
    adapter = read(factors(Q, rank), **config)
    product = adapter.changes[f"{Q}.weight"]
    assert isinstance(product, Product) and (product.rank, product.scale) == (rank, scale)
    assert (len(adapter.notes) == 1) == ("lora_alpha" in config and config["lora_alpha"] is None)


def test_hostile_patterns_end() -> None:
    deep = "a" * 200 + ".q"
    for pattern in ("(a+)+$b", "(.*a){20}b", "((a|aa)+)+x"):
        adapter = read(factors(deep), rank_pattern={pattern: 9}, alpha_pattern={pattern: 9})
        assert adapter.modules == 1
    for pattern, problem in (
        ("(", "no regular expression"),
        ("(?=a)", "assert"),
        ("(a)\\1", "groupref"),
        ("a{9999}", "repetitions"),
    ):
        with pytest.raises(InputError, match=rf"^a: rank_pattern: .*{problem}"):
            read(factors(Q), rank_pattern={pattern: 9})


def test_many_patterns_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of all patterns together."""
    monkeypatch.setattr(regex, "_MAX_STEPS", 50_000)
    modules = {key: t for k in range(100) for key, t in factors(f"layers.{k}.self_attn.q_proj").items()}
    with pytest.raises(InputError, match=r"rank_pattern or alpha_pattern: .* takes too long"):
        read(modules, rank_pattern={f"x{k}.*y.*z": 2 for k in range(50)})


def test_transposed() -> None:
    adapter = read(
        {**factors(Q), "e.lora_embedding_A": array(4, 9), "e.lora_embedding_B": array(3, 4)},
        fan_in_fan_out=True,
    )
    assert all(isinstance(c, Product) and c.transposed for c in adapter.changes.values())
    adapter = read({**factors(Q), "e.lora_embedding_A": array(4, 9), "e.lora_embedding_B": array(3, 4)})
    assert [c.transposed for c in adapter.changes.values() if isinstance(c, Product)] == [False, True]
    assert adapter.flexible == {f"{Q}.weight"}


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 1, 3)])
def test_convolutions(kernel: tuple[int, ...]) -> None:
    tensors = {"c.lora_A.weight": array(4, 5, *kernel), "c.lora_B.weight": array(7, 4, *([1] * len(kernel)))}
    product = read(tensors, fan_in_fan_out=True).changes["c.weight"]
    assert isinstance(product, Product) and not product.transposed
    left, right = matrices(product, product.a, product.b)
    assert left.shape == (1, 7, 4) and right.shape == (1, 4, 5 * math.prod(kernel))
    with pytest.raises(InputError, match="a convolution in groups"):
        read({**tensors, "c.lora_B.weight": array(7, 2, *([1] * len(kernel)))})
    with pytest.raises(InputError, match="a kernel of 1"):
        read({**tensors, "c.lora_B.weight": array(7, 4, *([2] * len(kernel)))})


def test_biases() -> None:
    tensors = {**factors(Q), f"{Q}.lora_B.bias": array(8)}
    changes = read(tensors, lora_bias=True).changes
    assert changes[f"{Q}.bias"] == Shift(tensors[f"{Q}.lora_B.bias"], 1.5)
    for bias in ("all", "lora_only"):
        tensors = {
            **factors(Q),
            f"{Q}.base_layer.bias": array(8),
            "k_proj.bias": array(3),
            "relative_bias.weight": array(3, 2),
        }
        adapter = read(tensors, bias=bias)
        assert {n for n, c in adapter.changes.items() if isinstance(c, Replacement)} == {
            f"{Q}.bias",
            "k_proj.bias",
            "relative_bias.weight",
        }
        assert adapter.modules == 3
    for config in ({}, {"bias": "none"}, {"bias": None}):
        with pytest.raises(InputError, match=r"'base_model\.model\.k_proj\.bias': not understood"):
            read({**factors(Q), "k_proj.bias": array(3)}, **config)


def test_saved_modules() -> None:
    tensors = {
        **factors(Q),
        "score.weight": array(3, 4),
        "score.bias": array(3),
        "a.norm.weight": array(4),
        "bn.running_mean": array(2),
    }
    adapter = read(tensors, modules_to_save=["score", "norm", "bn"])
    assert adapter.modules == 4 and adapter.changes["bn.running_mean"] == Replacement(
        tensors["bn.running_mean"]
    )
    with pytest.raises(
        InputError, match=r"'base_model\.model\.a\.norm\.weight': not understood: no factor, and neither"
    ):
        read(tensors, modules_to_save=["score", "bn"])


def test_biases_of_saved_modules() -> None:
    """With bias "all" PEFT saves them twice, beside the base's."""
    tensors = {
        **factors(Q),
        "score.weight": array(3, 4),
        "score.bias": array(3),
        "score.modules_to_save.bias": array(3),
        "score.original_module.bias": array(3),
    }
    adapter = read(tensors, modules_to_save=["score"], bias="all")
    assert adapter.changes["score.bias"] == Replacement(tensors["score.bias"]) and adapter.modules == 2
    assert adapter.copies == {"score.bias": tensors["score.original_module.bias"]}
    del tensors["score.bias"]
    adapter = read(tensors, modules_to_save=["score"], bias="all")
    assert adapter.changes["score.bias"] == Replacement(tensors["score.modules_to_save.bias"])


def test_embeddings_that_were_saved_whole() -> None:
    """save_embedding_layers: an untouched embedding, or the copy of the base's beside factors of it."""
    adapter = read({**factors(Q), "embed.weight": array(9, 3)})
    assert isinstance(adapter.changes["embed.weight"], Replacement)
    tensors = {
        "e.lora_embedding_A": array(4, 9),
        "e.lora_embedding_B": array(3, 4),
        "e.base_layer.weight": array(9, 3),
    }
    adapter = read(
        {
            **tensors,
            **factors("head"),
            "head.base_layer.weight": array(8, 6),
            "head.base_layer.bias": array(8),
        }
    )
    assert set(adapter.copies) == {"e.weight", "head.weight", "head.bias"} and adapter.modules == 2
    adapter = read(
        {**factors(Q), "s.original_module.weight": array(2, 3), "s.weight": array(2, 3)},
        modules_to_save=["s"],
    )
    assert set(adapter.copies) == {"s.weight"} == set(adapter.changes) - {f"{Q}.weight"}


def test_trained_tokens() -> None:
    rows = array(3, 4)
    tensors = {**factors(Q), "m.embed.token_adapter.trainable_tokens_delta": rows}
    for indices in ([5, 0, 2], {"embed": [5, 0, 2]}, {"m.embed": (5, 0, 2)}, {"x": [1], "embed": [5, 0, 2]}):
        assert read(tensors, trainable_token_indices=indices).changes["m.embed.weight"] == Replacement(
            rows, (5, 0, 2)
        )
    adapter = read(
        {**tensors, "m.embed.token_adapter.base_layer.weight": array(9, 4)}, trainable_token_indices=[5, 0, 2]
    )
    assert set(adapter.copies) == {"m.embed.weight"}
    for indices, problem in (
        ([5, 0], "expected 2 rows"), ([5, 0, 0], "different numbers"), ([5, 0, -1], "different numbers"), ([5, 0, True], "numbers"),
        ({"mbed": [5, 0, 2]}, "no trainable_token_indices of 'm.embed'"), (None, "no trainable_token_indices"), (3, "numbers"),
        ({"embed": 3}, "numbers"), ([5, 0, "2"], "numbers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            read(tensors, trainable_token_indices=indices)


def test_target_parameters() -> None:
    tensors = {**factors("m.experts.base_layer", 12, 10), **factors("m.experts", 6), **factors(Q)}
    config = {
        "target_parameters": ["experts.down", "m.experts.up"],
        "rank_pattern": {"up": 2},
        "peft_version": "0.19.1",
    }
    adapter = read(tensors, **config)
    [(module, nested)] = adapter.nested.items()
    assert module == "m.experts" and adapter.modules == 3 and nested.swaps
    assert [level[0].shape for level in nested.levels] == [(12, 6), (6, 6)], (
        "the deepest is the module's first parameter"
    )
    assert [(p.name, p.rank, p.scale) for p in nested.parameters] == [("down", 4, 1.5), ("up", 2, 3.0)]
    assert read(tensors, **{**config, "peft_version": "0.18.1"}).nested[module].swaps is False
    assert read(tensors, **{**config, "peft_version": None}).nested[module].swaps is None
    with pytest.raises(
        InputError, match=r"nested 1 deep, but target_parameters names 1 parameters of 'm\.experts'"
    ):
        read(tensors, target_parameters=["experts.down"])
    with pytest.raises(InputError, match=r"nested 1 deep, but target_parameters names 0"):
        read(factors("m.experts.base_layer", 12))


ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "DoRA": ({"use_dora": True}, "use_dora is set (DoRA)"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "kasa_config is set"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
    "QALoRA": ({"use_qalora": True}, "use_qalora is set"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
    "VeLoRA": ({"velora_config": {"scale": 1.0}}, "velora_config is set"),
    "Monte Carlo": ({"monteclora_config": {"num_samples": 8}}, "monteclora_config is set"),
    "layers": ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication is set"),
    "a new variant": ({"use_xlora": True}, "'use_xlora' is True, expected only fields of LoraConfig that are known here"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', expected an adapter of the unchanged base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "unchanged base"),
    "CorDA": ({"init_lora_weights": "corda"}, "unchanged base"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "unchanged base"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "unchanged base"),
    "MiCA": ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica', expected true, false, gaussian"),
    "another start": ({"init_lora_weights": 3}, "init_lora_weights is 3"),
    "no rank": ({"r": 0}, "r is 0, expected a rank of at least 1"),
    "a true rank": ({"r": True}, "r is True"),
    "a rank that is a text": ({"r": "4"}, "r is '4'"),
    "a huge rank": ({"r": 1 << 40}, "r is 1099511627776"),
    "half a rank": ({"r": 4.0}, "r is 4.0"),
    "alpha that is a text": ({"lora_alpha": "6"}, "lora_alpha is '6', expected a number"),
    "infinite alpha": ({"lora_alpha": 1e400}, "lora_alpha is inf"),
    "a huge alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1"),
    "no pattern": ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj'], expected an object"),
    "a pattern of none": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0"),
    "a pattern of a text": ({"alpha_pattern": {"q_proj": "6"}}, "alpha_pattern['q_proj'] is '6'"),
    "a flag": ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
    "another flag": ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1"),
    "bias": ({"bias": "some"}, "bias is 'some', expected none, all or lora_only"),
    "modules": ({"modules_to_save": "score"}, "modules_to_save is 'score', expected a list of names"),
    "parameters": ({"target_parameters": [3]}, "target_parameters is [3], expected a list of names"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "problem"), ODD_CONFIGS.values(), ids=ODD_CONFIGS.keys())
def test_configurations_that_are_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=rf"^a: .*{re.escape(problem)}"):
        read(factors(Q), **config)


def test_fields_that_change_nothing() -> None:
    harmless = {
        "target_modules": ["q_proj"], "exclude_modules": ["x"], "layers_to_transform": [0], "layers_pattern": "layers", "revision": "main",
        "base_model_name_or_path": "org/name", "peft_version": "0.21.2", "megatron_core": "megatron.core", "eva_config": {"rho": 2.0},
        "inference_mode": True, "qalora_group_size": 16, "init_lora_weights": "eva", "auto_mapping": {"x": "y"}, "use_dora": False,
        "corda_config": {"x": 1}, "loftq_config": {"loftq_bits": 4}, "an_unknown_field": None, "another": False, "ensure_weight_tying": True,
    }  # fmt: skip
    assert read(factors(Q), **harmless).modules == 1


ODD_KEYS: dict[str, tuple[dict[str, Array], str]] = {
    "A only": ({f"{Q}.lora_A.weight": array(4, 6)}, "lora_A.weight': without lora_B.weight"),
    "B only": ({f"{Q}.lora_B.weight": array(8, 4)}, "lora_B.weight': without lora_A.weight"),
    "half an embedding": ({"e.lora_embedding_B": array(8, 4)}, "without lora_embedding_A"),
    "another rank": (factors(Q, 3), "lora_A.weight': shape (3, 6), expected (4, …) for the rank 4"),
    "another rank of B": ({**factors(Q), f"{Q}.lora_B.weight": array(8, 5)}, "lora_B.weight': shape (8, 5), expected (…, 4)"),
    "a vector": ({**factors(Q), f"{Q}.lora_A.weight": array(4)}, "shape (4,)"),
    "nothing": ({**factors(Q), f"{Q}.lora_A.weight": array(4, 0)}, "shape (4, 0)"),
    "a cube": ({**factors(Q), f"{Q}.lora_A.weight": array(4, 3, 2)}, "lora_B.weight': shape (8, 4), expected (…, 4, …)"),
    "a bias of B": ({**factors(Q), f"{Q}.lora_B.bias": array(8)}, "expected lora_bias in the configuration"),
    "DoRA": ({**factors(Q), f"{Q}.lora_magnitude_vector": array(8)}, "the magnitudes of DoRA"),
    "the name of an adapter": ({f"{Q}.lora_A.default.weight": array(4, 6)}, "with the name of its adapter"),
    "LoHa": ({f"{Q}.hada_w1_a": array(4, 6)}, "a factor of LoHa or LoKr"),
    "kohya": ({"lora_unet_x.lora_down.weight": array(4, 6)}, "as kohya's scripts name it"),
    "kohya's alpha": ({"lora_te1_x.alpha": array(1)}, "as kohya's scripts name it"),
    "another C": ({**factors(Q), f"{Q}.lora_C.weight": array(4)}, "lora_C.weight': not understood"),
    "another tensor": ({**factors(Q), "x.y": array(4)}, "x.y': not understood"),
    "two changes": ({**factors(Q), f"{Q}.weight": array(8, 6)}, "changes 'model.layers.0.q_proj.weight', which another tensor"),
    "attention": (factors("m.attn.base_layer.out_proj"), "of torch.nn.MultiheadAttention"),
    "none": ({}, "no tensors"),
    "copies": ({"e.base_layer.weight": array(3, 4)}, "no factors"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "problem"), ODD_KEYS.values(), ids=ODD_KEYS.keys())
def test_keys_that_are_refused(tensors: dict[str, Array], problem: str) -> None:
    with pytest.raises(InputError, match=rf"^a: .*{re.escape(problem)}"):
        read(tensors)


def test_diffusers_without_a_prefix() -> None:
    with pytest.raises(InputError, match="a LoRA factor as diffusers save it"):
        read(factors("unet.down.to_q"), prefix="")
    assert read(factors("transformer.h.0.attn.c_attn"), prefix="").modules == 1, "of GPT-2"


def test_other_names() -> None:
    adapter = read(
        {**factors(Q), **factors("m.experts.base_layer", 12), **factors("m.experts", 6)},
        target_parameters=["experts.up", "experts.down"],
    )
    renamed = adapter.renamed(lambda name: f"x.{name}")
    assert list(renamed.changes) == [f"x.{Q}.weight"] == list(renamed.owner_of) == list(renamed.flexible)
    assert list(renamed.nested) == ["x.m.experts"]
    with pytest.raises(InputError, match="rename makes one name of two"):
        read({**factors(Q), **factors("k")}).renamed(lambda name: "same")


def test_matrices_of_experts() -> None:
    """As PEFT writes them: 'o r e, e r i -> e o i', or '-> e i o'."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 5)), rng.standard_normal((4, 6))
    product = Product(a, b, 2, 1.0, experts=3)
    expected = np.einsum("ore,eri->eoi", b.reshape(4, 2, 3), a.reshape(3, 2, 5))

    def expanded(product: Product[Array]) -> Array:
        left, right = matrices(product, a, b)
        return left @ right

    np.testing.assert_allclose(expanded(product), expected, rtol=1e-12)
    np.testing.assert_allclose(expanded(product._replace(expert=1)), expected[1:2], rtol=1e-12)
    np.testing.assert_allclose(expanded(product._replace(rows=(1, 3))), expected[:, 1:3], rtol=1e-12)
    np.testing.assert_allclose(expanded(product._replace(columns=(2, 5))), expected[:, :, 2:5], rtol=1e-12)
    turned = expected.swapaxes(1, 2)
    np.testing.assert_allclose(expanded(product._replace(transposed=True)), turned, rtol=1e-12)
    np.testing.assert_allclose(
        expanded(product._replace(transposed=True, columns=(2, 5))), turned[:, 2:5], rtol=1e-12
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["q_proj", "all", "LORA", ".*", "eva"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q_proj", "e", ".*", "("]) | st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
FIELDS = sorted(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "peft_type",
     "trainable_token_indices", "target_parameters", "init_lora_weights", "peft_version", "use_dora", "target_modules", "x"],
)  # fmt: skip
MODULES = st.sampled_from(
    ["", "q_proj", "a.q_proj", "e", "m.experts", "m.experts.base_layer", "m.base_layer.out_proj"]
)
KINDS = st.sampled_from(
    ["lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta",
     "weight", "bias", "base_layer.weight", "base_layer.bias", "original_module.weight", "lora_magnitude_vector", "modules_to_save.weight", ""],
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=4).map(tuple)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
    st.lists(st.tuples(st.sampled_from([PREFIX, "", "unet."]), MODULES, KINDS, SHAPES), max_size=6),
)
def test_anything_is_read_or_refused(
    config: dict[str, Any], given_tensors: list[tuple[str, str, str, tuple[int, ...]]]
) -> None:
    tensors = {f"{prefix}{module}.{kind}": shape for prefix, module, kind, shape in given_tensors}
    try:
        adapter = read_adapter({**CONFIG, **config}, tensors, lambda shape: shape, "a")
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    shapes = dict.fromkeys((*adapter.changes, *adapter.copies, "m.experts.q_proj"), (8, 4))
    with contextlib.suppress(InputError):
        placed = place(adapter, shapes, {}, "BASE")
        assert placed.modules == adapter.modules and placed.changes
