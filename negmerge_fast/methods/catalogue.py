"""The methods by name. Each is a module of this package, imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

from ..core.errors import InputError, require_choice
from .base import Method

NAMES = (
    "negmerge", "k-of-n", "mean", "task-arithmetic", "conflict", "magmax", "ties", "breadcrumbs", "dare", "dare-ties", "consensus", "emr",
)  # fmt: skip

# Which methods have a number.
PARAMETERS = {
    "density": ("ties", "breadcrumbs"),
    "over": ("ties", "breadcrumbs"),
    "gamma": ("breadcrumbs",),
    "drop": ("dare", "dare-ties"),
    "seed": ("dare", "dare-ties"),
    "mask_scale": ("consensus",),
}


def method(name: str, **numbers: Any) -> Method:
    """Make a method of its name and numbers.

    Args:
        name: "negmerge", "k-of-n", "mean", "task-arithmetic", "conflict", "magmax", "ties", "breadcrumbs", "dare", "dare-ties", "consensus"
            or "emr".
        numbers: density and over of ties; density, gamma and over of breadcrumbs; drop and seed of dare and dare-ties; mask_scale
            of consensus; model_weights of any. What is None or not given is the method's usual number.

    Raises:
        InputError: If there is no such method, it has no such number, or one is out of range.
        TypeError: If one is no number.
    """
    require_choice("method", name, NAMES)
    given = {key: value for key, value in numbers.items() if value is not None}
    model_weights = given.pop("model_weights", None)
    for key in given:
        if name not in PARAMETERS.get(key, ()):
            having = (
                f"expected one of {', '.join(PARAMETERS[key])}" if key in PARAMETERS else "no method has it"
            )
            raise InputError(f"{key}: method {name} has none, {having}")
    made: Method = maker(name)(**given)
    return made if model_weights is None else replace(made, model_weights=model_weights)


def maker(name: str) -> Callable[..., Method]:
    """What makes a method with its numbers."""
    spelled = name.replace("-", "_")
    made: Callable[..., Method] = getattr(import_module(f".{spelled}", __package__), spelled)
    return made


def as_method(value: str | Method) -> Method:
    """A method, given it or its name. Raises InputError for anything else."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, str):
        raise InputError(f"method: {type(value).__name__}, expected a name or a Method")
    return method(value)
