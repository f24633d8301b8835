"""NegMerge as a method of sd-mecha, which reads, merges and writes tensor by tensor."""

# sd-mecha reads the annotations: they cannot be postponed.

from sd_mecha import Parameter, Return, merge_method
from torch import Tensor

import negmerge_fast as nm


@merge_method
def negmerge(
    base: Parameter(Tensor),
    *models: Parameter(Tensor),
    scale: Parameter(float) = 0.9,
    method: Parameter(str) = "negmerge",
) -> Return(Tensor):
    return nm.merge(base, models, scale=scale, method=method)
