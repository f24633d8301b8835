"""NegMerge of one F32 tensor in plain PyTorch, as fast as it can be written: in blocks that stay in the cache, with the same few
buffers, and a block on each thread, which do not wait for each other after every operation.

It imports nothing of this package, so that it runs in the environments of other tools.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

BLOCK = 1 << 18


class Formula:
    """The formula in place. All differences have one sign if the least of them, each times the first one's sign, is above zero."""

    def __init__(self, scale: float) -> None:
        self.scale, self.local = scale, threading.local()
        self.pool = ThreadPoolExecutor(torch.get_num_threads())

    def __call__(self, base: torch.Tensor, models: Sequence[torch.Tensor]) -> None:
        for _ in self.pool.map(self.merge, *(tensor.view(-1).split(BLOCK) for tensor in (base, *models))):
            pass

    def merge(self, base: torch.Tensor, *models: torch.Tensor) -> None:
        """Merge tensors of at most BLOCK elements on this thread alone."""
        if not hasattr(self.local, "buffers"):
            torch.set_num_threads(1)  # of this thread
            self.local.buffers = torch.empty(4, BLOCK)
        total, sign, least, difference = self.local.buffers[:, : len(base)]
        torch.sub(models[0], base, out=total)
        torch.sign(total, out=sign)
        torch.abs(total, out=least)
        for x in models[1:]:
            total.add_(torch.sub(x, base, out=difference))
            torch.minimum(least, difference.mul_(sign), out=least)
        total.div_(float(len(models))).mul_(-self.scale).add_(base)
        torch.where(least > 0, total, base, out=base)


def compiled(scale: float) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], None]:
    """The formula as one loop under torch.compile, for tensors of any size."""

    @torch.compile(dynamic=True)
    def fused(base: torch.Tensor, models: list[torch.Tensor]) -> None:
        total = models[0] - base
        sign, least = torch.where(total > 0, 1.0, -1.0), total.abs()
        for x in models[1:]:
            difference = x - base
            total = total + difference
            least = torch.minimum(least, difference * sign)
        base.copy_(torch.where(least > 0, base + -scale * (total / len(models)), base))

    return lambda base, models: fused(base.view(-1), [x.view(-1) for x in models])


def arguments(description: str | None, **flags: str) -> argparse.Namespace:
    """Those that all scripts take: --scale S OUT BASE MODEL..., and flags by their help."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--scale", type=float, required=True)
    for flag, text in flags.items():
        options.add_argument(f"--{flag}", action="store_true", help=text)
    options.add_argument("out", type=Path)
    options.add_argument("base", type=Path)
    options.add_argument("models", type=Path, nargs="+")
    return options.parse_args()


def weights(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))
