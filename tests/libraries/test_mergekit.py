"""The real mergekit: NegMerge as a method of it, and its YAML merged here with its own result.

The bound of a difference is derived, not chosen. With u = 2^-24, mergekit and this package add the same n fp32 products p_k = w_k d_k, in
another order: each sum is off by at most (n - 1) u Σ|p_k|, each sum of weights by (n - 1) u of itself, and the division, λ and the last
addition by u each. `linear` rounds each w_k x_k there, and each (w_k / Σ w) (x_k - b) here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import load_model
from command import Run
from library_models import MARKS
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import merge_tensors, registered_methods
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import negmerge_fast as nm
import negmerge_fast.integrations.mergekit as plugin

pytestmark = MARKS

U = 2.0**-24
# Not what is compared; and models here have no tokenizer.
QUIET = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")
FINETUNED = ("ft-1", "ft-2", "ft-3")


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    """A small Llama and three versions of it, in the test's folder. Half of their differences are coarse: many are as large as others."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    states = [base]
    for name in FINETUNED:
        tuned = {}
        for tensor in base:
            change = torch.randn(base[tensor].shape, generator=generator)
            if "mlp" in tensor or "norm" in tensor:
                change = change.mul(2).round() / 2  # zeros among them
            tuned[tensor] = base[tensor] + 0.03 * change
        write(tmp_path / name, tuned, tmp_path / "base")
        states.append(tuned)
    return states


@pytest.fixture(autouse=True)
def no_files_of_other_tests() -> None:
    """mergekit keeps files open by the names of their folders, which are the same in all tests."""
    LoaderCache.loaders.clear()


def write(path: Path, tensors: dict[str, torch.Tensor], like: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_bytes((like / "config.json").read_bytes())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def write_config(
    merge_method: str, parameters: dict[str, Any], own: dict[str, list[float]], **rest: Any
) -> None:
    listed = [
        {"model": model, "parameters": {key: values[k] for key, values in own.items()}}
        for k, model in enumerate(FINETUNED)
    ]
    # JSON is valid YAML.
    config = {
        "merge_method": merge_method,
        "base_model": "base",
        "models": listed,
        "parameters": parameters,
        **rest,
    }
    Path("config.yml").write_text(json.dumps(config))


def merged_by_both(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    status, _, err = run("mergekit", "config.yml", "theirs", *QUIET)
    assert status == 0, err
    status, _, err = run("merge", "--config", "config.yml", "--output", "ours")
    assert status == 0, err
    assert run("verify", "ours", "--against", "base", *FINETUNED, "--quiet") == (0, "", "")
    return load_file("theirs/model.safetensors"), load_model(Path("ours"))


# By mergekit's method: parameters of all, and those of each model.
CASES: list[tuple[str, dict[str, Any], dict[str, list[float]]]] = [
    ("task_arithmetic", {"weight": 0.4}, {}),
    ("task_arithmetic", {"lambda": 0.7, "normalize": True}, {"weight": [0.5, -0.2, 1.3]}),
    ("ties", {"weight": 1.0, "density": 0.2}, {}),
    ("ties", {"lambda": 0.8, "int8_mask": True}, {"weight": [0.5, 0.3, 1.1], "density": [0.9, 0.5, 1.0]}),
    ("ties", {"weight": 0.5, "density": 0.5, "normalize": False}, {}),
    ("ties", {"weight": 1.0}, {}),
    ("breadcrumbs", {"weight": 0.5, "density": 0.6, "gamma": 0.05}, {}),
    ("breadcrumbs", {"density": 0.97}, {"weight": [0.5, 0.3, 1.1]}),
    ("breadcrumbs_ties", {"weight": 0.5, "normalize": True}, {"density": [0.3, 0.6, 1.0]}),
]  # fmt: skip


@pytest.mark.parametrize(("merge_method", "parameters", "own"), CASES)
def test_results_are_mergekits(
    run: Run, models: list[dict[str, torch.Tensor]], merge_method: str, parameters: dict[str, Any], own: dict[str, list[float]]
) -> None:  # fmt: skip
    write_config(merge_method, parameters, own)
    theirs, ours = merged_by_both(run)
    assert theirs.keys() == ours.keys() == models[0].keys()
    weights = torch.tensor(own.get("weight", [parameters.get("weight", 1.0)] * 3), dtype=torch.float64)
    densities = own.get("density", [parameters.get("density", 1.0)] * 3)
    n, compared, changed = len(FINETUNED), 0, 0
    for name, base in models[0].items():
        d = torch.stack([model[name] - base for model in models[1:]])
        p = d.double() * weights.view(-1, *[1] * base.dim())
        size = p.abs().sum(0) * parameters.get("lambda", 1.0)
        if parameters.get("normalize", merge_method == "ties"):
            # Of those elected, the weight of one at least is in the divisor; of task arithmetic, all are.
            size /= weights.abs().min() if merge_method != "task_arithmetic" else weights.sum()
        bound = 4 * n * U * size + 2 * U * ours[name].abs().double()
        clear = ~at_a_bound(d, densities, parameters.get("gamma", 0.01), "breadcrumbs" in merge_method)
        if merge_method != "task_arithmetic" and "ties" in merge_method:
            clear &= (p.sum(0).abs() > 2 * n * U * p.abs().sum(0)) | (p == 0).all(0)
        difference = (theirs[name].double() - ours[name].double()).abs()
        assert bool((difference <= bound)[clear].all()), (name, (difference / bound)[clear].max())
        compared, changed = compared + int(clear.sum()), changed + int((ours[name] != base).sum())
    total = sum(base.numel() for base in models[0].values())
    assert compared > 0.5 * total and changed > 0.1 * total


def at_a_bound(d: torch.Tensor, densities: list[float], gamma: float, is_outliers: bool) -> torch.Tensor:
    """Elements one of whose differences is as large as the smallest or the largest that is kept, or next to one: a sort decides there."""
    found = torch.zeros(d.shape[1:], dtype=torch.bool)
    for each, density in zip(d, densities, strict=True):
        if density == 1:
            continue
        ordered = each.abs().flatten().sort().values
        passing = int(density * each.numel())
        top = int(gamma * each.numel()) if is_outliers else 0
        bottom = max(each.numel() - passing - top, 0)
        for k in (bottom - 1, bottom, bottom + passing - 1, bottom + passing):
            found |= each.abs() == ordered[min(max(k, 0), each.numel() - 1)]
    return found


@pytest.mark.parametrize("base", ["base", "ft-2", None])
def test_linear(run: Run, models: list[dict[str, torch.Tensor]], base: str | None) -> None:
    """The base is one of the models: base_model, or the first."""
    weights = [0.7, 1.5, -0.4, 1.0]
    named = ("base", *FINETUNED)
    listed = [{"model": model, "parameters": {"weight": w}} for model, w in zip(named, weights, strict=True)]
    Path("config.yml").write_text(
        json.dumps({"merge_method": "linear", "base_model": base, "models": listed})
    )
    assert run("mergekit", "config.yml", "theirs", *QUIET)[0] == 0
    assert run("merge", "--config", "config.yml", "--output", "ours")[0] == 0
    theirs, ours = load_file("theirs/model.safetensors"), load_model(Path("ours"))
    total, n = sum(weights), len(weights)
    start = models[named.index(base or "base")]
    for name, tensor in start.items():
        products = sum(
            abs(w / total) * model[name].double().abs() for w, model in zip(weights, models, strict=True)
        )
        moved = sum(
            abs(w / total) * (model[name] - tensor).double().abs()
            for w, model in zip(weights, models, strict=True)
        )
        bound = 2 * (n + 1) * U * products + (n + 4) * U * moved + 2 * U * ours[name].double().abs()
        difference = (theirs[name].double() - ours[name].double()).abs()
        assert bool((difference <= bound).all()), (name, (difference / bound).max())


def test_half_precision(run: Run, models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """In fp32 and stored in bf16, results are the same but for one rounding; without dtype mergekit rounds at each step."""
    for path, state in zip(("base", *FINETUNED), models, strict=True):
        write(tmp_path / path, {name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "base")
    write_config("task_arithmetic", {"weight": 0.4}, {}, dtype="float32", out_dtype="bfloat16")
    theirs, ours = merged_by_both(run)
    for name in ours:
        assert ours[name].dtype == torch.bfloat16
        difference = (theirs[name].float() - ours[name].float()).abs()
        assert bool((difference <= 2.0**-8 * ours[name].float().abs()).all())
    write_config("ties", {"weight": 1}, {}, dtype="float32")
    status, _, err = run("merge", "--config", "config.yml", "--output", "other")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("negmerge: config.yml: dtype: float32, expected bfloat16 (tensor ")


@pytest.mark.parametrize("method", ["negmerge", "magmax", "ties", "dare", "k-of-n"])
def test_negmerge_in_mergekit_has_the_bits_of_negmerge(
    run: Run, models: list[dict[str, torch.Tensor]], method: str
) -> None:
    parameters: dict[str, Any] = {"scale": 0.9, "method": method}
    agreement = {"min_agreement": 0.6} if method in ("negmerge", "k-of-n") else {}
    write_config("negmerge", parameters | agreement, {})
    status, _, err = run("mergekit", "config.yml", "theirs", *QUIET)
    assert status == 0, err
    chosen = nm.method(method, over="tensor") if method == "ties" else method
    nm.merge_checkpoints("base", list(FINETUNED), "ours", scale=0.9, method=chosen, **agreement)
    theirs, ours = load_file("theirs/model.safetensors"), load_model(Path("ours"))
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[name], ours[name]) for name in ours)
    assert any(not same_bits(ours[name], models[0][name]) for name in ours)


def test_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = torch.randn(4, 1000, generator=generator).unbind()
    parameters = {"scale": 0.5, "min_agreement": 0.6}
    merged = merge_tensors([models[0], base, *models[1:]], "negmerge", base_index=1, parameters=parameters)
    assert same_bits(merged, nm.merge(base, models, scale=0.5, min_agreement=0.6))
    models[1][3] = float("nan")
    with pytest.raises(nm.InputError, match="nan, expected finite numbers"):
        merge_tensors([base, *models], "negmerge", base_index=0, parameters=parameters)


def test_importing_it_again_does_no_harm() -> None:
    import importlib

    before = registered_methods()
    importlib.reload(plugin)
    assert registered_methods() == before
    assert [method.spec.name for method in before].count("negmerge") == 1


REFUSED = {
    "no such file": ("none.yml", None, "none.yml: no such file"),
    "no YAML": ("config.yml", "[", "config.yml: while parsing"),
    "no such method": (
        "config.yml",
        "merge_method: x\nmodels: [{model: base}]",
        "config.yml: Unimplemented merge method x",
    ),
    "no models": ("config.yml", "merge_method: negmerge", "config.yml: Exactly one of 'models', 'slices'"),
    "key": (
        "config.yml",
        "merge_method: negmerge\nmodels: [{mode: base}]",
        "config.yml: models.0.model: Field required",
    ),
    "no base": (
        "config.yml",
        "merge_method: negmerge\nmodels: [{model: ft-1}]\nparameters: {scale: 1}",
        "mergekit: Merge method requires a base input",
    ),
    "no scale": (
        "config.yml",
        "merge_method: negmerge\nbase_model: base\nmodels: [{model: ft-1}]",
        "Missing required parameter scale",
    ),
    "method": (
        "config.yml",
        "merge_method: negmerge\nbase_model: base\nmodels: [{model: ft-1}]\nparameters: {scale: 1, method: mod}",
        "method: 'mod', expected one of negmerge, ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(run: Run, models: list[dict[str, torch.Tensor]], case: str) -> None:
    path, text, message = REFUSED[case]
    if text is not None:
        Path(path).write_text(text)
    status, out, err = run("mergekit", path, "theirs", *QUIET)
    assert (status, out, err.count("\n")) == (1 if case == "no scale" else 2, "", 1)
    assert err.startswith("negmerge: ") and message in err
