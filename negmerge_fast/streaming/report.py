"""What a merge of checkpoints did."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What a merge of checkpoints did; its fields are those of the JSON report.

    seconds: wall time of this run. bytes_read, bytes_written: by it; bytes_skipped: those of the inputs that did not need to
    be read; bytes_done_before: of the output, by the run that it went on with.
    """

    base: str
    models: list[str]
    output: str
    scale: float
    min_agreement: float
    backend: str
    device: str
    elements: int
    agreed: int
    consensus_ratio: float
    nonfinite: int
    bytes_read: int
    bytes_skipped: int
    bytes_written: int
    bytes_done_before: int
    seconds: float
    tensors: list[dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"
