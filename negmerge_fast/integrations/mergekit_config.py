"""mergekit's YAML for this package's engine: the methods that both have. What is not served is refused by name.

With base b, models x_k, weights w_k, λ ("lambda") and d_k = x_k - b, mergekit 0.1.5 computes

    linear             Σ w_k x_k / Σ w_k, over all models          here b + Σ (w_k / Σ w) d_k, with b one of the models
    task_arithmetic    b + λ Σ w_k d_k                             the sum divided by Σ w_k with normalize
    ties               b + λ Σ w_k e_k / Σ w_k of the elected      e_k: d_k among the `density` largest of its tensor; the sign of the sum
    breadcrumbs        b + λ Σ w_k e_k                             e_k: without the `gamma` largest and the smallest of its tensor
    breadcrumbs_ties   the same with the election of ties
    dare_linear        b + λ Σ w_k e_k                             e_k: kept with probability `density`, then rescaled
    dare_ties          the same with the election of ties

docs/mergekit.md lists what differs from mergekit's own results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.reader import naming
from ..core.choices import Election, Gate, Reduction
from ..core.dtypes import FLOAT_SIZES, TORCH_NAMES, holds
from ..core.errors import InputError, short_repr
from ..methods import catalogue
from ..methods.base import Method
from ..streaming.api import open_and_plan, prepare_outputs
from ..streaming.job import Job
from ..streaming.options import MergeOptions, as_path
from ..streaming.plan import Plan

# By mergekit's method: the method here, and what mergekit takes for `normalize` if it is not given.
_METHODS = {
    "linear": ("mean", True),
    "task_arithmetic": ("task-arithmetic", False),
    "ties": ("ties", True),
    "breadcrumbs": ("breadcrumbs", False),
    "breadcrumbs_ties": ("breadcrumbs", False),
    "dare_linear": ("dare", False),
    "dare_ties": ("dare-ties", False),
}
_KEYS = ("merge_method", "base_model", "models", "dtype", "out_dtype", "parameters")
# By method: the parameters of a model, which may be given for all, and those of the merge.
_OF_A_MODEL = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "breadcrumbs": ("weight", "density", "gamma"),
}
_OF_A_MODEL["breadcrumbs_ties"] = _OF_A_MODEL["breadcrumbs"]
_OF_THE_MERGE = {"linear": ("normalize",)}

_DTYPES = {TORCH_NAMES[name]: name for name in FLOAT_SIZES}
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class MergekitConfig:
    """A merge that a file of mergekit's describes.

    Attributes:
        base, finetuned: Paths, or names of the hub.
        method: The method, with its numbers for each model.
        scale: λ of this package: mergekit's with its sign turned, as mergekit adds.
        dtype: The type that mergekit converts inputs to, as safetensors spells it; None if it does not.
        out_dtype: The type that it converts the result to; None if it does not.
        notes: What a user should know of the result, a line each.
    """

    base: str
    finetuned: tuple[str, ...]
    method: Method
    scale: float
    dtype: str | None
    out_dtype: str | None
    notes: tuple[str, ...] = ()


def prepare(config: Path, output: str, **options: Any) -> Job:
    """Check the merge that a file of mergekit's describes, and decide how it runs, without writing anything.

    Args:
        config: The file.
        output: As of merge_checkpoints.
        options: Those of MergeOptions that the file does not have.

    Raises:
        InputError: If the file, an input or an option is bad.
    """
    read = read_config(config)
    given = MergeOptions(scale=read.scale, method=read.method, **options)
    destination = as_path("output", output)
    plan = open_and_plan(read.base, read.finetuned, given)
    if plan.is_low_rank:
        raise InputError(f"{config}: models: an adapter, expected models, as mergekit reads them")
    _check_types(plan, read, config)
    [job] = prepare_outputs(replace(plan, notes=(*read.notes, *plan.notes)), [(destination, given)])
    return job


def read_config(path: Path) -> MergekitConfig:
    """Read a file of mergekit's.

    Raises:
        InputError: If it is none, or asks for what is not served; the line names the key.
        OSError: If it cannot be read.
    """
    return parse(_load(path), str(path))


def parse(config: object, where: str) -> MergekitConfig:
    """The merge that the content of a file of mergekit's describes. where: the file, for messages. Raises InputError."""
    found = _mapping(config, where, _KEYS)
    name = found.get("merge_method")
    if not isinstance(name, str) or name not in _METHODS:
        raise InputError(f"{where}: merge_method: {short_repr(name)}, expected one of {', '.join(_METHODS)}")
    of_a_model = _OF_A_MODEL.get(name, ("weight", "density"))
    of_the_merge = _OF_THE_MERGE.get(name, ("normalize", "lambda", "rescale", "int8_mask"))
    shared = _mapping(found.get("parameters") or {}, f"{where}: parameters", (*of_the_merge, *of_a_model))
    models = _models(found.get("models"), f"{where}: models", of_a_model)
    base, numbers = _base_and_models(found, models, shared, where)
    finetuned = tuple(model for model in numbers if model != base)
    if not finetuned:
        raise InputError(f"{where}: models: no model but the base, expected at least one")
    values = {key: _each(numbers, shared, key, where) for key in of_a_model}
    normalize = _boolean(shared, "normalize", _METHODS[name][1], where)
    scale = _number(shared.get("lambda", 1.0), f"{where}: parameters: lambda")
    dtypes = [_dtype(found.get(key), f"{where}: {key}") for key in ("dtype", "out_dtype")]
    make = _linear if name == "linear" else _task_method
    method = make(name, base, values, normalize, shared, where)
    return MergekitConfig(base, finetuned, method, -scale, dtypes[0], dtypes[1], _notes(method, shared))


# --- Reading -----------------------------------------------------------------------------------------------------


def _load(path: Path) -> object:
    try:
        import yaml
    except ImportError:
        raise InputError("a file of mergekit's needs PyYAML: pip install 'negmerge_fast[yaml]'") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that a mapping has twice: of two numbers, one would count for nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            merged = "tag:yaml.org,2002:merge"  # <<: what it brings may be given again
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merged]
            twice = [key for k, key in enumerate(keys) if key in keys[:k]]
            if twice:
                raise InputError(f"{path}: key {short_repr(twice[0])}: twice, expected once")
            return super().construct_mapping(node, deep)  # type: ignore[no-any-return]

    try:
        with naming(path), open(path, encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise InputError(f"{path}: more than {_MAX_BYTES:,} characters, expected a small file of YAML")
        return yaml.load(text, Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, TypeError, InputError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {' '.join(str(error).split())}, expected YAML") from None


def _mapping(value: object, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """A mapping, without what is null. Raises InputError for a key that is not served, and anything else."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {short_repr(value)}, expected keys and values")
    given = {key: item for key, item in value.items() if item is not None}
    for key in given:
        if key not in keys:
            raise InputError(f"{where}: key {short_repr(key)} is not served, expected {', '.join(keys)}")
    return given


def _models(value: object, where: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The models in order, with their parameters."""
    if not isinstance(value, list):
        raise InputError(f"{where}: {short_repr(value)}, expected a list")
    found: dict[str, dict[str, Any]] = {}
    for k, each in enumerate(value):
        of_model = f"{where}[{k}]"
        given = _mapping(each, of_model, ("model", "parameters"))
        model = _reference(given.get("model"), f"{of_model}: model")
        if model in found:
            raise InputError(f"{of_model}: model: {short_repr(model)} again, expected each model once")
        found[model] = _mapping(given.get("parameters") or {}, f"{of_model}: parameters", keys)
    return found


def _reference(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {short_repr(value)}, expected a path or a name of the hub")
    if "+" in value:
        raise InputError(
            f"{where}: {short_repr(value)}: a model with an adapter is not served, expected one path"
        )
    return value


def _base_and_models(
    found: Mapping[str, Any], models: Mapping[str, dict[str, Any]], shared: Mapping[str, Any], where: str
) -> tuple[str, Mapping[str, dict[str, Any]]]:
    """The base, and the models that have numbers: of linear the base is one of them."""
    linear = found["merge_method"] == "linear"
    if "base_model" in found:
        base = _reference(found["base_model"], f"{where}: base_model")
    elif linear and models:
        base = next(iter(models))
    else:
        raise InputError(f"{where}: base_model: missing, expected a path or a name of the hub")
    if not linear:
        return base, {model: numbers for model, numbers in models.items() if model != base}
    return base, models if base in models else {**models, base: {}}


def _each(
    models: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any], key: str, where: str
) -> dict[str, float]:
    """A parameter of each model: its own, or the one of all."""
    usual = {"density": 1.0, "gamma": 0.01}
    found = {}
    for model, own in models.items():
        value = own.get(key, shared.get(key, usual.get(key)))
        if value is None:
            raise InputError(f"{where}: {key} of {short_repr(model)}: missing, expected a number")
        found[model] = _number(value, f"{where}: {key} of {short_repr(model)}")
    return found


def _number(value: object, where: str) -> float:
    if isinstance(value, str):  # PyYAML takes 1e-3 for a text, and mergekit that text for a number
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(
            f"{where}: {short_repr(value)}, expected one finite number (gradients and filters are not served)"
        )
    return float(value)


def _boolean(shared: Mapping[str, Any], key: str, usual: bool, where: str) -> bool:
    value = shared.get(key, usual)
    if not isinstance(value, bool):
        raise InputError(f"{where}: parameters: {key}: {short_repr(value)}, expected true or false")
    return value


def _dtype(value: object, where: str) -> str | None:
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    if name not in _DTYPES:
        raise InputError(f"{where}: {short_repr(value)}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


# --- Methods -----------------------------------------------------------------------------------------------------


def _linear(
    name: str,
    base: str,
    values: Mapping[str, dict[str, float]],
    normalize: bool,
    shared: Mapping[str, Any],
    where: str,
) -> Method:
    """b + Σ (w_k / Σ w) d_k."""
    weights = values["weight"]
    total = sum(weights.values())
    if not normalize and abs(total - 1) > 1e-9:
        raise InputError(
            f"{where}: parameters: normalize: false, and weights whose sum is {total:g}, expected true or a sum of 1"
        )
    if total == 0:
        raise InputError(f"{where}: weight: the sum is 0, expected another one")
    own = [weight / total for model, weight in weights.items() if model != base]
    return _weighted(replace(catalogue.method("mean"), name=name, reduction=Reduction.SUM), own)


def _task_method(
    name: str,
    base: str,
    values: Mapping[str, dict[str, float]],
    normalize: bool,
    shared: Mapping[str, Any],
    where: str,
) -> Method:
    method = _with_gate(name, values, where)
    if name == "breadcrumbs_ties":
        method = replace(method, name="breadcrumbs-ties", election=Election.SIGN_OF_SUM)
    is_random = name.startswith("dare")
    rescale = _boolean(shared, "rescale", is_random, where)
    if rescale and not is_random and name != "task_arithmetic":  # which has nothing to rescale
        raise InputError(f"{where}: parameters: rescale: true is not served with {name}, expected false")
    _boolean(shared, "int8_mask", False, where)
    weights = list(values["weight"].values())
    if normalize:
        _check_divisors(method, weights, where)
        if is_random and not rescale:
            raise InputError(
                f"{where}: parameters: normalize: true with rescale: false is not served, expected one of them only"
            )
    elif is_random and not rescale:  # the factor of a model is its weight divided by its density
        weights = [w * d for w, d in zip(weights, values["density"].values(), strict=True)]
    return _weighted(replace(method, reduction=Reduction.MEAN if normalize else Reduction.SUM), weights)


def _with_gate(name: str, values: Mapping[str, dict[str, float]], where: str) -> Method:
    """The method with its densities. A gate that everything passes is none."""
    method = catalogue.method(_METHODS[name][0])
    if method.gate == Gate.NONE:
        return method
    for model, density in values["density"].items():
        if not 0 < density <= 1:
            raise InputError(
                f"{where}: density of {short_repr(model)}: {density}, expected more than 0 and at most 1"
            )
    densities = tuple(values["density"].values())
    if all(density == 1 for density in densities):
        return replace(method, gate=Gate.NONE, density=1.0, gamma=0.0, drop=0.0)
    if method.gate == Gate.RANDOM:
        return replace(method, drop=_single(tuple(1 - density for density in densities)))
    gammas = set(values.get("gamma", {"": 0.0}).values())
    if len(gammas) > 1:
        raise InputError(f"{where}: gamma: {sorted(gammas)}, expected the same number for all models")
    try:
        return replace(method, density=_single(densities), gamma=gammas.pop(), over="tensor")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check_divisors(method: Method, weights: Sequence[float], where: str) -> None:
    """Refuse weights by whose sum mergekit does not divide, as it is zero."""
    if method.election == Election.SIGN_OF_SUM:  # the sum of any of them
        if min(weights, default=1) < 0 < max(weights, default=1):
            raise InputError(
                f"{where}: weight: of both signs, with normalize: true, expected one sign or normalize: false"
            )
    elif abs(sum(weights)) < 1e-8:
        raise InputError(f"{where}: weight: the sum is 0, with normalize: true, expected another one")


def _weighted(method: Method, weights: Sequence[float]) -> Method:
    return method if set(weights) == {1.0} else replace(method, model_weights=tuple(weights))


def _single(values: tuple[float, ...]) -> float | tuple[float, ...]:
    return values[0] if len(set(values)) == 1 else values


def _notes(method: Method, shared: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if method.gate == Gate.RANDOM:
        notes.append(
            f"{method.name}: other random numbers than mergekit's, from seed {method.seed}, and what is kept is divided by its density"
            if shared.get("rescale", True)
            else f"{method.name}: other random numbers than mergekit's, from seed {method.seed}"
        )
    if shared.get("int8_mask"):
        notes.append("int8_mask: true changes nothing here, nor the result of mergekit")
    return tuple(notes)


# --- Types -------------------------------------------------------------------------------------------------------


def _check_types(plan: Plan, config: MergekitConfig, where: Path) -> None:
    """Refuse tensors whose result would be stored in another type than mergekit's, or be computed of rounded inputs."""
    checked: dict[Any, str | None] = {}
    for extent in plan.extents:
        for each in extent.slices:
            signature = each.signature
            if signature not in checked:
                checked[signature] = _problem(signature.result, signature.models, config)
            if problem := checked[signature]:
                raise InputError(f"{where}: {problem} (tensor {short_repr(each.name)})")


def _problem(base: str, models: Sequence[str], config: MergekitConfig) -> str | None:
    """Why a tensor with versions in these types is not served; None if it is."""
    stored = {base, *models}
    promoted = next(t for t in ("F16", "BF16", "F32", "F64") if all(holds(t, each) for each in stored))
    result = config.out_dtype or config.dtype or promoted
    names = ", ".join(TORCH_NAMES[t] or t for t in dict.fromkeys((base, *models)))
    if result != base:
        key = "out_dtype" if config.out_dtype or not config.dtype else "dtype"
        return f"{key}: {TORCH_NAMES[result]}, expected {TORCH_NAMES[base]}"
    if any(not holds(each, base) for each in models):
        return f"models in {names}, expected the type of base_model, {TORCH_NAMES[base]}"
    arithmetic = config.dtype or promoted
    if not all(holds(arithmetic, each) for each in stored):
        return f"dtype: {TORCH_NAMES[arithmetic]} would round inputs, expected a type that holds {names}"
    if arithmetic == "F64" and "F64" not in stored:
        return "dtype: float64, expected float32, which is the arithmetic of what is not stored as float64"
    return None
