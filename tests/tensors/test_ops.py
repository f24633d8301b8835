"""The operators of torch: the same bits as the functions, in eager mode and in graphs of every kind."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bits import same_bits
from hostile import random_models
from torch._subclasses.fake_tensor import FakeTensorMode

import negmerge_fast as nm
import negmerge_fast.ops
from negmerge_fast.core.descriptors import upload_in_launches
from negmerge_fast.core.reference import plain_merge

merge, merge_ = torch.ops.negmerge.merge, torch.ops.negmerge.merge_

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_gpu)]

Tensors = list[torch.Tensor]


def family(device: str = "cpu", n: int = 3, seed: int = 0) -> tuple[Tensors, list[Tensors]]:
    """A base and n models of three tensors with hostile values: three signatures, one empty, one in channels_last."""
    kinds = [(F32, [BF16], (240,)), (F16, [F32, F16], (2, 3, 4, 5)), (F64, [F64], (0, 4))]
    base: Tensors = []
    models: list[Tensors] = [[] for _ in range(n)]
    for i, (dtype, dtypes, shape) in enumerate(kinds):
        b, versions = random_models(n, int(torch.Size(shape).numel()), dtype, dtypes, seed + i)
        base.append(b.view(shape).to(device))
        for model, version in zip(models, versions, strict=True):
            model.append(version.view(shape).to(device))
    base[1] = base[1].contiguous(memory_format=torch.channels_last)
    return base, models


def flat(models: list[Tensors]) -> Tensors:
    return [tensor for model in models for tensor in model]


def equals_plain(
    merged: Tensors, counts: torch.Tensor, base: Tensors, models: list[Tensors], *rule: Any
) -> bool:
    expected = [
        plain_merge(b.cpu(), [m[i].cpu() for m in models], *rule)
        for i, b in enumerate(base)
    ]  # fmt: skip
    assert counts.dtype == torch.int64 and counts.device == base[0].device
    assert [t.stride() for t in merged] == [torch.empty_like(t).stride() for t in base]
    return counts.tolist() == [counted for _, *counted in expected] and all(
        same_bits(m.cpu(), e) for m, (e, *_) in zip(merged, expected, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("rule", [(0.5, 1.0, False), (0.3, 0.6, False), (1.0, 1.0, True)])
def test_same_bits_as_the_rule(device: str, backend: str, rule: tuple[float, float, bool]) -> None:
    base, models = family(device)
    merged, counts = merge(base, flat(models), *rule, backend)
    assert equals_plain(merged, counts, base, models, *rule)
    written = [t.clone() for t in base]
    assert equals_plain(written, merge_(written, flat(models), *rule, backend), base, models, *rule)
    inputs = "task_vectors" if rule[2] else "finetuned"
    named = [{str(i): t for i, t in enumerate(model)} for model in (base, *models)]
    same: dict[str, Any] = nm.merge(
        named[0], named[1:], scale=rule[0], min_agreement=rule[1], inputs=inputs, backend=backend
    )
    assert all(same_bits(m, s) for m, s in zip(merged, same.values(), strict=True))


def test_counts_of_many_tensors_come_in_their_order() -> None:
    base = [torch.zeros(2 * i + 1, dtype=(F32, F16)[i % 2]) for i in range(6)]
    base[4] = torch.zeros(18)[::2]  # scattered, so it is copied and merged first
    assert merge(base, [torch.ones_like(t) for t in base], 0.5)[1].tolist() == [
        [2 * i + 1, 0, 0] for i in range(6)
    ]
    assert merge_(base, [torch.ones_like(t) for t in base], 0.5).tolist() == [
        [2 * i + 1, 0, 0] for i in range(6)
    ]
    assert all((t == -0.5).all() for t in base)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "kind", ["f64", "f32", "f16", "bf16", "mixed", "one model", "scattered", "requires grad", "majority", "task vectors"]
)  # fmt: skip
def test_opcheck_passes(device: str, kind: str) -> None:
    dtype = {"f64": F64, "f16": F16, "bf16": BF16}.get(kind, F32)
    base, models = family(device, n=1 if kind == "one model" else 3)
    if kind != "mixed":
        base, *models = ([t.to(dtype) for t in model] for model in (base, *models))
    if kind == "scattered":
        base[0], models[1][0] = base[0].view(20, 12).t(), models[1][0].view(12, 20).flip(0)
        models[0][0] = torch.ones(24, 20, dtype=dtype, device=device)[::2]
        models[2][0] = torch.ones((), dtype=dtype, device=device).expand(12, 20)
    grad = kind == "requires grad"
    for model in (base, *models):  # opcheck compares with allclose, where NaN is not equal to NaN
        model[:] = [t.nan_to_num(0.5, 0.25, -0.25).clamp(-9, 9).requires_grad_(grad) for t in model]
    rule = {"majority": (0.5, 0.6), "task vectors": (0.5, 1.0, True)}.get(kind, (0.5,))
    torch.library.opcheck(merge.default, (base, flat(models), *rule))
    if not grad:
        torch.library.opcheck(merge_.default, (base, flat(models), *rule))


@pytest.mark.parametrize("rule", [(0.3, 1.0, False), (0.3, 0.6, False), (0.3, 1.0, True), (0.3, 0.6, True)])
def test_gradient_matches_finite_differences(rule: tuple[float, float, bool]) -> None:
    inputs = [torch.randn(shape, dtype=F64).requires_grad_() for _ in range(4) for shape in ((20,), (3, 4))]
    assert torch.autograd.gradcheck(lambda *t: tuple(merge(t[:2], t[2:], *rule)[0]), inputs)


def test_gradient_goes_to_the_base_where_the_rule_keeps_it() -> None:
    base = torch.tensor([0.0, 0.0, float("nan"), 0.0], requires_grad=True)
    model = torch.tensor([1.0, 0.0, 1.0, float("inf")], requires_grad=True)
    merge([base], [model], 0.5)[0][0].sum().backward()
    assert base.grad is not None and base.grad.tolist() == [1.5, 1.0, 1.0, 1.0]
    assert model.grad is not None and model.grad.tolist() == [-0.5, 0.0, 0.0, 0.0]


def test_autograd_notices_a_merge_in_place() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    product = weight * weight
    merge_([weight], [torch.ones(4)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        base, models = family()
        written = [t.clone() for t in base]
        merged, counts = merge(base, flat(models), 0.5)
        assert torch.equal(merge_(written, flat(models), 0.5), counts)
    assert all(same_bits(*pair) for pair in zip(merged, written, strict=True))


def real(tensors: Tensors) -> Tensors:
    return tensors


def meta(tensors: Tensors) -> Tensors:
    return [t.to("meta") for t in tensors]


def fake(tensors: Tensors) -> Tensors:
    return [MODE.from_tensor(t) for t in tensors]


MODE = FakeTensorMode()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world", [meta, fake])
def test_shapes_without_data(world: Callable[[Tensors], Tensors], device: str) -> None:
    base, models = family(device)
    merged, counts = merge(world(base), world(flat(models)), 0.5)
    expected, expected_counts = merge(base, flat(models), 0.5)
    for found, like in zip([*merged, counts], [*expected, expected_counts], strict=True):
        assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), like.dtype)
        assert found.device == (torch.device("meta") if world is meta else like.device)
    assert merge_(world(base), world(flat(models)), 0.5).shape == (3, 3)


ones = torch.ones


@pytest.mark.parametrize("world", [real, meta, fake])
@pytest.mark.parametrize("operator", [merge, merge_])
@pytest.mark.parametrize(
    ("base", "finetuned", "rule", "message"),
    [
        ([], [], (0.5,), "base: no tensors, expected at least one"),
        ([ones(2)], [], (0.5,), "finetuned: no models, expected at least one"),
        ([ones(2), ones(2)], [ones(2)] * 3, (0.5,), "finetuned: 3 tensors, expected a multiple of the 2 of base"),
        ([ones(4, 2)], [ones(4, 2), ones(4, 2), ones(3, 2)], (0.5,), r"finetuned\[2\]\[0\]: shape \(3, 2\), expected \(4, 2\) like base\[0\]"),
        ([ones(2), ones(2).int()], [ones(2)] * 2, (0.5,), r"base\[1\]: I32, expected a floating-point type to merge, of F64"),
        ([ones(2)], [ones(2, dtype=torch.complex64)], (0.5,), r"finetuned\[0\]\[0\]: torch.complex64, expected a floating"),
        ([ones(2)], [ones(2)], (float("nan"),), "scale: nan, expected a finite number"),
        ([ones(2)], [ones(2)], (0.5, 0.5), "min_agreement: 0.5, expected more than 0.5"),
        ([ones(2)], [ones(2)], (0.5, 1.0, False, "gpu"), "backend: 'gpu', expected one of auto, cuda, triton, cpu, torch"),
    ],
)  # fmt: skip
def test_errors_are_the_same_with_and_without_data(
    world: Callable[[Tensors], Tensors],
    operator: Any,
    base: Tensors,
    finetuned: Tensors,
    rule: Any,
    message: str,
) -> None:
    before = [t.clone() for t in base]
    with pytest.raises(nm.InputError, match=message):
        operator(world(base), world(finetuned), *rule)
    assert all(map(torch.equal, base, before))


@pytest.mark.parametrize("operator", [merge, merge_])
def test_refused_layouts_and_devices(operator: Any) -> None:
    with pytest.raises(
        TypeError, match=r"finetuned\[0\]\[1\]: torch.sparse_coo tensor, expected a dense one"
    ):
        operator([ones(2), ones(2)], [ones(2), ones(2).to_sparse()], 0.5)
    with pytest.raises(nm.InputError, match=r"finetuned\[0\]\[0\]: on meta, expected cpu like base\[0\]"):
        operator([ones(2)], [ones(2, device="meta")], 0.5)
    with pytest.raises(nm.InputError, match=r"base\[1\]: on meta, expected cpu like base\[0\]"):
        operator([ones(2), ones(2, device="meta")], [ones(2), ones(2)], 0.5)
    (freed := ones(2)).untyped_storage().resize_(0)
    with pytest.raises(nm.InputError, match=r"finetuned\[0\]\[0\]: its memory has been freed"):
        operator([ones(2)], [freed], 0.5)
    with pytest.raises(nm.InputError, match="backend 'cuda' cannot run here"):
        operator([ones(2)], [ones(2)], 0.5, backend="cuda")


def test_shared_memory_is_refused_in_place() -> None:
    memory = torch.zeros(8)
    for base, finetuned, message in (
        ([memory, memory[4:]], [ones(8), ones(4)], r"base\[1\]: shares memory with base\[0\]"),
        ([memory[:4]], [ones(4), memory[2:6]], r"finetuned\[1\]\[0\]: shares memory with base\[0\]"),
        ([memory[:1].expand(4)], [ones(4)], r"base\[0\]: several of its elements share memory"),
        ([memory[::2]], [memory[:4]], r"shares memory"),
    ):
        with pytest.raises(nm.InputError, match=message):
            merge_(base, finetuned, 0.5)
    assert not memory.any()
    merge_([memory[::2]], [memory[1::2]], 0.5)
    merge_([memory[:0], memory[:0]], [memory[:0], memory[4:4]], 0.5)


def in_graph(base: Tensors, finetuned: Tensors, scale: float) -> Any:
    return merge([t * 1 for t in base], finetuned, scale)


def in_graph_(base: Tensors, finetuned: Tensors, scale: float) -> Any:
    return merge_(base, finetuned, scale)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [
        ("aot_eager", None),
        ("aot_eager", True),
        pytest.param(
            "inductor", None, marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++ for inductor")
        ),
    ],
)
def test_compiled(device: str, compiler: str, dynamic: bool | None) -> None:
    compiled, compiled_ = (
        torch.compile(f, fullgraph=True, backend=compiler, dynamic=dynamic) for f in (in_graph, in_graph_)
    )
    for scale in (0.5, 0.25):
        base, models = family(device)
        base, models = (
            [base[0], base[2]],
            [[m[0], m[2]] for m in models],
        )  # * 1 may change the payload of a NaN
        base[0].nan_to_num_()
        assert equals_plain(*compiled(base, flat(models), scale), base, models, scale)
        written = [t.clone() for t in base]
        assert equals_plain(written, compiled_(written, flat(models), scale), base, models, scale)


def named_family(device: str) -> list[dict[str, torch.Tensor]]:
    base, models = family(device)
    integers = [torch.arange(3, device=device) + k for k in range(4)]
    return [
        {"a": a, "steps": steps, "b": b, "c": c}
        for (a, b, c), steps in zip([base, *models], integers, strict=True)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_functions_in_a_graph(device: str, dynamic: bool | None) -> None:
    def merged_of(base: Any, finetuned: Any, scale: float) -> Any:
        return nm.merge(base, finetuned, scale=scale)

    def written_to(base: Any, finetuned: Any, scale: float) -> nm.Stats:
        return nm.merge_(base, finetuned, scale=scale, min_agreement=0.6)

    compiled, compiled_ = (
        torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for f in (merged_of, written_to)
    )
    base, *models = named_family(device)
    found, expected = compiled(base, models, 0.5), merged_of(base, models, 0.5)
    assert list(found) == list(expected) and found["steps"] is not base["steps"]
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert same_bits(compiled(base["a"], [m["a"] for m in models], 0.5), expected["a"])

    twins = [{name: t.clone() for name, t in base.items()} for _ in range(2)]
    stats, expected_stats = compiled_(twins[0], models, 0.5), written_to(twins[1], models, 0.5)
    assert {**stats.tensors} == {**expected_stats.tensors}
    assert all(same_bits(twins[0][name], twins[1][name]) for name in base)


def test_modules_in_a_graph() -> None:
    modules = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)) for _ in range(3)]
    expected: dict[str, torch.Tensor] = nm.merge(modules[0], modules[1:], scale=0.5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(base: Any, finetuned: Any) -> tuple[Any, nm.Stats]:
        return nm.merge(base, finetuned, scale=0.5), nm.merge_(base, finetuned, scale=0.5)

    merged, stats = both(modules[0], modules[1:])
    state = modules[0].state_dict()
    assert list(merged) == list(expected) and stats.elements == 24
    assert all(same_bits(merged[n], t) and same_bits(state[n], t) for n, t in expected.items())


def test_exported_for_every_length() -> None:
    class Merging(torch.nn.Module):
        def forward(self, base: torch.Tensor, model: torch.Tensor) -> Any:
            return nm.merge(base, [model], scale=0.5)

    any_length = {0: torch.export.Dim("length")}
    program = torch.export.export(
        Merging(), (torch.zeros(3), ones(3)), dynamic_shapes=(any_length, any_length)
    )
    assert torch.equal(program.module()(torch.zeros(5), ones(5)), torch.full((5,), -0.5))


def test_gradient_sees_no_difference_where_a_model_is_the_base_in_its_own_type() -> None:
    base = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12], requires_grad=True)
    model = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    (out,), counts = torch.ops.negmerge.merge([base], [model], 0.5)
    out.sum().backward()
    assert int(counts[0, 0]) == 1
    assert base.grad is not None and base.grad.tolist() == [1.0, 1.5]
    assert model.grad is not None and model.grad.tolist() == [0.0, -0.5]


def test_gradient_through_a_compiled_graph() -> None:
    def loss(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
        return (merge([base * 2], [model.sin()], 0.5)[0][0] ** 2).sum()

    inputs = [torch.randn(5, 6, dtype=F64, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("finetuned", "keywords", "message"),
    [
        ([{"a": ones(3)}], {}, r"finetuned\[0\]\['a'\]: shape \(3,\), expected \(2,\) like base"),
        ([{}], {}, r"finetuned\[0\]\['a'\]: missing, expected F32 \(2,\) like base"),
        ([], {}, "finetuned: no models, expected at least one"),
        ([{"a": ones(2)}], {"nonfinite": "error"}, "nonfinite: 'error', expected 'keep-base' in a graph"),
        ([{"a": ones(2)}], {"min_agreement": 0.1}, "min_agreement: 0.1, expected more than 0.5"),
    ],
)
def test_refused_while_a_graph_is_traced(finetuned: Any, keywords: Any, message: str) -> None:
    expected = message.replace("'", r"\\?'")
    if torch.__version__.startswith(("2.7.", "2.8.")):  # their compiler tells only what class of error it is
        expected += "|InputError"
    for function in (nm.merge, nm.merge_):
        compiled = torch.compile(
            lambda b, f, function=function: function(b, f, scale=0.5, **keywords),
            fullgraph=True,
            backend="aot_eager",
        )
        with pytest.raises(Exception, match=expected):
            compiled({"a": ones(2)}, finetuned)


@pytest.mark.parametrize("device", DEVICES)
def test_descriptors_are_uploaded_in_launches(device: str) -> None:
    """A CUDA graph needs it. Every bit of an address arrives."""
    numbers = np.array([0, 1, -1, 2**31, 2**53 + 1, 2**62 + 3, -(2**63), 0x7F62_3399_39A0] * 40)
    assert upload_in_launches(numbers, torch.device(device)).tolist() == numbers.tolist()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=needs_gpu)])
def test_cuda_graph(device: str, backend: str) -> None:
    base, models = family(device)
    finetuned, written = flat(models), [t.clone() for t in base]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # loads modules and allocates memory before the capture
        merge(base, finetuned, 0.5, backend=backend)
        merge_([t.clone() for t in base], finetuned, 0.5, backend=backend)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged, counts = merge(base, finetuned, 0.5, backend=backend)
        counts_ = merge_(written, finetuned, 0.5, backend=backend)
    for seed in (10, 20):
        new_base, new_models = family(device, seed=seed)
        for old, new in zip(base + written + finetuned, new_base + new_base + flat(new_models), strict=True):
            old.copy_(new)
        graph.replay()
        assert equals_plain(merged, counts, new_base, new_models, 0.5)
        assert equals_plain(written, counts_, new_base, new_models, 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current() -> None:
    base, models = family("cuda:1")
    with torch.cuda.device(0):
        merged, counts = merge(base, flat(models), 0.5)
        assert equals_plain(merged, counts, base, models, 0.5)
        with pytest.raises(
            nm.InputError, match=r"finetuned\[0\]\[0\]: on cuda:0, expected cuda:1 like base\[0\]"
        ):
            merge(base, [t.to("cuda:0") for t in flat(models)], 0.5)


def test_operators_and_graphs_tell_of_what_is_not_finite() -> None:
    def told(call: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        return [str(w.message) for w in caught if w.category is nm.MergeWarning]

    base, bad = [torch.ones(3), torch.ones(2)], [torch.ones(3), torch.tensor([1.0, torch.nan])]
    text = ["the result: 1 element of '1' left as in the base: not finite in a version or after the merge"]
    assert told(lambda: torch.ops.negmerge.merge(base, bad, 1.0)) == text
    assert told(lambda: torch.ops.negmerge.merge_(base, bad, 1.0)) == text
    assert told(lambda: torch.ops.negmerge.merge(base, base, 1.0)) == []
    for function in (nm.merge, nm.merge_):
        graph = torch.compile(lambda b, x, f=function: f(b, [x], scale=1.0), backend="eager", fullgraph=True)
        named = [dict(zip("ab", tensors, strict=True)) for tensors in (base, bad)]
        assert told(lambda graph=graph, named=named: graph(*named)) == text
