"""NegMerge as a method of fusion_bench, on its lazy models."""

from __future__ import annotations

import torch
from formula import Formula, arguments
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.modelpool.lazy_state_dict_pool import LazyStateDictPool
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


class NegMerge(BaseAlgorithm):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.formula = Formula(scale)

    @torch.no_grad()
    def run(self, modelpool: LazyStateDictPool) -> State:
        base = modelpool.load_model("_pretrained_")
        models = [modelpool.load_model(name) for name in modelpool.model_names]
        merged = {}
        for name in base:
            merged[name] = base[name]
            self.formula(merged[name], [model[name] for model in models])
        return merged


if __name__ == "__main__":
    given = arguments(__doc__)
    names = ("_pretrained_", *map(str, range(len(given.models))))
    pool = LazyStateDictPool(dict(zip(names, map(str, (given.base, *given.models)), strict=True)))
    merged = NegMerge(given.scale).run(pool)
    given.out.mkdir()
    save_file(merged, given.out / "model.safetensors", metadata={"format": "pt"})
