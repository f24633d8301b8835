"""negmerge_fast: make a trained model forget by merging its fine-tuned versions (NegMerge, arXiv 2410.05583).

Importing the package imports no torch and touches no GPU: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Report
    from .rule import InputError, Rule, Stats, TensorStats
    from .stream import merge_checkpoints
    from .tensors import merge, merge_, merge_task_vectors, negate_
    from .verify import DamageError, Verified, verify_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "DamageError": "verify",
    "InputError": "rule",
    "Report": "job",
    "Rule": "rule",
    "Stats": "rule",
    "TensorStats": "rule",
    "Verified": "verify",
    "merge": "tensors",
    "merge_": "tensors",
    "merge_checkpoints": "stream",
    "merge_task_vectors": "tensors",
    "negate_": "tensors",
    "verify_checkpoint": "verify",
}

__all__ = [
    "DamageError",
    "InputError",
    "Report",
    "Rule",
    "Stats",
    "TensorStats",
    "Verified",
    "__version__",
    "merge",
    "merge_",
    "merge_checkpoints",
    "merge_task_vectors",
    "negate_",
    "verify_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
