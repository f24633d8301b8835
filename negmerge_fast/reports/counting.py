"""Counting what prefixes of the models agree on, in one pass over a batch: compiled, or with PyTorch.

For one element, with d_k of core/rule.py, after the first p of n models:

    agrees       b, d_1 … d_p and their mean are finite, and these d are all above zero, or all below
    non-finite   b or one of d_1 … d_p is not finite; or they have one sign, and their mean is not finite
    vetoed by 0  not the former, and no two of d_1 … d_p have opposite signs: some are zero
    conflicting  the rest

So prefix p counts what the consensus delta of the first p models does (core/delta.py), and a merge of them as long as no result
overflows. Model p breaks the agreement of an element if the element agrees after p - 1 models (a finite b, after none) and not after p: by
zero, by the sign, or by what is not finite.

A model is the sole dissenter of an element if b is finite, the d of all other models are finite and have one sign, and its own has not:
it is zero, has the other sign, or is not finite. It is against the majority if b is finite, more than half of all n models have a finite d of one
sign, and its own is another. The order of the models does not matter for these two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from ..backends import native
from ..core.batch import Batch, Operand, Segment
from ..core.descriptors import pack_descriptors
from ..core.dtypes import DTYPE_CODES

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

# What is counted for each model, in this order (csrc/prefix.h): of the prefix that it ends, and of itself.
OF_PREFIX = ("agreed", "nonfinite", "vetoed_by_zero", "broken_by_zero", "broken_by_sign")
OF_MODEL = ("sole_by_zero", "sole_by_sign", "sole_by_nonfinite", "against_majority")
COUNTED_OF_PREFIXES = (*OF_PREFIX, *OF_MODEL)

# Bins of the magnitudes: ten for each power of ten. The borders are written out, so that every machine has the same.
MIN_EXPONENT, MAX_EXPONENT = -16, 4
_STEPS = (
    "1", "1.2589254117941673", "1.5848931924611136", "1.9952623149688795", "2.51188643150958", "3.1622776601683795",
    "3.9810717055349722", "5.011872336272723", "6.309573444801933", "7.943282347242816",
)  # fmt: skip
EDGES = (
    *(float(f"{step}e{exponent}") for exponent in range(MIN_EXPONENT, MAX_EXPONENT) for step in _STEPS),
    float(f"1e{MAX_EXPONENT}"),
)

# Elements of a block with PyTorch, of all models together: its temporaries take some 40 bytes for each.
_BLOCK = 1 << 18

# Returns int64[segments, columns(n)].
CountPrefixes: TypeAlias = "Callable[[Batch], Array]"


def columns(models: int) -> int:
    """How many numbers are counted of a segment: those for each model, then those of the bins of the magnitudes."""
    return len(COUNTED_OF_PREFIXES) * models + len(EDGES) + 1


def choose(device: str) -> tuple[str, CountPrefixes]:
    """The name and the function of what counts on a device."""
    return ("cpu", count_natively) if native.why_not("cpu", device) is None else ("torch", count_with_torch)


def count_natively(batch: Batch) -> Array:
    """Count a batch in main memory with the compiled loop, on this thread."""
    result, models, task_vectors = batch.signature
    counts = np.zeros((len(batch.segments), columns(len(models))), np.int64)
    descriptors = pack_descriptors(batch)
    edges = _edges()
    native.library().count_prefixes(
        DTYPE_CODES[result],
        bytes(map(DTYPE_CODES.__getitem__, models)),
        task_vectors,
        len(batch.segments),
        descriptors.buffer_info()[0],
        counts.ctypes.data,
        edges.ctypes.data,
        len(edges),
        native.instruction_set(),
    )
    return counts


@cache
def _edges() -> np.ndarray[Any, Any]:
    return np.array(EDGES, np.float64)


def count_with_torch(batch: Batch) -> Array:
    """Count a batch on any device of torch, block by block: the oracle of the compiled loop."""
    import torch

    from ..backends.pytorch import compute_alone_if_flushing, plain_arithmetic

    models = len(batch.signature.models)
    block = max(_BLOCK // models, 1)
    found = np.zeros((len(batch.segments), columns(models)), np.int64)
    with plain_arithmetic():
        compute_alone_if_flushing(torch.empty(block, device=batch.device))
        for row, segment in enumerate(batch.segments):
            for start in range(0, segment.numel, block):
                size = min(block, segment.numel - start)
                found[row] += _Block(batch, segment, start, size).counts().cpu().numpy()
    return found


class _Block(NamedTuple):
    """Some elements of a segment."""

    batch: Batch
    segment: Segment
    start: int
    size: int

    def _load(self, operand: Operand | None) -> torch.Tensor:
        import torch

        from ..backends.pytorch import load

        if operand is None:
            return torch.zeros(self.size, device=self.batch.device)
        return load(operand, self.start, self.size)

    def _differences(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b and all d_k in the arithmetic type."""
        import torch

        from ..backends.pytorch import TORCH_DTYPES, rounded

        signature = self.batch.signature
        wide = TORCH_DTYPES[signature.arithmetic]
        b = self._load(self.segment.base).to(wide)
        d = torch.empty(len(signature.models), self.size, dtype=wide, device=b.device)
        for k, operand in enumerate(self.segment.models):
            x = self._load(operand).to(wide)
            origin = (
                rounded(b, TORCH_DTYPES[operand.dtype]).to(wide)
                if signature.rounds_base(operand.dtype)
                else b
            )
            d[k] = x if signature.task_vectors else x - origin
        return b, d

    def counts(self) -> torch.Tensor:
        """One number for each column."""
        import torch

        b, d = self._differences()
        models = len(d)
        base_finite, finite = b.isfinite(), d.isfinite()
        positive, negative, zero = (d > 0) & finite, (d < 0) & finite, d == 0
        total = torch.zeros_like(b)
        all_positive = all_negative = torch.ones_like(base_finite)
        any_positive = any_negative = ~all_positive
        bad, before = ~base_finite, base_finite
        of_prefix = []
        for k in range(models):
            total = total + d[k]
            all_positive, all_negative = all_positive & positive[k], all_negative & negative[k]
            any_positive, any_negative = any_positive | positive[k], any_negative | negative[k]
            bad = bad | ~finite[k]
            one_sign = all_positive | all_negative
            nonfinite = bad | (one_sign & ~total.isfinite())
            agreed = one_sign & ~nonfinite
            vetoed = ~nonfinite & ~one_sign & ~(any_positive & any_negative)
            by_sign = before & ~one_sign & (positive[k] | negative[k])
            of_prefix.append(torch.stack([agreed, nonfinite, vetoed, before & zero[k], by_sign]))
            before = agreed
        of_model = self._of_models(positive, negative, zero, finite) & base_finite
        bins = self._bins((total / torch.full_like(total, models)).abs()[before])
        both = torch.cat([torch.stack(of_prefix, 1), of_model])  # kinds, models, elements
        return torch.cat([torch.count_nonzero(both, 2).flatten(), bins])

    @staticmethod
    def _of_models(
        positive: torch.Tensor, negative: torch.Tensor, zero: torch.Tensor, finite: torch.Tensor
    ) -> torch.Tensor:
        """Whether each model is the sole dissenter of an element, by zero, sign and what is not finite; and against the majority."""
        import torch

        n_positive, n_negative = positive.sum(0), negative.sum(0)
        others = len(positive) - 1
        sole = ((n_positive - positive.long() == others) & ~positive) | (
            (n_negative - negative.long() == others) & ~negative
        )
        sole &= torch.maximum(n_positive, n_negative) <= others  # a single model that agrees has no others
        against = ((n_positive * 2 > others + 1) & ~positive) | ((n_negative * 2 > others + 1) & ~negative)
        return torch.stack([sole & zero, sole & (positive | negative), sole & ~finite, against])

    @staticmethod
    def _bins(magnitudes: torch.Tensor) -> torch.Tensor:
        import torch

        edges = torch.tensor(EDGES, dtype=torch.float64, device=magnitudes.device)
        found = torch.searchsorted(edges, magnitudes.double(), right=True)
        return torch.bincount(found, minlength=len(EDGES) + 1)
