"""The choice of a backend, and why the others cannot run.

A backend is one function, merge(batch, rule) -> counts. core/rule.py says what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from ..core.batch import Batch, Merge, Signature
from ..core.delta import Apply, DeltaSignature, Save, differences_of
from ..core.dtypes import FLOAT_SIZES
from ..core.errors import InputError, first_line
from ..core.low_rank import Expand, ExpandSignature, expand_signature
from ..core.rule import Rule

# In the order of preference of "auto".
NAMES = ("cuda", "triton", "cpu", "torch")

# Backends that several threads may call at once, each on its own batch.
CONCURRENT = frozenset({"cpu"})

# Backends that are used on a device only after a self-test there. The CPU kernel has none: a merge of files would have to
# import torch for it.
_NEED_SELFTEST = frozenset({"cuda", "triton"})


def why_not(name: str, device: str) -> str | None:
    """Tell why a backend cannot run on a device here; None if it can."""
    if name == "triton":
        try:
            from ..kernels import merge
        except ImportError as error:
            return f"cannot be imported: {error}"
        reason: str | None = merge.why_not(device)
        return reason
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
        return f"torch has no device {device!r} here: {first_line(error)}"
    if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
        return "cannot be captured in a graph: it waits for the device"
    return None


def details(name: str) -> str:
    """Describe a backend for `negmerge info`: what it was compiled for."""
    if name not in ("cuda", "cpu"):
        return ""
    from . import native

    return native.details(name)


def choose(
    backend: str,
    device: str,
    rule: Rule | None = None,
    signatures: Iterable[Signature] = (),
    expanded: Iterable[ExpandSignature] = (),
) -> tuple[str, Merge]:
    """Choose a backend for a device.

    Args:
        backend: The name of one, or "auto" for the first that can run there.
        device: As torch writes it: "cpu", "cuda:0".
        rule: What will be computed; None skips the self-test.
        signatures: What will be merged. A backend that needs a self-test has one for each signature, once a process.
        expanded: What the backend will write of low-rank differences before it merges them.

    Returns:
        The name of the backend, and its merge function.

    Raises:
        InputError: If no such backend can run there; the message has the reasons.
    """

    def failure(name: str) -> str | None:
        nonlocal signatures, expanded
        if rule is None or name not in _NEED_SELFTEST:
            return None
        # Not iterators, of which the next backend would see only the rest.
        signatures, expanded = dict.fromkeys(signatures), dict.fromkeys(expanded)
        return _selftest_failure(name, device, rule, signatures) or _expand_failure(name, device, expanded)

    name = _choose(backend, device, failure)
    return name, _merge_of(name)


def _choose(backend: str, device: str, failure: Callable[[str], str | None]) -> str:
    """The first backend that can run on a device and passes its self-test. failure tells why one does not."""
    if backend not in ("auto", *NAMES):
        raise InputError(f"backend: {backend!r}, expected one of auto, {', '.join(NAMES)}")
    reasons = []
    for name in NAMES if backend == "auto" else (backend,):
        # On the CPU Triton is an interpreter, for tests.
        if (backend, name, device) == ("auto", "triton", "cpu"):
            continue
        reason = why_not(name, device) or failure(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise InputError(f"backend {backend!r} cannot run here: {'; '.join(reasons)}")


def choose_apply(backend: str, device: str, signatures: Iterable[DeltaSignature] = ()) -> tuple[str, Apply]:
    """Choose a backend that applies consensus deltas (core/delta.py) on a device, as `choose` does one that merges.

    Args:
        backend: The name of one, or "auto" for the first that can run there.
        device: As torch writes it.
        signatures: What will be applied. A backend that needs a self-test has one for each signature, once a process.

    Raises:
        InputError: If no such backend can run there; the message has the reasons.
    """
    signatures = dict.fromkeys(signatures)
    name = _choose(backend, device, lambda name: _apply_failure(name, device, signatures))
    return name, _apply_of(name)


def _apply_failure(name: str, device: str, signatures: Iterable[DeltaSignature]) -> str | None:
    """Tell why a backend must not apply deltas of one of the signatures; None if it may."""
    if name not in _NEED_SELFTEST:
        return None
    from . import selftest_delta

    if name == "triton":
        from ..kernels.apply import in_few_programs as launch
    else:
        from .native import deltas_in_few_blocks as launch
    failures = (selftest_delta.failure(name, launch, device, signature) for signature in signatures)
    return next(filter(None, failures), None)


def _apply_of(name: str) -> Apply:
    if name == "triton":
        from ..kernels import apply

        found: Apply = apply.apply
        return found
    if name in ("cuda", "cpu"):
        from . import native

        return native.apply_cuda if name == "cuda" else native.apply_cpu
    from . import pytorch_delta

    return pytorch_delta.apply


def save_of(name: str) -> Save:
    """A backend's function that copies the base's elements in the mask to `saved`."""
    if name == "triton":
        from ..kernels import apply

        found: Save = apply.save
        return found
    if name in ("cuda", "cpu"):
        from . import native

        return native.save_cuda if name == "cuda" else native.save_cpu
    from . import pytorch_delta

    return pytorch_delta.save


def choose_consensus(
    backend: str,
    device: str,
    rule: Rule,
    signatures: Iterable[Signature] = (),
    expanded: Iterable[ExpandSignature] = (),
) -> tuple[str, Merge]:
    """Choose a backend as `choose` does, for `consensus`; returns its name and that function."""
    name, _ = choose(backend, device, rule, map(differences_of, signatures), expanded)
    return name, consensus(name)


def consensus(name: str) -> Merge:
    """A backend's function that merges to the means of core/delta.py.

    The outputs of its segments are of the signature's arithmetic type. Where the element agrees and all is finite the mean is
    written, +0 elsewhere; of a rule with choices w · r where the element is chosen. The counts are those of a merge. Of the rule
    the scale is not used.
    """
    if name == "cpu":
        from . import native

        return partial(native.merge_cpu, consensus=True)
    from . import pytorch_delta

    return partial(pytorch_delta.consensus, _merge_of(name))


def choose_expand(
    backend: str, device: str, signatures: Iterable[ExpandSignature] = ()
) -> tuple[str, Expand]:
    """Choose a backend that writes low-rank differences (core/low_rank.py) on a device, as `choose` does one that merges.

    Args:
        backend: The name of one, or "auto" for the first that can run there.
        device: As torch writes it.
        signatures: What will be written. A backend that needs a self-test has one for each signature, once a process.

    Raises:
        InputError: If no such backend can run there; the message has the reasons.
    """
    signatures = dict.fromkeys(signatures)
    name = _choose(backend, device, lambda name: _expand_failure(name, device, signatures))
    return name, expand_of(name)


def _expand_failure(name: str, device: str, signatures: Iterable[ExpandSignature]) -> str | None:
    """Tell why a backend must not write low-rank differences of one of the signatures; None if it may."""
    if name not in _NEED_SELFTEST:
        return None
    from . import selftest_low_rank

    if name == "triton":
        from ..kernels.expand import in_few_programs as launch
    else:
        from .native import expand_cuda_in_few_blocks as launch
    failures = (selftest_low_rank.failure(name, launch, device, each) for each in dict.fromkeys(signatures))
    return next(filter(None, failures), None)


def expand_of(name: str) -> Expand:
    """A backend's function that writes low-rank differences."""
    if name == "triton":
        from ..kernels import expand

        found: Expand = expand.expand
        return found
    if name in ("cuda", "cpu"):
        from . import native

        return native.expand_cuda if name == "cuda" else native.expand_cpu
    from . import low_rank

    return low_rank.expand


def choose_low_rank(
    backend: str, device: str, rule: Rule, signatures: Iterable[Signature] = ()
) -> tuple[str, Merge]:
    """Choose a backend as `choose` does; its function accepts an Expansion in place of an Operand among a segment's models.

    Signatures have for such a model the arithmetic type if models are task vectors, else the base's type.
    """
    signatures = dict.fromkeys(signatures)
    name, merge = choose(backend, device, rule, signatures, map(expand_signature, signatures))
    return name, _low_rank(name, merge, consensus=False)


def choose_low_rank_consensus(
    backend: str, device: str, rule: Rule, signatures: Iterable[Signature] = ()
) -> tuple[str, Merge]:
    """Choose a backend as `choose_low_rank` does, for `consensus`."""
    signatures = dict.fromkeys(signatures)
    name, merge = choose_consensus(backend, device, rule, signatures, map(expand_signature, signatures))
    return name, _low_rank(name, merge, consensus=True)


def _low_rank(name: str, merge: Merge, consensus: bool) -> Merge:
    if name == "cpu":
        from . import native

        return partial(native.merge_low_rank_cpu, consensus=consensus)
    from . import low_rank

    return partial(low_rank.merge, merge, expand_of(name))


def _selftest_failure(name: str, device: str, rule: Rule, signatures: Iterable[Signature]) -> str | None:
    """Tell why a backend must not be used for one of the signatures; None if it passes."""
    from . import selftest

    merge = _merge_of(name)
    if name == "triton":
        from ..kernels.merge import merge_in_few_programs

        merge = merge_in_few_programs
    if name == "cuda":
        from .native import merge_cuda_in_few_blocks

        merge = merge_cuda_in_few_blocks
    failures = (selftest.failure(name, merge, device, signature, rule) for signature in signatures)
    return next(filter(None, failures), None)


def selftest(name: str, device: str) -> str | None:
    """Self-test a backend on a device for every dtype and a mixture; returns why it is not used, if it is not."""
    if name not in _NEED_SELFTEST:
        return None
    signatures = [Signature(dtype, (dtype, dtype), False) for dtype in FLOAT_SIZES]
    signatures.append(Signature("F32", ("BF16", "F16"), False))  # the base is rounded to both
    wide = {dtype: "F64" if dtype == "F64" else "F32" for dtype in FLOAT_SIZES}
    deltas = [DeltaSignature(dtype, wide[dtype], wide[dtype]) for dtype in FLOAT_SIZES]
    expanded = [ExpandSignature(wide[dtype], dtype) for dtype in FLOAT_SIZES] + [ExpandSignature("F32", None)]
    return (
        _selftest_failure(name, device, Rule(1.0), signatures)
        or _apply_failure(name, device, deltas)
        or _expand_failure(name, device, expanded)
    )


def _merge_of(name: str) -> Merge:
    if name == "torch":
        from . import pytorch

        return pytorch.merge
    if name == "triton":
        from ..kernels import merge

        found: Merge = merge.merge
        return found
    from . import native

    return native.merge_cpu if name == "cpu" else native.merge_cuda


def usual_threads() -> int:
    """The number of threads that merge on the CPU unless told otherwise: torch's, or what it would be, within the quota."""
    from . import native

    return native.usual_threads()


def first_nonfinite(batch: Batch, rule: Rule) -> tuple[int, int, int | str, str] | None:
    """Find the first non-finite element of a batch, as pytorch.first_nonfinite."""
    from . import pytorch

    return pytorch.first_nonfinite(batch, rule)
