"""csrc/bindings.cpp: addresses and sizes as integers. Storage types are numbered as in csrc/batch.h."""

from typing import TypeAlias

instruction_sets: list[str]
cuda: bool
cuda_tile: int
cuda_table: int
expand_tile: tuple[int, int]

# Gate, election, reduction, seed, λ of the masks, and the addresses of numbers and terms.
FamilyArguments: TypeAlias = tuple[int, int, int, int, float, int, int]

def merge_cpu(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    scale: float,
    required: int,
    segments: int,
    descriptors: int,
    counts: int,
    threads: int,
    instruction_set: str,
) -> None: ...
def merge_family_cpu(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    scale: float,
    required: int,
    segments: int,
    descriptors: int,
    counts: int,
    family: FamilyArguments,
    expansions: int,
    consensus: bool,
    threads: int,
    instruction_set: str,
) -> None: ...
def merge_cuda(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    scale: float,
    required: int,
    segments: int,
    table: int,
    words: int,
    counts: int,
    tiles: int,
    max_blocks: int,
    device: int,
    stream: int,
) -> None: ...
def family_cuda(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    scale: float,
    required: int,
    segments: int,
    family: FamilyArguments,
    table: int,
    words: int,
    counts: int,
    tiles: int,
    max_blocks: int,
    device: int,
    stream: int,
) -> None: ...
def count_prefixes(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    segments: int,
    descriptors: int,
    counts: int,
    edges: int,
    edge_count: int,
    instruction_set: str,
) -> None: ...
def apply_cuda(
    result: int,
    means: int,
    arithmetic: int,
    act: int,
    scale: float,
    segments: int,
    table: int,
    words: int,
    counts: int,
    tiles: int,
    max_blocks: int,
    device: int,
    stream: int,
) -> None: ...
def expand_cuda(
    result: int,
    arithmetic: int,
    boxes: int,
    table: int,
    words: int,
    counts: int,
    tiles: int,
    max_blocks: int,
    device: int,
    stream: int,
) -> None: ...
def measure_magnitudes(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    segments: int,
    descriptors: int,
    edges: int,
    counts: int,
    found: int,
    instruction_set: str,
) -> None: ...
def read_ranges(sources: int, count: int) -> bool: ...

class Turn: ...

def merge_chunk(
    sources: int,
    count: int,
    arguments: list[tuple[int, bytes, bool, float, int, int, int, int, int, FamilyArguments | None]],
    instruction_set: str,
    descriptor: int,
    offset: int,
    fetch: bool,
    release: bool,
    refuse_nonfinite: bool,
    turn: Turn | None,
) -> tuple[int, int, bool, tuple[float, float, float, float]]: ...
