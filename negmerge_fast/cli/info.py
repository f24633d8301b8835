"""Versions, devices, every backend and why it is or is not usable, and what the way of files costs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from .._version import __version__
from ..backends.registry import NAMES, details, self_test, why_not
from ..streaming.placement import describe


def text() -> str:
    lines = [f"negmerge_fast {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    for package in ("torch", "triton", "numpy", "safetensors"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    devices = ["cpu"]
    try:
        import torch

        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        lines.append(f"threads {torch.get_num_threads()}")
    except ImportError:
        pass
    lines.append(f"devices {', '.join(devices)}")
    for name in NAMES:
        gpus = devices[1:]
        own = {"cuda": gpus or ["cuda:0"], "triton": gpus or ["cpu"], "cpu": ["cpu"], "torch": devices}
        for device in own[name]:
            reason = why_not(name, device) or self_test(name, device)
            lines.append(
                f"backend {name} on {device}: {'usable' if reason is None else reason}{details(name)}"
            )
    lines += [f"way of files: {line}" for line in describe(devices[1:])]
    return "\n".join(lines)
