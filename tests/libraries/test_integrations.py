"""The examples for other packages, with the packages: what they merge has the bits of the plain rule."""

from __future__ import annotations

import copy
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from library_models import MARKS, SCALE, finetuned
from safetensors.torch import load_file, save_file

import negmerge_fast as nm
from negmerge_fast.core.reference import plain_family, plain_merge
from negmerge_fast.methods.mean import naive

pytestmark = MARKS

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"


@cache  # sd-mecha has one method of a name
def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"with_{name}.py"))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def check(
    out: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    versions: list[dict[str, torch.Tensor]],
    method: str,
) -> None:
    assert out.keys() == base.keys()
    for name, tensor in base.items():
        models = [each[name] for each in versions]
        rule = (
            plain_merge(tensor, models, SCALE)
            if method == "negmerge"
            else plain_family(tensor, models, SCALE, naive)
        )
        assert same_bits(out[name], rule[0]), name
        assert not torch.equal(out[name], tensor)


@pytest.fixture
def states() -> list[dict[str, torch.Tensor]]:
    base = network()
    return [base.state_dict(), *(finetuned(base, seed).state_dict() for seed in range(3))]


@pytest.mark.parametrize("method", ["negmerge", "mean"])
def test_fusion_bench(method: str) -> None:
    fusion_bench = pytest.importorskip("fusion_bench")
    base = network()
    versions = [finetuned(base, seed) for seed in range(3)]
    pool = fusion_bench.BaseModelPool(
        {"_pretrained_": base, "a": versions[0], "b": versions[1], "c": versions[2]}
    )
    before = copy.deepcopy(base.state_dict())
    merged = example("fusion_bench")["NegMerge"](scale=SCALE, method=method).run(pool)
    check(merged.state_dict(), before, [each.state_dict() for each in versions], method)


@pytest.mark.parametrize("method", ["negmerge", "mean"])
def test_fusion_bench_makes_it_of_its_configuration(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a YAML file: its class by name, and its numbers."""
    hydra = pytest.importorskip("hydra.utils")
    pytest.importorskip("fusion_bench")
    monkeypatch.syspath_prepend(EXAMPLES)
    made = hydra.instantiate({"_target_": "with_fusion_bench.NegMerge", "scale": 0.4, "method": method})
    assert (made.scale, made.method) == (0.4, method)
    assert made.config["scale"] == 0.4


@pytest.mark.parametrize("method", ["negmerge", "mean"])
def test_sd_mecha(method: str, states: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    sd_mecha = pytest.importorskip("sd_mecha")
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"{k}.safetensors")
    base, *models = (sd_mecha.model(tmp_path / f"{k}.safetensors") for k in range(len(states)))
    recipe = example("sd_mecha")["negmerge"](base, *models, scale=SCALE, method=method)
    sd_mecha.merge(
        recipe, merge_dtype=torch.float32, output_dtype=torch.float32, output=tmp_path / "out.safetensors"
    )
    check(load_file(tmp_path / "out.safetensors"), states[0], states[1:], method)


@pytest.mark.parametrize(
    "options", [{}, {"method": "k-of-n", "min_agreement": 0.6}], ids=["negmerge", "k-of-n"]
)
def test_torchunlearn(options: dict[str, Any]) -> None:
    torchunlearn = pytest.importorskip("torchunlearn")
    torch.manual_seed(0)
    means = torch.randn(4, 12)
    labels = torch.arange(200) % 4
    images = means[labels] + 0.3 * torch.randn(200, 12)
    rmodel = torchunlearn.RobModel(network(), n_classes=4)
    run = example("torchunlearn")

    def loader(chosen: torch.Tensor) -> Any:
        data = torch.utils.data.TensorDataset(images[chosen], labels[chosen])
        return torch.utils.data.DataLoader(data, batch_size=50)

    trainer = run["FinetuneOnForget"](rmodel)  # on everything, first
    trainer.setup(optimizer="Adam(lr=0.02)", n_epochs=20)
    trainer.fit(loader(labels >= 0), n_epochs=20, record_type=None, save_type=None)
    forget, retain = loader(labels == 0), loader(labels != 0)
    assert rmodel.eval_accuracy(forget) > 95 and rmodel.eval_accuracy(retain) > 95
    optimizers = [f"Adam(lr={rate})" for rate in (0.01, 0.02, 0.03)]
    stats = run["negmerge"](rmodel, forget, optimizers, n_epochs=5, scale=5.0, **options)
    assert isinstance(stats, nm.Stats) and 0 < stats.agreed < stats.elements
    assert rmodel.eval_accuracy(forget) < 50 and rmodel.eval_accuracy(retain) > 95
