"""merge, merge_, merge_task_vectors and negate_ on tensors, arrays, mappings of these and modules.

Models become named tensors, the versions of one name a segment of flat memory, and all segments of one device and
signature a batch: one call of a backend. Everything is checked before the first write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

import numpy as np
import torch

from ..core.rule import Inputs, NonFinite, Rule
from ..core.stats import Stats
from .arrays import SupportsDLPack
from .call import SINGLE, Array, Call, ExtraState, Model, not_mergeable
from .flatten import Item
from .graph import merge_in_graph, merge_in_graph_

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack  # of typing since Python 3.11

# What comes back as it came in; a Parameter as a Tensor.
_Same = TypeVar("_Same", torch.Tensor, np.ndarray[Any, Any])


class _Options(TypedDict, total=False):
    """Keywords of merge_task_vectors; for type checkers only, as the next."""

    min_agreement: float
    nonfinite: NonFinite
    backend: str


class _Scaled(_Options, total=False):
    """Keywords of merge."""

    scale: Required[float]
    inputs: Inputs


@overload
def merge(base: _Same, finetuned: Sequence[Model], **options: Unpack[_Scaled]) -> _Same: ...
@overload
def merge(
    base: Mapping[str, _Same], finetuned: Sequence[Model], **options: Unpack[_Scaled]
) -> dict[str, _Same]: ...
@overload
def merge(
    base: torch.nn.Module, finetuned: Sequence[Model], **options: Unpack[_Scaled]
) -> dict[str, torch.Tensor]: ...
@overload
def merge(base: SupportsDLPack, finetuned: Sequence[Model], **options: Unpack[_Scaled]) -> torch.Tensor: ...
@overload
def merge(
    base: Mapping[str, Array], finetuned: Sequence[Model], **options: Unpack[_Scaled]
) -> dict[str, Any]: ...
def merge(
    base: Model,
    finetuned: Sequence[Model],
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Any:
    """The base, negated by the consensus of its fine-tuned versions (NegMerge, arXiv 2410.05583, section 4).

        d_k = x_k - b;   agree = all d_k > 0 or all d_k < 0;   out = b - scale · mean(d)  if agree,  else b

    base: a tensor, a mapping of names to tensors, or an nn.Module. Any shape, strides and device; fp64, fp32, fp16
        and bf16 are merged; integer and bool tensors are the base's, untouched. Wherever a tensor may be, so may an
        array of numpy, or of any library that speaks DLPack, if torch can view it without a copy; or a DTensor.
    finetuned: one or more of the same kind, with the same names, shapes and devices; floating-point types may differ.
    scale: λ. min_agreement: the share of the models, in (0.5, 1], that must agree on the sign; 1 is the paper's.
    inputs: whether finetuned holds "finetuned" weights x_k or "task_vectors" d_k.
    nonfinite: an element with a NaN or an infinity in any version, or in the result, keeps the base's bits
        ("keep-base") or is an "error".

    Returns what base is, in memory of its own: a tensor, or a dict of tensors (of a module, its state dict), plain ones
    of torch; for arrays of numpy, arrays; for DTensors, DTensors that lie as the base's do. Tied weights stay tied. Raises
    InputError (a ValueError) or TypeError naming model and tensor.

    Of DTensors each rank merges its own shards, without communication: all versions of a name must have equal
    placements, Shard or Replicate, on the same ranks. Only with nonfinite="error" do these ranks tell each other
    whether anything was found (one number per dimension of the mesh), so that all of them raise or none; they all
    have to call. Other mistakes that one rank alone can see, such as shared memory, it alone refuses.
    """
    if torch.compiler.is_compiling():
        return merge_in_graph(base, finetuned, scale, min_agreement, inputs, nonfinite, backend)
    rule = Rule(scale, min_agreement)
    call = Call(base, finetuned, "finetuned", inputs, nonfinite, backend)
    items = [item._replace(out=call.empty_like(item.name, item.versions[0])) for item in call.items]
    merged = call.run(items, rule)
    for name, value in call.untouched.items():
        is_extra = isinstance(value, ExtraState)
        merged[name] = value.value if is_extra else call.empty_like(name, value).copy_(value)
    return call.like_base(merged)


def merge_(
    base: Model,
    finetuned: Sequence[Model],
    *,
    scale: float,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Stats:
    """merge, in place on base; the arguments are merge's. Tied weights are updated once (in a graph they are not looked for).

    Nothing is written if anything is refused: fine-tuned versions that share memory with base included, and with
    nonfinite="error" any non-finite element (which costs a second reading of everything). Ctrl-C waits until all is
    written; only memory that is missing for the flat copy of a scattered tensor can stop it on the way. Arrays are
    written where they are; read-only ones, which DLPack before 1.0 can't tell from others, are refused.

    Returns what was counted, per tensor and in all: elements, agreed, nonfinite, consensus_ratio. Of DTensors, what this
    rank holds was counted; where each element is on one rank, as in FSDP, sums over the ranks are the model's.
    """
    if torch.compiler.is_compiling():
        return merge_in_graph_(base, finetuned, scale, min_agreement, inputs, nonfinite, backend)
    rule = Rule(scale, min_agreement)
    return Call(base, finetuned, "finetuned", inputs, nonfinite, backend, in_place=True).run_in_place(rule)


def negate_(
    base: Model,
    tau: Model,
    *,
    scale: float,
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Stats:
    """base -= scale · tau, in place, where tau is not zero: task negation (arXiv 2212.04089) with any task vector.

    base, nonfinite and the result are those of merge_; tau is one model of the same kind, whose integer and bool
    tensors may be missing. One multiplication and one addition, rounded each, in float32 (float64 for fp64).
    """
    rule = Rule(scale)
    return Call(base, [tau], "tau", "task_vectors", nonfinite, backend, in_place=True).run_in_place(rule)


@overload
def merge_task_vectors(task_vectors: Sequence[_Same], **options: Unpack[_Options]) -> _Same: ...
@overload
def merge_task_vectors(
    task_vectors: Sequence[Mapping[str, _Same]], **options: Unpack[_Options]
) -> dict[str, _Same]: ...
@overload
def merge_task_vectors(
    task_vectors: Sequence[torch.nn.Module], **options: Unpack[_Options]
) -> dict[str, torch.Tensor]: ...
@overload
def merge_task_vectors(task_vectors: Sequence[Model], **options: Unpack[_Options]) -> Any: ...
def merge_task_vectors(
    task_vectors: Sequence[Model],
    *,
    min_agreement: float = 1.0,
    nonfinite: NonFinite = "keep-base",
    backend: str = "auto",
) -> Any:
    """The consensus mean of task vectors, dense: their mean where all signs agree, 0 elsewhere (arXiv 2410.05583, eq. 3).

    task_vectors: one or more tensors, mappings or modules with the same names, shapes and devices. The result has the
    widest of their types, per tensor; integer and bool tensors are left out; non-finite elements are 0 or an error.
    Arrays are taken, and given back where task_vectors[0] has them, as by merge. Raises as merge does.
    """
    rule = Rule(-1.0, min_agreement)
    call = Call(None, task_vectors, "task_vectors", "task_vectors", nonfinite, backend)
    if call.is_single and not call.items:
        raise not_mergeable("task_vectors[0]", call.untouched[SINGLE].dtype)
    items = []
    for item in call.items:
        vectors = item.versions[1:]
        widest = vectors[0].dtype
        for vector in vectors:
            widest = torch.promote_types(widest, vector.dtype)
        out = call.empty_like(item.name, vectors[0], widest)
        segment = item.segment and item.segment._replace(base=None)
        items.append(Item(item.name, [None, *vectors], segment, out))
    return call.like_base(call.run(items, rule))
