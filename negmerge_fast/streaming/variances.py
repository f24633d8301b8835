"""Variances of normalisation layers, read from an output: a merge follows the rule, and may leave them below zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from ..core.dtypes import FLOAT_SIZES
from ..core.unmergeable import is_variance
from .plan import Extent

if TYPE_CHECKING:
    import numpy as np

_CHUNK_BYTES = 1 << 20
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def below_zero(extents: Sequence[Extent], open_file: Callable[[str], BinaryIO]) -> list[str]:
    """Names of the merged variances that are below zero somewhere.

    Args:
        extents: The output in order.
        open_file: Opens a file of the output.

    Raises:
        OSError: If the output cannot be read.
    """
    found: dict[str, None] = {}
    for extent in extents:
        offset = extent.sources[0].offset
        for name, _, numel, signature, _ in extent.slices:
            end = offset + numel * FLOAT_SIZES[signature.result]
            if is_variance(name):
                with open_file(extent.path) as file:
                    if any((values < 0).any() for values in _values(file, offset, end, signature.result)):
                        found[name] = None
            offset = end
    return list(found)


def _values(file: BinaryIO, begin: int, end: int, dtype: str) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the numbers of a tensor in chunks."""
    import numpy as np

    file.seek(begin)
    for start in range(begin, end, _CHUNK_BYTES):
        values = np.frombuffer(file.read(min(_CHUNK_BYTES, end - start)), _NUMPY[dtype])
        yield (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values
