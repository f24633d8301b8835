"""Text of negmerge info: versions, devices, backends with the reason why one is not usable, and bandwidths."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from .._version import __version__
from ..backends.registry import NAMES, details, selftest, why_not
from ..streaming.placement import describe


def text() -> str:
    """Describe this machine, and what is usable on it."""
    devices, lines = ["cpu"], list(_versions())
    try:
        import torch

        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        lines.append(f"threads {torch.get_num_threads()}")
    except ImportError:
        pass
    lines.append(f"devices {', '.join(devices)}")
    lines += _backends(devices)
    lines += [f"bandwidth: {line}" for line in describe(devices[1:])]
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    yield f"negmerge_fast {__version__}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in ("torch", "triton", "numpy", "safetensors"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed"


def _backends(devices: list[str]) -> Iterator[str]:
    gpus = devices[1:]
    own = {"cuda": gpus or ["cuda:0"], "triton": gpus or ["cpu"], "cpu": ["cpu"], "torch": devices}
    for name in NAMES:
        for device in own[name]:
            reason = why_not(name, device) or selftest(name, device)
            yield f"backend {name} on {device}: {'usable' if reason is None else reason}{details(name)}"
