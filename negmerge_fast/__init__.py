"""negmerge_fast: make a trained model forget by merging its fine-tuned versions (NegMerge, arXiv 2410.05583).

Importing the package imports no torch and touches no GPU: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .core.errors import InputError, MergeWarning
    from .core.rule import Rule
    from .core.stats import Stats, TensorStats
    from .deltas.apply import apply_delta
    from .deltas.job import delta_checkpoints
    from .deltas.live import Live
    from .deltas.memory import Delta, consensus_delta, load_delta
    from .deltas.paired import Changed
    from .methods.base import Method
    from .methods.catalogue import method
    from .reports.api import write_report
    from .reports.statistics import ConsensusStatistics, consensus_statistics
    from .search.api import select_scale
    from .search.points import ScalePoint
    from .search.result import NoScaleError, SelectedScale
    from .streaming.api import merge_checkpoints
    from .streaming.report import Report
    from .streaming.verify import DamageError, Verified, verify_checkpoint
    from .tensors.api import merge, merge_, merge_task_vectors, negate_

_HOMES = {
    "Changed": "deltas.paired",
    "ConsensusStatistics": "reports.statistics",
    "DamageError": "streaming.verify",
    "Delta": "deltas.memory",
    "InputError": "core.errors",
    "Live": "deltas.live",
    "MergeWarning": "core.errors",
    "Method": "methods.base",
    "NoScaleError": "search.result",
    "Report": "streaming.report",
    "Rule": "core.rule",
    "ScalePoint": "search.points",
    "SelectedScale": "search.result",
    "Stats": "core.stats",
    "TensorStats": "core.stats",
    "Verified": "streaming.verify",
    "apply_delta": "deltas.apply",
    "consensus_delta": "deltas.memory",
    "consensus_statistics": "reports.statistics",
    "delta_checkpoints": "deltas.job",
    "load_delta": "deltas.memory",
    "merge": "tensors.api",
    "merge_": "tensors.api",
    "merge_checkpoints": "streaming.api",
    "merge_task_vectors": "tensors.api",
    "method": "methods.catalogue",
    "negate_": "tensors.api",
    "select_scale": "search.api",
    "verify_checkpoint": "streaming.verify",
    "write_report": "reports.api",
}

__all__ = [
    "Changed",
    "ConsensusStatistics",
    "DamageError",
    "Delta",
    "InputError",
    "Live",
    "MergeWarning",
    "Method",
    "NoScaleError",
    "Report",
    "Rule",
    "ScalePoint",
    "SelectedScale",
    "Stats",
    "TensorStats",
    "Verified",
    "__version__",
    "apply_delta",
    "consensus_delta",
    "consensus_statistics",
    "delta_checkpoints",
    "load_delta",
    "merge",
    "merge_",
    "merge_checkpoints",
    "merge_task_vectors",
    "method",
    "negate_",
    "select_scale",
    "verify_checkpoint",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
