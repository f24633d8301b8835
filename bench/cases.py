"""Cases of the suite: which candidates are timed, on which workloads, and of which size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from negmerge_fast.benchmark.bandwidth import IN_MEMORY
from negmerge_fast.benchmark.candidates import BASELINES, IN_PLACE, MAX_AUTOTUNE, ONE_GRAPH, PUBLIC
from negmerge_fast.benchmark.records import on_gpu
from negmerge_fast.benchmark.shapes import LAYOUTS, Shapes, one_tensor
from negmerge_fast.core.dtypes import FLOAT_SIZES

GPU, CPU = "cuda:0", "cpu"
OURS = {GPU: ("cuda", "triton", "torch"), CPU: ("cpu", "torch")}
ONE = "one tensor"


@dataclass(frozen=True)
class Case:
    """A candidate on a workload. shapes: None for rooflines and files. usual: whether it is measured without --all."""

    suite: str
    device: str
    candidate: str
    layout: str = ""
    shapes: Shapes | None = None
    dtype: str = ""
    n: int = 0
    state: str = "in memory"
    usual: bool = True

    def __str__(self) -> str:
        numel = f"{self.n}x{self.shapes['weight'][0]}" if self.layout == ONE and self.shapes else f"n{self.n}"
        workload = (self.layout, self.dtype, numel) if self.n else ()
        parts = ("gpu" if on_gpu(self.device) else "cpu", *workload, self.state, self.candidate)
        text = "-".join(part for part in parts if part not in ("", "in memory"))
        return "".join(c for c in text.replace(" ", "_") if c not in ",()/")

    @property
    def baseline(self) -> bool:
        return self.candidate in BASELINES


@dataclass(frozen=True)
class Size:
    """The size of all cases.

    Attributes:
        bytes: Bytes of all versions of one tensor together, by device.
        small: Elements of the smaller tensors.
        seconds: How long the rounds of a case take, roughly.
        shrink: The divisor of the dimensions of layouts.
        file_elements: Elements of one version in files.
        limit_bytes: Bytes that a roofline moves.
        rotate: Whether a workload rotates over copies, see Workload.
    """

    bytes: dict[str, int]
    small: tuple[int, ...]
    seconds: float
    shrink: int
    file_elements: int
    limit_bytes: int
    rotate: bool


SIZES = {
    "usual": Size(
        {GPU: 2 << 30, CPU: 400_000_000}, (4096, 65_536, 1 << 20, 1 << 22), 0.6, 1, 1 << 25, 512 << 20, True
    ),
    # For tests of the suite. Its rows are no measurements.
    "tiny": Size({GPU: 1 << 20, CPU: 1 << 20}, (4096,), 0.0, 64, 1 << 14, 1 << 20, False),
}


def rooflines() -> Iterator[Case]:
    for device in (GPU, CPU):
        for candidate in IN_MEMORY["cuda" if on_gpu(device) else "cpu"]:
            yield Case("limits", device, candidate)
    for state in ("cold", "warm"):
        yield Case("limits", CPU, "disk read", state=state)


def memory(size: Size) -> Iterator[Case]:
    """One tensor: every backend, dtype, number of models and size, and baselines at n = 8. Cases of one workload come together."""
    for device, names in OURS.items():
        ours = [
            name + place for name in names for place in ("", IN_PLACE) if (name, place) != ("torch", IN_PLACE)
        ]
        for dtype, width in FLOAT_SIZES.items():
            for n in (1, 2, 3, 4, 8, 16, 32, 64):
                numel = max(4096, size.bytes[device] // (n + 2) // width // 4096 * 4096)
                case = Case("memory", device, "", ONE, one_tensor(numel), dtype, n, usual=n in (2, 8, 32))
                for candidate in ours:
                    yield replace(case, candidate=candidate)
                for candidate in BASELINES if n == 8 else ():
                    if candidate == ONE_GRAPH:  # of one tensor it is the same
                        continue
                    yield replace(case, candidate=candidate, usual=on_gpu(device) or dtype != "F64")
                for small in size.small if n == 8 else ():
                    for name in names:
                        yield replace(case, candidate=name, shapes=one_tensor(small))


# Usual dtypes and numbers of models, by layout and device: they fit a common machine and take seconds.
_USUAL = {
    "2,000 tensors": {GPU: (("F32", 8), ("BF16", 8)), CPU: (("F32", 8), ("BF16", 8))},
    "2,000 large tensors": {GPU: (("BF16", 8),), CPU: ()},
    "ViT-B/32": {GPU: (("F32", 8), ("BF16", 8)), CPU: (("F32", 2),)},
    "Llama 1B": {GPU: (("BF16", 8),), CPU: (("BF16", 2),)},
    "Llama 8B": {GPU: (("BF16", 2),), CPU: (("BF16", 2),)},
}


def layouts(size: Size) -> Iterator[Case]:
    for device, names in OURS.items():
        for layout, make in LAYOUTS.items():
            shapes = {
                name: tuple(max(1, length // size.shrink) for length in shape)
                for name, shape in make().items()
            }
            for dtype in ("F32", "BF16", "F16"):
                for n in (2, 8, 32):
                    usual = (dtype, n) in _USUAL[layout][device]
                    case = Case("layouts", device, "", layout, shapes, dtype, n, usual=usual)
                    for candidate in (*names, PUBLIC):
                        long = candidate == "torch" and layout.startswith("Llama") and device == CPU
                        yield replace(case, candidate=candidate, usual=usual and not long)
                    for candidate in BASELINES:
                        # max-autotune finds nothing else than for one tensor; a graph of 18,000 inputs takes hours.
                        if candidate == MAX_AUTOTUNE or (
                            candidate == ONE_GRAPH and layout.startswith("2,000")
                        ):
                            continue
                        long = candidate == ONE_GRAPH and layout == "Llama 8B"
                        yield replace(case, candidate=candidate, usual=usual and not long)


PLAIN = "lazy files, formula, save_file"


def files() -> Iterator[Case]:
    for device, names in OURS.items():
        for state in ("warm", "cold"):
            case = Case("files", device, "", "16 tensors in files", None, "F32", 8, state)
            for candidate in names if device == CPU else [name for name in names if name != "torch"]:
                yield replace(case, candidate=candidate)
            if device == CPU:
                yield replace(case, candidate=PLAIN, usual=state == "warm")


def cases(suite: str, size: Size) -> Iterator[Case]:
    makers: dict[str, Any] = {"memory": lambda: memory(size), "layouts": lambda: layouts(size)}
    return makers.get(suite, {"limits": rooflines, "files": files}.get(suite))()
