"""Fine-tuned versions of the models of other libraries, merged on disk and in memory, and compared with the plain rule."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
import torch
from bits import same_bits
from command import Run
from safetensors.torch import load_file

import negmerge_fast as nm
from negmerge_fast.core.reference import plain_merge

# A warning that no test expects is a failure.
MARKS = [pytest.mark.libraries, pytest.mark.filterwarnings("error::negmerge_fast.MergeWarning")]
SCALE = 0.9
SEEDS = (1, 2, 3)

State = Mapping[str, torch.Tensor]
AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


class Merged(NamedTuple):
    """out: what was written. notes: what was said of it. report: its counts."""

    out: Path
    notes: list[str]
    report: dict[str, object]


def finetuned(module: AnyModule, seed: int) -> AnyModule:
    """A copy that has moved by a few percent, half of it in a direction that all seeds share."""
    tuned = copy.deepcopy(module)
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            size = 0.03 * max(float(parameter.abs().mean()), 0.02)
            for generator in (shared, own):
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return tuned


def merge_files(run: Run, base: Path, models: Sequence[Path], out: Path, *options: object) -> Merged:
    """Merge by the command, which must end well and know its output afterwards."""
    report = out.with_name(f"{out.name}.report.json")
    arguments = (base, *models, "--output", out, "--scale", SCALE, "--report", report, *options)
    status, _, err = run("merge", *arguments)
    assert status == 0, err
    notes = [line for line in err.splitlines() if line]
    assert all(line.startswith("negmerge: note: ") for line in notes), err
    status, _, err = run("verify", out)
    assert status == 0, err
    return Merged(out, notes, json.loads(report.read_text()))


def refused(run: Run, *paths: Path) -> str:
    """The one line with which the command refuses a base and its models, whose output must not be there."""
    out = paths[0].with_name("refused")
    status, _, err = run("merge", *paths, "--output", out, "--scale", SCALE)
    assert status == 2, err
    assert not out.exists()
    assert err.startswith("negmerge: ") and err.count("\n") == 1
    return err


def states(path: Path) -> dict[str, torch.Tensor]:
    """All tensors below a directory, or of a file; those of a subfolder's files with its name before theirs."""
    if path.is_file():
        return load_file(path)
    tensors = {}
    for file in sorted(path.rglob("*.safetensors")):
        folder = file.parent.relative_to(path).as_posix()
        prefix = "" if folder == "." else f"{folder}/"
        tensors.update({prefix + name: tensor for name, tensor in load_file(file).items()})
    return tensors


def check(merged: State, base: State, models: Sequence[State]) -> None:
    """Hold what was merged to the plain rule, bit by bit: no name is missing, some weights agreed and changed, others did not."""
    assert set(merged) == set(base)
    elements = agreed = 0
    for name, b in base.items():
        if b.is_floating_point():
            expected, count, *_ = plain_merge(b, [model[name] for model in models], SCALE)
            elements, agreed = elements + b.numel(), agreed + count
            assert merged[name].isfinite().all(), name
        else:
            expected = b
        assert same_bits(merged[name], expected), name
    assert 0 < agreed < elements
    assert not all(same_bits(merged[name], b) for name, b in base.items())


def check_in_memory(base: torch.nn.Module, models: Sequence[torch.nn.Module], files: Sequence[State]) -> None:
    """Hold every mixture of modules and the state dicts of their files, the base's first, to the same bits, in place too."""
    expected = base.state_dict()
    check(nm.merge(base, models, scale=SCALE), expected, [model.state_dict() for model in models])
    merged = nm.merge(base, models, scale=SCALE)
    mixed = [*models[:1], *files[2:]]
    for versions in (files[1:], mixed):
        of_module = nm.merge(base, versions, scale=SCALE)
        assert set(of_module) == set(expected)
        for name in of_module:
            assert same_bits(of_module[name], merged[name]), name
        written = copy.deepcopy(base)
        nm.merge_(written, versions, scale=SCALE)
        for name, tensor in written.state_dict().items():
            assert same_bits(tensor, merged[name]), name
    for versions in (models, mixed, [model.state_dict() for model in models]):
        of_file = nm.merge(files[0], versions, scale=SCALE)
        assert set(of_file) == set(files[0])
        for name, tensor in of_file.items():
            assert same_bits(tensor, merged.get(name, tensor)), name
