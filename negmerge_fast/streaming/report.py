"""What a merge of checkpoints did."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What a merge of checkpoints did. The fields are those of the JSON report.

    Attributes:
        base: The path of the base, as given; of a name of the hub, that of its snapshot in the cache.
        models: The paths of the fine-tuned models, in order.
        output: The path of the output.
        method: The method, with its numbers that are not the usual ones.
        weights: The path of what has a weight for each element, as given; None if there is none.
        scale: λ, or pairs of a regular expression and a number; None of a consensus delta.
        min_agreement: The fraction of the models that had to agree.
        backend: The backend that merged.
        device: The device it merged on.
        elements: Elements that were merged.
        agreed: Elements that the rule changed.
        consensus_ratio: agreed / elements.
        nonfinite: Elements that kept the base's bits because something was not finite, as far as it was read. None of a job that was
            finished before, by a run that may have skipped bytes of the models.
        vetoed_by_zero: Finite elements that did not agree, but would have if each difference of exactly zero had the sign of the
            majority. None if it is not known, because some bytes of the models were skipped, or an older version wrote OUT, and of
            another method or with weights.
        masked: Elements that the method would have changed, but for a weight of zero. None of NegMerge without weights.
        bytes_read: Bytes that this run read.
        bytes_skipped: Bytes of the inputs that did not need to be read.
        bytes_written: Bytes that this run wrote.
        bytes_done_before: Bytes of the output that an earlier, interrupted run had done.
        seconds: Wall time of this run.
        notes: What a user should know of the merge, a line each.
        adapters: How many modules of each LoRA adapter were placed in the base, a line each; equal ones are one line.
        skipped_files: Names of files of the base that were not copied: --keep copies them.
        large_files: Bytes of each other file of more than 1 MiB that was copied, by name: --drop skips them.
        tensors: name, elements, agreed, nonfinite, vetoed_by_zero and masked of each tensor.
    """

    base: str
    models: list[str]
    output: str
    method: str
    weights: str | None
    scale: float | list[list[object]] | None
    min_agreement: float
    backend: str
    device: str
    elements: int
    agreed: int
    consensus_ratio: float
    nonfinite: int | None
    vetoed_by_zero: int | None
    masked: int | None
    bytes_read: int
    bytes_skipped: int
    bytes_written: int
    bytes_done_before: int
    seconds: float
    notes: list[str]
    adapters: list[str]
    skipped_files: list[str]
    large_files: dict[str, int]
    tensors: list[dict[str, Any]]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"
