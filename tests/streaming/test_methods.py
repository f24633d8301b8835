"""Merges of files by other methods, with weights for each element and with λ by patterns on names."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import difference, save_adapter
from bits import same_bits
from checkpoint_files import load_model, read_manifest, save_model
from interrupted import finish, start
from resumable import folder, interrupt, made, merge, weights  # noqa: F401
from safetensors.torch import save_file
from small_chunks import set_chunk_bytes

import negmerge_fast as nm
from negmerge_fast.core.choices import Election, key_of
from negmerge_fast.core.reference import _differences, plain_family, plain_merge
from negmerge_fast.core.scales import Scales
from negmerge_fast.methods import catalogue
from negmerge_fast.methods.base import Method
from negmerge_fast.output.manifest import sealed
from negmerge_fast.streaming import api
from negmerge_fast.streaming.options import MergeOptions

Tensors = dict[str, torch.Tensor]

# With the usual numbers, and where those leave little of so small tensors, with others.
METHODS = {name: catalogue.method(name) for name in catalogue.NAMES} | {
    "ties": catalogue.method("ties", density=0.6, over="tensor"),
    "breadcrumbs": catalogue.method("breadcrumbs", density=0.5, gamma=0.2),
    "dare": catalogue.method("dare", drop=0.4, seed=7),
    "dare-ties": catalogue.method("dare-ties", drop=0.3, seed=1 << 63),
}
SCALES = {"embed": 0.5, "brain|half": -0.25, "": 0.9}


def expected(
    method: Method,
    base: torch.Tensor,
    models: list[torch.Tensor],
    name: str,
    scale: float,
    weight: Any = None,
) -> tuple[torch.Tensor, int, int, int]:
    """By the method's naive version."""
    naive = import_module(f"negmerge_fast.methods.{method.name.replace('-', '_')}").naive
    known = {"required": len(models), "key": key_of(name)}
    names = naive.__code__.co_varnames[1 : naive.__code__.co_argcount]
    numbers = {each: known.get(each, getattr(method, each, None)) for each in names}
    choices = method.choices(len(models), weighted=True)
    assert choices
    if not base.numel():
        return base, 0, 0, 0

    def reduce(d: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = naive(d, **numbers)
        return found

    flat = [each.flatten() for each in (base, *models)]  # a scalar, too
    given = None if weight is None else weight.flatten()
    result, *counted = plain_family(flat[0], flat[1:], scale, reduce, choices.factors, given)
    return result.view(base.shape), *counted


def masks_of(base: Tensors) -> Tensors:
    """Masks as SalUn saves them, of a part of the model."""
    generator = torch.Generator().manual_seed(3)
    floats = {name: tensor for name, tensor in base.items() if tensor.is_floating_point() and name != "norm"}
    return {name: (torch.rand(t.shape, generator=generator) < 0.5).long() for name, t in floats.items()}


@pytest.fixture
def masks(models: list[Tensors], tmp_path: Path) -> Tensors:
    """masks.pt, of all but one tensor."""
    found = masks_of(models[0])
    torch.save({f"module.{name}": mask for name, mask in found.items()}, tmp_path / "masks.pt")
    return found


def paths(folder: Path) -> list[Path]:
    return [folder / f"ft-{k}" for k in range(3)]


def merge_by(folder: Path, method: str | Method, out: str = "out", **options: Any) -> nm.Report:
    options = {"scale": 0.9, **options}
    return nm.merge_checkpoints(folder / "base", paths(folder), folder / out, method=method, **options)


def same_weights(folder: Path, *outputs: str) -> bool:
    first, *others = ({p.name: p.read_bytes() for p in (folder / o).glob("*.safetensors")} for o in outputs)
    return bool(first) and all(other == first for other in others)


@pytest.mark.filterwarnings("ignore:.*masks.pt")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_does_as_its_naive_version(
    name: str, models: list[Tensors], masks: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    options = {"scale": SCALES, "weights": tmp_path / "masks.pt"}
    report = merge_by(tmp_path, method, **options)
    merged, of_name = load_model(tmp_path / "out"), Scales.of(SCALES).by_name(models[0])
    for tensor, base in models[0].items():
        if not base.is_floating_point():
            assert same_bits(merged[tensor], base)
            continue
        versions = [each[tensor] for each in models[1:]]
        result, changed, nonfinite, masked = expected(
            method, base, versions, tensor, of_name[tensor], masks.get(tensor)
        )
        assert same_bits(merged[tensor], result), tensor
        [row] = [each for each in report.tensors if each["name"] == tensor]
        assert row == {
            "name": tensor, "elements": base.numel(), "agreed": changed, "nonfinite": nonfinite, "vetoed_by_zero": None, "masked": masked,
        }  # fmt: skip
    assert report.method == str(method) and report.weights == str(tmp_path / "masks.pt")
    assert report.scale == [list(pair) for pair in SCALES.items()]
    assert report.masked == sum(row["masked"] for row in report.tensors) > 0 and report.vetoed_by_zero is None
    # The same bytes from chunks of one page, on three threads and by another backend.
    set_chunk_bytes(monkeypatch, 512)
    merge_by(tmp_path, method, "small", threads=3, backend="torch", **options)
    assert same_weights(tmp_path, "out", "small")
    verified = nm.verify_checkpoint(
        tmp_path / "out", [tmp_path / "base", *paths(tmp_path)], weights=tmp_path / "masks.pt"
    )
    assert verified.blocks > 4
    # A delta of it, applied.
    nm.delta_checkpoints(
        tmp_path / "base", paths(tmp_path), tmp_path / "delta", method=method, weights=tmp_path / "masks.pt"
    )
    nm.verify_checkpoint(
        tmp_path / "delta", [tmp_path / "base", *paths(tmp_path)], weights=tmp_path / "masks.pt"
    )
    applied = nm.apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "applied", scale=SCALES)
    assert same_weights(tmp_path, "out", "applied")
    assert (applied.method, applied.masked, applied.agreed) == (str(method), report.masked, report.agreed)
    assert applied.vetoed_by_zero is None and applied.scale == report.scale
    nm.verify_checkpoint(tmp_path / "applied", [tmp_path / "base", tmp_path / "delta"])
    listed = read_manifest(tmp_path / "delta" / "negmerge.json")
    assert ("method" in listed) is (name != "negmerge") and listed["weights"]["path"] == "masks.pt"


@pytest.mark.parametrize("over", ["model", "tensor"])
def test_differences_are_trimmed_over_the_model_or_each_tensor(
    over: Any, models: list[Tensors], tmp_path: Path
) -> None:
    method = catalogue.method("ties", density=0.3, over=over)
    merge_by(tmp_path, method, exclude="norm")  # which is fp64: all others have magnitudes of one type
    merged = load_model(tmp_path / "out")
    names = [n for n, t in models[0].items() if t.is_floating_point() and t.numel() and n != "norm"]
    flat = [{n: m[n].flatten() for n in names} for m in models]
    of_tensor = [_differences(flat[0][n], [m[n] for m in flat[1:]], False)[1] for n in names]
    naive = import_module("negmerge_fast.methods.ties").naive
    sizes = [each.shape[1] for each in of_tensor]
    parts = (
        naive(torch.cat(of_tensor, 1), 0.3).split(sizes)
        if over == "model"
        else [naive(each, 0.3) for each in of_tensor]
    )
    for name, part in zip(names, parts, strict=True):
        versions = [m[name] for m in flat[1:]]
        result = plain_family(flat[0][name], versions, 0.9, lambda d, part=part: part)[0]  # type: ignore[misc]
        assert same_bits(merged[name].flatten(), result), name


def test_weights_of_one_change_nothing_and_masks_are_masks(models: list[Tensors], tmp_path: Path) -> None:
    merge_by(tmp_path, "negmerge")
    floats = {name: t for name, t in models[0].items() if t.is_floating_point()}
    kinds = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.bool,
        torch.int32,
        torch.int64,
    ]
    for k, kind in enumerate(kinds):
        save_model(tmp_path / "ones", {n: torch.ones(t.shape, dtype=kind) for n, t in floats.items()})
        report = merge_by(tmp_path, "negmerge", f"out-{k}", weights=tmp_path / "ones", threads=1 + k % 2)
        assert same_weights(tmp_path, "out", f"out-{k}") and report.masked == 0, kind
    masks = {name: mask.bool() for name, mask in masks_of(models[0]).items()} | {
        "norm": torch.arange(16) % 2 == 0
    }
    save_file(masks, tmp_path / "masks.safetensors")
    merge_by(tmp_path, "negmerge", "masked", weights=tmp_path / "masks.safetensors", threads=2)
    plain, merged = load_model(tmp_path / "out"), load_model(tmp_path / "masked")
    for name, base in floats.items():
        assert same_bits(merged[name], torch.where(masks[name], plain[name], base)), name


def test_a_weight_that_is_not_finite_is_named_in_its_own_file(models: list[Tensors], tmp_path: Path) -> None:
    weight = torch.ones(50, 16)
    weight[3, 5] = torch.nan
    save_file({"embed": weight}, tmp_path / "w.safetensors")
    with pytest.raises(nm.InputError, match=re.escape("w.safetensors: tensor 'embed': nan at (3, 5)")):
        merge_by(tmp_path, "mean", weights=tmp_path / "w.safetensors")


def test_weights_scale_what_is_taken_off(models: list[Tensors], tmp_path: Path) -> None:
    """Fractions, as of PerTA, and λ turned as --add turns it."""
    weight = torch.rand(50, 16, generator=torch.Generator().manual_seed(1))
    save_file({"embed": weight.bfloat16()}, tmp_path / "w.safetensors")
    report = merge_by(
        tmp_path,
        "magmax",
        scale=Scales.of(0.5).negated(),
        weights=tmp_path / "w.safetensors",
        include="embed",
    )
    versions = [m["embed"] for m in models[1:]]
    result = expected(METHODS["magmax"], models[0]["embed"], versions, "embed", -0.5, weight.bfloat16())[0]
    assert same_bits(load_model(tmp_path / "out")["embed"], result) and report.scale == -0.5


def test_patterns_are_merges_of_each_group(models: list[Tensors], tmp_path: Path) -> None:
    merge_by(tmp_path, "negmerge", scale=[("embed|norm", 0.5), ("brain", 0.0), ("", 0.9)], threads=2)
    merged = load_model(tmp_path / "out")
    for name, base in models[0].items():
        if base.is_floating_point():
            scale = {"embed": 0.5, "norm": 0.5, "brain": 0.0}.get(name, 0.9)
            assert same_bits(merged[name], plain_merge(base, [m[name] for m in models[1:]], scale)[0]), name
    listed = read_manifest(tmp_path / "out" / "negmerge.json")
    assert listed["scale"] == [["embed|norm", 0.5], ["brain", 0.0], ["", 0.9]]
    assert "method" not in listed and "weights" not in listed and "masked" not in listed["counted"]
    nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", *paths(tmp_path)])
    manifest = tmp_path / "out" / "negmerge.json"
    other = {**listed, "scale": [["embed|norm", 0.5], ["", 0.9]]}
    manifest.write_text(json.dumps(sealed(other), indent=2) + "\n")
    with pytest.raises(nm.DamageError, match="tensor 'brain'"):
        nm.verify_checkpoint(tmp_path / "out", [tmp_path / "base", *paths(tmp_path)])


def test_options_that_do_not_fit(models: list[Tensors], tmp_path: Path) -> None:
    mean = catalogue.method("mean")
    each = Method("x", mean.gate, mean.election, mean.reduction, model_weights=(1.0, 2.0))
    dense = catalogue.method("ties", density=(0.1, 0.2))
    for options, message in [
        ({"scale": {"embed": 1.0}}, "scale: no pattern matches '"),
        ({"scale": {"w": 1.0, "": 2.0}}, "scale: 'w' is the first to match no tensor"),
        ({"method": each}, "model_weights: 2 numbers, expected one for each of 3 models"),
        ({"method": dense}, "density: 2 numbers, expected one for each of 3 models"),
    ]:
        with pytest.raises(nm.InputError, match=f"^{re.escape(message)}"):
            merge_by(tmp_path, **{"method": "negmerge", **options})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit(models: list[Tensors], tmp_path: Path) -> None:
    embed, file = torch.ones(50, 16), tmp_path / "w.safetensors"
    save_adapter(tmp_path / "adapter", {"embed": (torch.ones(2, 16), torch.ones(50, 2))}, 2, 2)
    given: list[tuple[Any, str]] = [
        ({"embed": embed, "head": embed + 1}, "w.safetensors: tensor 'head': not in base"),
        ({"a": embed, "b": embed + 1}, "w.safetensors: tensor 'a' and 1 more: not in base"),
        ({"embed": embed.T.contiguous()}, r"tensor 'embed': shape (16, 50), expected (50, 16) like base"),
        (
            {"embed": embed.short()},
            "tensor 'embed': I16, expected weights in one of F64, F32, F16, BF16, U8, BOOL, I32, I64",
        ),
        ({"ids": torch.ones(9)}, "w.safetensors: weights of no tensor that is merged"),
        (tmp_path / "base", "base: weights that are"),
        (tmp_path / "ft-1", "ft-1: weights that are"),
        (tmp_path / "adapter", "adapter: a LoRA adapter, expected a weight for each element"),
        (tmp_path / "none.pt", "none.pt: No such file"),
    ]
    for tensors, message in given:
        if isinstance(tensors, dict):
            save_file(tensors, file)
        with pytest.raises(nm.InputError, match=re.escape(message)) as error:
            merge_by(tmp_path, "negmerge", weights=file if isinstance(tensors, dict) else tensors)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*masks.pt")
def test_what_belongs_to_an_output(models: list[Tensors], masks: Tensors, tmp_path: Path) -> None:
    """Its method and weights are inputs: of another merge, it is not finished, and not verified."""
    weighted = {"weights": tmp_path / "masks.pt"}
    merge_by(tmp_path, "magmax", **weighted)
    again = merge_by(tmp_path, "magmax", resume=True, **weighted)
    assert again.bytes_written == 0 and again.masked and again.vetoed_by_zero is None
    for method, options in [
        ("emr", weighted),
        ("magmax", {}),
        ("magmax", {**weighted, "scale": {"": 0.9, "x": 1}}),
    ]:
        with pytest.raises(nm.InputError, match=r"exists already|first to match"):
            merge_by(tmp_path, method, resume=True, **options)
    against = [tmp_path / "base", *paths(tmp_path)]
    with pytest.raises(nm.InputError, match=r"weights: none, expected masks\.pt as in"):
        nm.verify_checkpoint(tmp_path / "out", against)
    with pytest.raises(nm.InputError, match="weights: given without against"):
        nm.verify_checkpoint(tmp_path / "out", **weighted)
    content = (tmp_path / "masks.pt").read_bytes()
    torch.save({f"module.{name}": 1 - mask for name, mask in masks.items()}, tmp_path / "masks.pt")
    assert len((tmp_path / "masks.pt").read_bytes()) == len(content)
    with pytest.raises(nm.InputError, match=r"masks\.pt: (sample|header) "):
        nm.verify_checkpoint(tmp_path / "out", against, **weighted)
    with pytest.raises(nm.InputError, match="exists already"):
        merge_by(tmp_path, "magmax", resume=True, **weighted)


HOSTILE_METHODS: dict[str, Any] = {
    "no object": "mean",
    "no choices": {"name": "mean"},
    "an unknown choice": {"name": "mean", "gate": "open", "election": "all", "reduction": "mean"},
    "a number for a choice": {"name": "mean", "gate": 0, "election": "all", "reduction": "mean"},
    "an unknown number": {"name": "mean", "gate": "none", "election": "all", "reduction": "mean", "power": 2},
    "a number out of range": {
        "name": "t",
        "gate": "none",
        "election": "all",
        "reduction": "mean",
        "density": 2,
    },
    "of other models": {
        "name": "t",
        "gate": "none",
        "election": "all",
        "reduction": "mean",
        "model_weights": [1],
    },
}


@pytest.mark.parametrize("method", HOSTILE_METHODS.values(), ids=HOSTILE_METHODS)
def test_a_manifest_with_another_method(method: Any, models: list[Tensors], tmp_path: Path) -> None:
    merge_by(tmp_path, "mean")
    manifest = tmp_path / "out" / "negmerge.json"
    listed = read_manifest(manifest)
    manifest.write_text(json.dumps(sealed({**listed, "method": method}), indent=2) + "\n")
    with pytest.raises(nm.InputError, match=r"method is|model_weights") as error:
        nm.verify_checkpoint(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_weights_are_in_the_budget(models: list[Tensors], tmp_path: Path) -> None:
    floats = {name: torch.ones_like(t) for name, t in models[0].items() if t.is_floating_point()}
    save_file(floats, tmp_path / "w.safetensors")

    def job(**options: Any) -> Any:
        chosen = MergeOptions(0.9, threads=2, **options)
        return api.prepare(tmp_path / "base", paths(tmp_path), tmp_path / "out", chosen)

    plain, weighted = job(), job(weights=tmp_path / "w.safetensors")
    assert weighted.memory >= plain.memory + plain.workers * plain.chunk_bytes
    assert weighted.plan.bytes_read > plain.plan.bytes_read
    assert weighted.plan.unweighted.bytes_read == plain.plan.bytes_read
    assert not (tmp_path / "out").exists()
    report = merge_by(tmp_path, "emr", weights=tmp_path / "w.safetensors", memory_budget="5MiB")
    assert report.agreed


@pytest.mark.parametrize("name", ["mean", "ties"])
@pytest.mark.filterwarnings("ignore:.*adapter")
def test_adapters(name: str, tmp_path: Path) -> None:
    """As the differences that they are, from factors or expanded."""
    generator = torch.Generator().manual_seed(0)
    modules = {"layers.0.q_proj": (24, 16), "layers.1.q_proj": (24, 16)}
    base = {f"{m}.weight": torch.randn(shape, generator=generator) for m, shape in modules.items()}
    save_model(tmp_path / "base", base)
    adapters, vectors = (
        [tmp_path / f"adapter-{k}" for k in range(3)],
        [tmp_path / f"vector-{k}" for k in range(3)],
    )
    for adapter, vector in zip(adapters, vectors, strict=True):
        factors = {
            m: (torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator))
            for m, (rows, columns) in modules.items()
        }
        save_adapter(adapter, factors, 3, 5)
        save_model(
            vector, {f"{m}.weight": difference(*ab, 5 / 3, torch.float32) for m, ab in factors.items()}
        )
    options: dict[str, Any] = {"scale": 0.75, "method": METHODS[name]}
    nm.merge_checkpoints(tmp_path / "base", vectors, tmp_path / "dense", inputs="task_vectors", **options)
    for backend in ("auto", "torch"):
        out = tmp_path / f"out-{backend}"
        nm.merge_checkpoints(tmp_path / "base", adapters, out, backend=backend, **options)
        nm.verify_checkpoint(out, [tmp_path / "base", *adapters])
    assert same_weights(tmp_path, "dense", "out-auto", "out-torch")
    assert not same_weights(tmp_path, "dense", "base")


def hostile(models: list[Tensors], folder: Path, weight: float) -> dict[str, Path]:
    mask = torch.ones(50, 16)
    mask[3, 2] = weight
    save_file({"embed": mask}, folder / "w.safetensors")
    return {"weights": folder / "w.safetensors"}


def test_a_weight_that_is_not_finite(models: list[Tensors], tmp_path: Path) -> None:
    options: dict[str, Any] = {**hostile(models, tmp_path, float("nan")), "include": "embed"}
    with pytest.raises(nm.InputError, match=r"tensor 'embed': .*at \(3, 2\)"):
        merge_by(tmp_path, "magmax", **options)
    assert not (tmp_path / "out").exists()
    assert merge_by(tmp_path, "magmax", nonfinite="keep-base", **options).nonfinite == 1


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ties", "dare"])
def test_a_merge_is_resumed(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(
        {n: torch.ones(t.shape, dtype=torch.bool) for n, t in load_model(folder / "base").items()},
        tmp_path / "w.safetensors",
    )
    options: dict[str, Any] = {"method": METHODS[name], "weights": tmp_path / "w.safetensors"}
    merge(folder, resume=False, **options)
    once = weights(folder / "out")
    shutil.rmtree(folder / "out")
    interrupt(folder, monkeypatch, at=0.8, **options)
    with pytest.raises(nm.InputError, match="was made with method"):
        merge(folder, **{**options, "method": "emr"})
    with pytest.raises(nm.InputError, match=r"was made of .*w\.safetensors.*, too"):
        merge(folder, method=METHODS[name])
    report = merge(folder, memory_budget="6MB", **options)
    assert report.bytes_done_before and weights(folder / "out") == once
    assert METHODS[name].election in (Election.SIGN_OF_SUM, Election.ALL)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ties", pytest.param("dare", marks=pytest.mark.slow)])
def test_two_ranks(name: str, folder: Path) -> None:
    merge(folder, method=name)
    once = weights(folder / "out")
    shutil.rmtree(folder / "out")
    ended = finish(start(folder, "--method", name, ranks=2, wait=0.0))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert weights(folder / "out") == once
