"""Variances of normalisation layers, read from an output: a merge follows the rule, and may leave them below zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.reader import naming
from ..core.dtypes import FLOAT_SIZES
from ..core.unmergeable import is_variance
from .plan import Extent

_CHUNK_BYTES = 1 << 20
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def below_zero(extents: Sequence[Extent], path_of: Callable[[str], Path]) -> list[str]:
    """Names of the merged variances that are below zero somewhere.

    Args:
        extents: The output in order.
        path_of: Where a file of the output is.

    Raises:
        OSError: If the output cannot be read.
    """
    found: dict[str, None] = {}
    for extent in extents:
        offset = extent.sources[0].offset
        for name, _, numel, signature in extent.slices:
            end = offset + numel * FLOAT_SIZES[signature.result]
            if is_variance(name):
                chunks = _values(path_of(extent.path), offset, end, signature.result)
                if any((values < 0).any() for values in chunks):
                    found[name] = None
            offset = end
    return list(found)


def _values(path: Path, begin: int, end: int, dtype: str) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the numbers of a tensor in chunks."""
    with naming(path), open(path, "rb") as file:
        file.seek(begin)
        for start in range(begin, end, _CHUNK_BYTES):
            values = np.frombuffer(file.read(min(_CHUNK_BYTES, end - start)), _NUMPY[dtype])
            yield (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values
