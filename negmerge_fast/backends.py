"""Which backends work here, and why the others do not.

Every backend is one function, merge(batch, rule) -> counts; rule.py says what it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rule import InputError, Merge

if TYPE_CHECKING:
    from .rule import Batch, Rule

# In the order in which "auto" prefers them.
NAMES = ("torch",)


def why_not(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device here; None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"torch has no device {device!r} here: {str(error).splitlines()[0]}"
    return None


def choose(backend: str, device: str) -> tuple[str, Merge]:
    """The name and the merge function of a backend for one device; "auto" takes the first that can run there."""
    if backend not in ("auto", *NAMES):
        raise InputError(f"backend: {backend!r}, expected one of auto, {', '.join(NAMES)}")
    reasons = []
    for name in NAMES if backend == "auto" else (backend,):
        reason = why_not(name, device)
        if reason is None:
            from . import reference

            return name, reference.merge
        reasons.append(f"{name}: {reason}")
    raise InputError(f"backend {backend!r} cannot run here: {'; '.join(reasons)}")


def first_nonfinite(batch: Batch, rule: Rule) -> tuple[int, int, int | str, float] | None:
    """Where a batch first has a non-finite element; reference.py says what is returned."""
    from . import reference

    return reference.first_nonfinite(batch, rule)
