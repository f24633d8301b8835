"""Which backends work here, and why the others do not.

Every backend is one function, merge(batch, rule) -> counts; rule.py says what it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rule import InputError, Merge

if TYPE_CHECKING:
    from .rule import Batch, Rule

# In the order in which "auto" prefers them.
NAMES = ("cuda", "cpu", "torch")

# Those that several threads may call at once, on batches of their own.
CONCURRENT = frozenset({"cpu"})


def why_not(name: str, device: str) -> str | None:
    """Why a backend cannot run on a device here; None if it can."""
    if name != "torch":
        from . import native

        return native.why_not(name, device)
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"torch has no device {device!r} here: {str(error).splitlines()[0]}"
    return None


def details(name: str) -> str:
    """What a person may want to know of a backend beside whether it can run."""
    if name == "torch":
        return ""
    from . import native

    return native.details(name)


def choose(backend: str, device: str) -> tuple[str, Merge]:
    """The name and the merge function of a backend for one device; "auto" takes the first that can run there."""
    if backend not in ("auto", *NAMES):
        raise InputError(f"backend: {backend!r}, expected one of auto, {', '.join(NAMES)}")
    reasons = []
    for name in NAMES if backend == "auto" else (backend,):
        reason = why_not(name, device)
        if reason is None:
            return name, _merge_of(name)
        reasons.append(f"{name}: {reason}")
    raise InputError(f"backend {backend!r} cannot run here: {'; '.join(reasons)}")


def _merge_of(name: str) -> Merge:
    if name == "torch":
        from . import reference

        return reference.merge
    from . import native

    return native.merge_cpu if name == "cpu" else native.merge_cuda


def usual_threads() -> int:
    """How many threads merge on the CPU unless told otherwise: torch's number, or what it would be."""
    from . import native

    return native.usual_threads()


def first_nonfinite(batch: Batch, rule: Rule) -> tuple[int, int, int | str, float] | None:
    """Where a batch first has a non-finite element; reference.py says what is returned."""
    from . import reference

    return reference.first_nonfinite(batch, rule)
