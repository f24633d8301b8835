"""Consensus deltas in memory: what the rule takes off a base, computed once and applied with any λ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ..backends import registry
from ..backends.pytorch import FLOAT_NAMES, TORCH_DTYPES
from ..checkpoints.delta import DeltaInfo, TensorInfo
from ..core.batch import Batch, Counts, Merge, Operand, Segment, Signature
from ..core.errors import stacklevel
from ..core.low_rank import AdaptersAs
from ..core.pairing import Rename
from ..core.rule import Inputs, NonFinite, Rule
from ..core.scales import Scale
from ..core.schema import TensorSpec
from ..core.stats import Stats, TensorStats
from ..methods.base import Method
from ..methods.catalogue import as_method
from ..tensors import low_rank
from ..tensors.call import Call
from ..tensors.counts import readable, tell_of_nonfinite
from ..tensors.dtensor import box_of
from ..tensors.family import ask, scales_of
from ..tensors.flatten import Item, signatures
from ..tensors.names import Model, Names
from .live import Live
from .packing import Packed, Packer, TensorDelta
from .paired import Changed, Paired, Parts, changed_of
from .samples import hashes
from .storage import read_delta, save_delta

# Elements whose means are dense at a time, multiples of RANK_BLOCK. On a GPU every operation is a launch: few and large ones.
CPU_BLOCK, DEVICE_BLOCK = 1 << 20, 1 << 24


class Delta:
    """A consensus delta in memory: for each tensor of a base a bit mask of the elements that agree, and their means.

    Applying it gives the bits of a merge, for every λ, without the models. It is made by consensus_delta or load_delta.

    Attributes:
        tensors: The deltas of the base's tensors, by name; tied ones once.
        models: How many models it is of.
        min_agreement: The fraction of the models that agreed on the sign.
        inputs: What the models were: "finetuned" weights or "task_vectors".
        method: The Method by which they were merged.
    """

    def __init__(self, parts: Parts, info: DeltaInfo) -> None:
        self._parts, self._info = parts, info
        self.tensors: Mapping[str, TensorDelta] = MappingProxyType(dict(parts.tensors))
        self.models, self.min_agreement, self.inputs = info.models, info.min_agreement, info.inputs
        self.method = as_method("negmerge") if info.method is None else Method.of_json(info.method)

    @property
    def stats(self) -> Stats:
        """Counts for each tensor and in all. What agreed is in the mask."""
        stats = Stats()
        stats.include(
            {
                name: TensorStats(
                    d.numel, d.agreed, d.info.nonfinite, d.info.vetoed_by_zero, d.info.masked or 0
                )
                for name, d in self.tensors.items()
            }
        )
        return stats

    @property
    def nbytes(self) -> int:
        """The bytes of masks, means and ranks."""
        return sum(each.nbytes for delta in self.tensors.values() for each in delta.packed)

    def to(self, device: str | torch.device) -> Delta:
        """The delta on a device: this one's tensors where they are there already, else copies.

        Args:
            device: Where the model is, to which it will be applied.
        """
        moved = {
            name: delta._replace(packed=Packed(*(each.to(device) for each in delta.packed)))
            for name, delta in self.tensors.items()
        }
        return Delta(self._parts._replace(tensors=moved), self._info)

    def apply_(
        self,
        model: Model,
        scale: Scale,
        *,
        nonfinite: NonFinite = "keep-base",
        rename: Rename = (),
        backend: str = "auto",
    ) -> Stats:
        """Subtract the delta, scaled by λ, from its base, in place: the bits of merge_ with the models.

        Args:
            model: The base that the delta is of: a tensor, an array, a mapping or a module, as merge_ takes it. DTensors are
                applied to shard by shard, each rank its own.
            scale: λ, any finite number; or by patterns on the model's names, as of merge.
            nonfinite: "keep-base", or "error": nothing is written if an element was not finite in a version, or would not be.
            rename: Regular expressions and what replaces their matches in the names of the delta.
            backend: As of merge.

        Returns:
            The counts of merge_. Of a shard that is cut from a delta of the whole tensor, elements that were not finite in a
                version and that zeros vetoed are not counted.

        Warns:
            MergeWarning: As merge_; also if the model has tensors that the delta lacks, which are left as they are.

        Raises:
            InputError: If the model is not the base: in names, dtypes or shapes, or in the bytes in the middle of a tensor, such as
                after a delta was applied to it; also as merge_. Nothing was written.
            TypeError: If an argument is of the wrong kind.
        """
        checked = scales_of(scale)
        with torch.no_grad():
            return Paired(self._parts, model, rename, backend, nonfinite).apply(checked)

    def changed(self, model: Model, scale: Scale, *, rename: Rename = (), backend: str = "auto") -> Changed:
        """Count the elements of the base whose stored bits another λ would change. Nothing is written.

        In BF16 steps that are small beside the weight are rounded away.

        Args:
            model: As of apply_.
            scale: λ, any finite number; or by patterns on the model's names, as of merge.
            rename: As of apply_.
            backend: As of merge.

        Returns:
            Counts, and which fraction they are, in all and for each tensor.

        Raises:
            InputError: As apply_.
        """
        checked = scales_of(scale)
        with torch.no_grad():
            return changed_of(Paired(self._parts, model, rename, backend, written=False).count(checked))

    def live(self, model: Model, *, rename: Rename = (), backend: str = "auto") -> Live:
        """Make a block in which a model can be moved to any λ, again and again, and after which it has its former bits.

            with delta.live(model) as live:
                for scale in (0.5, 0.7, 0.9):
                    live.scale = scale
                    evaluate(model)

        Each move costs one sweep over the masks and means. Beside the model only the base's elements in the masks are kept.

        Args:
            model: As of apply_.
            rename: As of apply_.
            backend: As of merge.

        Returns:
            A context manager; it checks its arguments when the block begins, as apply_ does.
        """
        return Live(self._parts, model, rename, backend)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the delta to a new directory, as plain safetensors. load_delta and `negmerge apply` read it.

        Args:
            path: The directory, which must not exist.

        Raises:
            InputError: If it exists, or the delta is of DTensors' shards.
        """
        save_delta(path, self.tensors, self._info)

    def __reduce__(self) -> tuple[Any, ...]:
        return Delta, (self._parts, self._info)  # a mapping proxy can be neither pickled nor copied

    def __repr__(self) -> str:
        method = "" if self._info.method is None else f"method={self.method}, "
        return f"Delta({method}models={self.models}, tensors={len(self.tensors)}, nbytes={self.nbytes}, stats={self.stats})"


def load_delta(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Delta:
    """Read a consensus delta from disk.

    Args:
        path: What `negmerge delta` or Delta.save wrote: a directory, or one .safetensors file.
        device: Where it is put.

    Returns:
        The delta.

    Raises:
        InputError: If there is none, or it is malformed; the line names the file and the tensor.
        OSError: If it cannot be read.
    """
    tensors, info = read_delta(path)
    return Delta(Parts(tensors, {}, None), info).to(device)


def consensus_delta(
    base: Model,
    finetuned: Sequence[Model],
    *,
    min_agreement: float = 1.0,
    inputs: Inputs = "finetuned",
    nonfinite: NonFinite = "keep-base",
    include: str | None = None,
    exclude: str | None = None,
    rename: Rename = (),
    half: bool = False,
    backend: str = "auto",
    adapters_as: AdaptersAs = "difference",
    method: str | Method = "negmerge",
    weights: Model | None = None,
) -> Delta:
    """Compute the consensus delta of fine-tuned versions of a base: a merge without λ.

    The rule and the arguments are those of merge; λ comes later, with Delta.apply_ or Delta.live. Tensors are read one after the
    other, and the delta takes an eighth of a byte for each element, and a mean for each that agrees.

    Args:
        base: As of merge.
        finetuned: As of merge; LoRA adapters, too.
        min_agreement: As of merge.
        inputs: As of merge.
        nonfinite: An element that is not finite in any version is not in the delta ("keep-base"), or raises ("error").
        include: As of merge; the delta has nothing of other tensors.
        exclude: As of merge.
        rename: As of merge.
        half: Whether means are stored in BF16, which takes half the memory or a quarter. Merges then have other bits.
        backend: As of merge.
        adapters_as: As of merge. What no model of a list of adapters changes is not in the delta.
        method: As of merge.
        weights: As of merge. The means in the delta are the weighted ones.

    Returns:
        The delta, each tensor on the device of the base's. Of DTensors it is of this rank's shards, and fits the same shards only.

    Warns:
        MergeWarning: As merge.

    Raises:
        InputError: As merge.
        TypeError: If an argument is of the wrong kind.
    """
    # With λ = 0 an element is non-finite by the rule exactly if it is for every λ.
    (rule, asked), names = ask(0.0, min_agreement, method, weights), Names(include, exclude, rename)
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
    if call.family is not None:
        rule = call.family.rule(rule)
    with torch.no_grad():
        builder = _Builder(call, rule, half)
        made = [(item, *builder.build(item)) for item in call.items]
        counted = Stats()
        for results in builder.results:
            counted.add(*results)
        if nonfinite == "error":
            call.refuse_nonfinite(call.items, rule, counted)
        samples = hashes(
            {item.name: (item.versions[0], None, tuple(item.versions[0].shape)) for item in call.items}
        )
    tell_of_nonfinite(builder.results, call.names, "not in the delta", stacklevel() + 1)
    tensors = {}
    for item, arithmetic, packed in made:
        tensor, name = item.versions[0], item.name
        held = call.dtensors.get(name)
        spec = TensorSpec(FLOAT_NAMES[tensor.dtype], tuple((tensor if held is None else held).shape))
        counts = counted.tensors.get(name, TensorStats())
        masked = None if rule.choices is None else counts.masked
        known = TensorInfo(spec, arithmetic, counts.nonfinite, counts.vetoed_by_zero, samples[name], masked)
        tensors[name] = TensorDelta(
            known, packed, None if held is None else box_of(held, call.where(None, name))
        )
    unchosen = frozenset(name for name in call.kept)
    listed, weighted = None, None
    if asked is not None:
        listed = None if asked.method.is_negmerge else asked.method.to_json()
        weighted = None if asked.weights is None else ""
    info = DeltaInfo(call.models, rule.min_agreement, inputs, {}, listed, weighted)
    return Delta(Parts(tensors, call.tied, unchosen), info)


class _Builder:
    """Builds the deltas of items one after the other.

    Attributes:
        results: Names, numbers of elements and counts of all blocks so far.
    """

    def __init__(self, call: Call, rule: Rule, half: bool) -> None:
        self.results: list[tuple[list[tuple[str, int]], Counts]] = []
        self._call, self._rule, self._half = call, rule, half
        self._dense: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        # Backends are chosen for all devices first.
        mixed = [each for item in call.items if (each := call.mixed(item))]
        self._consensus: dict[str, Merge]
        if mixed:
            self._consensus = low_rank.choose(
                registry.choose_low_rank_consensus, mixed, rule, call.merged, call.task_vectors, call.backend
            )
        else:
            self._consensus = {
                str(device): registry.choose_consensus(
                    call.backend, str(device), rule, list(signatures(call.items, device, call.task_vectors))
                )[1]
                for device in dict.fromkeys(item.versions[0].device for item in call.items)
            }

    def build(self, item: Item) -> tuple[str, Packed]:
        """The type of an item's arithmetic, and its delta in row-major order."""
        mixed = self._call.mixed(item)
        if mixed is None:
            source: _Versions | low_rank.Prepared = _Versions(item, self._call.task_vectors)
        else:
            source = low_rank.Prepared(mixed, self._call.merged, self._call.task_vectors)
        device, numel, signature = source.device, source.numel, source.signature
        dtype = TORCH_DTYPES[signature.arithmetic]
        packer = Packer(numel, torch.bfloat16 if self._half else dtype, device)
        longest = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
        block = source.block(longest) if numel else 1
        terms = None if self._call.family is None else self._call.family.row_terms(item.name)
        for start in range(0, numel, block):
            size = min(block, numel - start)
            dense = self._memory(device, dtype, size, block)
            out = Operand(dense.data_ptr(), signature.arithmetic, dense)
            segment = source.segment(start, size, out)
            batch = Batch(str(device), signature, [segment], low_rank.at_start(terms, start))
            counts = self._consensus[str(device)](batch, self._rule)
            self.results += readable([([(item.name, size)], counts)])
            packer.add(dense)
        return signature.arithmetic, packer.packed()

    def _memory(self, device: torch.device, dtype: torch.dtype, size: int, block: int) -> torch.Tensor:
        """Memory for dense means, the same for all blocks."""
        held = self._dense.get((device, dtype))
        if held is None or len(held) < size:
            held = torch.empty(size if held is None else block, dtype=dtype, device=device)
            self._dense[device, dtype] = held
        return held[:size]


class _Versions:
    """A tensor of models that are all in memory, block by block. Copies of a scattered one are made here."""

    def __init__(self, item: Item, task_vectors: bool) -> None:
        self._versions = [t.resolve_neg().contiguous() for t in item.versions]
        self.device, self.numel = self._versions[0].device, self._versions[0].numel()
        dtypes = [FLOAT_NAMES[t.dtype] for t in self._versions]
        self.signature = Signature(dtypes[0], tuple(dtypes[1:]), task_vectors)

    def block(self, longest: int) -> int:
        return longest

    def segment(self, start: int, size: int, out: Operand) -> Segment:
        base, *models = [low_rank.at(t, start) for t in self._versions]
        return Segment(size, base, models, out)
