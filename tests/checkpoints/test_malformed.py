"""Every malformed input is refused: status 2, one line that names it, nothing written, in bounded time and memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import Answer, Process
from malformed import HEADERS, LONG, NOT_SIZES, VECTORS, array, npy
from malformed_models import DIRECTORIES, PAIRS, PATHS, SHARD, UNREADABLE, good_model
from safetensors import safe_open

pytestmark = pytest.mark.processes

ROLES = ("base", "ft-1")
# What the library takes, and we don't.
STRICTER = {
    f"shape {NOT_SIZES[-2]}", "begins with ' {}'", r"begins with '\n{}'",
    "twice: a name", "twice: a name, escaped", "twice: a key of metadata", "twice: a key of no sense",
}  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a base and two fine-tuned versions."""
    with tempfile.TemporaryDirectory() as name:
        for model in ("base", "ft-0", "ft-1"):
            good_model(Path(name, model))
        yield Path(name)


MERGE = ("merge", "base", "ft-0", "ft-1", "--output", "out", "--scale", "0.9", "--threads", "1")


def names(folder: Path) -> list[str]:
    return sorted(str(path) for pattern in ("*", "*/*") for path in folder.glob(pattern))


def library_takes(path: Path) -> bool:
    try:
        safe_open(path, "np").__enter__()
    except Exception:  # it has its own types of errors
        return False
    return True


def refuse(
    process: Process, folder: Path, arguments: tuple[str, ...], *parts: str, user: int | None = None
) -> Answer:
    before = names(folder)
    answer = process.negmerge(folder, *arguments, user=user)
    status, out, err = answer
    assert (status, out) == (2, ""), err[-2000:]
    assert err.startswith("negmerge: ") and err.endswith("\n") and err[:-1].isprintable(), err[:2000]
    assert len(err) < 10_000
    for part in parts:
        assert part in err, err[:2000]
    assert names(folder) == before
    return answer


def test_the_corpus_is_large() -> None:
    assert len(HEADERS) + len(LONG) + len(VECTORS) + len(DIRECTORIES) + len(PAIRS) + len(PATHS) >= 400


def test_the_good_model_is_merged(process: Process, folder: Path) -> None:
    assert process.negmerge(folder, *MERGE).status == 0
    assert (folder / "out" / SHARD).read_bytes() == (folder / "base" / SHARD).read_bytes()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", HEADERS)
def test_headers(process: Process, folder: Path, role: str, case: str) -> None:
    content, message = HEADERS[case]
    path = folder / role / SHARD
    path.write_bytes(content)
    refuse(process, folder, MERGE, f"{role}/{SHARD}", message)
    if role == "base":
        assert library_takes(path) == (case in STRICTER)


@pytest.mark.parametrize("case", LONG)
def test_long_headers(process: Process, folder: Path, case: str) -> None:
    make, message = LONG[case]
    (folder / "ft-1" / SHARD).write_bytes(make())
    refuse(process, folder, MERGE, f"ft-1/{SHARD}", message)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", VECTORS)
def test_vectors(process: Process, tmp_path: Path, role: str, case: str) -> None:
    content, message = VECTORS[case]
    for name in ("base.npy", "ft-0.npy", "ft-1.npy"):
        (tmp_path / name).write_bytes(content if name.startswith(role) else npy(array()))
    arguments = ("merge", "base.npy", "ft-0.npy", "ft-1.npy", "--output", "out.npy", "--scale", "0.9")
    refuse(process, tmp_path, arguments, f"{role}.npy: ", message)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories(process: Process, folder: Path, role: str, case: str) -> None:
    spoil, message, culprit = DIRECTORIES[case]
    spoil(folder / role)
    refuse(process, folder, MERGE, f"{role}/{culprit}" if culprit else role, message)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", PATHS)
def test_paths(process: Process, folder: Path, role: str, case: str) -> None:
    spoil, message, _ = PATHS[case]
    spoil(folder / role)
    refuse(process, folder, MERGE, f"{role}: ", message)


@pytest.mark.parametrize("case", PAIRS)
def test_versions_that_do_not_fit(process: Process, folder: Path, case: str) -> None:
    spoil, message, culprit = PAIRS[case]
    spoil(folder / "ft-1")
    refuse(process, folder, MERGE, f"ft-1/{culprit}" if culprit else "ft-1", message)


@pytest.mark.parametrize(
    "name",
    ["new\nline", "clear\x1b[2J", "back\u202ewards", os.fsdecode(b"no \xff UTF-8"), "n" * 300, "n/" * 3000],
)
def test_strange_names(process: Process, folder: Path, name: str) -> None:
    refuse(process, folder, (*MERGE, name), "no such file" if len(name) < 99 else "File name too long")
    if len(name) < 99:
        (folder / "ft-1").rename(folder / name)
        (folder / name / SHARD).write_bytes(b"")
        refuse(
            process,
            folder,
            ("merge", "base", name, "--output", "out", "--scale", "1"),
            "expected a safetensors header",
        )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_may_not_be_read(process: Process, folder: Path, role: str, case: str) -> None:
    path, mode = UNREADABLE[case]
    folder.chmod(0o755)
    (folder / role / path).chmod(mode)
    try:
        refuse(
            process,
            folder,
            MERGE,
            f"{role}/{path}" if path.name else role,
            "Permission denied",
            user=65534 if not os.getuid() else None,
        )
    finally:
        (folder / role / path).chmod(0o755)
