"""Launch parameters of the CUDA and of the Triton kernel, measured on a GPU.

Each choice for CUDA is csrc/merge_cuda.cu compiled with other constants; those for Triton are the candidates of
kernels/launch.py. All choices take turns on the same memory, by device events: a device copy of as many bytes, the limit,
and behind it the merge, from the table's upload to the counts. Bytes counted: (n + 2) · numel · size. A choice has a speed
only where it gives the reference's bits, on hostile numbers and on all that is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rows import percentiles, record

import negmerge_fast as nm
from negmerge_fast import backends, native, trust
from negmerge_fast.measure.rows import device_name
from negmerge_fast.rule import FLOAT_SIZES, Batch, Merge, Rule, Segment, Signature, Stream
from negmerge_fast.table import device_memory, upload

SOURCE = Path(__file__).with_name("tune_gpu.cu")
RULE = Rule(0.9)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
FLUSHED = 256 << 20  # bytes that are zeroed before each turn

# For Triton, those for which all groups differ; each candidate is compiled once for each number.
MODELS = {"cuda": (2, 8, 32), "triton": (8, 32)}

# Each compiles for sm_90 without local memory; 512 threads or 32 bytes of the base do not.
CUDA = {
    "as built": [],
    "blocks of 64 threads": ["THREADS=64"],
    "blocks of 128 threads": ["THREADS=128"],
    "blocks of 128 threads, tiles of 2,048": ["THREADS=128", "TILE=2048"],
    "tiles of 2,048": ["TILE=2048"],
    "tiles of 8,192": ["TILE=8192"],
    "tiles of 16,384": ["TILE=16384"],
    "4 models at once": ["GROUP=4"],
    "16 models of 256 bytes at once": ["GROUP=16", "GROUP_BYTES=256"],
    "64 bytes at once": ["GROUP_BYTES=64"],
    "256 bytes at once": ["GROUP_BYTES=256"],
    "8 bytes of the base": ["BASE_BYTES=8"],
}


def compiler(device: str) -> list[str]:
    """The command that makes a library of SOURCE for a device: as csrc/CMakeLists.txt has it, for one architecture."""
    major, minor = torch.cuda.get_device_capability(device)
    host = "-Xcompiler=-fPIC,-ffp-contract=off,-fno-fast-math"
    code = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    return [
        os.environ.get("CUDACXX", "nvcc"),
        "-O3",
        "--fmad=false",
        code,
        host,
        "-cudart=static",
        "-Xlinker=-Bsymbolic",
    ]


def why_no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this torch is not one for CUDA"
    return None if shutil.which(os.environ.get("CUDACXX", "nvcc")) else "no nvcc on PATH or in CUDACXX"


class Built:
    """The CUDA kernel with constants of its own."""

    def __init__(self, command: list[str], library: str, constants: Iterable[str]) -> None:
        flags = [f"-DNEGMERGE_CUDA_{constant}" for constant in constants]
        arguments = [*command, "-std=c++17", "-shared", *flags, str(SOURCE), "-o", library]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
            raise RuntimeError((errors or [f"{command[0]} ended with exit status {done.returncode}"])[0])
        loaded = ctypes.CDLL(library)
        loaded.tile.restype = ctypes.c_int64
        self.tile = loaded.tile()
        self.function = loaded.merge_launch
        long, address = ctypes.c_int64, ctypes.c_void_p
        self.function.argtypes = [
            ctypes.c_int, ctypes.c_char_p, long, ctypes.c_bool, ctypes.c_double, long, long, address, address,
            long, ctypes.c_int, ctypes.c_uint64,
        ]  # fmt: skip
        self.function.restype = ctypes.c_char_p

    def merge(self, batch: Batch, rule: Rule, threads: int | None = None) -> torch.Tensor:
        """What native.merge_cuda does."""
        memory, tiles = device_memory(batch, self.tile)
        there = upload(memory, batch.device)
        counts = torch.zeros(len(batch.segments), 2, dtype=torch.int64, device=batch.device)
        result, dtypes, *others = native._signature(batch, rule)
        index = torch.device(batch.device).index or 0
        why = self.function(
            result, dtypes, len(dtypes), *others, there.data_ptr(), counts.data_ptr(), tiles, index, stream()
        )
        if why:
            raise RuntimeError(why.decode())
        return counts


def cuda_ways(device: str, folder: str) -> dict[str, Merge]:
    """The kernel with each choice of constants."""
    command = compiler(device)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = [
            pool.submit(Built, command, f"{folder}/{number}.so", constants)
            for number, constants in enumerate(CUDA.values())
        ]
    return {f"cuda, {way}": found.result().merge for way, found in zip(CUDA, libraries, strict=True)}


def triton_ways(signature: Signature) -> tuple[dict[str, Merge], dict[str, Any]]:
    """The kernel with each of its candidates, the usual one first; and the candidates."""
    from negmerge_fast.kernels.launch import candidates
    from negmerge_fast.kernels.merge import launch_merge

    def way(launch: Any) -> Merge:
        return lambda batch, rule, threads=None: launch_merge(batch, rule, launch)

    launches = {
        f"triton, {launch.elements} x {launch.threads} elements, {launch.group} models at once": launch
        for launch in candidates(signature, unanimous=True)
    }
    return {name: way(launch) for name, launch in launches.items()}, launches


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def mark() -> Any:
    """A moment on the device, when it has done all that it was given until now."""
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds(began: Any, ended: Any) -> float:
    return float(began.elapsed_time(ended)) / 1e3


class Work:
    """One tensor: a base, n fine-tuned versions most of which lean to one side, an output; and what should come out."""

    def __init__(self, device: str, dtype: str, n: int, total: int) -> None:
        self.device, self.dtype, self.n = device, dtype, n
        size = FLOAT_SIZES[dtype]
        self.numel = total // (n + 2) // size // 4096 * 4096
        self.bytes = (n + 2) * self.numel * size
        generator = torch.Generator(device).manual_seed(0)

        def random() -> torch.Tensor:
            return torch.empty(self.numel, dtype=DTYPES[dtype], device=device).normal_(generator=generator)

        base, lean = random(), random()
        models = [random().mul_(0.3).add_(lean).mul_(0.1).add_(base) for _ in range(n)]
        self.out = torch.empty_like(base)
        self.expected = nm.merge(base, models, scale=RULE.scale, backend="torch")
        first, *others, last = [Stream(t.data_ptr(), dtype, t) for t in (base, *models, self.out)]
        self.signature = Signature(dtype, (dtype,) * n, False)
        self.batch = Batch(device, self.signature, [Segment(self.numel, first, others, last)])
        # What the limit copies, and what is zeroed.
        self.source, self.target, self.flushed = (
            torch.zeros(length, dtype=torch.uint8, device=device)
            for length in (self.bytes // 2, self.bytes // 2, FLUSHED)
        )

    def wrong(self, way: str, merge: Merge) -> str | None:
        """Why a way gets no speed; None if it gives the reference's bits."""
        if (reason := trust.distrust(way, merge, self.device, self.signature, RULE)) is not None:
            return reason
        self.out.view(torch.uint8).fill_(0xA5)
        merge(self.batch, RULE)
        bits = BITS[self.out.itemsize]
        count = int((self.out.view(bits) != self.expected.view(bits)).sum())
        return f"{count:,} elements differ from the reference's" if count else None

    def measure(self, ways: dict[str, Merge], rounds: int) -> list[dict[str, Any]]:
        """A row for each way that is right."""
        right = {}
        for way, merge in ways.items():
            if (reason := self.wrong(way, merge)) is None:
                right[way] = merge
            else:
                print(f"{way}, {self.dtype}, n = {self.n}: no speed, {reason}")
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in right}
        for _ in range(rounds):
            for way, merge in right.items():
                self.flushed.zero_()  # meanwhile the host gives the device what is timed
                marks = [mark()]
                self.target.copy_(self.source)
                marks.append(mark())
                merge(self.batch, RULE)
                marks.append(mark())
                torch.cuda.synchronize()
                taken[way].append((seconds(*marks[:2]), seconds(*marks[1:])))
        return [self.row(way, *zip(*pairs, strict=True)) for way, pairs in taken.items()]

    def row(self, way: str, copies: tuple[float, ...], merges: tuple[float, ...]) -> dict[str, Any]:
        spread = percentiles(merges)
        return {
            "suite": "tune", "layout": "one tensor", "way": way, "dtype": self.dtype, "n": self.n,
            "numel": self.numel, "bytes": self.bytes, "state": "in memory", "rounds": len(merges), **spread,
            "GB/s": self.bytes / spread["p50"] / 1e9, "limit": "device copy",
            "limit GB/s": self.bytes / statistics.median(copies) / 1e9,
            "of_limit": statistics.median(c / m for c, m in zip(copies, merges, strict=True)), "differing": 0,
        }  # fmt: skip


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each way that was measured wherever the others were: its share of the limit, the geometric mean of all rows."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["way"], []).append(row["of_limit"])
    most = max(map(len, found.values()), default=0)
    return {way: statistics.geometric_mean(each) for way, each in found.items() if len(each) == most}


def winner(rows: list[dict[str, Any]], usual: str) -> tuple[str, str] | None:
    """The way with the largest share, and a line that holds it against the usual one."""
    if not (found := shares(rows)):
        return None
    best = max(found, key=lambda way: found[way])
    beside = f"{found[usual]:.3f}" if usual in found else "no speed"
    return best, f"{best}: {found[best]:.3f} of a device copy; {usual}: {beside}"


def measure(
    device: str, dtype: str, n: int, cuda: dict[str, Merge], triton: bool, total: int, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all ways for one work, and Triton's candidates among the ways."""
    work = Work(device, dtype, n, total)
    ways = dict(cuda) if n in MODELS["cuda"] else {}
    launches: dict[str, Any] = {}
    if triton and n in MODELS["triton"]:
        more, launches = triton_ways(work.signature)
        ways |= more
    rows = work.measure(ways, rounds)
    print(f"{dtype}, n = {n}: {len(rows)} of {len(ways)} ways measured", flush=True)
    return rows, launches


def tune(device: str, cuda: dict[str, Merge], triton: bool, total: int, rounds: int) -> list[str]:
    """Measures, appends the rows, and returns the winners and the lines for kernels/launch.py."""
    said, found, of_cuda = [], [], []
    for dtype in DTYPES:
        rows: list[dict[str, Any]] = []
        launches: dict[str, Any] = {}
        for n in sorted({*(MODELS["cuda"] if cuda else ()), *(MODELS["triton"] if triton else ())}):
            try:
                more, candidates = measure(device, dtype, n, cuda, triton, total, rounds)
            except torch.cuda.OutOfMemoryError:
                print(f"{dtype}, n = {n}: out of memory")
                continue
            rows += more
            launches |= candidates
        record("tune_gpu.jsonl", rows, device)
        mine = [row for row in rows if row["way"] in cuda]
        of_cuda += mine
        if best := winner(mine, "cuda, as built"):
            said.append(f"{dtype}: {best[1]}")
        if launches and (best := winner([r for r in rows if r["way"] in launches], next(iter(launches)))):
            said.append(f"{dtype}: {best[1]}")
            key = device_name(device), dtype, dtype, True
            found.append(f"    {key!r}: {launches[best[0]]!r},  # for FOUND in kernels/launch.py")
    if best := winner(of_cuda, "cuda, as built"):
        said.append(f"all types: {best[1]}")
    return said + found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--bytes", type=int, default=1 << 30, help="read and written by a merge")
    options.add_argument("--rounds", type=int, default=30)
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("tune_gpu: torch finds no GPU here, nothing was measured")
        return
    torch.cuda.set_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Merge] = {}
        if (reason := why_no_cuda()) is None:
            try:
                ways = cuda_ways(given.device, folder)
            except (OSError, RuntimeError) as error:
                reason = str(error)
        if reason is not None:
            print(f"cuda: {reason}")
        if (no_triton := backends.why_not("triton", given.device)) is not None:
            print(f"triton: {no_triton}")
        if ways or no_triton is None:
            print("\n".join(tune(given.device, ways, no_triton is None, given.bytes, given.rounds)))


if __name__ == "__main__":
    main()
