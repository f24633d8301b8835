"""Merges in a process in which tests/support/shim.c answers some system calls; what became of them goes to a file as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import negmerge_fast as nm
from negmerge_fast.output import filesystem, journal, reserve, writer
from negmerge_fast.streaming import budget

INPUTS = ("base", "ft-0", "ft-1")


class Stop(Exception):
    pass


def make_models(folder: Path) -> None:
    """Directories and single files, of which the second half is the same in all versions."""
    for k, name in enumerate(INPUTS):
        values = np.random.default_rng(0).normal(size=40_000).astype("f4")
        values[:20_000] += k * np.random.default_rng(k).random(20_000, "f4")
        np.save(folder / f"{name}.npy", values)
        header = {"w": {"dtype": "F32", "shape": [40_000], "data_offsets": [0, 160_000]}}
        text = json.dumps(header).encode()
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        content = len(text).to_bytes(8, "little") + text + values.tobytes()
        (folder / name / "model.safetensors").write_bytes(content)


def merge(folder: Path, kind: str, **options: Any) -> nm.Report:
    suffix = ".npy" if kind == "file" else ""
    base, *models = (folder / f"{name}{suffix}" for name in INPUTS)
    options = {"scale": 0.9, "threads": 1, "nonfinite": "keep-base", **options}
    return nm.merge_checkpoints(base, models, folder / f"out{suffix}", **options)


def outputs(folder: Path) -> dict[str, bytes]:
    """What lies beside the inputs."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.relative_to(folder).parts[0].removesuffix(".npy") not in INPUTS
    }


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.removesuffix(".npy") not in INPUTS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def stop(done: int, total: int) -> None:
    if done > total // 2:
        raise Stop


@cache
def merged_without(folder: Path, kind: str) -> dict[str, bytes]:
    clear(folder)
    merge(folder, kind)
    return outputs(folder)


def _counter(name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(ctypes.CDLL(None), name)


def attempt(folder: Path, shim: str, kind: str, mode: str) -> dict[str, Any]:
    """One merge, under a shim if there is one."""
    expected = merged_without(folder, kind)
    clear(folder)
    journal.INTERVAL_S = 0.0 if mode == "resume" else 5.0
    if mode == "overwrite":
        merge(folder, kind, scale=0.3)
    elif mode == "resume":
        try:
            merge(folder, kind, resume=True, progress=stop)
        except Stop:
            assert any(name.startswith(".out") for name in outputs(folder))
    before = outputs(folder)
    hits, emulated = (_counter(name) if shim else ctypes.c_int() for name in ("shim_hits", "shim_emulated"))
    hits.value = emulated.value = 0
    os.environ["SHIM"] = shim
    said: dict[str, Any] = {"error": None, "notes": []}
    try:
        said["notes"] = merge(folder, kind, resume=mode == "resume", overwrite=mode == "overwrite").notes
    except Exception as error:
        said["error"] = [type(error).__name__, str(error)]
    os.environ["SHIM"] = ""
    after = outputs(folder)
    return {
        **said,
        "hits": hits.value,
        "emulated": emulated.value,
        "right": after == expected,
        "as before": after == before,
        "found": sorted(after),
    }


def main(folder: Path, attempts: list[list[str]], result: Path) -> None:
    warnings.simplefilter("ignore")
    budget.MAX_CHUNK_BYTES = 1 << 15
    # As on Btrfs: files are reserved, and what no model changed is cloned.
    real, btrfs = filesystem.filesystem_type, next(iter(filesystem.REFLINK_FILESYSTEMS))
    reserve.filesystem_type = writer.filesystem_type = lambda path: real(path) and btrfs
    make_models(folder)
    done = {" ".join(each): attempt(folder, *each) for each in attempts}
    result.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
