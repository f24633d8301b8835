"""Other methods, weights and λ by names on models in memory: every method against its naive version, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import difference, save_adapter
from bits import same_bits

import negmerge_fast as nm
from negmerge_fast.core.choices import key_of
from negmerge_fast.core.reference import _differences, plain_family
from negmerge_fast.methods.catalogue import NAMES, as_method
from negmerge_fast.tensors.graph import require_plain

pytestmark = pytest.mark.filterwarnings("error::negmerge_fast.MergeWarning")

Tensors = dict[str, torch.Tensor]
BACKENDS = ("torch", "cpu")
SCALE = 0.7
# Names, of which two are equal in a pattern, and shapes that end within a word of the generator.
SHAPES = {"layers.0.weight": (13, 7), "layers.1.weight": (5, 6), "bias": (9,)}


def models_of(seed: int = 0, n: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensors]:
    """A base and its models, all of whose differences are distinct in size."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: drawn(*shape) for name, shape in SHAPES.items()}
    models = [
        {name: (b + 0.1 * drawn(*b.shape) + 0.05).to(dtype) for name, b in base.items()} for _ in range(n)
    ]
    return [{name: b.to(dtype) for name, b in base.items()}, *models]


def copies(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def reduced(method: nm.Method, d: torch.Tensor, name: str) -> torch.Tensor:
    """r of differences [n, elements] by the method's own naive version."""
    naive = import_module(f"negmerge_fast.methods.{method.name.replace('-', '_')}").naive
    given = {"required": len(d), "key": key_of(name)}
    names = naive.__code__.co_varnames[1 : naive.__code__.co_argcount]
    found: torch.Tensor = naive(d, **{n: given.get(n, getattr(method, n, None)) for n in names})
    return found


def expected(
    versions: Sequence[Tensors],
    method: str | nm.Method,
    scale: float = SCALE,
    weights: Mapping[str, torch.Tensor] = {},
    task_vectors: bool = False,
) -> tuple[Tensors, dict[str, tuple[int, int, int]]]:
    """What the reference merges to; and agreed, non-finite and masked elements."""
    method = as_method(method)
    base, *models = versions
    found, counts = {}, {}
    d = {n: _differences(b, [m[n] for m in models], task_vectors)[1].flatten(1) for n, b in base.items()}
    whole: dict[str, torch.Tensor] = {}
    if method.needs_bounds and method.over == "model":
        parts = reduced(method, torch.cat(list(d.values()), 1), "").split([t.shape[1] for t in d.values()])
        whole = dict(zip(d, parts, strict=True))
    for name, b in base.items():
        found[name], *counted = plain_family(
            b,
            [m[name] for m in models],
            scale,
            lambda each, name=name: whole[name] if whole else reduced(method, each, name),  # type: ignore[misc]
            weight=weights.get(name),
            task_vectors=task_vectors,
        )
        counts[name] = (counted[0], counted[1], counted[2])
    return found, counts


def holds(found: Mapping[str, Any], wanted: Tensors) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert same_bits(torch.as_tensor(found[name]), tensor), name


def counted(stats: nm.Stats) -> dict[str, tuple[int, int, int]]:
    return {name: (t.agreed, t.nonfinite, t.masked) for name, t in stats.tensors.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_each_method_is_its_naive_version(name: str, backend: str) -> None:
    versions = models_of()
    wanted, counts = expected(versions, name)
    base, *models = versions
    before = copies(base)
    holds(nm.merge(base, models, scale=SCALE, method=name, backend=backend), wanted)
    holds(base, before)
    stats = nm.merge_(base, models, scale=SCALE, method=name, backend=backend)
    holds(base, wanted)
    assert counted(stats) == counts
    assert stats.agreed > 0 and (name in ("negmerge", "k-of-n") or stats.vetoed_by_zero == 0)


@pytest.mark.parametrize("name", ["magmax", "dare-ties", "ties"])
def test_with_numbers_weights_and_types(name: str) -> None:
    numbers = {"dare-ties": {"drop": 0.4, "seed": 7}, "ties": {"density": 0.6, "over": "tensor"}}
    method = nm.method(name, **numbers.get(name, {}))
    versions = models_of(1, dtype=torch.bfloat16)
    weights = {n: torch.rand(shape).to(torch.float16) for n, shape in SHAPES.items()}
    wanted, counts = expected(versions, method, weights=weights)
    stats = nm.merge_(versions[0], versions[1:], scale=SCALE, method=method, weights=weights)
    holds(versions[0], wanted)
    assert counted(stats) == counts


def test_modules_and_task_vectors() -> None:
    torch.manual_seed(0)
    base, *models = (torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6)) for _ in range(4))
    states = [dict(m.state_dict()) for m in (base, *models)]
    floats = [{n: t.clone() for n, t in state.items() if t.is_floating_point()} for state in states]
    wanted, _ = expected(floats, "magmax", 0.1)
    merged = nm.merge(base, models, scale=0.1, method="magmax")
    holds({n: t for n, t in merged.items() if t.is_floating_point()}, wanted)
    nm.merge_(base, models, scale=0.1, method="magmax")
    holds({n: t for n, t in base.state_dict().items() if t.is_floating_point()}, wanted)

    versions = models_of(2)
    wanted, _ = expected(versions, "ties", task_vectors=True)
    holds(nm.merge(versions[0], versions[1:], scale=SCALE, method="ties", inputs="task_vectors"), wanted)


def test_the_task_vector_of_a_method() -> None:
    _, *vectors = models_of(3)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in vectors[0].items()}
    wanted, _ = expected([zeros, *vectors], "emr", -1.0, task_vectors=True)
    holds(nm.merge_task_vectors(vectors, method="emr"), wanted)
    one = nm.merge_task_vectors([v["bias"] for v in vectors], method=nm.method("dare", drop=0.5))
    d = torch.stack([v["bias"] for v in vectors])
    assert torch.equal(one, reduced(nm.method("dare", drop=0.5), d, ""))


@pytest.mark.parametrize("name", ["mean", "ties"])
def test_nothing_is_written_if_an_element_is_not_finite(name: str) -> None:
    base, *models = models_of()
    models[2]["layers.1.weight"][1, 2] = torch.inf
    before = copies(base)
    message = (
        r"^finetuned\[2\]\['layers.1.weight'\]: element 8 in memory order: inf, expected finite numbers$"
    )
    with pytest.raises(nm.InputError, match=message):
        nm.merge_(base, models, scale={"bias": 0.1, "": 1.0}, method=name, nonfinite="error")
    holds(base, before)
    with pytest.warns(nm.MergeWarning, match="1 element of 'layers.1.weight' left as in the base"):
        stats = nm.merge_(base, models, scale=1.0, method=name)
    assert stats.nonfinite == 1 and torch.equal(
        base["layers.1.weight"][1, 2], before["layers.1.weight"][1, 2]
    )


def test_a_weight_that_is_not_finite_is_named() -> None:
    base, *models = models_of()
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    weights["bias"][3] = torch.nan
    with pytest.raises(nm.InputError, match=r"^weights\['bias'\]: element 3 in memory order: nan, expected"):
        nm.merge(base, models, scale=1.0, weights=weights, nonfinite="error")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int32, torch.int64],
    ids=str,
)
def test_weights_of_one_change_nothing(dtype: torch.dtype, backend: str) -> None:
    base, *models = models_of()
    models[0]["bias"][:4] = base["bias"][:4]  # vetoed by zero
    ones = {name: torch.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}
    for name in ("negmerge", "conflict", "dare"):
        plain, weighted = copies(base), copies(base)
        wanted = nm.merge_(plain, models, scale=SCALE, method=name, backend=backend)
        stats = nm.merge_(weighted, models, scale=SCALE, method=name, weights=ones, backend=backend)
        holds(weighted, plain)
        assert dict(stats.tensors) == dict(wanted.tensors)
        assert stats.agreed and (name != "negmerge" or stats.vetoed_by_zero)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_a_mask_is_masking_by_hand(dtype: torch.dtype, backend: str) -> None:
    base, *models = models_of()
    merged = nm.merge(base, models, scale=SCALE, backend=backend)
    masks = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    wanted = {name: torch.where(masks[name], merged[name], base[name]) for name in base}
    changed = {name: merged[name] != base[name] for name in base}
    held = {name: mask.to(dtype) for name, mask in masks.items()}
    stats = nm.merge_(base, models, scale=SCALE, weights=held, backend=backend)
    holds(base, wanted)
    assert stats.masked == sum(int((changed[n] & ~masks[n]).sum()) for n in masks) > 0
    assert stats.agreed == sum(int((changed[n] & masks[n]).sum()) for n in masks) > 0
    assert f"masked={stats.masked}" in repr(stats)


def test_weights_of_some_tensors_under_other_names() -> None:
    base, *models = models_of()
    mask = torch.rand(13, 7) < 0.5
    full = {"layers.0.weight": mask, "layers.1.weight": torch.ones(5, 6), "bias": torch.ones(9)}
    wanted = nm.merge(base, models, scale=SCALE, weights=full)
    with pytest.warns(nm.MergeWarning) as warned:
        holds(nm.merge(base, models, scale=SCALE, weights={"module.layers.0.weight": mask}), wanted)
    assert [str(each.message) for each in warned] == [
        "weights: 'module.layers.0.weight' is taken for 'layers.0.weight'",
        "weights: lacks 'layers.1.weight', 'bias': the weights of their elements are 1",
    ]
    renamed = {f"mask/{name}": weight for name, weight in full.items()}
    with pytest.warns(nm.MergeWarning, match="is taken for"):
        holds(nm.merge(base, models, scale=SCALE, weights=renamed, rename={"^mask/": ""}), wanted)
    # What is not merged needs no weights that fit.
    weights = {**full, "bias": torch.zeros(3, dtype=torch.int64)}
    kept = nm.merge(base, models, scale=SCALE, weights=weights, exclude="bias")
    holds(kept, {**wanted, "bias": base["bias"]})


def test_weights_of_a_name_that_is_no_string() -> None:
    base, *models = models_of()
    with pytest.raises(nm.InputError, match=r"^weights: 0: not in base, expected weights of its tensors$"):
        nm.merge(base, models, scale=SCALE, weights={0: torch.ones(9)})  # type: ignore[dict-item]


def test_weights_of_tied_tensors() -> None:
    base, *models = ({"a": t["bias"], "b": t["bias"]} for t in models_of())
    mask = torch.tensor([True, False, True] * 3)
    wanted = nm.merge(base["a"], [m["a"] for m in models], scale=SCALE, weights=mask)
    for weights in ({"a": mask}, {"b": mask}, {"a": mask, "b": mask.clone()}):
        found = nm.merge(base, models, scale=SCALE, weights=weights)
        holds(found, {"a": wanted, "b": wanted})
        assert found["a"] is found["b"]
    with pytest.raises(nm.InputError, match=r"^weights\['b'\]: differs from weights\['a'\], expected equal"):
        nm.merge(base, models, scale=SCALE, weights={"a": mask, "b": ~mask})


def test_scales_by_patterns_are_merges_of_groups() -> None:
    base, *models = models_of()
    scales = [(r"\.0\.", 0.3), ("layers", -0.4), ("", 1.0)]
    wanted = {}
    for name, scale in zip(SHAPES, (0.3, -0.4, 1.0), strict=True):
        wanted |= nm.merge({name: base[name]}, [{name: m[name]} for m in models], scale=scale)
    holds(nm.merge(base, models, scale=scales), wanted)
    negated = copies(base)
    nm.negate_(negated, models[0], scale=scales)
    for name, scale in zip(SHAPES, (0.3, -0.4, 1.0), strict=True):
        separate = nm.merge(base[name], [models[0][name]], scale=scale, inputs="task_vectors")
        assert same_bits(negated[name], separate)
    stats = nm.merge_(base, models, scale=dict(scales))
    holds(base, wanted)
    assert set(stats.tensors) == set(SHAPES)


def test_negation_with_weights() -> None:
    base, tau, *_ = models_of()
    mask = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    wanted = {name: torch.where(mask[name], base[name] - 0.5 * tau[name], base[name]) for name in base}
    nm.negate_(base, tau, scale=0.5, weights=mask)
    holds(base, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_applied_is_a_merge(name: str) -> None:
    base, *models = models_of()
    weights = {n: torch.rand(shape) * (torch.rand(shape) < 0.7) for n, shape in SHAPES.items()}
    for given in (None, weights):
        delta = nm.consensus_delta(base, models, method=name, weights=given)
        assert delta.method == as_method(name)
        assert (f"method={delta.method}" in repr(delta)) == (name != "negmerge")
        for scale in (0.9, -0.3, 0.0, {"layers": 0.5, "": -2.0}):
            applied, merged = copies(base), copies(base)
            stats = delta.apply_(applied, scale)
            wanted = nm.merge_(merged, models, scale=scale, method=name, weights=given)
            holds(applied, merged)
            assert dict(stats.tensors) == dict(wanted.tensors)
            assert delta.stats.masked == wanted.masked


def test_a_delta_remembers_its_method_on_disk(tmp_path: Path) -> None:
    base, *models = models_of()
    method = nm.method("ties", density=0.3)
    mask = {name: torch.rand(shape) < 0.5 for name, shape in SHAPES.items()}
    delta = nm.consensus_delta(base, models, method=method, weights=mask)
    delta.save(tmp_path / "delta")
    loaded = nm.load_delta(tmp_path / "delta")
    assert loaded.method == method and loaded.stats.masked == delta.stats.masked > 0
    merged = nm.merge(base, models, scale=1.5, method=method, weights=mask)
    loaded.apply_(base, 1.5)
    holds(base, merged)


@pytest.mark.parametrize("name", ["dare", "dare-ties", "ties", "mean"])
def test_strides_do_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    versions = [torch.randn(4, 6, 5, generator=generator) for _ in range(4)]
    weight = torch.rand(4, 6, 5, generator=generator)
    numbers = {"drop": 0.5, "seed": 3} if name.startswith("dare") else {}
    method = nm.method(name, **numbers)
    wanted = nm.merge(versions[0], versions[1:], scale=SCALE, method=method, weights=weight)

    def transposed(t: torch.Tensor) -> torch.Tensor:
        return t.permute(2, 0, 1).contiguous().permute(1, 2, 0)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, t], -1)[..., 0]

    for view in (transposed, spread):
        for views in ([view] * 4, [view, spread, transposed, torch.clone], [torch.clone, view, view, view]):
            base, *models = (v(t) for v, t in zip(views, versions, strict=True))
            for w in (weight, view(weight)):
                assert same_bits(nm.merge(base, models, scale=SCALE, method=method, weights=w), wanted)
            delta = nm.consensus_delta(base, models, method=method, weights=view(weight))
            nm.merge_(base, models, scale=SCALE, method=method, weights=view(weight))
            assert same_bits(base, wanted)
            delta.apply_(again := versions[0].clone(), SCALE)
            assert same_bits(again, wanted)


def test_random_numbers_depend_on_names() -> None:
    ones = {name: torch.ones(40) for name in ("a", "b")}
    zeros = {name: torch.zeros(40) for name in ones}
    method = nm.method("dare", drop=0.5, seed=1)
    found = nm.merge(zeros, [ones], scale=-1.0, method=method)
    assert not torch.equal(found["a"], found["b"])
    separate = nm.merge({"b": zeros["b"]}, [{"b": ones["b"]}], scale=-1.0, method=method)
    assert torch.equal(separate["b"], found["b"])
    other = nm.merge(zeros, [ones], scale=-1.0, method=nm.method("dare", drop=0.5, seed=2))
    assert not torch.equal(other["a"], found["a"])


def test_arrays() -> None:
    versions = models_of()
    weights = {name: (torch.rand(shape) < 0.5) for name, shape in SHAPES.items()}
    wanted = nm.merge(versions[0], versions[1:], scale=SCALE, method="magmax", weights=weights)
    base, *models = ({name: t.numpy() for name, t in version.items()} for version in versions)
    found = nm.merge(
        base, models, scale=SCALE, method="magmax", weights={n: w.numpy() for n, w in weights.items()}
    )
    assert all(isinstance(each, np.ndarray) for each in found.values())
    holds(found, wanted)


@pytest.mark.parametrize("over", ["tensor", "model", None])
@pytest.mark.parametrize("mixed", [False, True], ids=["adapters", "beside a model"])
def test_adapters(over: Any, mixed: bool, tmp_path: Path) -> None:
    """Low-rank differences, and that of a full model, which has to be computed, by a method with bounds and a random one."""
    method = nm.method("ties", density=0.4, over=over) if over else nm.method("dare", drop=0.5)
    generator = torch.Generator().manual_seed(0)
    base = {f"{m}.weight": torch.randn(24, 16, generator=generator) for m in ("a.q_proj", "b.q_proj")}
    models: list[Any] = []
    vectors = []
    if mixed:
        models = [{name: t + 0.1 * torch.randn(24, 16, generator=generator) for name, t in base.items()}]
        vectors = [{name: t - base[name] for name, t in models[0].items()}]
    for k in range(3):
        factors = {
            name.removesuffix(".weight"): (
                torch.randn(2, 16, generator=generator),
                torch.randn(24, 2, generator=generator),
            )
            for name in base
        }
        models.append(save_adapter(tmp_path / f"adapter-{k}", factors, 2, 4))
        vectors.append({f"{m}.weight": difference(*f, 2.0, torch.float32) for m, f in factors.items()})
    weights = {name: torch.rand(24, 16, generator=generator) for name in base}
    options: Any = {"scale": {"a": 0.3, "b": 0.6}, "method": method, "weights": weights}
    wanted = nm.merge(base, vectors, inputs="task_vectors", **options)
    holds(nm.merge(base, models, **options), wanted)
    delta = nm.consensus_delta(base, models, method=method, weights=weights)
    delta.apply_(base, {"a": 0.3, "b": 0.6})
    holds(base, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "method: 'tie', expected one of negmerge, k-of-n"),
        ({"method": 3}, "method: int, expected a name or a Method"),
        ({"method": "ties", "min_agreement": 0.6}, "min_agreement: 0.6, expected 1.0: ties counts no signs"),
        ({"scale": {"bias": 1.0}}, "scale: no pattern matches 'layers.0.weight', expected one, or a number"),
        ({"scale": {"(": 1.0}}, "scale: '(' is not a regular expression"),
        ({"scale": {"x": 1.0, "": 1.0}}, "scale: 'x' is the first to match no tensor, expected at least one"),
        ({"scale": [("", 0.5), ("", 0.6)]}, "scale: '' is given twice, expected each pattern once"),
        ({"scale": []}, "scale: no patterns, expected a number or at least one"),
        ({"weights": {"z": torch.ones(9)}}, "weights: 'z': not in base, expected weights of its tensors"),
        ({"weights": {}}, "weights: of no tensor that is merged, expected some"),
        ({"weights": {"bias": torch.ones(3)}}, "weights['bias']: shape (3,), expected (9,) like base['bias']"),
        ({"weights": {"bias": torch.ones(9).short()}}, "weights['bias']: I16, expected one of F64, F32, F16, BF16, U8"),
        ({"weights": {"bias": torch.ones(9, device="meta")}}, "weights['bias']: a meta tensor holds no data"),
        (
            {"method": nm.method("ties", density=(0.1, 0.2))},
            "density: 2 numbers, expected one for each of 4 models",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options: dict[str, Any], message: str) -> None:
    base, *models = models_of()
    before = copies(base)
    for call in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=f"^{re.escape(message)}"):
            call(base, models, **{"scale": 1.0, **options})
    holds(base, before)


def test_refused_kinds() -> None:
    base, *models = models_of()
    with pytest.raises(TypeError, match=r"^weights: Tensor, expected a mapping or a module like base$"):
        nm.merge(base, models, scale=1.0, weights=torch.ones(9))
    with pytest.raises(TypeError, match=r"^weights: dict, expected a tensor like base$"):
        nm.merge(base["bias"], [models[0]["bias"]], scale=1.0, weights={})
    with pytest.raises(TypeError, match=r"^weights\['bias'\]: int, expected a tensor or an array$"):
        nm.merge(base, models, scale=1.0, weights={"bias": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"^scale: '1', expected a number$"):
        nm.merge(base, models, scale="1")  # type: ignore[arg-type]
    with pytest.raises(
        nm.InputError, match=r"^the weights of base.*: shares memory with base.*, which is written"
    ):
        nm.merge_(base, models, scale=1.0, weights=base)
    with pytest.raises(
        nm.InputError, match="density: method mean has none, expected one of ties, breadcrumbs"
    ):
        nm.method("mean", density=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (({"": 1.0}, "negmerge", None), r"scale: {'': 1.0}, expected a number in a graph"),
        ((1.0, "ties", None), "method: ties, expected negmerge in a graph"),
        ((1.0, "negmerge", torch.ones(2)), "weights: expected none in a graph"),
    ],
)  # fmt: skip
def test_refused_in_a_graph(options: Any, message: str) -> None:
    with pytest.raises(nm.InputError, match=f"^{re.escape(message)}$"):
        require_plain(None, None, (), *options)
    require_plain(None, None, (), 0.9, "negmerge", None)
