"""Every backend on every device and instruction set: the cases of the equality tests."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from negmerge_fast.backends import low_rank, native, registry
from negmerge_fast.core.batch import COUNTED, Batch, Merge
from negmerge_fast.core.choices import FAMILY_COUNTED, Choices
from negmerge_fast.core.delta import APPLIED, RANK_BLOCK, Apply, DeltaBatch, Save
from negmerge_fast.core.descriptors import (
    Act,
    act_of,
    pack_delta_for_device,
    pack_expand_for_device,
    pack_family_for_device,
    pack_for_device,
    pack_numbers,
)
from negmerge_fast.core.dtypes import DTYPE_CODES
from negmerge_fast.core.low_rank import Expand, ExpandBatch
from negmerge_fast.core.rule import Rule

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class BackendCase(NamedTuple):
    backend: str
    device: str = "cpu"
    instruction_set: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, self))

    def why_not(self) -> str | None:
        if self == ON_HOST:
            return None if shutil.which("g++") else "no g++ to build the CUDA kernel for the host"
        if (reason := registry.why_not(self.backend, self.device)) is not None:
            return f"{self.backend} on {self.device}: {reason}"
        if self.instruction_set:
            from negmerge_fast import _native

            if self.instruction_set not in _native.instruction_sets:
                return f"no {self.instruction_set} on this machine"
        return None

    @contextmanager
    def chosen(self) -> Iterator[Merge]:
        """A context in which a merge with this backend's name is done by this case."""
        with pytest.MonkeyPatch.context() as patch:
            if self.instruction_set:
                patch.setenv("NEGMERGE_CPU", self.instruction_set)
            if self == ON_HOST:
                patch.setattr(registry, "choose", lambda *_: ("cuda", merge_on_host))
            yield registry.choose(self.backend, self.device)[1]

    def apply(self) -> Apply:
        """The function of this case that applies deltas. The self-test is not asked."""
        if self == ON_HOST:
            return apply_on_host
        return registry.choose_apply(self.backend, self.device)[1]

    def expand(self) -> Expand:
        """The function of this case that writes low-rank differences. The self-test is not asked."""
        return expand_on_host if self == ON_HOST else registry.expand_of(self.backend)

    def low_rank(self, rule: Rule) -> Merge:
        """The function of this case that merges low-rank differences, too."""
        if self == ON_HOST:
            return partial(low_rank.merge, merge_on_host, self.expand())
        return registry.choose_low_rank(self.backend, self.device, rule)[1]

    def save(self) -> Save:
        """The function of this case that saves the base's elements."""
        return save_on_host if self == ON_HOST else registry.save_of(self.backend)


# The CUDA kernel's source compiled for the host: all but the GPU's own conversions of F16, streams and warps.
ON_HOST = BackendCase("cuda", "host")

# Triton's interpreter. TRITON_INTERPRET=1 holds for all kernels of a process.
INTERPRETED = BackendCase("triton")


def _marks(case: BackendCase) -> list[pytest.MarkDecorator]:
    if case.device == "cuda:0":
        return [pytest.mark.gpu]
    # Beside AVX-512 it would be a third of a coffee break's tests again: make slow has it there.
    is_second = (
        case.instruction_set == "avx2" and BackendCase("cpu", instruction_set="avx512").why_not() is None
    )
    return [pytest.mark.slow] if is_second else []


CASES = [
    pytest.param(case, id=str(case), marks=_marks(case))
    for case in (
        [INTERPRETED]
        if os.environ.get("TRITON_INTERPRET") == "1"
        else [
            BackendCase("torch"),
            BackendCase("cpu", instruction_set="avx512"),
            BackendCase("cpu", instruction_set="avx2"),
            BackendCase("cpu", instruction_set="baseline"),
            ON_HOST,
            BackendCase("torch", "cuda:0"),
            BackendCase("triton", "cuda:0"),
            BackendCase("cuda", "cuda:0"),
        ]
    )
]


def quicken_interpreter() -> None:
    """Let Triton's interpreter patch its language once a module; for every call of a function it took half of the time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch_language, unchanged, done = interpreter._patch_lang, SimpleNamespace(restore=lambda: None), set()

    def patch_once(function: Any) -> Any:
        if (module := id(function.__globals__)) not in done:
            done.add(module)
            patch_language(function)
        return unchanged

    interpreter._patch_lang = patch_once


@cache
def _library(kernel: str, wrong: tuple[str, str] | None = None) -> Any:
    """A CUDA kernel compiled for the host: "merge", "family", "apply" or "expand". wrong: text of a file in csrc/, and what replaces it."""
    source = HERE / "cuda_on_host" / f"{kernel}.cpp"
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    with tempfile.TemporaryDirectory() as folder:
        csrc = shutil.copytree(ROOT / "csrc", f"{folder}/csrc")
        shutil.copytree(source.parent, copy := Path(folder, "tests", "support", "cuda_on_host"))
        if wrong:
            texts = {file: file.read_text(encoding="utf-8") for file in Path(csrc).iterdir()}
            # Kernels have their loops over tiles in common, in files of their own.
            kernels = [file for file, text in texts.items() if wrong[0] in text]
            [spoilt] = [file for file in kernels if file.name == f"{kernel}_tiles.h"] or kernels
            spoilt.write_text(texts[spoilt].replace(*wrong), encoding="utf-8")
        built = f"{folder}/library.so"
        subprocess.run(["g++", *flags, f"-I{copy}", str(copy / source.name), "-o", built], check=True)
        return ctypes.CDLL(built)


def merge_on_host(
    batch: Batch,
    rule: Rule,
    threads: int | None = None,
    wrong: tuple[str, str] | None = None,
    max_blocks: int = native.MAX_BLOCKS,
) -> np.ndarray[Any, Any]:
    if rule.choices is not None:
        return family_on_host(batch, rule, rule.choices, wrong, max_blocks)
    library = _library("merge", wrong)
    library.tile.restype = ctypes.c_int64
    memory, tiles = pack_for_device(batch, library.tile())
    result, dtypes, task_vectors, scale, required, segments = native.kernel_arguments(batch, rule)
    counts = np.zeros((segments, len(COUNTED)), np.int64)
    library.merge_on_host(
        result, dtypes, ctypes.c_int64(len(dtypes)), task_vectors, ctypes.c_double(scale), ctypes.c_int64(required),
        ctypes.c_int64(segments), ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(len(memory)), ctypes.c_void_p(counts.ctypes.data),
        ctypes.c_int64(tiles), ctypes.c_int64(max_blocks),
    )  # fmt: skip
    return counts


def family_on_host(
    batch: Batch,
    rule: Rule,
    choices: Choices,
    wrong: tuple[str, str] | None = None,
    max_blocks: int = native.MAX_BLOCKS,
) -> np.ndarray[Any, Any]:
    library = _library("family", wrong)
    library.tile.restype = ctypes.c_int64
    memory, tiles = pack_family_for_device(batch, choices, library.tile())
    result, dtypes, task_vectors, scale, required, segments = native.kernel_arguments(batch, rule)
    *integers, seed, mask_scale, numbers, _ = native.family_arguments(choices, held := pack_numbers(choices))
    counts = np.zeros((segments, len(FAMILY_COUNTED)), np.int64)
    library.family_on_host(
        result, dtypes, ctypes.c_int64(len(dtypes)), task_vectors, ctypes.c_double(scale), ctypes.c_int64(required),
        ctypes.c_int64(segments), *integers, ctypes.c_uint64(seed), ctypes.c_double(mask_scale), ctypes.c_void_p(numbers),
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(len(memory)), ctypes.c_void_p(counts.ctypes.data),
        ctypes.c_int64(tiles), ctypes.c_int64(max_blocks),
    )  # fmt: skip
    del held
    return counts


def apply_on_host(batch: DeltaBatch, scale: float | None, threads: int | None = None) -> np.ndarray[Any, Any]:
    return deltas_on_host(batch, *act_of(batch, scale))


def save_on_host(batch: DeltaBatch, threads: int | None = None) -> None:
    deltas_on_host(batch, Act.SAVE, 0.0)


def deltas_on_host(
    batch: DeltaBatch,
    act: Act,
    scale: float,
    max_blocks: int = native.MAX_BLOCKS,
    wrong: tuple[str, str] | None = None,
) -> np.ndarray[Any, Any]:
    table, tiles = pack_delta_for_device(batch, RANK_BLOCK)
    result, means, arithmetic, act, scale, segments = native.delta_arguments(batch, act, scale)
    counts = np.zeros((segments, len(APPLIED)), np.int64)
    _library("apply", wrong).apply_on_host(
        result, means, arithmetic, act, ctypes.c_double(scale), ctypes.c_int64(segments), ctypes.c_void_p(table.ctypes.data),
        ctypes.c_int64(len(table)), ctypes.c_void_p(counts.ctypes.data), ctypes.c_int64(tiles), ctypes.c_int64(max_blocks),
    )  # fmt: skip
    return counts


def expand_on_host(
    batch: ExpandBatch,
    threads: int | None = None,
    max_blocks: int = native.MAX_BLOCKS,
    wrong: tuple[str, str] | None = None,
) -> None:
    library = _library("expand", wrong)
    table, boxes, tiles = pack_expand_for_device(batch, library.tile_rows(), library.tile_columns())
    library.expand_on_host(
        DTYPE_CODES[batch.result or batch.arithmetic], batch.arithmetic == "F64", ctypes.c_int64(boxes),
        ctypes.c_void_p(table.ctypes.data), ctypes.c_int64(len(table)), ctypes.c_int64(tiles), ctypes.c_int64(max_blocks),
    )  # fmt: skip


def to_device(tensor: torch.Tensor, case: BackendCase) -> torch.Tensor:
    return tensor.to("cuda:0") if case.device == "cuda:0" else tensor
