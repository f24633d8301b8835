"""The rule of core/choices.py with PyTorch, block by block: the fallback on every torch device, as pytorch.py is of the rule of rule.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core.batch import Batch, Operand, Segment
from ..core.choices import Choices, Election, Gate, Reduction, Terms
from ..core.generator import numbers
from ..core.rule import Rule
from .pytorch import DEVICE_BLOCK_BYTES, SCRATCH_BYTES, TORCH_DTYPES, bits_of, load, rounded, store

# For each element of a block e_1 … e_n are alive at once, and at most so many temporaries of their size, most of them the generator's.
_TEMPORARIES = 16


class FamilyWorkspace:
    """What is the same for all blocks of a batch, and the temporaries that are as many as there are models.

    Attributes:
        block: The most elements of a block.
        d: A temporary of a version's elements of a block.
        nonfinite: The flags of the block that was merged last.
    """

    def __init__(self, batch: Batch, rule: Rule, choices: Choices) -> None:
        self.signature, self.choices = batch.signature, choices
        self.storage = TORCH_DTYPES[batch.signature.result]
        self.dtype = TORCH_DTYPES[batch.signature.arithmetic]
        self.device, models = torch.device(batch.device), len(batch.signature.models)
        self.required = rule.required(models)
        nbytes = SCRATCH_BYTES if self.device.type == "cpu" else 8 * DEVICE_BLOCK_BYTES
        max_elements = nbytes // self.dtype.itemsize // (models + _TEMPORARIES)
        longest = max((segment.numel for segment in batch.segments), default=0)
        self.block = min(longest, max_elements) or 1
        self.e = torch.empty(models, self.block, dtype=self.dtype, device=self.device)
        self.d = self.e[0]
        self.nonfinite = torch.empty(0, dtype=torch.bool, device=self.device)
        self.minus_scale, self.mask_scale = self._numbers((-rule.scale, choices.mask_scale))
        self.factors, self.votes = self._numbers(choices.factors), self._numbers(choices.votes)
        self.zero, self.infinity = self._numbers((0.0,))[0], self._numbers((math.inf,))[0]

    def _numbers(self, numbers: Sequence[float]) -> torch.Tensor:
        """Numbers rounded to the arithmetic type. A tensor on the device: with a Python number torch computes otherwise on a GPU."""
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").to(self.dtype).to(self.device)

    def merge_block(self, segment: Segment, start: int, size: int, terms: Terms | None) -> torch.Tensor:
        """Merge elements start … start + size; returns what FAMILY_COUNTED lists."""
        if terms is None:
            raise ValueError("terms: None, expected those of each segment")
        terms = terms.at(start)
        stored = None if segment.base is None else load(segment.base, start, size)
        b = self.zero.repeat(size) if stored is None else stored.to(self.dtype)
        e = self.e[:, :size]
        finite = self._passing(segment, start, b, terms, e)
        vetoed = self._elect(e)
        r = self._reduced(e)
        weight = None if terms.weight is None else self._weight(terms.weight, size)
        product = r if weight is None else weight * r
        chosen = product != 0
        result = rounded((product * self.minus_scale).add_(b), self.storage)
        finite &= b.isfinite() & product.isfinite() & (result.isfinite() | ~chosen)
        chosen &= finite
        self.nonfinite = ~finite
        if segment.out is not None:
            kept = b.to(self.storage) if stored is None else stored
            store(segment.out, start, torch.where(chosen, bits_of(result), bits_of(kept)))
        masked = None if weight is None else (weight == 0) & (r != 0) & finite
        none = torch.zeros((), dtype=torch.bool, device=self.device)
        flags = (
            chosen,
            self.nonfinite,
            none if vetoed is None else vetoed & finite,
            none if masked is None else masked,
        )
        return torch.stack([torch.count_nonzero(each) for each in flags])

    def _passing(
        self, segment: Segment, start: int, b: torch.Tensor, terms: Terms, e: torch.Tensor
    ) -> torch.Tensor:
        """Write e_1 … e_n; returns whether every p_k is finite."""
        finite = torch.ones(len(b), dtype=torch.bool, device=self.device)
        low, high = self._numbers(terms.low), self._numbers(terms.high)
        for k, operand in enumerate(segment.models):
            d = load(operand, start, len(b)).to(self.dtype)
            if not self.signature.task_vectors:
                is_rounded = self.signature.rounds_base(operand.dtype)
                d = d - (rounded(b, TORCH_DTYPES[operand.dtype]).to(self.dtype) if is_rounded else b)
            torch.mul(d, self.factors[k], out=e[k])
            finite &= e[k].isfinite()
            if self.choices.gate == Gate.RANDOM:
                drawn = _drawn(self.choices.seed, terms, k, len(b), self.device)
                e[k].masked_fill_(drawn >= self.choices.keep[k], 0.0)
            elif self.choices.gate == Gate.MAGNITUDE and len(low):
                magnitude = d.abs()
                e[k].masked_fill_(~((magnitude >= low[k]) & (magnitude <= high[k])), 0.0)
        return finite

    def _elect(self, e: torch.Tensor) -> torch.Tensor | None:
        """Set to zero the e_k that are not elected: an e_k of zero is the same as none, in all that follows.

        Returns:
            Of AGREEMENT, which elements do not agree, but would if their zeros had the sign of the majority.
        """
        election, n, vetoed = self.choices.election, len(e), None
        if election == Election.ALL:
            return None
        if election == Election.MASKS:
            total, masks = self._sum(e), self.zero.repeat(e.shape[1])
            for each in e:
                masks += each.abs() >= self.mask_scale * (total - each).abs()
            positive = negative = masks >= 2
        elif election == Election.SIGN_OF_SUM:
            positive = self._sum(e) >= 0
            negative = ~positive
        else:
            counts = torch.zeros(2, e.shape[1], dtype=torch.int32, device=self.device)
            for each in e:
                counts[0] += each > 0
                counts[1] += each < 0
            if election == Election.CONFLICT:
                positive = negative = (counts < n).all(0)
            else:
                positive, negative = counts >= self.required
            if election == Election.COUNTED:
                total = self._sum(e)
                positive = negative = (positive & (total > 0)) | (negative & (total < 0))
            elif election == Election.AGREEMENT:
                vetoed = (counts.amin(0) <= n - self.required) & ~positive & ~negative
        ceiling = torch.where(positive, self.infinity, self.zero)
        e.clamp_(torch.where(negative, -self.infinity, self.zero), ceiling)
        return vetoed

    def _reduced(self, e: torch.Tensor) -> torch.Tensor:
        """r of the elected e_k."""
        if self.choices.reduction == Reduction.LARGEST:
            largest = e[0].clone()
            for each in e[1:]:
                largest = torch.where(each.abs() >= largest.abs(), each, largest)
            return largest
        total = self._sum(e)
        if self.choices.reduction == Reduction.SUM:
            return total
        of_elected = self.choices.election in (Election.AGREEMENT, Election.SIGN_OF_SUM)
        votes = self.zero.repeat(e.shape[1] if of_elected else 1)
        for vote, each in zip(self.votes, e, strict=True):
            votes += torch.where(each != 0, vote, self.zero) if of_elected else vote
        return torch.where(votes == 0, self.zero, total / votes)

    def _sum(self, e: torch.Tensor) -> torch.Tensor:
        # One after the other: sum(0) adds in another order.
        total = self.zero.repeat(e.shape[1])
        for each in e:
            total += each
        return total

    def _weight(self, operand: Operand, size: int) -> torch.Tensor:
        if operand.dtype == "BOOL":  # any byte counts as a number
            operand = operand._replace(dtype="U8")
        return load(operand, 0, size).to(self.dtype)


def _drawn(seed: int, terms: Terms, model: int, size: int, device: torch.device) -> torch.Tensor:
    """The generator's numbers of so many elements."""
    first, skipped = divmod(terms.begin, 4)
    quads = torch.arange(first, -((terms.begin + size) // -4), dtype=torch.int64, device=device)
    drawn = torch.stack(numbers(seed, terms.key, model, quads), 1)
    return drawn.view(-1)[skipped : skipped + size]
