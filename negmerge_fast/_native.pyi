"""csrc/bindings.cpp: addresses and sizes as integers. Storage types are numbered as in csrc/batch.h."""

instruction_sets: list[str]
cuda: bool
cuda_tile: int

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
def merge_cuda(
    result: int,
    dtypes: bytes,
    task_vectors: bool,
    scale: float,
    required: int,
    segments: int,
    memory: int,
    counts: int,
    tiles: int,
    max_blocks: int,
    device: int,
    stream: int,
) -> None: ...
