"""Every kind of tensor that torch has: merged with the right bits, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from array_cases import arrays, expected
from bits import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import negmerge_fast as nm
from negmerge_fast.tensors import flatten


class Labelled(torch.Tensor):
    """A subclass without __torch_dispatch__: its numbers are in its memory, whatever its methods do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("asked")


class Wrapper(torch.Tensor):
    """A subclass with __torch_dispatch__, as DTensor: its numbers are not in its memory."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("asked")


def strided(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(2, 3, 8, 4)[:, :, ::2].copy_(t)


def in_inference_mode(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def inner(t: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return make(t)

    return inner


def fake(t: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(t.shape)


def imaginary(t: torch.Tensor) -> torch.Tensor:
    """The imaginary part of a conjugate, whose memory holds the negated values."""
    view = torch.complex(torch.zeros(t.shape), -t).conj().imag
    assert view.is_neg()
    return view


# Functions that make a tensor of a kind from a plain one of shape (2, 3, 4, 4). It is merged as the plain one is.
MERGED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": torch.clone,
    "requires grad": lambda t: t.clone().requires_grad_(),
    "not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "buffer": lambda t: torch.nn.Module.register_buffer(m := torch.nn.Module(), "b", t.clone()) or m.b,
    "view": lambda t: torch.cat([t, t])[1:3].copy_(t),
    "strided": strided,
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels last": lambda t: t.clone(memory_format=torch.channels_last),
    "negative bit": lambda t: torch._neg_view(-t),
    "imaginary part of a conjugate": imaginary,
    "inference": in_inference_mode(torch.clone),
    "strided inference": in_inference_mode(strided),
    "subclass": lambda t: t.clone().as_subclass(Labelled),
    "strided subclass": lambda t: strided(t).as_subclass(Labelled),
    "numpy": lambda t: t.clone().numpy(),  # type: ignore[dict-item,return-value]
    "shared": lambda t: t.clone().share_memory_(),
}

OUTSIDE = "a tensor without memory, as inside torch.func.vmap or grad"
DTYPES = "expected .*F64, F32, F16, BF16"
REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse COO": (lambda t: t.to_sparse(), "torch.sparse_coo tensor, expected a dense one"),
    "sparse CSR": (lambda t: t[0, 0].to_sparse_csr(), "torch.sparse_csr tensor, expected a dense one"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8), "quantized tensor"),
    "by channel": (
        lambda t: torch.quantize_per_channel(t, torch.ones(2), torch.zeros(2), 0, torch.qint8),
        "quantized tensor, expected a dense one",
    ),
    "nested": (lambda t: torch.nested.nested_tensor([t]), "nested tensor, expected a dense one"),
    "jagged": (lambda t: torch.nested.nested_tensor([t[0]], layout=torch.jagged), "nested tensor, expected"),
    "mkldnn": (lambda t: t.to_mkldnn(), "torch._mkldnn tensor, expected a dense one"),
    "meta": (lambda t: t.to("meta"), "a meta tensor holds no data"),
    "fake": (fake, "FakeTensor, expected a plain torch.Tensor"),
    "wrapper subclass": (Wrapper, "Wrapper, expected a plain torch.Tensor"),
    "lazy": (lambda t: torch.nn.UninitializedParameter(), "not initialized yet, expected"),
    "lazy buffer": (lambda t: torch.nn.UninitializedBuffer(), "not initialized yet, expected"),
    "zeros without memory": (lambda t: torch._efficientzerotensor(t.shape), OUTSIDE),
    "complex": (lambda t: t.to(torch.complex64), f"dtype torch.complex64, {DTYPES}"),
    "conjugate": (lambda t: t.to(torch.complex64).conj(), f"dtype torch.complex64, {DTYPES}"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), f"dtype torch.float8_e4m3fn, {DTYPES}"),
    "strided float8": (lambda t: t.to(torch.float8_e5m2).mT, f"dtype torch.float8_e5m2, {DTYPES}"),
}


def versions() -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays(2, 3, 4, 4)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["base", "models", "all"])
@pytest.mark.parametrize("kind", MERGED)
def test_kinds_that_are_merged(kind: str, which: str) -> None:
    tensors, make = versions(), MERGED[kind]
    plain = expected(tensors)

    def held() -> list[Any]:
        return [
            make(t) if which in ("all", "models" if k else "base") else t.clone()
            for k, t in enumerate(tensors)
        ]

    def numbers(value: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return torch.as_tensor(value).detach().clone().contiguous().resolve_neg()

    base, *models = held()
    merged = nm.merge(base, models, scale=0.9)
    assert type(merged) is (np.ndarray if isinstance(base, np.ndarray) else torch.Tensor)
    assert same_bits(numbers(merged), plain) and same_bits(numbers(base), tensors[0])
    stats = nm.merge_(base, models, scale=0.9)
    assert same_bits(numbers(base), plain) and stats.elements == plain.numel()
    named = {"plain": tensors[0].clone(), "w": held()[0]}
    nm.merge_(named, [{"plain": t, "w": v} for t, v in zip(tensors[1:], models, strict=True)], scale=0.9)
    assert same_bits(named["plain"], plain) and same_bits(numbers(named["w"]), plain)


@pytest.mark.filterwarnings("ignore")  # torch deprecates some kinds, and calls some incomplete
@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_are_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    tensors = versions()
    for function in (nm.merge, nm.merge_):
        for which in (0, 2):
            held = [t.clone() for t in tensors]
            held[which] = make(held[which])
            where = f"finetuned[{which - 1}]" if which else "base"
            models = [{"first": t.clone(), "w": v} for t, v in zip(tensors, held, strict=True)]
            escaped = where.replace("[", r"\[").replace("]", r"\]")
            with pytest.raises((nm.InputError, TypeError), match=f"^{escaped}: {message}"):
                function(held[0], held[1:], scale=0.9)
            with pytest.raises((nm.InputError, TypeError), match=rf"^{escaped}\['w'\]: {message}"):
                function(models[0], models[1:], scale=0.9)
            assert same_bits(models[0]["first"], tensors[0])


def test_expanded_tensors() -> None:
    base, *models = (t[:1, :1].expand(2, 3, 4, 4) for t in versions())
    assert same_bits(nm.merge(base, models, scale=0.9), expected([base, *models]))
    with pytest.raises(nm.InputError, match="base: several of its elements share memory"):
        nm.merge_(base, models, scale=0.9)
    nm.merge_(own := base.clone(), models, scale=0.9)
    assert same_bits(own, expected([base, *models]))


def test_lazy_modules() -> None:
    for function in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=r"base\['weight'\]: not initialized yet"):
            function(torch.nn.LazyLinear(2), [torch.nn.LazyLinear(2)], scale=0.9)


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "vmap": torch.func.vmap,
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": torch.func.functionalize,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", [nm.merge, nm.merge_])
def test_inside_torch_func(transform: str, function: Any) -> None:
    """Transformed tensors have no memory, nor do tensors made inside. They are refused without a crash."""
    outer = {"w": torch.ones(3)}

    def inner(x: torch.Tensor) -> torch.Tensor:
        for base, models in ((x, [torch.full(x.shape, 2.0)]), (outer["w"], [x[..., :3]])):
            with pytest.raises(TypeError, match=f"^(base|finetuned\\[0\\]): {OUTSIDE}"):
                function(base, models, scale=1.0)
        return x * 1

    TRANSFORMS[transform](inner)(torch.ones(3, 3) if transform == "vmap" else torch.ones(3))
    assert outer["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_plain_tensors_inside_torch_func(transform: str) -> None:
    held = [torch.ones(3, 3).T[:2], torch.full((2, 3), 2.0)]

    def inner(x: torch.Tensor) -> torch.Tensor:
        try:
            assert nm.merge(held[0], held[1:], scale=1.0).tolist() == [[0.0] * 3] * 2
        except TypeError as error:
            assert OUTSIDE in str(error)
        return x * 1

    TRANSFORMS[transform](inner)(torch.ones(3, 3) if transform == "vmap" else torch.ones(3))


def freed(t: torch.Tensor) -> torch.Tensor:
    held = torch.cat([t, t])[2:]
    held.untyped_storage().resize_(0)
    return held


def cut(t: torch.Tensor) -> torch.Tensor:
    held = torch.cat([t, t])[2:]
    held.untyped_storage().resize_(held.untyped_storage().nbytes() - 1)
    return held


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", [0, 2])
def test_many_names_are_checked_as_one_is(which: int) -> None:
    """Columns of names find the same tensors flat, at the same addresses, as each name alone; in the base's order."""
    others = {
        "freed": freed, "cut": cut, "half": torch.Tensor.half, "double": torch.Tensor.double, "integer": torch.Tensor.long,
        "longer": lambda t: torch.cat([t, t]), "flatter": torch.Tensor.flatten, "empty": lambda t: t[:0],
        "missing": lambda t: None,
    }  # fmt: skip
    makers = {**MERGED, **{kind: make for kind, (make, _) in REFUSED.items()}, **others}
    for odd in (list(makers), *([kind] for kind in makers)):
        tensors = versions()
        named: list[dict[str, Any]] = [{f"a.{i}": t for i in range(70)} for t in tensors]
        for k, (model, t) in enumerate(zip(named, tensors, strict=True)):
            model |= {kind: makers[kind](t) if k == which else t.clone() for kind in odd}
            model |= {f"b.{i}": t for i in range(70)} | {"c._extra_state": t}
        found = flatten.flat_items(named)
        single = {name: item for name in named[0] if (item := flatten._flat_item(name, named))}
        assert list(found) == list(single) and not found.keys() & {"freed", "cut", "c._extra_state"}
        assert [facts(item) for item in found.values()] == [facts(item) for item in single.values()]


def facts(item: flatten.Item) -> tuple[Any, ...]:
    """All of an item but its tensors, of which it may hold detached views."""
    assert item.segment and item.segment.base and item.segment.out is item.out is None
    operands = [item.segment.base, *item.segment.models]
    for tensor, (address, dtype, owner) in zip(item.versions, operands, strict=True):
        assert owner is tensor and tensor.data_ptr() == address and not tensor.requires_grad
        assert flatten.FLOAT_NAMES[tensor.dtype] == dtype
    return item.name, item.segment.numel, [tuple(operand[:2]) for operand in operands]
