"""Statistics of a consensus: of models in files, of deltas and of reports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import family, load_model, save_model
from report_models import MODELS, WRONG, save_llama

import negmerge_fast as nm
from negmerge_fast.deltas.job import delta_checkpoints
from negmerge_fast.reports import counting, statistics
from negmerge_fast.reports.statistics import ConsensusStatistics, consensus_statistics


@pytest.fixture
def llama(tmp_path: Path) -> list[Path]:
    return save_llama(tmp_path)


def test_prefixes_are_counted_as_merges_of_them(tmp_path: Path) -> None:
    """Of all types, in several shards: each tensor's counts are those of the merge of the first p models."""
    base, *models = [
        save_model(
            tmp_path / f"{k}", tensors, [["embed", "norm", "ids"], ["half", "brain", "scalar", "empty"]]
        )
        for k, tensors in enumerate(family(n=4))
    ]
    found = consensus_statistics(base, models)
    assert found.prefixes
    for p in range(1, 5):
        merged = nm.merge_checkpoints(base, models[:p], tmp_path / f"out-{p}", scale=0.5)
        row = found.prefixes[p - 1]
        assert row["models"] == p
        assert (row["agreed"], row["nonfinite"], row["vetoed_by_zero"]) == (
            merged.agreed, merged.nonfinite, merged.vetoed_by_zero,
        )  # fmt: skip
        by_name = {tensor["name"]: tensor["agreed_by_prefix"][p - 1] for tensor in found.tensors}
        assert by_name == {tensor["name"]: tensor["agreed"] for tensor in merged.tensors}
    kinds = ("name", "elements", "agreed", "nonfinite", "vetoed_by_zero")
    # A report has a count of masked elements, too, which NegMerge without weights does not count.
    assert [
        {key: tensor[key] for key in kinds} | {"masked": None} for tensor in found.tensors
    ] == merged.tensors
    assert (found.elements, found.agreed, found.consensus_ratio) == (
        merged.elements, merged.agreed, merged.consensus_ratio,
    )  # fmt: skip
    assert (found.base, found.models, found.model_count) == (merged.base, merged.models, 4)
    assert found.magnitudes and sum(found.magnitudes["counts"]) == found.agreed


def test_a_model_removes_what_the_others_agree_on_without_it(llama: list[Path]) -> None:
    base, *models = llama
    found = consensus_statistics(base, models)
    assert found.dissent
    removed = []
    for k, row in enumerate(found.dissent):
        without = consensus_statistics(base, models[:k] + models[k + 1 :])
        sole = row["sole_by_zero"] + row["sole_by_sign"] + row["sole_by_nonfinite"]
        assert without.agreed == found.agreed + sole
        assert sole == sum(tensor["sole_dissents"][k] for tensor in found.tensors)
        removed.append(sole)
    assert removed.index(max(removed)) == MODELS.index(WRONG)
    against = [row["against_majority"] for row in found.dissent]
    assert against.index(max(against)) == MODELS.index(WRONG)


def test_the_order_of_the_models_is_the_order_given(llama: list[Path]) -> None:
    base, *models = llama
    found, reversed_ = consensus_statistics(base, models), consensus_statistics(base, models[::-1])
    assert found.prefixes and reversed_.prefixes and found.dissent
    assert reversed_.models == found.models[::-1]
    assert reversed_.dissent == found.dissent[::-1]
    assert reversed_.prefixes[-1]["agreed"] == found.prefixes[-1]["agreed"]
    assert reversed_.prefixes[1]["agreed"] != found.prefixes[1]["agreed"]


def test_chunks_threads_and_counters_do_not_matter(
    llama: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = llama
    expected = consensus_statistics(base, models)
    monkeypatch.setattr(statistics, "_ROWS", 2)
    done: list[tuple[int, int]] = []
    for options in ({"threads": 1}, {"threads": 3}):
        found = consensus_statistics(
            base, models, memory_budget=5 << 20, progress=lambda *now: done.append(now), **options
        )
        assert found == expected
        assert done[-1] == (6 * 4 * found.elements, 6 * 4 * found.elements)
    monkeypatch.setattr(counting, "choose", lambda _: ("torch", counting.count_with_torch))
    assert consensus_statistics(base, models) == expected


def test_small_chunks_are_summed(llama: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = llama
    expected = consensus_statistics(base, models)
    monkeypatch.setattr(statistics, "allocate", lambda *_: (2, 256, 0))
    assert consensus_statistics(base, models) == expected


def test_options_of_models(llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    found = consensus_statistics(base, models, include="layers", exclude="mlp")
    assert [t["name"] for t in found.tensors] == [
        f"model.layers.{k}.{kind}.weight"
        for k in range(3)
        for kind in ("input_layernorm", "self_attn.q_proj")
    ]
    as_vectors = consensus_statistics(base, models, inputs="task_vectors")
    assert as_vectors.agreed > consensus_statistics(base, models).agreed
    loaded = load_model(models[0])
    other = save_model(tmp_path / "renamed", {name.replace("mlp", "ffn"): t for name, t in loaded.items()})
    with pytest.raises(nm.InputError, match="ffn"):
        consensus_statistics(base, [other])
    renamed = consensus_statistics(base, [other], rename=[("ffn", "mlp")])
    assert renamed.tensors == consensus_statistics(base, models[:1]).tensors


def test_what_lies_beside_the_weights_does_not_matter(llama: list[Path]) -> None:
    """A merge would ask whether it is to be copied."""
    base, *models = llama
    (base / "more.bin").write_bytes(bytes(3 << 20))
    (base / "more.json").write_text('{"weights": "more.bin"}')
    with pytest.raises(nm.InputError, match=r"more\.bin"):
        nm.merge_checkpoints(base, models, base.parent / "out", scale=1)
    assert consensus_statistics(base, models).elements


def test_a_delta_knows_what_its_models_do_but_no_prefixes(llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    delta_checkpoints(base, models, tmp_path / "delta")
    expected, done = consensus_statistics(base, models), []
    found = consensus_statistics(tmp_path / "delta", progress=lambda *now: done.append(now))
    assert found.source == "delta"
    assert found.magnitudes == expected.magnitudes
    assert done[-1] == (4 * found.agreed, 4 * found.agreed)
    assert (found.models, found.prefixes, found.dissent) == ([], None, None)
    for field in (
        "model_count",
        "min_agreement",
        "elements",
        "agreed",
        "consensus_ratio",
        "nonfinite",
        "vetoed_by_zero",
    ):
        assert getattr(found, field) == getattr(expected, field)
    kinds = ("name", "elements", "agreed", "nonfinite", "vetoed_by_zero")
    assert found.tensors == [{key: tensor[key] for key in kinds} for tensor in expected.tensors]


def test_a_delta_of_all_types(tmp_path: Path) -> None:
    base, *models = [save_model(tmp_path / f"{k}", t) for k, t in enumerate(family(n=3))]
    expected = consensus_statistics(base, models)
    for half in (False, True):
        with pytest.warns(nm.MergeWarning) if half else nullcontext():
            delta_checkpoints(base, models, tmp_path / f"{half}", half=half)
        found = consensus_statistics(tmp_path / f"{half}")
        assert (found.agreed, found.elements) == (expected.agreed, expected.elements)
        assert found.magnitudes and sum(found.magnitudes["counts"]) == found.agreed
        assert half or found.magnitudes == expected.magnitudes


def test_a_delta_with_a_mean_of_zero_is_refused(llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    delta_checkpoints(base, models, tmp_path / "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = bytes(4)
    file.write_bytes(content)
    with pytest.raises(
        nm.InputError, match=r"delta\.safetensors: tensor '.*': 1 means are zero or not finite"
    ):
        consensus_statistics(tmp_path / "delta")


def test_the_report_of_a_merge(llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    merged = nm.merge_checkpoints(base, models, tmp_path / "out", scale=0.9)
    (tmp_path / "report.json").write_text(merged.to_json())
    found = consensus_statistics(tmp_path / "report.json")
    expected = replace(
        consensus_statistics(base, models), source="report", prefixes=None, dissent=None, magnitudes=None,
        tensors=[{key: value for key, value in tensor.items() if key != "masked"} for tensor in merged.tensors],
    )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize("source", ["models", "delta"])
def test_statistics_are_read_as_they_were_written(source: str, llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    found = consensus_statistics(base, models)
    if source == "delta":
        delta_checkpoints(base, models, tmp_path / "delta")
        found = consensus_statistics(tmp_path / "delta")
    (tmp_path / "statistics.json").write_text(found.to_json())
    assert json.loads(found.to_json()) == asdict(found)
    assert consensus_statistics(tmp_path / "statistics.json") == found


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.pop(key)


def _with(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.update(fields)


@pytest.mark.parametrize(
    "change, told",
    [
        (_without("models"), "models is None, expected list"),
        (_with(models=[1]), "models is [1], expected the paths of the models"),
        (_with(models=[]), "model_count is 5"),
        (_with(model_count=0), "model"),
        (_with(model_count=4), "models is"),
        (_with(elements=-1), "elements is -1, expected a number from 0"),
        (_with(elements=True), "elements is True, expected int"),
        (_with(agreed=1 << 70), "is not JSON"),
        (_with(agreed=10**9), "agreed is 1000000000, expected a number from 0 to"),
        (_with(vetoed_by_zero="1"), "vetoed_by_zero is '1', expected int or null"),
        (_with(min_agreement=None), "min_agreement is None"),
        (_with(base=3), "base is 3, expected str"),
        (_with(tensors={}), "tensors is {}, expected list"),
        (_with(tensors=[1]), "tensors is 1, expected objects"),
        (_with(tensors=[{"name": 1}]), "elements is None"),
        (_with(prefixes=[]), "prefixes is [], expected 5 objects"),
        (_with(prefixes=[{}] * 5), "models is None"),
        (_with(dissent=7), "dissent is 7, expected 5 objects"),
        (_with(magnitudes={"edges": [1], "counts": [1]}), "magnitudes is"),
        (_with(magnitudes=[]), "magnitudes is [], expected the edges"),
        (_with(magnitudes={"edges": list(counting.EDGES), "counts": [0]}), "counts is [0], expected 202 numbers"),
    ],
)  # fmt: skip
def test_malformed_reports_are_refused_in_one_line(
    change: Callable[[dict[str, Any]], Any], told: str, llama: list[Path], tmp_path: Path
) -> None:
    base, *models = llama
    found = asdict(consensus_statistics(base, models))
    change(found)
    if told == "model_count is 5":
        found["model_count"], told = None, "model_count is None, expected int"
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(found))
    with pytest.raises(nm.InputError) as refused:
        consensus_statistics(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ") and told in line and "\n" not in line and len(line) < 1000


def test_a_column_of_another_length_is_refused(llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    found = asdict(consensus_statistics(base, models))
    for wrong in ([1], [1, 2, 3, 4, -5], "x"):
        found["tensors"][0]["agreed_by_prefix"] = wrong
        (tmp_path / "s.json").write_text(json.dumps(found))
        with pytest.raises(nm.InputError, match="agreed_by_prefix is"):
            consensus_statistics(tmp_path / "s.json")


def test_bad_arguments(llama: list[Path], tmp_path: Path) -> None:
    base, *models = llama
    with pytest.raises(
        nm.InputError, match=r"base: no delta\.safetensors and no .*, expected a consensus delta"
    ):
        consensus_statistics(base)
    with pytest.raises(nm.InputError, match="include: given without models"):
        consensus_statistics(base, include="x")
    with pytest.raises(nm.InputError, match="inputs: given without models"):
        consensus_statistics(base, inputs="task_vectors")
    with pytest.raises(TypeError, match="finetuned: one path"):
        consensus_statistics(base, models[0])  # type: ignore[arg-type]
    with pytest.raises(nm.InputError, match="is the base itself"):
        consensus_statistics(base, [base])
    with pytest.raises(nm.InputError, match=r"no\.json: No such file"):
        consensus_statistics(tmp_path / "no.json")
    with pytest.raises(nm.InputError, match="progress"):
        consensus_statistics(base, models, progress=3)  # type: ignore[arg-type]


def test_a_file_that_shrinks_is_an_error(llama: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = llama
    planned = statistics.open_and_plan

    def shrink(*arguments: Any, **options: Any) -> Any:
        plan = planned(*arguments, **options)
        file = models[1] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        return plan

    monkeypatch.setattr(statistics, "open_and_plan", shrink)
    with pytest.raises(OSError, match=r"ft-1/model\.safetensors: the file changed"):
        consensus_statistics(base, models)


def test_what_is_not_finite_is_counted(llama: list[Path]) -> None:
    base, *models = llama
    tensors = load_model(models[0])
    tensors["model.norm.weight"][3] = float("nan")
    save_model(models[0], tensors)
    found = consensus_statistics(base, models)
    assert found.nonfinite == 1
    assert found.dissent and sum(row["sole_by_nonfinite"] for row in found.dissent) <= 1


def test_nothing_agrees(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", {"w": torch.zeros(4)})
    model = save_model(tmp_path / "ft", {"w": torch.zeros(4)})
    found = consensus_statistics(base, [model])
    assert isinstance(found, ConsensusStatistics)
    assert (found.agreed, found.vetoed_by_zero, found.consensus_ratio) == (0, 4, 0.0)
    assert not re.search("NaN|Infinity", found.to_json())
