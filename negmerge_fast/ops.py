"""Registers torch.ops.negmerge.merge and merge_, the rule as operators of torch."""

from .tensors.ops import merge, merge_

__all__ = ["merge", "merge_"]
