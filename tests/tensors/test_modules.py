"""Modules whose state dict is not their memory, says more than its tensors, or is of what cannot be merged."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits import same_bits

import negmerge_fast as nm

Hook = Callable[[torch.nn.Module, dict[str, Any]], None]


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", nm.MergeWarning)
        yield


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4, bias=False))


def tuned(base: torch.nn.Module, n: int = 2) -> list[torch.nn.Module]:
    """Copies of a module with larger parameters."""
    made = [copy.deepcopy(base) for _ in range(n)]
    for k, module in enumerate(made):
        for parameter in module.parameters():
            parameter.data += 0.25 * (k + 1)
    return made


def hooked(hook: Hook) -> torch.nn.Module:
    module = net()
    module._register_state_dict_hook(lambda m, state, prefix, metadata: hook(m, state))
    return module


def values(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Hook:
    return lambda module, state: state.update({name: function(state[name])})


COPIES: dict[str, tuple[Hook, str]] = {
    "a cast": (change("0.bias", lambda t: t.bfloat16()), "0.bias"),
    "a copy": (change("1.weight", torch.clone), "1.weight"),
    "a transposed copy": (change("1.weight", lambda t: t.mT.contiguous()), "1.weight"),
    "a scattered copy": (change("1.weight", lambda t: t.clone().mT), "1.weight"),
    "an array": (change("1.weight", lambda t: t.numpy().copy()), "1.weight"),  # type: ignore[arg-type,return-value]
    "another tensor": (lambda module, state: state.update(extra=torch.ones(3)), "extra"),
}


@pytest.mark.parametrize(("hook", "name"), COPIES.values(), ids=COPIES.keys())
def test_a_state_dict_that_is_not_the_memory_is_refused_in_place(hook: Hook, name: str) -> None:
    base = hooked(hook)
    models, before = tuned(base), values(base)
    message = rf"^base\['{name}'\]: a copy that the module's state dict gives"
    with pytest.raises(nm.InputError, match=message):
        nm.merge_(base, models, scale=1.0)
    with pytest.raises(nm.InputError, match=message):
        nm.negate_(base, models[0], scale=1.0)
    assert all(map(same_bits, values(base), before))
    assert list(nm.merge(base, models, scale=1.0)) == list(base.state_dict())


def test_copies_of_what_is_not_written_are_no_matter() -> None:
    base = hooked(COPIES["a copy"][0])
    models, before = tuned(base), values(base)
    nm.merge_(base, models, scale=1.0, exclude=r"1\.weight")
    assert not same_bits(base[0].weight, before[0]) and same_bits(base[1].weight, before[2])


def in_parts(module: torch.nn.Module, state: dict[str, Any]) -> None:
    """Two halves of a weight, and a view of a bias."""
    weight, bias = state.pop("0.weight"), state.pop("0.bias")
    state.update({"0.q": weight[:3], "0.k": weight[3:].mT, "0.b": bias.view(2, 3)})


def test_views_of_the_memory_are_merged_in_place() -> None:
    base = hooked(in_parts)
    plain, models = net(), tuned(base)
    nm.merge_(plain, tuned(plain), scale=1.0)
    nm.merge_(base, models, scale=1.0)
    assert all(map(same_bits, values(base), values(plain)))


class Held(torch.nn.Module):
    """A module inside another, as of torch.compile or DDP, under a name that its state dict does not have."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.module = inner

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Held, torch.compile, torch.nn.DataParallel, torch.jit.script])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_modules_are_merged_in_place(wrap: Callable[[Any], Any]) -> None:
    plain = net()
    nm.merge_(plain, tuned(plain), scale=1.0)
    base = net()
    wrapped = wrap(base)
    stats = nm.merge_(
        wrapped, [{n: t + 0.25 * k for n, t in wrapped.state_dict().items()} for k in (1, 2)], scale=1.0
    )
    assert all(map(same_bits, values(base), values(plain))) and stats.elements == 54


def test_other_parameters_and_buffers_are_no_matter() -> None:
    base = torch.nn.Sequential(net(), torch.nn.BatchNorm1d(3))
    base.register_parameter("meta", torch.nn.Parameter(torch.empty(2, device="meta")))
    base.register_parameter("integers", torch.nn.Parameter(torch.arange(2), requires_grad=False))
    base.register_buffer("sparse", torch.eye(2).to_sparse(), persistent=False)
    base.register_buffer("wrapped", QuantizedTensor(torch.ones(2)), persistent=False)
    models = [{n: t + 1 if t.is_floating_point() else t for n, t in base.state_dict().items()}]
    assert nm.merge_(base, models, scale=0.1, exclude="meta").elements == 54 + 12


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_modules_are_merged_in_place(parametrization: str) -> None:
    torch.manual_seed(0)
    base = getattr(torch.nn.utils.parametrizations, parametrization)(torch.nn.Linear(4, 4))
    models = tuned(base)
    merged = nm.merge(base, models, scale=1.0)
    nm.merge_(base, models, scale=1.0)
    assert all(same_bits(t, merged[name]) for name, t in base.state_dict().items())


def without(*names: str) -> Hook:
    return lambda module, state: [state.pop(name) for name in names] and None


def test_parameters_that_the_state_dict_does_not_have_are_told_of() -> None:
    base = hooked(without("0.weight", "1.weight"))
    models = tuned(base)
    with pytest.warns(nm.MergeWarning) as caught:
        nm.merge_(base, models, scale=1.0)
    (warning,) = caught
    assert str(warning.message).startswith(
        "base: '0.weight', '1.weight': parameters that the module's state dict"
    )
    assert warning.filename == __file__
    before = values(base)
    with pytest.raises(nm.MergeWarning):
        nm.merge_(base, models, scale=1.0)
    assert all(map(same_bits, values(base), before)), (
        "a warning that is an error comes before the first write"
    )


def test_tied_parameters_are_in_the_state_dict_under_one_name() -> None:
    base = hooked(without("1.weight"))
    base[1].weight = torch.nn.Parameter(base[0].weight.detach().mT)
    nm.merge_(base, tuned(base), scale=1.0)


class Versioned(torch.nn.Linear):
    """A layer whose weight was transposed in an earlier version, and that looks at the version of what it loads."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if local.get("version", 1) < 2:
            state[prefix + "weight"] = state[prefix + "weight"].mT
        super()._load_from_state_dict(state, prefix, local, *rest)


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.state_dict()], ids=["module", "state dict"])
def test_the_metadata_of_a_state_dict_is_kept(of: Callable[[torch.nn.Module], Any]) -> None:
    base = torch.nn.Sequential(Versioned(4, 4))
    state = base.state_dict()
    merged = nm.merge(of(base), [base], scale=1.0)
    assert type(merged) is OrderedDict and list(merged) == list(state)
    assert merged._metadata == state._metadata and merged._metadata[""] == {"version": 1}  # type: ignore[attr-defined]
    merged._metadata["0"]["version"] = 7  # type: ignore[attr-defined]
    assert base.state_dict()._metadata["0"] == state._metadata["0"] == {"version": 2}, "a copy"
    other = torch.nn.Sequential(Versioned(4, 4))
    other.load_state_dict(nm.merge(of(base), [base], scale=1.0))
    assert same_bits(other[0].weight, base[0].weight)
    tau = nm.merge_task_vectors([of(base), base])
    assert tau._metadata == state._metadata  # type: ignore[attr-defined]


def test_the_kind_of_a_mapping_is_kept() -> None:
    tensors = {"w": torch.ones(2)}
    assert type(nm.merge(tensors, [tensors], scale=1.0)) is dict
    ordered = nm.merge(OrderedDict(tensors), [tensors], scale=1.0)
    assert type(ordered) is OrderedDict and not hasattr(ordered, "_metadata")
    assert type(nm.merge_task_vectors([OrderedDict(tensors)])) is OrderedDict


class Params4bit(torch.nn.Parameter):
    """As in bitsandbytes: packed integers in a parameter."""


class Int8Params(torch.nn.Parameter):
    """As in bitsandbytes."""


def packed(kind: type[torch.nn.Parameter], seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Linear(4, 4)
    integers = torch.randint(0, 100, (8, 1), dtype=torch.int8, generator=generator)
    module.weight = kind(integers, requires_grad=False)
    return torch.nn.Sequential(module)


def with_attributes(**attributes: Any) -> torch.nn.Module:
    module = net()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


GPTQ = SimpleNamespace(quant_method="gptq", bits=4)
UNMERGEABLE: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "config": (lambda: with_attributes(config=SimpleNamespace(quantization_config=GPTQ)), "quantization_config 'gptq'"),
    "config, a dict": (lambda: with_attributes(config={"quantization_config": {"quant_method": "awq"}}), "'awq'"),
    "config of a part": (
        lambda: with_attributes(config=SimpleNamespace(text_config=SimpleNamespace(quantization_config=GPTQ))),
        "quantization_config",
    ),
    "hf_quantizer": (lambda: with_attributes(hf_quantizer=object()), "hf_quantizer"),
    "is_quantized": (lambda: with_attributes(is_quantized=True), "is_quantized"),
    "8 bits": (lambda: with_attributes(is_loaded_in_8bit=True), "is_loaded_in_8bit"),
    "wrapped": (lambda: Held(with_attributes(is_quantized=True)), "is_quantized"),
    "adapters": (
        lambda: with_attributes(peft_config={"default": {}}, active_adapter="default"),
        "Sequential with adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), UNMERGEABLE.values(), ids=UNMERGEABLE.keys())
def test_quantized_models_and_adapters_are_refused(make: Callable[[], torch.nn.Module], message: str) -> None:
    good, bad = net(), make()
    for base, models, where in ((bad, [good], "base"), (good, [good, bad], r"finetuned\[1\]")):
        before = values(base)
        for function in (nm.merge, nm.merge_):
            with pytest.raises(nm.InputError, match=f"^{where}: .*{message}"):
                function(base, models, scale=1.0)
        assert all(map(same_bits, values(base), before))


def test_attributes_that_mean_nothing_here() -> None:
    base = with_attributes(
        config=SimpleNamespace(quantization_config=None, text_config=SimpleNamespace(depth=2)),
        hf_quantizer=None,
        is_quantized=False,
        peft_config={"default": {}},  # of adapters that were merged: none is active
    )
    nm.merge_(base, tuned(base), scale=1.0)
    odd = with_attributes(config=3)
    nm.merge_(odd, tuned(odd), scale=1.0)


@pytest.mark.parametrize("kind", [Params4bit, Int8Params])
def test_parameters_of_quantized_types_are_refused(kind: type[torch.nn.Parameter]) -> None:
    base, model = packed(kind, 0), packed(kind, 1)
    before = base[0].bias.detach().clone()
    for function in (nm.merge, nm.merge_):
        with pytest.raises(
            nm.InputError, match=rf"^base\['0.weight'\]: (I8|{kind.__name__}): quantized weights"
        ):
            function(base, [model], scale=1.0)
        held = {"w": torch.ones(2), "q": base[0].weight}
        with pytest.raises(nm.InputError, match=rf"^base\['q'\]: {kind.__name__}: quantized weights"):
            function(held, [{**held, "w": torch.zeros(2)}], scale=1.0)
    assert same_bits(base[0].bias, before)


class QuantizedTensor(torch.Tensor):
    """As of torchao: a tensor that has its numbers in others."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("asked")


def test_tensors_of_quantized_types_are_refused() -> None:
    base, model = ({"w": torch.ones(2), "q": QuantizedTensor(torch.ones(2))} for _ in range(2))
    for function in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=r"^base\['q'\]: QuantizedTensor: quantized weights"):
            function(base, [model], scale=1.0)
        with pytest.raises(
            nm.InputError, match=r"^finetuned\[0\]\['q'\]: QuantizedTensor: quantized weights"
        ):
            function({n: torch.ones(2) for n in base}, [model], scale=1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_of_torch_are_refused() -> None:
    good = net()
    bad = torch.ao.quantization.quantize_dynamic(net())
    for base, model, where in ((bad, bad, "base"), (good, bad, r"finetuned\[0\]")):
        for function in (nm.merge, nm.merge_):
            with pytest.raises(
                nm.InputError, match=rf"^{where}\['0._packed_params.*'\]: .*: quantized weights"
            ):
                function(base, [model], scale=1.0)
