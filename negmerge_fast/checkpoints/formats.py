"""Opening checkpoints of all formats, without reading their weights.

There is one module per format. No file is trusted: every length, offset and name is checked before it is used.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..core.errors import InputError
from . import huggingface, npy, safetensors
from .base import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face directory, a .safetensors file or a .npy vector.

    Raises:
        InputError: If something is missing or malformed; the line names the file.
    """
    path = Path(path)
    try:
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or with a NUL
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if is_directory:
        return huggingface.open_directory(path)
    if path.suffix == ".safetensors":
        return safetensors.open_file(path)
    if path.suffix == ".npy":
        return npy.open_file(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    raise InputError(f"{path}: expected a directory, a .safetensors file or a .npy file")
