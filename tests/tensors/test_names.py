"""Models in memory whose names, ties or integers differ; names that are chosen; what is refused by its names and numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from array_cases import arrays
from bits import same_bits

import negmerge_fast as nm

Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", nm.MergeWarning)
        yield


class LM(torch.nn.Module):
    """A language model with tied weights, under a name before or after that of the embedding."""

    def __init__(self, seed: int, head: str = "head") -> None:
        super().__init__()
        torch.manual_seed(seed)
        embed, output = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
        for name, module in sorted({"embed": embed, head: output}.items()):
            self.add_module(name, module)
        self.norm = torch.nn.LayerNorm(4)
        output.weight = embed.weight


def saved(model: torch.nn.Module, *tied: str) -> Tensors:
    """What is in its file: tied weights once, in memory of its own."""
    return {n: t.clone() for n, t in model.state_dict().items() if n not in tied}


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight", "ahead.weight"])
@pytest.mark.parametrize("in_place", [False, True])
def test_tied_weights_may_be_missing_in_a_version(kept: str, in_place: bool) -> None:
    head = "ahead" if kept == "ahead.weight" else "head"
    base, *models = (LM(seed, head) for seed in range(4))
    plain = nm.merge(base, models, scale=0.9)
    dropped = f"{head}.weight" if kept == "embed.weight" else "embed.weight"
    files = [saved(model, dropped) for model in models]
    mixed = [files[0], models[1], {n: t.numpy() for n, t in files[2].items()}]
    for versions in (files, mixed):
        merged = nm.merge(base, versions, scale=0.9)
        assert list(merged) == list(plain) and merged[f"{head}.weight"] is merged["embed.weight"]
        assert all(same_bits(merged[name], t) for name, t in plain.items())
    if in_place:
        nm.merge_(base, files, scale=0.9)
        assert all(same_bits(t, plain[name]) for name, t in base.state_dict().items())


def test_tied_weights_of_versions_may_be_missing_in_the_base() -> None:
    base, *models = (LM(seed) for seed in range(4))
    plain, file = nm.merge(base, models, scale=0.9), saved(base, "head.weight")
    merged = nm.merge(file, models, scale=0.9)
    assert list(merged) == list(file) and all(same_bits(t, plain[name]) for name, t in merged.items())
    with pytest.warns(nm.MergeWarning, match=r"^finetuned\[2\]: 'head.weight' is not in base, but tied to"):
        nm.merge_(file, [models[0], saved(models[1], "head.weight"), saved(models[2])], scale=0.9)
    assert all(same_bits(t, merged[name]) for name, t in file.items())
    tau = nm.merge_task_vectors([saved(models[0], "head.weight"), models[1]])
    assert list(tau) == list(file)


def test_only_tied_weights_may_be_missing() -> None:
    base, *models = (saved(LM(seed)) for seed in range(3))
    assert not same_bits(base["norm.weight"], base["norm.bias"])
    for name in ("norm.weight", "norm.bias"):  # all ones, all zeros
        broken = [{n: t for n, t in model.items() if n != name} for model in models]
        with pytest.raises(
            nm.InputError, match=rf"^finetuned\[0\]\['{name}'\]: missing, expected F32 \(4,\)"
        ):
            nm.merge(base, broken, scale=0.9)
    models[1]["head.weight"] += 1
    with pytest.raises(nm.InputError, match=r"^finetuned\[1\]\['head.weight'\]: not in base"):
        nm.merge({n: t for n, t in base.items() if n != "head.weight"}, models, scale=0.9)


IDS = {"position_ids": torch.arange(5)[None]}


@pytest.mark.parametrize("ids", [IDS, {"position_ids": IDS["position_ids"].numpy()}], ids=["tensor", "array"])
def test_integers_may_be_missing_or_more(ids: Tensors) -> None:
    base, *models = ({"w": torch.from_numpy(a)} for a in arrays(3, 4, n=2))
    plain = nm.merge(base, models, scale=0.9)
    with pytest.warns(
        nm.MergeWarning, match=r"^finetuned\[0\] and 1 more: lacks 'position_ids': base has integers"
    ) as one:
        merged = nm.merge({**base, **ids}, models, scale=0.9)
    assert list(merged) == ["w", "position_ids"] and same_bits(merged["w"], plain["w"])
    assert np.asarray(merged["position_ids"]).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.warns(
        nm.MergeWarning, match=r"^finetuned\[1\]: 'position_ids' of integers: not in base"
    ) as other:
        merged = nm.merge(base, [models[0], {**models[1], **ids}], scale=0.9)
    assert list(merged) == ["w"] and same_bits(merged["w"], plain["w"])
    assert len(one) == len(other) == 1 and one[0].filename == other[0].filename == __file__


SPELLINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda n: f"_orig_mod.{n}",
    "DDP": lambda n: f"module.{n}",
    "a prefix": lambda n: f"model.{n}",
    "old names": lambda n: n.replace("weight", "gamma").replace("bias", "beta"),
}


@pytest.mark.parametrize("of_base", [False, True], ids=["models", "base"])
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_other_spellings_are_taken_for_each_other(spell: Callable[[str], str], of_base: bool) -> None:
    base, *models = (saved(torch.nn.Sequential(torch.nn.LayerNorm(4))) for _ in range(3))
    for k, model in enumerate(models):
        model["0.weight"] += 1 + k
    plain = nm.merge(base, models, scale=0.9)

    def spelled(model: Tensors) -> Tensors:
        return {spell(name): t for name, t in model.items()}

    versions = (spelled(base), models) if of_base else (base, [spelled(m) for m in models])
    with pytest.warns(
        nm.MergeWarning, match=r"^finetuned\[0\] and 1 more: '.*' is taken for '.*', and 1 more"
    ):
        merged = nm.merge(*versions, scale=0.9)
    assert list(merged) == list(versions[0])
    assert all(map(same_bits, merged.values(), plain.values()))
    with pytest.warns(nm.MergeWarning):
        nm.merge_(*versions, scale=0.9)
    assert all(map(same_bits, versions[0].values(), plain.values()))


def test_rename() -> None:
    base, *models = ({"a.w": torch.from_numpy(a)} for a in arrays(3, 4, n=2))
    plain = nm.merge(base, models, scale=0.9)
    renamed = [{"b/w/x": m["a.w"]} for m in models]
    with pytest.raises(nm.InputError, match=r"^finetuned\[0\]\['a.w'\]: missing"):
        nm.merge(base, renamed, scale=0.9)
    with pytest.warns(nm.MergeWarning, match=r"'(b/w/x|t)' is taken for 'a.w'"):
        for rename in ({"^b/": "a.", "/x$": ""}, [("^b/", "a."), ("/x$", "")]):
            assert same_bits(nm.merge(base, renamed, scale=0.9, rename=rename)["a.w"], plain["a.w"])
        tau = nm.merge_task_vectors([models[0], renamed[1]], rename={"^b/(.)/x": r"a.\1"})
        nm.negate_(base, {"t": tau["a.w"]}, scale=0.0, rename={"t": "a.w"})
        nm.merge_(base, renamed, scale=0.9, rename={"b/w/x": "a.w"})
    assert same_bits(base["a.w"], plain["a.w"])
    with pytest.raises(nm.InputError, match=r"^rename: '\(' to '': "):
        nm.merge(base, models, scale=0.9, rename={"(": ""})


def test_a_mismatch_shows_the_prefix_that_differs() -> None:
    base, model = (
        {"a.w": torch.ones(2), "a.b": torch.ones(2)},
        {"x.a.w": torch.ones(2), "x.a.c": torch.ones(2)},
    )
    with pytest.raises(nm.InputError, match=r"'x.a.w' may be 'a.w', with the prefix 'x.' for ''"):
        nm.merge(base, [model], scale=0.9)


def test_names_that_are_no_texts() -> None:
    merged = nm.merge({1: torch.ones(2)}, [{1: torch.zeros(2)}], scale=1.0)  # type: ignore[dict-item]
    assert merged[1].tolist() == [2, 2]  # type: ignore[index]
    with pytest.raises(nm.InputError, match=r"^finetuned\[0\]\[1\]: missing"):
        nm.merge({1: torch.ones(2)}, [{2: torch.zeros(2)}], scale=1.0)  # type: ignore[dict-item]


def mixed(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator),
        "b.weight": torch.randn(3, generator=generator).numpy(),
        "n": torch.arange(3),
    }


def test_include_and_exclude() -> None:
    base, *models = (mixed(seed) for seed in range(3))
    whole = nm.merge(base, models, scale=0.9)
    for options, names in (
        ({"include": "weight"}, ["a.weight", "b.weight"]),
        ({"exclude": "^a"}, ["b.weight"]),
        ({"include": "weight", "exclude": "^b"}, ["a.weight"]),
    ):
        merged = nm.merge(base, models, scale=0.9, **options)  # type: ignore[call-overload]
        assert list(merged) == list(base)
        for name, value in merged.items():
            like = whole if name in names else base
            assert type(value) is type(base[name]) and np.array_equal(
                np.asarray(value), np.asarray(like[name])
            )
            assert not np.shares_memory(np.asarray(value), np.asarray(base[name]))
        written = {
            name: value.copy() if isinstance(value, np.ndarray) else value.clone()
            for name, value in base.items()
        }
        stats = nm.merge_(written, models, scale=0.9, **options)
        assert list(stats.tensors) == names
        assert all(np.array_equal(np.asarray(written[n]), np.asarray(merged[n])) for n in base)
        tau = nm.merge_task_vectors(models, **options)
        assert list(tau) == names
        assert list(nm.negate_(written, models[0], scale=0.9, **options).tensors) == names


def test_what_is_not_chosen_is_not_checked() -> None:
    base = {
        "w": torch.ones(3), "other shape": torch.ones(2), "only here": torch.ones(1), "float8": torch.ones(2).to(torch.float8_e5m2),
        "sparse": torch.ones(2).to_sparse(), "text": "x", "q.qweight": torch.ones(2, dtype=torch.int32), "lora_A": torch.ones(2),
    }  # fmt: skip
    model = {
        "w": torch.zeros(3),
        "other shape": torch.ones(4),
        "only there": torch.ones(1),
        "q.qweight": torch.zeros(5),
    }
    merged = nm.merge(base, [model], scale=1.0, include="^w$")
    assert list(merged) == list(base) and merged["w"].tolist() == [2, 2, 2] and merged["text"] == "x"
    assert merged["sparse"].is_sparse and merged["float8"].dtype == torch.float8_e5m2
    nm.merge_(base, [model], scale=1.0, include="^w$")
    assert base["w"].tolist() == [2, 2, 2] and base["other shape"].tolist() == [1, 1]


def test_patterns_that_choose_nothing_or_are_none() -> None:
    tensors = {"w": torch.ones(3)}
    for options, message in (
        ({"include": "x"}, "base: no tensor is chosen by include 'x', exclude None"),
        ({"exclude": "w"}, "base: no tensor is chosen by include None, exclude 'w'"),
        ({"include": "("}, r"include: '\(' is not a regular expression"),
        ({"exclude": "["}, r"exclude: '\[' is not a regular expression"),
        ({"include": 3}, "include: 3 is not a regular expression"),
        ({"rename": "v=w"}, "rename: 'v=w', expected pairs of a regular expression and a text, or a mapping"),
        ({"rename": {"v": None}}, "rename: 'v' to None: "),
    ):
        for function in (nm.merge, nm.merge_):
            with pytest.raises(nm.InputError, match=f"^{message}"):
                function(tensors, [tensors], scale=1.0, **options)
    with pytest.raises(nm.InputError, match=r"^base: no tensor is chosen by include 'x'"):
        nm.merge(torch.ones(2), [torch.ones(2)], scale=1.0, include="x")


def test_one_of_two_tied_weights_cannot_be_chosen() -> None:
    base, model = LM(0), LM(1)
    before = base.embed.weight.detach().clone()
    for function in (nm.merge, nm.merge_):
        with pytest.raises(
            nm.InputError, match=r"^base\['head.weight'\]: is not chosen, but tied to base\['embed.weight'\]"
        ):
            function(base, [model], scale=1.0, exclude="head")
    assert same_bits(base.embed.weight, before)
    merged = nm.merge(base, [model], scale=1.0, include="norm")
    assert merged["head.weight"] is merged["embed.weight"]
    parts = {"whole": torch.ones(4), "part": torch.ones(1)}
    parts["part"] = parts["whole"][:2]
    with pytest.raises(
        nm.InputError, match=r"base\['part'\]: shares memory with base\['whole'\], which is written"
    ):
        nm.merge_(parts, [{"whole": torch.zeros(4)}], scale=1.0, exclude="part")


def test_names_are_neither_chosen_nor_changed_in_a_graph() -> None:
    tensors = {"w": torch.ones(3)}
    for function in (nm.merge, nm.merge_):
        for options in ({"include": "w"}, {"exclude": "v"}, {"rename": {"v": "w"}}):
            compiled = torch.compile(
                lambda a, b, f=function, o=options: f(a, [b], scale=1.0, **o), fullgraph=True, backend="eager"
            )
            with pytest.raises(
                Exception, match=f"{next(iter(options))}: .*, expected none in a graph|InputError"
            ):
                compiled(tensors, {"w": torch.zeros(3)})


FACTORS: dict[str, Tensors] = {
    "PEFT": {"l.lora_A.weight": torch.ones(2, 8), "l.lora_B.weight": torch.ones(8, 2)},
    "PEFT in a model": {"l.w": torch.ones(2), "l.lora_A.default.weight": torch.ones(2, 8), "l.lora_B.default.weight": torch.ones(8, 2)},
    "kohya": {"lora_unet_x.lora_down.weight": torch.ones(2, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 2), "lora_unet_x.alpha": torch.ones(())},
    "LoHa": {"l.hada_w1_a": torch.ones(8, 2), "l.hada_w1_b": torch.ones(2, 8)},
    "LoKr": {"l.lokr_w1": torch.ones(2, 2), "l.lokr_w2": torch.ones(4, 4)},
    "not all flat": {"l.lora_A.weight": torch.ones(8, 2).mT, "l.lora_B.weight": torch.ones(8, 2), "n": torch.arange(2)},
    "arrays": {"l.lora_A.weight": np.ones((2, 8)), "l.lora_B.weight": np.ones((8, 2))},
}  # fmt: skip
QUANTIZED: dict[str, Tensors] = {
    "GPTQ": {"l.qweight": torch.ones(2, 2, dtype=torch.int32), "l.scales": torch.ones(2)},
    "bitsandbytes": {"l.weight": torch.ones(8, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(1)},
    "int8": {"l.w": torch.ones(2, 2, dtype=torch.int8), "l.w_scale": torch.ones(2)},
    "array": {"l.qweight": np.ones((2, 2), np.int32), "l.scales": np.ones(2)},
}


@pytest.mark.parametrize("bad", [*FACTORS.values(), *QUANTIZED.values()], ids=[*FACTORS, *QUANTIZED])
def test_factors_and_quantized_weights_are_refused(bad: Tensors) -> None:
    """Even if all versions are equal, and where one version only has them."""
    good = {"a": torch.ones(2)}
    for base, model, where in (
        (bad, bad, "base"),
        ({**good, **bad}, good, "base"),
        (good, {**good, **bad}, r"finetuned\[0\]"),
    ):
        for function in (nm.merge, nm.merge_):
            with pytest.raises(
                nm.InputError, match=rf"^{where}\['.*'\]: .*(a (LoRA )?factor|quantized weights)"
            ):
                function(base, [model], scale=1.0)
    with pytest.raises(nm.InputError, match=r"a (LoRA )?factor|quantized weights"):
        nm.merge_task_vectors([bad, bad])
    with pytest.raises(nm.InputError, match=r"a (LoRA )?factor|quantized weights"):
        nm.negate_(good, {**good, **bad}, scale=1.0)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.to(torch.uint16), lambda t: t.numpy()])
def test_integers_that_differ_are_refused(make: Callable[[torch.Tensor], Any]) -> None:
    base = {"w": torch.ones(3), "codes": make(torch.arange(6).view(2, 3))}
    equal, other = ({"w": torch.zeros(3), "codes": make(torch.arange(6).view(2, 3) + k)} for k in (0, 1))
    message = r"^finetuned\[1\]\['codes'\]: (I64|U16), differs from base\['codes'\], expected equal integers: they are not merged"
    for function in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=message + r" \(exclude='\^codes\$' keeps"):
            function(base, [equal, other], scale=1.0)
    assert base["w"].tolist() == [1, 1, 1]
    assert nm.merge(base, [equal, other], scale=1.0, exclude="^codes$")["w"].tolist() == [2, 2, 2]
    wider = {**equal, "codes": torch.arange(6, dtype=torch.int32).view(2, 3)}
    assert nm.merge(base, [wider], scale=1.0)["w"].tolist() == [2, 2, 2]
    nm.merge_(base, [other], scale=1.0, inputs="task_vectors")


def test_counters_and_flags_may_differ() -> None:
    base = {
        "w": torch.ones(3),
        "num_batches_tracked": torch.tensor(3),
        "steps": torch.arange(3),
        "mask": torch.ones(2, 2).bool(),
    }
    model = {
        **base,
        "w": torch.zeros(3),
        "num_batches_tracked": torch.tensor(5),
        "steps": torch.arange(3) + 1,
    }
    model["mask"] = ~base["mask"]
    assert nm.merge(base, [model], scale=1.0)["steps"].tolist() == [0, 1, 2]


def normalised(variance: float) -> torch.nn.Module:
    module = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.InstanceNorm1d(3, track_running_stats=True)
    )
    for layer in module:
        layer.running_var.fill_(variance)
    return module


def test_variances_below_zero_are_told_of() -> None:
    base, models = normalised(1.0), [normalised(3.0), normalised(4.0)]
    message = r"^the result: '0.running_var', '1.running_var': below zero somewhere after the merge"
    for function in (nm.merge, nm.merge_):
        with pytest.warns(nm.MergeWarning, match=message) as caught:
            merged = function(base, models, scale=1.0)
        assert len(caught) == 1 and caught[0].filename == __file__
        if function is nm.merge:
            assert merged["0.running_var"].tolist() == [-1.5] * 3
    base = normalised(1.0)
    with pytest.warns(nm.MergeWarning, match="below zero"):
        nm.negate_(base, {n: t * 3 for n, t in base.state_dict().items() if t.dim()}, scale=1.0)
    nm.merge(normalised(1.0), models, scale=0.1)
    nm.merge(normalised(1.0), models, scale=1.0, exclude="running_var")
    nm.merge_task_vectors([{"running_var": torch.full((2,), -1.0)}])
    nm.merge({"w": torch.ones(2)}, [{"w": torch.full((2,), 9.0)}], scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_name_of_variances_as_other_libraries_have_it(dtype: torch.dtype) -> None:
    def versions(of: float) -> Tensors:
        return {f"bn{k}/moving_variance": torch.tensor([1.0, of, math.nan], dtype=dtype) for k in range(5)}

    with pytest.warns(nm.MergeWarning) as told:
        nm.merge(versions(1.0), [versions(3.0)], scale=1.0)
    nonfinite, below = (str(w.message) for w in told)
    names = "'bn0/moving_variance', 'bn1/moving_variance', 'bn2/moving_variance' and 2 more"
    assert below.startswith(f"the result: {names}: below") and nonfinite.startswith(
        "the result: 5 elements of"
    )


def test_a_tie_that_is_guessed_from_equal_bits_is_told() -> None:
    """Memory that is shared is no guess."""
    embed = torch.randn(4, 3)
    model = {"embed": embed + 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.merge({"embed": embed, "head": embed}, [model], scale=0.9)
        nm.merge({"embed": embed}, [{**model, "head": model["embed"]}], scale=0.9)
    with pytest.warns(
        nm.MergeWarning, match=r"finetuned\[0\]: lacks 'head', which base ties to 'embed'"
    ) as told:
        nm.merge({"embed": embed, "head": embed.clone()}, [model], scale=0.9)
    assert len(told) == 1
    with pytest.warns(nm.MergeWarning, match=r"finetuned\[0\]: 'head' is not in base, but tied to 'embed'"):
        nm.merge({"embed": embed}, [{**model, "head": model["embed"].clone()}], scale=0.9)
