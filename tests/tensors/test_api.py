"""merge, merge_, merge_task_vectors and negate_ on tensors, state dicts and modules."""

from __future__ import annotations

import gc
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bits import peak_allocated, same_bits

import negmerge_fast as nm
from negmerge_fast.backends import native
from negmerge_fast.core.batch import Batch
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.core.rule import Rule


def versions(
    *shape: int, n: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base.to(dtype)] + [
        (base + 0.1 * torch.randn(shape, generator=generator) + 0.05).to(dtype) for _ in range(n)
    ]


def expected(tensors: list[torch.Tensor], scale: float = 0.9) -> torch.Tensor:
    return plain_merge(tensors[0], tensors[1:], scale)[0]


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 5))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (4, 5, 6)])
def test_shapes(shape: tuple[int, ...]) -> None:
    tensors = versions(*shape)
    assert same_bits(nm.merge(tensors[0], tensors[1:], scale=0.9), expected(tensors))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.permute(2, 0, 1),
        lambda t: t[:, ::2],
        lambda t: t[1:, :, 3:],
        lambda t: t.flip(0).mT,
        lambda t: t.unsqueeze(0).contiguous(memory_format=torch.channels_last),
        lambda t: t[0, 0, 0],
    ],
)
@pytest.mark.parametrize("which", ["all", "base", "models"])
def test_strides(view: Any, which: str) -> None:
    tensors = versions(4, 6, 8)
    views = [view(t) for t in tensors]
    plain = expected([v.contiguous() for v in views])
    if which == "base":
        views[1:] = [v.contiguous() for v in views[1:]]
    elif which == "models":
        views[0] = views[0].contiguous()
    assert same_bits(nm.merge(views[0], views[1:], scale=0.9), plain)
    around = [t.clone() for t in tensors]
    in_place = view(around[0]) if which != "models" else views[0]
    nm.merge_(in_place, views[1:], scale=0.9)
    assert same_bits(in_place, plain)


def test_merge_into_a_view_writes_nothing_else() -> None:
    tensors = versions(6, 8)
    whole = tensors[0].clone()
    nm.merge_(whole[:, 2:5], [t[:, 2:5] for t in tensors[1:]], scale=0.9)
    assert torch.equal(whole[:, :2], tensors[0][:, :2]) and torch.equal(whole[:, 5:], tensors[0][:, 5:])
    assert same_bits(whole[:, 2:5], expected([t[:, 2:5].contiguous() for t in tensors]))


def test_modules() -> None:
    base, *finetuned = (net(seed) for seed in range(4))
    before = {name: t.clone() for name, t in base.state_dict().items()}
    merged = nm.merge(base, finetuned, scale=0.9)
    assert list(merged) == list(before)
    for name, tensor in before.items():
        assert same_bits(base.state_dict()[name], tensor), "the base is read only"
        if tensor.is_floating_point():
            plain = expected([tensor, *(m.state_dict()[name] for m in finetuned)])
            assert same_bits(merged[name], plain)
        else:
            assert same_bits(merged[name], tensor)
            assert merged[name].data_ptr() != base.state_dict()[name].data_ptr()
    stats = nm.merge_(base, finetuned, scale=0.9)
    assert all(same_bits(t, merged[name]) for name, t in base.state_dict().items())
    assert stats.elements == sum(t.numel() for t in before.values() if t.is_floating_point())
    assert set(stats.tensors) == {n for n, t in before.items() if t.is_floating_point()}
    assert 0 < stats.consensus_ratio < 1 and "consensus_ratio" in repr(stats)
    assert base[0].weight.requires_grad


def test_tied_weights_are_updated_once_and_stay_tied() -> None:
    base, *finetuned = versions(5, 4)
    plain = expected([base, *finetuned])
    model = {"embed": base, "head": base, "alone": base.clone()}
    others = [{"embed": t, "head": t.clone(), "alone": t} for t in finetuned]
    merged = nm.merge(model, others, scale=0.9)
    assert merged["embed"] is merged["head"] and same_bits(merged["head"], plain)
    stats = nm.merge_(model, others, scale=0.9)
    assert same_bits(base, plain) and stats.elements == 40
    others[1]["head"] = others[1]["head"] + 1
    with pytest.raises(nm.InputError, match=r"finetuned\[1\]\['head'\]: differs from 'embed'"):
        nm.merge(model, others, scale=0.9)


def test_tensors_of_a_model_may_differ_in_dtype() -> None:
    a, b = versions(10), versions(10, dtype=torch.bfloat16)
    merged = nm.merge(
        {"a": a[0], "b": b[0]}, [{"a": x, "b": y} for x, y in zip(a[1:], b[1:], strict=True)], scale=0.9
    )
    assert same_bits(merged["a"], expected(a)) and same_bits(merged["b"], expected(b))
    assert merged["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["finetuned", "task_vectors"])
def test_task_vectors(kind: str) -> None:
    base, *finetuned = versions(1000)
    taus = [t - base for t in finetuned]
    tau = nm.merge_task_vectors(taus)
    agree = (torch.stack(taus) > 0).all(0) | (torch.stack(taus) < 0).all(0)
    mean = ((taus[0] + taus[1]) + taus[2]) / torch.tensor(3.0)
    assert torch.equal(tau, torch.where(agree, mean, 0.0))
    inputs = taus if kind == "task_vectors" else finetuned
    whole = nm.merge(base, inputs, scale=0.5, inputs=kind)
    stats = nm.negate_(base, tau, scale=0.5)
    assert torch.equal(base, whole)
    assert stats.agreed == int(agree.sum())


def test_task_vectors_need_no_integers() -> None:
    base, *finetuned = (net(seed) for seed in range(3))
    held = base.state_dict()
    taus = [{n: t - held[n] for n, t in m.state_dict().items() if t.is_floating_point()} for m in finetuned]
    tau = nm.merge_task_vectors(taus)
    merged = nm.merge(base, taus, scale=0.9, inputs="task_vectors")
    nm.negate_(base, tau, scale=0.9)
    assert all(torch.equal(t, merged[n]) for n, t in base.state_dict().items())


def test_integers_in_some_task_vectors_only() -> None:
    w, i = torch.ones(2), torch.arange(3)
    for taus in ([{"w": w, "n": i}, {"w": w}], [{"w": w}, {"w": w, "n": i}]):
        assert nm.merge_task_vectors(taus).keys() == {"w"}
    base = {"w": w.clone()}
    nm.negate_(base, {"w": w, "n": i}, scale=1.0)
    assert base["w"].tolist() == [0, 0]
    with pytest.raises(
        nm.InputError, match=r"task_vectors\[0\]: torch.int64, expected a floating-point type"
    ):
        nm.merge_task_vectors([i])


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self) -> torch.Tensor:
        return torch.full((self.in_features,), 7.0)

    def set_extra_state(self, state: torch.Tensor) -> None:
        pass


def test_extra_state_is_taken_from_the_base() -> None:
    base, *finetuned = (WithExtraState(3, 2) for _ in range(3))
    assert nm.merge(base, finetuned, scale=0.9)["_extra_state"].tolist() == [7, 7, 7]
    assert nm.merge_(base, finetuned, scale=0.9).elements == 8
    nested = [torch.nn.ModuleDict({"a": WithExtraState(k, 2)}) for k in (3, 3)]
    assert nm.merge(nested[0], nested[1:], scale=0.9)["a._extra_state"].tolist() == [7, 7, 7]
    # It may be anything, and one side may lack it.
    for states in (
        (object(), torch.ones(2)),
        (torch.ones(2), b"text"),
        (torch.tensor([1]), torch.tensor([2, 3])),
    ):
        models = [{"w": torch.ones(2), "a._extra_state": state} for state in states]
        assert nm.merge(models[0], models[1:], scale=1.0)["a._extra_state"] is states[0]
        assert nm.merge(models[0], [{"w": torch.ones(2)}], scale=1.0)["a._extra_state"] is states[0]
        assert nm.merge({"w": torch.ones(2)}, models[1:], scale=1.0).keys() == {"w"}


@pytest.mark.parametrize(
    "name", ["encoder_extra_state", "a.b_extra_state", "_extra_state.w", "x-_extra_state"]
)
def test_names_that_look_like_extra_state_are_weights(name: str) -> None:
    base, *finetuned = versions(4)
    models = [{name: t.clone()} for t in (base, *finetuned)]
    assert same_bits(nm.merge(models[0], models[1:], scale=0.9)[name], expected([base, *finetuned]))
    assert nm.merge_(models[0], models[1:], scale=0.9).tensors.keys() == {name}
    assert same_bits(models[0][name], expected([base, *finetuned]))
    with pytest.raises(nm.InputError, match="missing, expected F32"):
        nm.merge({**models[0], "w": base}, [{"w": base}], scale=0.9)


def test_views_with_the_negative_bit() -> None:
    base, *finetuned = versions(5, 3)
    plain = expected([-base, *(-t for t in finetuned)])
    views = [torch._neg_view(t) for t in (base.clone(), *finetuned)]
    assert views[0].is_neg()
    assert same_bits(nm.merge(views[0], views[1:], scale=0.9), plain)
    nm.merge_(views[0], views[1:], scale=0.9)
    assert same_bits(views[0].resolve_neg(), plain)
    # Two views of the same memory with different values.
    z = torch.complex(torch.zeros(3), torch.ones(3))
    two = {"a": z.imag, "b": z.conj().imag}
    with pytest.raises(nm.InputError, match="shares memory"):
        nm.merge_(two, [{"a": torch.ones(3), "b": torch.ones(3)}], scale=1.0)
    assert nm.merge(two, [{"a": torch.zeros(3), "b": torch.zeros(3)}], scale=1.0)["b"].tolist() == [
        -2,
        -2,
        -2,
    ]


def test_views_of_one_memory_are_not_tied() -> None:
    base, *finetuned = versions(3, 4)
    merged = nm.merge({"a": base, "b": base[:2]}, [{"a": t, "b": t[:2]} for t in finetuned], scale=0.9)
    assert same_bits(merged["a"], expected([base, *finetuned])) and same_bits(merged["b"], merged["a"][:2])


def test_copies_of_scattered_tensors_are_made_one_at_a_time() -> None:
    size = 4 * 300 * 200
    base, *models = [{str(i): torch.full((300, 200), float(k)).T for i in range(5)} for k in range(4)]
    models = [{n: t.contiguous() for n, t in m.items()} for m in models]
    peak = peak_allocated(lambda: nm.merge_(base, models, scale=0.9, backend="cpu"))
    assert 4 * size <= peak < 5 * size  # three copies and the result of one tensor


def test_merge_task_vectors_takes_the_widest_type() -> None:
    taus = [torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float16)]
    assert nm.merge_task_vectors(taus).dtype == torch.float32


def test_parameters_and_inference_tensors() -> None:
    tensors = versions(20)
    parameter = torch.nn.Parameter(tensors[0].clone())
    nm.merge_(parameter, tensors[1:], scale=0.9)
    assert same_bits(parameter, expected(tensors)) and parameter.is_leaf
    with torch.inference_mode():
        frozen = tensors[0].clone()
    nm.merge_(frozen, tensors[1:], scale=0.9)
    assert same_bits(frozen, expected(tensors))
    merged = nm.merge(parameter, tensors[1:], scale=0.9)
    assert not merged.requires_grad and not merged.is_inference()


def test_autograd_notices_a_merge_in_place() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    nm.merge_(weight, [torch.full((3,), 2.0)], scale=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD = {
    "shape": (
        lambda: ({"w": torch.zeros(3, 2)}, [{"w": torch.zeros(3, 2)}, {"w": torch.zeros(4, 2)}]),
        r"finetuned\[1\]\['w'\]: shape \(4, 2\), expected \(3, 2\) like base",
    ),
    "names": (
        lambda: ({"a": torch.zeros(1), "b": torch.zeros(1)}, [{"b": torch.zeros(1), "c": torch.zeros(1)}]),
        r"finetuned\[0\]\['a'\]: missing, expected F32 \(1,\) like base; finetuned\[0\]\['c'\]: not in base",
    ),
    "kind of type": (
        lambda: (torch.zeros(2), [torch.zeros(2, dtype=torch.int64)]),
        r"finetuned\[0\]: dtype I64, expected one of F64, F32, F16, BF16 \(base has F32\)",
    ),
    "type": (
        lambda: (torch.zeros(2, dtype=torch.complex64), [torch.zeros(2, dtype=torch.complex64)]),
        "base: dtype torch.complex64, expected F64, F32, F16, BF16 or an integer type",
    ),
    "no models": (lambda: (torch.zeros(2), []), "finetuned: no models, expected at least one"),
    "a tensor for a list": (lambda: (torch.zeros(2), torch.zeros(2)), "finetuned: Tensor, expected a list of models"),
    "kinds of model": (lambda: ({"a": torch.zeros(2)}, [torch.zeros(2)]), r"finetuned\[0\]: Tensor, but base is dict"),
    "not a tensor": (lambda: ({"a": 1}, [{"a": 1}]), r"base\['a'\]: int, expected a tensor"),
    "not a model": (lambda: (3, [3]), "base: int, expected a tensor, an array, a mapping of these or a module"),
    "meta": (lambda: (torch.zeros(2, device="meta"), [torch.zeros(2)]), "base: a meta tensor holds no data"),
    "sparse": (lambda: (torch.zeros(2).to_sparse(), [torch.zeros(2)]), "base: torch.sparse_coo tensor, expected a dense one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    make, message = BAD[case]
    base, finetuned = make()
    for function in (nm.merge, nm.merge_):
        with pytest.raises((nm.InputError, TypeError), match=message):
            function(base, finetuned, scale=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale: nan"),
        ({"scale": 1, "min_agreement": 0.2}, "min_agreement: 0.2"),
        ({"scale": 1, "inputs": "both"}, "inputs: 'both', expected one of finetuned, task_vectors"),
        ({"scale": 1, "nonfinite": "skip"}, "nonfinite: 'skip', expected one of keep-base, error"),
        (
            {"scale": 1, "backend": "abacus"},
            "backend: 'abacus', expected one of auto, cuda, triton, cpu, torch",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nm.InputError, match=message):
        nm.merge(torch.zeros(2), [torch.zeros(2)], **options)


def test_shared_memory_is_refused_in_place_only() -> None:
    base, *finetuned = versions(8, 8)
    with pytest.raises(nm.InputError, match=r"finetuned\[1\]\['a'\]: shares memory with base\['a'\]"):
        nm.merge_({"a": base}, [{"a": finetuned[0]}, {"a": base}], scale=0.9)
    with pytest.raises(nm.InputError, match=r"base\['b'\]: shares memory with base\['a'\]"):
        nm.merge_({"a": base, "b": base[1:]}, [{"a": t, "b": t[1:]} for t in finetuned], scale=0.9)
    with pytest.raises(nm.InputError, match="several of its elements share memory"):
        nm.merge_(base[:1].expand(4, 8), [t[:4] for t in finetuned], scale=0.9)
    with pytest.raises(nm.InputError, match="several of its elements share memory"):
        nm.merge_(base.as_strided((4, 4), (2, 1)), [t[:4, :4] for t in finetuned], scale=0.9)
    with pytest.raises(nm.InputError, match=r"base\['raw'\]: shares memory with base\['a'\]"):
        nm.merge_(
            {"a": base, "raw": base.view(torch.int32)},
            [{"a": t, "raw": base.view(torch.int32).clone()} for t in finetuned],
            scale=0.9,
        )
    # Columns of one matrix are interleaved, but share no element.
    columns = base.clone()
    nm.merge_(columns[:, 0], [columns[:, 1], columns[:, 2]], scale=0.9)
    assert same_bits(columns[:, 1:], base[:, 1:])
    assert same_bits(nm.merge(base, [base, base], scale=0.9), base)


def test_nothing_is_written_if_a_later_tensor_is_refused() -> None:
    a, b = versions(50), versions(60)
    model = {"a": a[0].clone(), "b": b[0].clone()}
    finetuned = [{"a": x, "b": y} for x, y in zip(a[1:], b[1:], strict=True)]
    finetuned[2]["b"] = torch.zeros(61)
    with pytest.raises(nm.InputError):
        nm.merge_(model, finetuned, scale=0.9)
    finetuned[2]["b"] = b[3].clone()
    finetuned[2]["b"][7] = float("nan")
    with pytest.raises(nm.InputError, match=r"finetuned\[2\]\['b'\]: element 7 in memory order: nan"):
        nm.merge_(model, finetuned, scale=0.9, nonfinite="error")
    assert same_bits(model["a"], a[0]) and same_bits(model["b"], b[0])


def test_nonfinite_elements_keep_the_base_or_are_an_error() -> None:
    base = torch.tensor([1.0, 60000.0, 1.0], dtype=torch.float16)
    finetuned = [torch.tensor([2.0, -60000.0, float("inf")], dtype=torch.float16)]
    merged = base.clone()
    stats = nm.merge_(merged, finetuned, scale=1.0)
    assert merged.tolist() == [0.0, 60000.0, 1.0]
    assert (stats.agreed, stats.nonfinite) == (1, 2)
    with pytest.raises(nm.InputError, match="base: element 1 in memory order: the result is not finite"):
        nm.merge(base[:2], [finetuned[0][:2]], scale=1.0, nonfinite="error")
    with pytest.raises(nm.InputError, match=r"finetuned\[0\]: element 1 in memory order: inf"):
        nm.merge(base[[0, 2]], [finetuned[0][[0, 2]]], scale=1.0, nonfinite="error")


def test_a_base_beyond_the_type_of_a_model_is_named() -> None:
    base, finetuned = torch.tensor([1.0, 1e6]), [torch.ones(2), torch.ones(2).half()]
    assert nm.merge_(base.clone(), finetuned, scale=1.0).nonfinite == 1
    with pytest.raises(nm.InputError) as error:
        nm.merge(base, finetuned, scale=1.0, nonfinite="error")
    assert str(error.value) == (
        "base: element 1 in memory order: 1000000.0 (infinite in a model's F16), expected finite numbers"
    )


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_one_trained_tensor_of_ten_is_a_tenth_of_the_consensus(backend: str) -> None:
    """A float32 base with bfloat16 models: rounding is no training."""
    generator = torch.Generator().manual_seed(1)
    base = {f"t{i}": torch.randn(1000, generator=generator) for i in range(10)}
    models = [{name: t.bfloat16() for name, t in base.items()} for _ in range(4)]
    for model in models:
        model["t3"] = (base["t3"] + 0.5).bfloat16()
    stats = nm.merge_({name: t.clone() for name, t in base.items()}, models, scale=0.9, backend=backend)
    assert stats.consensus_ratio == 0.1 and stats.tensors["t3"].agreed == 1000


def test_the_order_of_names_changes_no_bit() -> None:
    tensors = {f"t{i}": versions(i + 1, seed=i) for i in range(6)}
    models = [{name: v[k] for name, v in tensors.items()} for k in range(4)]
    backwards = [dict(reversed(m.items())) for m in models]
    forward = nm.merge(models[0], models[1:], scale=0.9)
    mixed = nm.merge(backwards[0], [models[1], backwards[2], models[3]], scale=0.9)
    assert all(same_bits(forward[name], mixed[name]) for name in forward)


def test_tensors_of_all_kinds_in_one_model() -> None:
    """Flat ones, scattered ones, and one with a dimension of size 1, whose stride is arbitrary."""
    odd = torch.empty(7).as_strided((1, 2), (5, 1))
    shapes = {"flat": torch.empty(3, 4), "scattered": torch.empty(3, 8)[:, ::2], "dense": torch.empty(4, 3).T}
    shapes |= {"scalar": torch.empty(()), "odd": odd, "none": torch.empty(0), "one": odd[:, :1][0]}
    models: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
    for seed, (name, like) in enumerate(shapes.items()):
        for model, values in zip(models, versions(*like.shape, n=2, seed=seed), strict=True):
            storage = torch.empty(like.untyped_storage().nbytes() // 4)
            model[name] = storage.as_strided(like.shape, like.stride()).copy_(values)
    plain = {name: expected([m[name].contiguous() for m in models]) for name in shapes}
    merged = nm.merge(models[0], models[1:], scale=0.9)
    stats = nm.merge_(models[0], models[1:], scale=0.9)
    for name in shapes:
        assert same_bits(merged[name], plain[name]) and same_bits(models[0][name], plain[name])
        assert stats.tensors[name].elements == plain[name].numel()


def test_a_model_with_nothing_to_merge() -> None:
    integers, floats = {"n": torch.arange(3), "flag": torch.tensor(True)}, {"w": torch.ones(2)}
    for base, options, message in (
        (integers, {}, r"base: 2 tensors of torch.bool, torch.int64, expected a floating-point one to merge \(F64, "),
        ({}, {}, "base: no tensors, expected a floating-point one to merge"),
        (torch.nn.ReLU(), {}, "base: no tensors, expected"),
        (torch.arange(3), {}, "base: torch.int64, expected a floating-point type to merge"),
        ({**integers, **floats}, {"exclude": "w"}, "base: 2 tensors of torch.bool, torch.int64, expected"),
        (floats, {"include": "v"}, "base: no tensor is chosen by include 'v', exclude None"),
    ):  # fmt: skip
        for function in (nm.merge, nm.merge_):
            with pytest.raises(nm.InputError, match=f"^{message}"):
                function(base, [base], scale=1.0, **options)
    with pytest.raises(nm.InputError, match=r"^task_vectors\[0\]: 2 tensors of torch.bool, torch.int64"):
        nm.merge_task_vectors([integers, integers])
    with pytest.raises(nm.InputError, match=r"^base: no tensors, expected"):
        nm.negate_({}, {}, scale=1.0)


@pytest.mark.filterwarnings("ignore")  # torch deprecates some of these kinds of tensor
def test_problems_are_found_among_tensors_that_fit() -> None:
    good = {f"t{i}": torch.ones(4) for i in range(5)}
    other = {name: tensor + 1 for name, tensor in good.items()}
    for wrong, message in {
        torch.ones(5): r"finetuned\[1\]\['t3'\]: shape \(5,\), expected \(4,\) like base",
        torch.ones(4, dtype=torch.int64): r"finetuned\[1\]\['t3'\]: dtype I64",
        torch.ones(4, device="meta"): r"finetuned\[1\]\['t3'\]: a meta tensor holds no data",
        torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8): r"\['t3'\]: quantized tensor",
        torch.nested.nested_tensor([torch.ones(4)]): r"\['t3'\]: nested tensor",
        good["t2"]: r"finetuned\[1\]\['t3'\]: shares memory with base\['t2'\]",
    }.items():
        with pytest.raises((nm.InputError, TypeError), match=message):
            nm.merge_(good, [other, {**other, "t3": wrong}], scale=1.0)
    nm.merge_(good, [other, {**other, "t3": other["t2"]}], scale=1.0)


def test_neighbours_in_one_memory_are_apart() -> None:
    memory = torch.randn(4, 3, 10)
    models = [{str(i): m[i] for i in range(3)} for m in memory.clone()]
    nm.merge_(models[0], models[1:], scale=0.9)
    assert all(same_bits(models[0][str(i)], expected([m[i] for m in memory])) for i in range(3))


def test_ctrl_c_waits_until_all_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes during the first of two batches."""
    made = {"single": versions(50), "half": [t.half() for t in versions(50)]}
    base, *finetuned = [{name: tensors[k].clone() for name, tensors in made.items()} for k in range(4)]
    merge_cpu, calls = native.merge_cpu, []

    def interrupted(batch: Batch, rule: Rule, threads: int | None = None) -> Any:
        calls.append(batch)
        signal.raise_signal(signal.SIGINT)
        return merge_cpu(batch, rule, threads)

    monkeypatch.setattr(native, "merge_cpu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nm.merge_(base, finetuned, scale=0.9, backend="cpu")
    assert len(calls) == 2
    for name, tensors in made.items():
        assert same_bits(base[name], expected(tensors))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


CUT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda t: t.clone(),
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: torch.stack([t, t], 2)[..., 0],
    "with an offset": lambda t: torch.cat([t, t])[40:],
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("kept", ["nothing", "almost all", "as many bytes as it has"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("which", ["base", "finetuned[0]", "finetuned[1]"])
def test_memory_that_was_freed_or_cut_is_refused(
    kind: str, kept: str, dtype: torch.dtype, which: str
) -> None:
    """Fully sharded training leaves such tensors between uses."""
    if kept == "as many bytes as it has" and kind != "with an offset":
        pytest.skip("that is all")
    ones = torch.ones(40, 50, dtype=dtype)
    models = {
        label: {"v": torch.full((3,), float(k)), "w": ones.clone()}
        for k, label in enumerate(["base", "finetuned[0]", "finetuned[1]"])
    }
    cut = models[which]["w"] = CUT[kind](ones)
    storage = cut.untyped_storage()
    span = (cut.stride(0) * 39 + cut.stride(1) * 49 + 1 + cut.storage_offset()) * cut.itemsize
    storage.resize_({"nothing": 0, "almost all": span - 1}.get(kept, cut.nbytes))
    message = f"^{re.escape(which)}\\['w'\\]: its memory has been freed, or cut, expected {span:,} bytes$"
    base, *finetuned = models.values()
    for function in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=message):
            function(base, finetuned, scale=0.9)
    if which == "base":  # what is not chosen is copied
        with pytest.raises(nm.InputError, match=message):
            nm.merge(base, finetuned, scale=0.9, exclude="w")
    assert base["v"].tolist() == [0, 0, 0]


def test_memory_of_other_arguments_that_was_cut() -> None:
    def cut() -> torch.Tensor:
        t = torch.ones(64)
        t.untyped_storage().resize_(200)
        return t

    whole = torch.ones(64)
    for call in (
        lambda: nm.merge_task_vectors([whole, cut()]),
        lambda: nm.negate_(cut(), whole, scale=1.0),
        lambda: nm.negate_(whole, cut(), scale=1.0),
        lambda: nm.merge(whole, [cut()], scale=1.0, inputs="task_vectors"),
        lambda: nm.merge(whole.double(), [whole, cut()], scale=1.0),
        lambda: nm.merge(whole.half(), [cut()], scale=1.0),
        lambda: nm.merge(cut().view(torch.float16), [whole.view(torch.float16)], scale=1.0),
    ):
        with pytest.raises(nm.InputError, match="its memory has been freed, or cut, expected 256 bytes"):
            call()


def test_tensors_without_elements_need_no_memory() -> None:
    empty = torch.ones(3, 0, 2)
    empty.untyped_storage().resize_(0)
    past = torch.ones(8)[8:]
    past.untyped_storage().resize_(0)
    models = [{"w": torch.ones(2), "empty": empty, "past": past} for _ in range(2)]
    assert nm.merge(models[0], models[1:], scale=1.0)["past"].shape == (0,)


def test_garbage_is_collected_while_code_of_the_users_runs() -> None:
    enabled: list[bool] = []

    class Watched(torch.nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            enabled.append(gc.isenabled())
            return super().state_dict(*args, **kwargs)

    class Array:
        def __init__(self, held: torch.Tensor) -> None:
            self.held = held.detach().numpy()

        def __dlpack_device__(self) -> Any:
            return self.held.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> Any:
            enabled.append(gc.isenabled())
            return self.held.__dlpack__(**options)

    def models() -> Iterator[Any]:
        for _ in range(2):
            enabled.append(gc.isenabled())
            yield Watched(3, 2)
        yield {name: Array(t) for name, t in torch.nn.Linear(3, 2).state_dict().items()}

    nm.merge(Watched(3, 2), models(), scale=1.0)  # type: ignore[arg-type]
    assert len(enabled) >= 7 and all(enabled) and gc.isenabled()


TOLD: dict[str, tuple[Callable[..., Any], str]] = {
    "merge": (lambda base, models: nm.merge(base, models, scale=1.0), "left as in the base"),
    "merge_": (lambda base, models: nm.merge_(base, models, scale=1.0), "left as in the base"),
    "negate_": (lambda base, models: nm.negate_(base, models[0], scale=1.0), "left as in the base"),
    "merge_task_vectors": (lambda _, models: nm.merge_task_vectors(models), "set to 0"),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("call", TOLD)
def test_elements_that_are_not_finite_are_told_of_once(call: str, backend: str) -> None:
    """With the number, and names in the order of the base, though tensors of another type are merged earlier."""
    function, kept = TOLD[call]
    good = {"a": torch.ones(4), "half": torch.ones(5).half(), "b": torch.ones(6, 2).T, "last": torch.ones(2)}
    bad = {name: t.clone() for name, t in good.items()}
    bad["half"][1] = torch.inf
    bad["b"][1] = torch.nan

    def told(base: Any, models: list[Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(base, models)
        assert all(w.category is nm.MergeWarning and w.filename == __file__ for w in caught)
        return [str(w.message) for w in caught]

    end = f"{kept}: not finite in a version or after the merge"
    base = {name: t.clone() for name, t in good.items()}
    assert told(base, [good]) == []
    assert told(base, [bad]) == [f"the result: 7 elements of 'half', 'b' {end}"]
    assert told(torch.ones(3), [torch.tensor([1.0, 2.0, torch.nan])]) == [f"the result: 1 element {end}"]
    many = [{str(k): torch.tensor([x]) for k in range(9)} for x in (1.0, torch.inf)]
    assert told(many[0], many[1:]) == [f"the result: 9 elements of '0', '1', '2' and 6 more {end}"]


def test_a_result_that_overflows_is_told_of() -> None:
    with pytest.warns(nm.MergeWarning, match="^the result: 1 element left as in the base: not finite"):
        out = nm.merge(torch.tensor([6e4, 1.0]).half(), [torch.tensor([0.0, 2.0]).half()], scale=1.0)
    assert out.tolist() == [6e4 // 32 * 32, 0.0]


def test_nothing_is_told_of_what_raises_or_is_not_chosen() -> None:
    models = [{"a": torch.ones(2), "b": torch.tensor([x])} for x in (1.0, torch.nan)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.merge(models[0], models[1:], scale=1.0, exclude="b")
        for function in (nm.merge, nm.merge_):
            with pytest.raises(nm.InputError, match=r"finetuned\[0\]\['b'\]: element 0"):
                function(models[0], models[1:], scale=1.0, nonfinite="error")
