"""NegMerge as an algorithm of fusion_bench: the pool's pretrained model is the base, its other models are the fine-tuned versions."""

from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from torch import nn

import negmerge_fast as nm


@auto_register_config
class NegMerge(BaseAlgorithm):
    def __init__(self, scale: float = 0.9, method: str = "negmerge", **kwargs) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: BaseModelPool) -> nn.Module:
        model = modelpool.load_pretrained_model()
        nm.merge_(model, list(modelpool.models()), scale=self.scale, method=self.method)
        return model
