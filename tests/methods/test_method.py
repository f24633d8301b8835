"""What a method is: its numbers and their bounds, its choices, and how a manifest lists it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from negmerge_fast.core.choices import KEEP_ALL, Election, Gate, Reduction
from negmerge_fast.core.errors import InputError
from negmerge_fast.methods import catalogue
from negmerge_fast.methods.base import Method


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_name_is_a_method_with_choices_for_each_model(name: str) -> None:
    method = catalogue.method(name)
    assert method.name == name and str(method).startswith(name)
    assert catalogue.as_method(name) == method and catalogue.as_method(method) is method
    choices = method.choices(5, weighted=True)
    assert choices is not None and len(choices.factors) == len(choices.votes) == 5
    assert len(choices.keep) == (5 if choices.gate == Gate.RANDOM else 0)
    assert (method.choices(5) is None) == method.is_negmerge == (name == "negmerge")
    assert method.needs_bounds == (name in ("ties", "breadcrumbs"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"density": 0.0}, "density: 0.0, expected more than 0 and at most 1"),
        ({"density": 1.1}, "density: 1.1, expected more than 0 and at most 1"),
        ({"density": (0.5, math.nan)}, "density: nan, expected more than 0 and at most 1"),
        ({"gamma": 1.0}, "gamma: 1.0, expected at least 0 and less than 1"),
        ({"gamma": -0.1}, "gamma: -0.1, expected at least 0 and less than 1"),
        ({"drop": 1.0}, "drop: 1.0, expected at least 0 and less than 1"),
        ({"drop": math.nan}, "drop: nan, expected at least 0 and less than 1"),
        ({"mask_scale": -1.0}, "mask_scale: -1.0, expected a finite number of at least 0"),
        ({"mask_scale": math.inf}, "mask_scale: inf, expected a finite number of at least 0"),
        ({"seed": -1}, "seed: -1, expected 0 … 2^64 - 1"),
        ({"seed": 1 << 64}, "expected 0 … 2^64 - 1"),
        ({"over": "layer"}, "over: 'layer', expected"),
        ({"model_weights": (1.0, math.inf)}, "model_weights: inf, expected a finite number"),
        ({"model_weights": ()}, "model_weights: no numbers, expected one for each model"),
        ({"density": ()}, "density: no numbers, expected one for each model"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Method("any", Gate.NONE, Election.ALL, Reduction.SUM, **numbers)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "numbers",
    [
        {"density": "0.5"}, {"density": True}, {"drop": None}, {"seed": 1.0}, {"seed": True}, {"gamma": (0.1,)}, {"mask_scale": [0.4]},
        {"model_weights": ("a",)}, {"density": (0.5, None)},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_is_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected a"):
        Method("any", Gate.NONE, Election.ALL, Reduction.SUM, **numbers)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("tries", {}, "method: 'tries', expected"),
        ("mean", {"density": 0.5}, "density: method mean has none, expected one of ties, breadcrumbs"),
        ("ties", {"seed": 1}, "seed: method ties has none, expected one of dare, dare-ties"),
        ("ties", {"alpha": 1}, "alpha: method ties has none, no method has it"),
    ],
)
def test_numbers_of_other_methods_are_refused(name: str, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        catalogue.method(name, **numbers)
    assert message in str(caught.value)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(InputError, match="method: int, expected a name or a Method"):
        catalogue.as_method(3)  # type: ignore[arg-type]


def test_every_method_has_weights_of_models() -> None:
    for name in catalogue.NAMES:
        assert catalogue.method(name, model_weights=[1, 2]).model_weights == (1.0, 2.0)


def test_numbers_not_given_are_the_usual_ones() -> None:
    assert catalogue.method("ties", density=None, seed=None) == catalogue.method("ties")


ODD = Method(
    "linear", Gate.RANDOM, Election.SIGN_OF_SUM, Reduction.LARGEST, density=(0.25, 1.0), gamma=0.1, over="model", drop=(0.1, 0.0),
    seed=(1 << 64) - 1, mask_scale=0.3, model_weights=(1.0, -0.1),
)  # fmt: skip


@pytest.mark.parametrize("method", [*map(catalogue.method, catalogue.NAMES), ODD], ids=str)
def test_a_manifest_lists_a_method(method: Method) -> None:
    assert Method.of_json(json.loads(json.dumps(method.to_json()))) == method


@pytest.mark.parametrize(
    "change", [{"gate": "some"}, {"gate": None}, {"other": 1}, {"density": 7}, {"seed": "1"}], ids=str
)
def test_a_manifest_that_lists_no_method_is_refused(change: dict[str, Any]) -> None:
    listed = {**ODD.to_json(), **change}
    with pytest.raises((InputError, TypeError, KeyError, ValueError, AttributeError)):
        Method.of_json({key: value for key, value in listed.items() if value is not None})


def test_choices_have_a_number_for_each_model() -> None:
    choices = ODD.choices(2)
    assert choices is not None
    assert choices.votes == (1.0, -0.1) and choices.factors == (1.0 / (1.0 - 0.1), -0.1)
    assert choices.keep == (round(0.9 * KEEP_ALL), KEEP_ALL) and choices.seed == (1 << 64) - 1
    with pytest.raises(InputError, match="model_weights: 2 numbers, expected one for each of 3 models"):
        ODD.choices(3)


@pytest.mark.parametrize(
    ("density", "gamma", "numel", "expected"),
    [
        (0.2, 0.0, 10, (8, 0)),  # the two largest pass
        (0.2, 0.0, 3, (2, 0)),  # one always does
        (1.0, 0.0, 10, (0, 0)),
        (0.29, 0.0, 100, (72, 0)),  # 0.29 * 100 is below 29: rounded down, as mergekit does
        (0.5, 0.1, 10, (4, 1)),
        (0.9, 0.3, 10, (0, 1)),  # what is cut of the largest is less, so that the density holds
        (1.0, 0.3, 10, (0, 0)),
    ],
)
def test_ranks(density: float, gamma: float, numel: int, expected: tuple[int, int]) -> None:
    method = Method("any", Gate.MAGNITUDE, Election.ALL, Reduction.SUM, density=density, gamma=gamma)
    assert method.ranks(2, numel) == [expected] * 2
