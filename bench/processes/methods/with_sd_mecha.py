"""NegMerge as a method of sd-mecha, which reads and writes tensor by tensor."""

# sd-mecha reads the annotations: they cannot be postponed.

import sd_mecha
import torch
from formula import BLOCK, Formula, arguments, weights
from sd_mecha import Parameter, Return
from torch import Tensor

given = arguments(__doc__)
formula = Formula(given.scale)


@sd_mecha.merge_method(identifier="negmerge")
def negmerge(base: Parameter(Tensor), *models: Parameter(Tensor)) -> Return(Tensor):
    # On this thread: sd-mecha merges several tensors at a time. In place: it was read for this call.
    for block in zip(*(tensor.view(-1).split(BLOCK) for tensor in (base, *models)), strict=True):
        formula.merge(*block)
    return base


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    given.out.mkdir()
    base, *models = (sd_mecha.model(path) for model in (given.base, *given.models) for path in weights(model))
    sd_mecha.merge(
        negmerge(base, *models), merge_dtype=torch.float32, output_dtype=torch.float32, output=given.out / "model.safetensors",
        check_finite_output=False, omit_non_finite_inputs=False,
    )  # fmt: skip
