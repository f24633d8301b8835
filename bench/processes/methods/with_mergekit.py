"""NegMerge as a method of mergekit, run by its command: its command line imports no plug-ins."""

from __future__ import annotations

import json

import torch
from formula import Formula, arguments
from mergekit.merge_methods.base import BasePolicy, InputContract, TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.registry import register
from mergekit.scripts.run_yaml import main as run

# Without what costs time and is not the merge.
OPTIONS = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")

given = arguments(__doc__)
formula = Formula(given.scale)


@merge_method(name="negmerge", contract=InputContract(base=BasePolicy.REQUIRED))
def negmerge(group: TensorGroup) -> torch.Tensor:
    out = group.base.tensor.clone()  # a method must not change its inputs
    formula(out, [entry.tensor for entry in group.non_base])
    return out


if __name__ == "__main__":
    register(negmerge)
    given.out.mkdir()
    recipe = given.out / "recipe.yaml"
    # JSON is valid YAML.
    recipe.write_text(
        json.dumps({
            "merge_method": "negmerge", "base_model": str(given.base), "dtype": "float32",
            "models": [{"model": str(model)} for model in given.models],
        })
    )  # fmt: skip
    run([str(recipe), str(given.out), *OPTIONS])
