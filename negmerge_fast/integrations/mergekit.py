"""NegMerge, and the other methods of this package, as a merge method of mergekit (0.1.5 and newer): importing this module registers it.

    merge_method: negmerge
    base_model: base
    parameters: {scale: 0.9}

mergekit finds no plug-ins by itself: `negmerge mergekit CONFIG.yml OUT` imports this module first. In memory, after the import:
mergekit.merge_methods.merge_tensors([base, …], "negmerge", base_index=0, parameters={"scale": 0.9}).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..methods.catalogue import as_method
from ..tensors.api import merge

try:
    from mergekit.merge_methods import (
        BasePolicy,
        InputContract,
        OptionalTensorPolicy,
        TensorGroup,
        merge_method,
        register,
        registered_methods,
    )
except ImportError as error:
    if error.name and not error.name.startswith("mergekit"):
        raise
    raise ImportError(
        "mergekit 0.1.5 or newer is not installed: pip install 'negmerge_fast[mergekit]'", name=error.name
    ) from None

NAME = "negmerge"


def negmerge(
    group: TensorGroup, scale: float, min_agreement: float = 1.0, method: str = "negmerge"
) -> torch.Tensor:
    """Merge one tensor's versions: base - λ · r.

    Args:
        group: The base and the models, in one floating-point type, as mergekit hands them over.
        scale: λ, any finite number; the paper's is positive, and negates. With a negative one the models are merged in.
        min_agreement: The fraction of the models, in (0.5, 1], whose differences must have the same sign.
        method: "negmerge", or another method of this package with its usual numbers. Fractions are of each tensor, as mergekit hands
            over one at a time: those of ties, too.

    Returns:
        The merged tensor, in the base's type and shape and in memory of its own.

    Raises:
        InputError: If an option is out of range, or an element is not finite.
    """
    assert group.base is not None  # the contract asks for it
    name: str = group.metadata.name or ""  # the generator of dare takes it
    chosen = replace(as_method(method), over="tensor")
    merged: dict[str, torch.Tensor] = merge(
        {name: group.base.tensor},
        [{name: entry.tensor} for entry in group.non_base],
        scale=scale,
        min_agreement=min_agreement,
        method=chosen,
        nonfinite="error",
    )
    return merged[name]


if not any(each.spec.name == NAME for each in registered_methods()):
    register(
        merge_method(
            negmerge,
            name=NAME,
            pretty_name="NegMerge",
            reference_url="https://arxiv.org/abs/2410.05583",
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
            # What only the base has is the base's.
            optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        )
    )
