"""Opening checkpoints of all formats, without reading their weights.

There is one module per format. No file is trusted: every length, offset and name is checked before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import InputError
from . import adapters, huggingface, npy, safetensors
from .base import Checkpoint, OutputFormat
from .parts import read_config
from .reader import File
from .side_files import Globs


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    extra_files: bool = True,
) -> Checkpoint:
    """Open a Hugging Face directory, a .safetensors file, a PyTorch file, a .npy vector, or a LoRA adapter as PEFT saves it.

    Args:
        path: The directory or file.
        keep: Patterns for files of a directory to copy that would be skipped, such as weights in another format.
        drop: Patterns for files of a directory to skip that would be copied.
        extra_files: Whether to look for the files beside the weights. Of fine-tuned models none is needed.

    Raises:
        InputError: If something is missing or malformed; the line names the file.
    """
    path = Path(path)
    try:
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or with a NUL
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if is_directory and adapters.is_adapter_directory(path):
        return adapters.open_directory(path)
    if is_directory:
        return huggingface.open_directory(path, keep, drop, extra_files)
    if extra_files:
        for option, patterns in (("--keep", keep), ("--drop", drop)):
            Globs(option, patterns).refuse_unmatched(path)
    if (path.suffix == ".safetensors" or path.name.startswith("adapter_model.")) and adapters.is_adapter_file(
        path
    ):
        return adapters.open_file(path)
    if path.suffix == ".safetensors":
        return replace(safetensors.open_file(path), configs={"": read_config(path.parent)})
    if path.suffix == ".npy":
        return npy.open_file(path)
    from . import pytorch  # slower to import than most checkpoints take
    from .distributed import refuse_training_state

    refuse_training_state(path)
    if pytorch.is_named(path) or (path.is_file() and pytorch.is_pytorch(File.at(path).read_head(16))):
        return replace(pytorch.open_file(path), configs={"": read_config(path.parent)})
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    raise InputError(f"{path}: expected a directory, a .safetensors file, a PyTorch file or a .npy file")


def translate(checkpoint: Checkpoint, wanted: OutputFormat = "auto") -> Checkpoint:
    """A checkpoint as the base of an output in a format; the same one, if the output mirrors it.

    Args:
        checkpoint: What was opened.
        wanted: The format; "auto" keeps .safetensors and .npy files, and makes .safetensors files of all others.

    Raises:
        InputError: If it cannot be written so.
    """
    suffixes = {Path(name).suffix for name in checkpoint.weights}
    if suffixes == {".npy"}:
        if wanted == "auto":
            return checkpoint
        raise InputError(f"{checkpoint.path}: a vector without names, expected --format auto")
    if wanted != "pt" and suffixes == {".safetensors"} and _is_mirrored(checkpoint):
        return checkpoint
    from .translate import translation  # most bases are mirrored

    return translation(checkpoint, "pt" if wanted == "pt" else "safetensors")


def _is_mirrored(checkpoint: Checkpoint) -> bool:
    """Whether all tensors lie in the files of the weights, as they are."""
    own = {*checkpoint.weights.values()}
    return all(tensor.source.file in own for tensor in checkpoint.tensors.values())
