"""Merges models in files with the loops that the paper's authors released, between load_file and save_file.

A task vector is a model minus the base, which is loaded again for each. Their sum, the sum of their signs, the elements where all
signs are equal, the mean, its negation, and the base plus λ times that follow one after another, each for the whole model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from formula import arguments, weights
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def loaded(model: Path) -> State:
    return {name: tensor for path in weights(model) for name, tensor in load_file(path).items()}


def vector(base: Path, model: Path) -> State:
    before, after = loaded(base), loaded(model)
    return {name: after[name] - before[name] for name in before}


def main() -> None:
    given = arguments(__doc__)
    torch.set_grad_enabled(False)
    merged: State = {}
    signs: State = {}
    for model in given.models:
        for name, difference in vector(given.base, model).items():
            if name not in merged:
                merged[name], signs[name] = torch.zeros_like(difference), torch.zeros_like(difference)
            merged[name] += difference
            signs[name] += torch.sign(difference)
    n = len(given.models)
    for name, total in merged.items():
        merged[name] = torch.where(torch.abs(signs[name]) == n, total / n, torch.zeros_like(total))
    negated = {name: -mean for name, mean in merged.items()}
    base = loaded(given.base)
    out = {name: base[name] + given.scale * negated[name] for name in base}
    given.out.mkdir()
    save_file(out, given.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
