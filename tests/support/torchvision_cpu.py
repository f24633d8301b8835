"""PyPI's torchvision beside a torch for the CPU: its operators need CUDA, and without them its import fails."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # a declaration lives as long as its library


def declare_operators() -> None:
    """Declare what torchvision registers kernels of, if it cannot load them. Nothing calls them; transformers imports torchvision."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or _declared:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
