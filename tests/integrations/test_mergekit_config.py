"""mergekit's YAML: what it becomes here, and that all else is refused by name. tests/libraries compares results with mergekit's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from negmerge_fast.core.choices import Election, Gate, Reduction
from negmerge_fast.core.errors import InputError
from negmerge_fast.integrations import mergekit_config
from negmerge_fast.integrations.mergekit_config import MergekitConfig, parse, read_config

MODELS = [{"model": "ft-1"}, {"model": "ft-2"}]


def config(merge_method: str = "ties", **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": merge_method, "base_model": "base", "models": copy.deepcopy(MODELS), "parameters": {"weight": 1.0}, **changes,
    }  # fmt: skip


def parsed(merge_method: str, **parameters: Any) -> MergekitConfig:
    return parse(config(merge_method, parameters=parameters), "c.yml")


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("""
merge_method: ties
base_model: org/base@abc
models:
  - model: org/base@abc  # as mergekit's own examples list it
  - model: ft-1
    parameters: {density: 0.3, weight: 0.5}
  - model: ft-2
    parameters: {weight: 1e-3}
parameters: {density: .4, normalize: false, lambda: 0.7, int8_mask: true, rescale: null}
dtype: float32
out_dtype: torch.bfloat16
tokenizer_source: null
""")
    found = read_config(path)
    assert (found.base, found.finetuned) == ("org/base@abc", ("ft-1", "ft-2"))
    assert (found.scale, found.dtype, found.out_dtype) == (-0.7, "F32", "BF16")
    method = found.method
    assert (method.name, method.gate, method.election, method.reduction) == (
        "ties", Gate.MAGNITUDE, Election.SIGN_OF_SUM, Reduction.SUM,
    )  # fmt: skip
    assert (method.density, method.over, method.model_weights) == ((0.3, 0.4), "tensor", (0.5, 1e-3))
    assert found.notes == ("int8_mask: true changes nothing here, nor the result of mergekit",)


# By method of mergekit: its gate, election and reduction where nothing but weights is given.
USUAL = {
    "task_arithmetic": (Gate.NONE, Election.ALL, Reduction.SUM),
    "ties": (Gate.NONE, Election.SIGN_OF_SUM, Reduction.MEAN),
    "breadcrumbs": (Gate.NONE, Election.ALL, Reduction.SUM),
    "breadcrumbs_ties": (Gate.NONE, Election.SIGN_OF_SUM, Reduction.SUM),
    "dare_linear": (Gate.NONE, Election.ALL, Reduction.SUM),
    "dare_ties": (Gate.NONE, Election.SIGN_OF_SUM, Reduction.SUM),
}


@pytest.mark.parametrize("name", USUAL)
def test_what_mergekit_does_if_nothing_is_given(name: str) -> None:
    """A density of 1 is no gate: nothing has to be sorted, and nothing is random."""
    for parameters in ({"weight": 1}, {"weight": 1, "density": 1.0}):
        if name == "task_arithmetic" and "density" in parameters:
            continue
        found = parsed(name, **parameters)
        method = found.method
        assert (method.gate, method.election, method.reduction) == USUAL[name]
        assert found.scale == -1 and method.model_weights is None and found.notes == ()
        assert not method.needs_bounds
        assert parsed(name, **parameters, normalize=True).method.reduction == Reduction.MEAN
        assert parsed(name, **parameters, normalize=False).method.reduction == Reduction.SUM


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(name: str) -> None:
    method = parsed(name, weight=0.5, density=0.9, gamma=0.02).method
    assert (method.gate, method.density, method.gamma, method.over) == (Gate.MAGNITUDE, 0.9, 0.02, "tensor")
    assert method.election == USUAL[name][1] and method.model_weights == (0.5, 0.5)
    assert parsed(name, weight=1, density=0.9).method.gamma == 0.01


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare(name: str) -> None:
    rescaled = parsed(name, weight=0.5, density=0.25)
    assert rescaled.method.gate == Gate.RANDOM and rescaled.method.drop == 0.75
    choices = rescaled.method.choices(2)
    assert choices is not None and choices.factors == (2.0, 2.0) and choices.keep == (1 << 30, 1 << 30)
    assert "divided by its density" in rescaled.notes[0]
    plain = parsed(name, weight=0.5, density=0.25, rescale=False)
    choices = plain.method.choices(2)
    assert choices is not None and choices.factors == (0.5, 0.5) and "density" not in plain.notes[0]


def test_linear_has_its_base_among_the_models() -> None:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", 2), ("c", 5))]
    given = {"merge_method": "linear", "models": models}
    for base, finetuned, weights in ((None, ("b", "c"), (0.25, 0.625)), ("b", ("a", "c"), (0.125, 0.625))):
        found = parse({**given, "base_model": base}, "c.yml")
        assert (found.base, found.finetuned, found.scale) == (base or "a", finetuned, -1)
        assert found.method.model_weights == weights and found.method.reduction == Reduction.SUM
    # One that is not among them is one more, with the weight of all.
    found = parse(config("linear"), "c.yml")
    assert (found.base, found.finetuned, found.method.model_weights) == (
        "base",
        ("ft-1", "ft-2"),
        (1 / 3, 1 / 3),
    )
    models[2]["parameters"]["weight"] = -2
    found = parse({**given, "parameters": {"normalize": False}}, "c.yml")
    assert found.method.model_weights == (2, -2)


REFUSED = {
    "no mapping": (["ties"], "c.yml: ['ties'], expected keys and values"),
    "no method": (config(merge_method=None), "merge_method: None, expected one of linear, task_arithmetic,"),
    "other method": (config("slerp"), "merge_method: 'slerp', expected one of linear,"),
    "method in a list": (config(["ties"]), "merge_method: ['ties'], expected one of"),  # type: ignore[arg-type]
    "unknown key": (config(weights=1), "c.yml: key 'weights' is not served, expected merge_method, base_model,"),
    "slices": (config(slices=[{}]), "c.yml: key 'slices' is not served"),
    "modules": (config(modules={}), "c.yml: key 'modules' is not served"),
    "tokenizer_source": (config(tokenizer_source="union"), "c.yml: key 'tokenizer_source' is not served"),
    "tokenizer": (config(tokenizer={"source": "base"}), "c.yml: key 'tokenizer' is not served"),
    "chat_template": (config(chat_template="auto"), "c.yml: key 'chat_template' is not served"),
    "no base": (config(base_model=None), "c.yml: base_model: missing, expected a path or a name of the hub"),
    "base that is no text": (config(base_model={"model": "b"}), "base_model: {'model': 'b'}, expected a path"),
    "adapter": (config(models=[{"model": "a+b"}]), "models[0]: model: 'a+b': a model with an adapter is not served"),
    "no models": (config(models=None), "c.yml: models: None, expected a list"),
    "only the base": (config(models=[{"model": "base"}]), "models: no model but the base, expected at least one"),
    "no model": (config(models=[{"parameters": {}}]), "models[0]: model: None, expected a path"),
    "model twice": (config(models=[*MODELS, MODELS[0]]), "models[2]: model: 'ft-1' again, expected each model once"),
    "key of a model": (
        config(models=[{"model": "a", "layer_range": [0, 1]}]),
        "models[0]: key 'layer_range' is not served, expected model, parameters",
    ),
    "no weight": (config(parameters={}), "c.yml: weight of 'ft-1': missing, expected a number"),
    "no weight of linear's base": (
        config("linear", models=[{"model": "ft-1", "parameters": {"weight": 1}}], parameters={}),
        "weight of 'base': missing",
    ),
    "gradient": (config(parameters={"weight": [0, 1]}), "weight of 'ft-1': [0, 1], expected one finite number (gradients"),
    "filter": (
        config(parameters={"weight": [{"filter": "mlp", "value": 1}, {"value": 0}]}),
        "weight of 'ft-1': [{'filter': 'mlp', 'value': 1}, {'value': 0}], expected one finite number (gradients and filters",
    ),
    "truth": (config(parameters={"weight": True}), "weight of 'ft-1': True, expected one finite number"),
    "text": (config(parameters={"weight": "much"}), "weight of 'ft-1': 'much', expected one finite number"),
    "nan": (config(parameters={"weight": float("nan")}), "weight of 'ft-1': nan, expected one finite number"),
    "lambda": (config(parameters={"weight": 1, "lambda": [1]}), "parameters: lambda: [1], expected one finite number"),
    "lambda of a model": (
        config(models=[{"model": "a", "parameters": {"lambda": 1}}]),
        "models[0]: parameters: key 'lambda' is not served, expected weight, density",
    ),
    "density of task_arithmetic": (
        config("task_arithmetic", parameters={"weight": 1, "density": 0.5}),
        "parameters: key 'density' is not served, expected normalize, lambda, rescale, int8_mask, weight",
    ),
    "gamma of ties": (config(parameters={"weight": 1, "gamma": 0}), "parameters: key 'gamma' is not served"),
    "epsilon": (config(parameters={"weight": 1, "epsilon": 0}), "parameters: key 'epsilon' is not served"),
    "lambda of linear": (config("linear", parameters={"weight": 1, "lambda": 1}), "key 'lambda' is not served"),
    "density 0": (config(parameters={"weight": 1, "density": 0}), "density of 'ft-1': 0.0, expected more than 0 and at most 1"),
    "density of DARE": (
        config("dare_ties", parameters={"weight": 1, "density": 1.1}),
        "density of 'ft-1': 1.1, expected more than 0 and at most 1",
    ),
    "gamma": (
        config("breadcrumbs", parameters={"weight": 1, "density": 0.5, "gamma": 1}),
        "c.yml: gamma: 1.0, expected at least 0 and less than 1",
    ),
    "two gammas": (
        config(
            "breadcrumbs",
            models=[{"model": m, "parameters": {"gamma": g}} for m, g in (("a", 0.1), ("b", 0.2))],
            parameters={"weight": 1, "density": 0.5},
        ),
        "c.yml: gamma: [0.1, 0.2], expected the same number for all models",
    ),
    "normalize": (config(parameters={"weight": 1, "normalize": 1}), "parameters: normalize: 1, expected true or false"),
    "int8_mask": (config(parameters={"weight": 1, "int8_mask": "no"}), "int8_mask: 'no', expected true or false"),
    "rescaled ties": (
        config(parameters={"weight": 1, "rescale": True}),
        "parameters: rescale: true is not served with ties, expected false",
    ),
    "DARE that is normalized, but not rescaled": (
        config("dare_ties", parameters={"weight": 1, "density": 0.5, "rescale": False, "normalize": True}),
        "normalize: true with rescale: false is not served",
    ),
    "weights of both signs": (
        config(models=[{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", -1))]),
        "weight: of both signs, with normalize: true, expected one sign",
    ),
    "weights that cancel": (
        config(
            "task_arithmetic",
            models=[{"model": m, "parameters": {"weight": w}} for m, w in (("a", 1), ("b", -1))],
            parameters={"normalize": True},
        ),
        "weight: the sum is 0, with normalize: true, expected another one",
    ),
    "linear weights that cancel": (config("linear", parameters={"weight": 0}), "weight: the sum is 0"),
    "linear, not normalized": (
        config("linear", parameters={"weight": 1, "normalize": False}),
        "normalize: false, and weights whose sum is 3, expected true or a sum of 1",
    ),
    "dtype": (config(dtype="int64"), "dtype: 'int64', expected one of float64, float32, float16, bfloat16"),
    "out_dtype": (config(out_dtype=["float32"]), "out_dtype: ['float32'], expected one of float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        parse(given, "c.yml")
    assert message in str(caught.value) and str(caught.value).startswith("c.yml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmerge_method: linear\n", "key 'merge_method': twice, expected once"),
        ("parameters: {weight: 1, weight: 2}", "key 'weight': twice"),
        ("a: [1", "expected YAML"),
        ("a: !!python/object:os.system {}", "expected YAML"),
        ("? [1, 2]\n: 3", "expected YAML"),
        ("[" * 2000, "expected YAML"),
        ("", "None, expected keys and values"),
        ("#" * (1 << 20) + "\n", "more than 1,048,576 characters"),
    ],
)
def test_files_that_are_no_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_config(tmp_path / "c.yml")
    assert message in str(caught.value) and str(tmp_path / "c.yml") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_no_such_file_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yml: no such file$"):
        read_config(tmp_path / "none.yml")
    (tmp_path / "c.yml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match=r"expected YAML$"):
        read_config(tmp_path / "c.yml")


def test_keys_of_a_merged_mapping_may_be_given_again(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: a\n  parameters: &p {weight: 2}\n"
        "- model: b\n  parameters: {<<: *p, weight: 3}\n"
    )
    assert read_config(tmp_path / "c.yml").method.model_weights == (2, 3)


# Stored types of the base and of models, dtype and out_dtype; and what is said, or nothing.
TYPES = [
    ("F32", ("F32", "F32"), None, None, ""),
    ("BF16", ("BF16",), None, None, ""),
    ("BF16", ("BF16",), "BF16", None, ""),
    ("BF16", ("BF16",), "F32", "BF16", ""),  # as this package computes
    ("BF16", ("F32",), "F32", "BF16", ""),
    ("F64", ("F32",), "F64", None, "models in float64, float32, expected the type of base_model, float64"),
    ("F32", ("F32",), "F32", "F32", ""),
    ("F32", ("F32",), "BF16", None, "dtype: bfloat16, expected float32"),
    ("F32", ("F32",), None, "BF16", "out_dtype: bfloat16, expected float32"),
    ("BF16", ("BF16",), "F32", None, "dtype: float32, expected bfloat16"),
    ("BF16", ("F32",), None, None, "out_dtype: float32, expected bfloat16"),
    ("BF16", ("F32",), "BF16", None, "dtype: bfloat16 would round inputs, expected a type that holds bfloat16, float32"),
    ("F32", ("BF16",), None, None, "models in float32, bfloat16, expected the type of base_model, float32"),
    ("F16", ("BF16",), None, "F16", "models in float16, bfloat16, expected the type of base_model, float16"),
    ("F32", ("F32",), "F64", "F32", "dtype: float64, expected float32, which is the arithmetic of what is not stored as float64"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "models", "dtype", "out_dtype", "message"), TYPES)
def test_types_that_would_be_others_than_mergekits_are_refused(
    base: str, models: tuple[str, ...], dtype: str | None, out_dtype: str | None, message: str
) -> None:
    found = MergekitConfig("base", ("a",), parsed("ties", weight=1).method, -1.0, dtype, out_dtype)
    assert (mergekit_config._problem(base, models, found) or "") == message
