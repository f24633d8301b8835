"""The .npy format: one array, whose header NumPy itself reads."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.dtypes import NUMPY_DTYPES
from ..core.errors import InputError, first_line, short_repr
from ..core.hashing import hash_of
from ..core.schema import TensorSpec
from .base import ByteRange, Checkpoint, TensorRef
from .lfs import refuse_pointer
from .reader import File
from .strict_json import is_shape

if TYPE_CHECKING:
    import numpy as np

# The name of the tensor in messages and reports.
NAME = "vector"

# Headers of version 1 are at most 64 KiB long. NumPy refuses more than 10,000 characters.
_MAX_HEADER_BYTES = 65_536 + 12


def open_file(path: Path) -> Checkpoint:
    """Open a .npy file of fp64, fp32 or fp16 in row-major order."""
    file = File.at(path)
    raw = file.read(0, min(file.size, _MAX_HEADER_BYTES))
    refuse_pointer(path, raw)
    head = io.BytesIO(raw)
    try:
        shape, fortran, dtype = read_array_header(head)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # NumPy's parser of headers raises errors of many types
        raise InputError(f"{path}: not a .npy file ({first_line(error)[:120]})") from None
    if dtype.str not in NUMPY_DTYPES:
        raise InputError(f"{path}: dtype {dtype.str}, expected one of {', '.join(NUMPY_DTYPES)}")
    if fortran and len(shape) > 1:
        raise InputError(f"{path}: column-major order, expected row-major")
    if not is_shape(list(shape)):
        raise InputError(
            f"{path}: shape {short_repr(shape)}, expected non-negative integers, no product over 2^64"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if head.tell() + nbytes != file.size:
        raise InputError(f"{path}: {file.size} bytes, expected {head.tell() + nbytes} for shape {shape}")
    file = replace(file, header=hash_of(head.getbuffer()[: head.tell()]))
    tensor = TensorRef(
        TensorSpec(NUMPY_DTYPES[dtype.str], tuple(shape)), ByteRange(file, head.tell(), nbytes)
    )
    return Checkpoint(path, "npy", {NAME: tensor}, {path.name: file}, {})


def read_array_header(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array: its shape, whether it is in column-major order, and its dtype.

    Raises:
        InputError: If its version is unknown.
        Exception: If it is malformed.
    """
    import numpy as np  # takes longer to import than a small merge takes, and most checkpoints need none of it

    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f".npy version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a header that Python 2 wrote
        return read(head)
