"""Merging of models in memory: merge, merge_, merge_task_vectors and negate_ on tensors, arrays, mappings and modules.

Models become named tensors. The versions of one name become a segment of flat memory. All segments of one device and
signature become a batch, which is one call of a backend. Everything is checked before the first write.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

import numpy as np
import torch

from ..core.low_rank import AdaptersAs
from ..core.pairing import Rename
from ..core.rule import Inputs, NonFinite, Rule
from ..core.stats import Stats
from .arrays import SupportsDLPack
from .call import Call
from .flatten import Item
from .graph import merge_in_graph, merge_in_graph_, require_plain
from .names import Array, Model, Names

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack  # of typing since Python 3.11

    from ..core.scales import Scale
    from ..methods.base import Method
    from .family import Asked

# Types that are returned as they were passed; a Parameter is returned as a Tensor.
_Same = TypeVar("_Same", torch.Tensor, np.ndarray[Any, Any])


class _Options(TypedDict, total=False):
    """Keywords of merge_task_vectors, for type checkers."""

    min_agreement: float
    nonfinite: NonFinite
    include: str | None
    exclude: str | None
    rename: Rename
    backend: str
    method: str | Method


class _Scaled(_Options, total=False):
    """Keywords of merge, for type checkers."""

    scale: Required[Scale]
    inputs: Inputs
    adapters_as: AdaptersAs
    weights: Model | None


def _rule(
    scale: Scale, min_agreement: float, method: str | Method, weights: Model | None
) -> tuple[Rule, Asked | None]:
    """The rule of a call, and what is asked for beside NegMerge with one λ."""
    if isinstance(scale, (float, int)) and method == "negmerge" and weights is None:
        return Rule(scale, min_agreement), None
    from .family import ask  # not before: a small merge takes less time than importing it

    return ask(scale, min_agreement, method, weights)


@overload
def merge(base: _Same, finetuned: Sequence[Model], **options: Unpack[_Scaled]) -> _Same: ...
@overload
def merge(
    base: Mapping[str, _Same], finetuned: Sequence[Model], **options: Unpack[_Scaled]
) -> dict[str, _Same]: ...
@overload
def merge(
    base: torch.nn.Module, finetuned: Sequence[Model], **options: Unpack[_Scaled]
) -> OrderedDict[str, torch.Tensor]: ...
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
    scale: Scale,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    backend: str = "auto",
    adapters_as: AdaptersAs = "difference",
    method: str | Method = "negmerge",
    weights: Model | None = None,
) -> Any:
    """Merge fine-tuned versions into a base model by negation of their consensus (NegMerge).

    For one element, with base weight b, fine-tuned weights x_1 … x_n and scale λ (arXiv 2410.05583, section 4):

        d_k   = x_k - b                        (b rounded to the type of x_k)
        agree = all d_k > 0  or  all d_k < 0
        out   = b - λ · (d_1 + … + d_n) / n    if agree,   else b

    DTensors are merged shard by shard, each rank its own, without communication. All versions of a name must have equal
    placements, Shard or Replicate, on the same ranks. Only with nonfinite="error" do the ranks exchange whether anything
    was found (one number for each dimension of the mesh), so that all of them raise or none; then all have to call. A
    mistake that only one rank can see, such as shared memory, is refused by that rank alone.

    LoRA adapters of PEFT may stand among the models. Their products are expanded tile by tile: no model is dense in memory. In a list
    with adapters every model is a task vector, a full one as its difference to the base. What an adapter does not change is zero, and
    what no model of the list changes is not merged.

    Args:
        base: A tensor, a mapping of names to tensors, or an nn.Module. Any shape, strides and device. fp64, fp32, fp16
            and bf16 are merged; integer and bool tensors are copied. NumPy arrays, arrays of any library with DLPack
            and DTensors may stand wherever a tensor may, if torch can view them without a copy. A module in which PEFT has put
            adapters stands for its base, under the plain names; adapters must not be merged into it at the moment.
        finetuned: One or more models of the same kind, with the same names, shapes and devices. Floating-point dtypes
            may differ. One list, even for one model. A PeftModel, or a module with adapters, is as many models as it has adapters, in
            the order of peft_config, whichever is active. A path is an adapter on disk: PEFT's directory, or its .safetensors file;
            or text, the name of one on the hub. PEFT need not be installed for it. Adapters may be on any device.
        scale: λ, any finite number. The paper searches 0 … 1. Or λ by the names of tensors: a mapping of regular expressions to numbers,
            or pairs of these. The first that is found in a name counts; "" is found in all. A number below zero merges in.
        min_agreement: The fraction of the models, in (0.5, 1], whose differences must have the same sign. The paper
            has 1.
        inputs: Whether finetuned holds "finetuned" weights x_k or "task_vectors" d_k.
        nonfinite: An element with a NaN or an infinity in any version or in the result keeps the base's bits
            ("keep-base") or raises ("error").
        include: A regular expression. Only tensors whose name matches are merged; the others are copied from base.
        exclude: A regular expression. Tensors whose name matches are copied from base. What is not chosen is not compared.
        rename: Regular expressions and what replaces their matches in the names of finetuned, in order: a mapping, or pairs.
            What compilers and wrappers put before names (_orig_mod., module.), a prefix of all names and names that
            PyTorch had earlier need none.
        backend: "auto", or one of "cuda", "triton", "cpu" and "torch". "auto" takes the compiled kernel of the device,
            else Triton on a GPU, else plain PyTorch. All give the same bits.
        adapters_as: What adapters are: task vectors d = s · BA in the arithmetic type ("difference"); or models, b + d rounded to the
            type of b, as merging them one by one would make them ("merged"). Then full models are merged as without adapters.
        method: What is taken off the base: the name of a method, or one with numbers of its own, made by negmerge_fast.method.
        weights: A weight w for each element: out = b - λ · w · mean. What base is, with its names and shapes, on its devices: of a
            floating-point type, or a mask of bool, uint8, int32 or int64. Tensors that it lacks have weight 1. Names are paired as those of models.

    Returns:
        What base is, in memory of its own: a tensor or array, or a dict of them. For a module, its state dict as plain
            tensors: an OrderedDict with the _metadata of the base's, that loads into the module without adapters. Dtypes, shapes,
            devices and DTensor placements are those of base; tied weights stay tied.

    Warns:
        MergeWarning: If elements are non-finite with nonfinite="keep-base" (on a GPU, where the call does not wait, a later
            call warns, or the end of the process), names were taken for others, integers are in some versions only, only some of the
            adapters change a tensor, weights lack a tensor, or variances of a BatchNorm are below zero after the merge.

    Raises:
        InputError: If versions differ in names, shapes or devices, or in integers that are no counters; there is nothing to
            merge; weights are quantized; a part of an adapter has no place in the base, or is no plain LoRA; memory cannot be viewed;
            an option is out of range; weights have a name that the base lacks, another shape or another type;
            a named backend cannot run here; or an element is non-finite with nonfinite="error". It is a ValueError,
            and names the model and the tensor.
        TypeError: If an argument is of the wrong kind, or a tensor is not a dense one with memory of its own.
        RuntimeError: If the device fails.
    """
    if torch.compiler.is_compiling():
        require_plain(include, exclude, rename, scale, method, weights)
        return merge_in_graph(base, finetuned, scale, min_agreement, inputs, nonfinite, backend)
    (rule, asked), names = _rule(scale, min_agreement, method, weights), Names(include, exclude, rename)
    call = Call(
        base,
        finetuned,
        "finetuned",
        inputs,
        nonfinite,
        backend,
        names,
        adapters_as=adapters_as,
        asked=asked,
    )
    items = [item._replace(out=call.empty_like(item.name, item.versions[0])) for item in call.items]
    merged = call.run(items, rule)
    return call.like_base({**merged, **call.unmerged()})


def merge_(
    base: Model,
    finetuned: Sequence[Model],
    *,
    scale: Scale,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    backend: str = "auto",
    adapters_as: AdaptersAs = "difference",
    method: str | Method = "negmerge",
    weights: Model | None = None,
) -> Stats:
    """Merge fine-tuned versions into a base model, in place.

    The rule and the arguments are those of merge. Everything is checked before the first write. Ctrl-C and other signals
    that Python handles come when all is written; only memory that is missing, for the flat copy of a scattered tensor or for the factors
    of adapters, can stop the call on the way. In a graph of torch.compile, tied weights and shared memory are not looked for.

    Args:
        base: As of merge; it is written. Tied weights are updated once. Arrays are written where they are; read-only
            ones, which DLPack before 1.0 cannot tell from others, are refused. Of a module with adapters the base's layers are
            written; the adapters in it stay, and now add to the merged weights.
        finetuned: As of merge. Versions that share memory with base are refused. The adapters of base itself may be among them.
        scale: λ, any finite number, or patterns, as of merge.
        min_agreement: The fraction of the models, in (0.5, 1], whose differences must have the same sign.
        inputs: Whether finetuned holds "finetuned" weights or "task_vectors".
        nonfinite: "keep-base", or "error". With "error" nothing is written if any element is non-finite, which costs
            a second reading of everything.
        include: As of merge; the other tensors are not written.
        exclude: As of merge.
        rename: As of merge.
        backend: As of merge.
        adapters_as: As of merge.
        method: As of merge.
        weights: As of merge. They must not share memory with base.

    Returns:
        Counts for each tensor and in all: elements, agreed, nonfinite, masked, consensus_ratio. They stay on the device until
            one is read, on any stream: reading waits for the merge. Only counts of a CUDA graph or of a graph of
            torch.compile have to be waited for by the caller. Of DTensors they are what this rank holds; where each element is on one rank, as in FSDP, the
            sums over the ranks are the model's.

    Warns:
        MergeWarning: As merge; also if the state dict of a module lacks some of its parameters.

    Raises:
        InputError: As merge; also if a version shares memory with base, or the state dict of a module has copies of its
            parameters. Nothing was written.
        TypeError: If an argument is of the wrong kind.
    """
    if torch.compiler.is_compiling():
        require_plain(include, exclude, rename, scale, method, weights)
        return merge_in_graph_(base, finetuned, scale, min_agreement, inputs, nonfinite, backend)
    (rule, asked), names = _rule(scale, min_agreement, method, weights), Names(include, exclude, rename)
    call = Call(
        base,
        finetuned,
        "finetuned",
        inputs,
        nonfinite,
        backend,
        names,
        in_place=True,
        adapters_as=adapters_as,
        asked=asked,
    )
    return call.run_in_place(rule)


def negate_(
    base: Model,
    tau: Model,
    *,
    scale: Scale,
    nonfinite: NonFinite = "keep-base",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    backend: str = "auto",
    weights: Model | None = None,
) -> Stats:
    """Subtract a scaled task vector from a model, in place: base -= scale · tau.

    This is task negation (arXiv 2212.04089) with any task vector. One multiplication and one addition, each rounded, in
    float32 (float64 if either is fp64). Elements where tau is zero keep their bits.

    Args:
        base: A tensor, mapping or module, as of merge_; it is written.
        tau: One task vector of the same kind. Its integer and bool tensors may be missing. Or one LoRA adapter, as of merge.
        scale: λ, any finite number, or patterns, as of merge.
        nonfinite: As of merge_.
        include: As of merge_.
        exclude: As of merge_.
        rename: As of merge, in the names of tau.
        backend: As of merge.
        weights: As of merge.

    Returns:
        Counts as of merge_; agreed counts the elements where tau is not zero.

    Warns:
        MergeWarning: As merge_.

    Raises:
        InputError: As merge_.
        TypeError: If an argument is of the wrong kind.
    """
    (rule, asked), names = _rule(scale, 1.0, "negmerge", weights), Names(include, exclude, rename)
    call = Call(base, [tau], "tau", "task_vectors", nonfinite, backend, names, in_place=True, asked=asked)
    return call.run_in_place(rule)


@overload
def merge_task_vectors(task_vectors: Sequence[_Same], **options: Unpack[_Options]) -> _Same: ...
@overload
def merge_task_vectors(
    task_vectors: Sequence[Mapping[str, _Same]], **options: Unpack[_Options]
) -> dict[str, _Same]: ...
@overload
def merge_task_vectors(
    task_vectors: Sequence[torch.nn.Module], **options: Unpack[_Options]
) -> OrderedDict[str, torch.Tensor]: ...
@overload
def merge_task_vectors(task_vectors: Sequence[Model], **options: Unpack[_Options]) -> Any: ...
def merge_task_vectors(
    task_vectors: Sequence[Model],
    *,
    min_agreement: float = 1.0,
    nonfinite: NonFinite = "keep-base",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    backend: str = "auto",
    method: str | Method = "negmerge",
) -> Any:
    """Compute the consensus mean of task vectors, dense (arXiv 2410.05583, equation 3).

    An element is the mean of the task vectors where all their signs agree, and 0 elsewhere. With another method it is what that method
    reduces the task vectors to.

    Args:
        task_vectors: One or more tensors, mappings or modules with the same names, shapes and devices. Arrays are
            taken as by merge. Adapters are not, for they have no base here.
        min_agreement: The fraction of the task vectors, in (0.5, 1], that must have the same sign.
        nonfinite: Non-finite elements are 0 ("keep-base") or raise ("error").
        include: A regular expression. Only tensors whose name in task_vectors[0] matches are in the result.
        exclude: A regular expression. Tensors whose name matches are not.
        rename: As of merge, in the names of all but the first.
        backend: As of merge.
        method: As of merge.

    Returns:
        What task_vectors[0] is: a tensor, an array or a dict, with the widest dtype of each tensor's versions. It has
            no integer and bool tensors.

    Warns:
        MergeWarning: As merge.

    Raises:
        InputError: As merge; also for a single tensor that is not of a floating-point type.
        TypeError: If an argument is of the wrong kind.
    """
    (rule, asked), names = _rule(-1.0, min_agreement, method, None), Names(include, exclude, rename)
    call = Call(None, task_vectors, "task_vectors", "task_vectors", nonfinite, backend, names, asked=asked)
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
