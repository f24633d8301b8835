"""select_scale on live models."""

from __future__ import annotations

import builtins
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import negmerge_fast as nm
from negmerge_fast.checkpoints.delta import open_delta
from negmerge_fast.search.identity import identity_of, identity_of_files


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)).bfloat16()


def finetuned(base: torch.nn.Module, n: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{k: t + 0.2 * torch.rand_like(t) for k, t in base.state_dict().items()} for _ in range(n)]


class Distance:
    """A score of how far the model is from its base: it falls by 1 for λ = 1."""

    def __init__(self, base: torch.nn.Module, models: list[dict[str, torch.Tensor]]) -> None:
        self.states = [nm.merge(base, models, scale=k / 20) for k in range(21)]
        self.calls: list[int] = []

    def __call__(self, model: torch.nn.Module) -> float:
        held = model.state_dict()
        k = next(
            k for k, state in enumerate(self.states) if all(torch.equal(state[n], held[n]) for n in held)
        )
        self.calls.append(k)
        return 1 - k / 20


def retain(score: float) -> float:
    return 1.0 if score > 0.28 else 0.5


def same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_each_score_is_that_of_a_direct_merge_and_the_model_is_restored() -> None:
    model = network()
    models, before = finetuned(model), copy.deepcopy(model.state_dict())
    delta, score = nm.consensus_delta(model, models), Distance(model, models)
    found = nm.select_scale(model, delta, evaluate=lambda m: {"forget": (v := score(m)), "retain": retain(v)})
    assert found.scale == 0.7 and isinstance(found, nm.SelectedScale)
    assert score.calls == list(range(21))
    assert [point.forget for point in found.points] == [1 - k / 20 for k in range(21)]
    assert all(isinstance(point, nm.ScalePoint) and point.seconds > 0 for point in found.points)
    assert same(model, before)


def test_two_functions_are_called_as_one_is() -> None:
    model = network()
    models = finetuned(model)
    delta, score = nm.consensus_delta(model, models), Distance(model, models)
    one = nm.select_scale(model, delta, evaluate=lambda m: ((v := score(m)), torch.tensor(retain(v))))
    two = nm.select_scale(model, delta, forget=score, retain=lambda m: retain(score(m)))
    assert [(p.scale, p.forget, p.retain) for p in one.points] == [
        (p.scale, p.forget, p.retain) for p in two.points
    ]
    assert one.scale == two.scale == 0.7


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_restored_after_an_exception_and_the_search_goes_on(
    tmp_path: Path, error: type[BaseException]
) -> None:
    model = network()
    models, before = finetuned(model), copy.deepcopy(model.state_dict())
    delta, score = nm.consensus_delta(model, models), Distance(model, models)

    def evaluate(m: torch.nn.Module) -> tuple[float, float]:
        value = score(m)
        if len(score.calls) == 8:
            raise error
        return value, retain(value)

    path = tmp_path / "points.jsonl"
    with pytest.raises(error):
        nm.select_scale(model, delta, evaluate=evaluate, points=path)
    assert same(model, before)
    with pytest.warns(nm.MergeWarning, match="the scores of 7 scales are from there") as caught:
        found = nm.select_scale(model, delta, evaluate=evaluate, points=path)
    assert [Path(each.filename).name for each in caught] == ["test_select_scale.py"]
    assert found.scale == 0.7 and score.calls == [*range(8), *range(7, 21)]
    assert same(model, before)
    other = nm.consensus_delta(model, models[:2])
    with pytest.raises(nm.InputError, match="the scores are of another delta"):
        nm.select_scale(model, other, evaluate=evaluate, points=path)


def test_a_delta_is_the_same_in_memory_and_in_files(tmp_path: Path) -> None:
    model = network()
    models = finetuned(model)
    delta = nm.consensus_delta(model, models)
    delta.save(tmp_path / "D")
    assert (
        identity_of(delta)
        == identity_of(nm.load_delta(tmp_path / "D"))
        == identity_of_files(open_delta(tmp_path / "D"))
    )
    others = [nm.consensus_delta(model, models[:2]), nm.consensus_delta(model, models[::-1][:2]), nm.consensus_delta(model, models, half=True)]  # fmt: skip
    assert len({identity_of(each) for each in (delta, *others)}) == 4


def test_nothing_qualifies() -> None:
    model = network()
    before, delta = copy.deepcopy(model.state_dict()), nm.consensus_delta(model, finetuned(model))
    with pytest.raises(nm.NoScaleError, match="no scale of 20") as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.select_scale(model, delta, forget=lambda m: 1.0, retain=lambda m: float(same(m, before)))
    assert len(error.value.points) == 21 and same(model, before)


def test_notes_are_warnings() -> None:
    model = network()
    delta = nm.consensus_delta(model, finetuned(model))
    scores = iter([(0.9, 1.0), (0.5, 1.0), (0.6, 1.0)])
    with pytest.warns(nm.MergeWarning) as caught:
        found = nm.select_scale(model, delta, evaluate=lambda m: next(scores), scales=(1, 2))
    assert [str(each.message) for each in caught] == list(found.notes)
    assert found.notes == ("forget is not monotone: as λ grows it rises once, most from λ 1 to 2, by 0.1",)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, nm.InputError, "expected forget and retain, or evaluate"),
        ({"forget": len}, nm.InputError, "expected forget and retain, or evaluate"),
        ({"forget": len, "retain": len, "evaluate": len}, nm.InputError, "expected forget and retain, or evaluate"),
        ({"evaluate": 3}, TypeError, "evaluate: 3, expected a function"),
        ({"evaluate": lambda m: 0.5}, nm.InputError, r"evaluate: returned 0.5, expected \(forget, retain\)"),
        ({"evaluate": lambda m: {"forget": 1}}, nm.InputError, "evaluate: returned"),
        ({"evaluate": lambda m: (0.5, "x")}, nm.InputError, "retain at λ 0: 'x', expected a number"),
        ({"evaluate": lambda m: (0.5, 1), "progress": "yes"}, TypeError, "progress: 'yes'"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    before, delta = copy.deepcopy(model.state_dict()), nm.consensus_delta(model, finetuned(model))
    with pytest.raises(error, match=message):
        nm.select_scale(model, delta, **options)
    assert same(model, before)


def test_a_path_is_no_delta() -> None:
    with pytest.raises(TypeError, match="delta: str, expected a Delta"):
        nm.select_scale(network(), "delta", evaluate=lambda m: (0, 0))  # type: ignore[arg-type]


def test_the_picture_and_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    delta = nm.consensus_delta(model, finetuned(model))
    scores = iter([(0.9, 1.0), (0.5, 0.98), (0.4, 0.5)])
    found = nm.select_scale(model, delta, evaluate=lambda m: next(scores), scales=(1, 2))
    (axes,) = found.plot(tmp_path / "scales.png").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["forget (lower is better)"] == [[0, 0.9], [1, 0.5], [2, 0.4]]
    assert lines["retain (higher is better)"] == [[0, 1.0], [1, 0.98], [2, 0.5]]
    assert lines["chosen: λ = 1"][0][0] == 1 and lines["lowest retain score allowed"][0][1] == 0.95
    assert (tmp_path / "scales.png").read_bytes().startswith(b"\x89PNG")
    fields = json.loads(found.to_json())
    assert fields["scale"] == 1 and [point["retain"] for point in fields["points"]] == [1.0, 0.98, 0.5]

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(nm.InputError, match=r"pip install 'negmerge_fast\[plot\]'"):
        found.plot()
