"""make fuzz: random models for a given time, chosen by the code that they reach (atheris, libFuzzer).

It ends at a model that crashes, hangs, takes too much memory or gets no proper answer. The model's choices are saved in the
folder, and `python tests/support/fuzz.py FILE` tries it again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["negmerge_fast"]):
    from negmerge_fast.deltas import apply  # noqa: F401
    from negmerge_fast.streaming import api  # noqa: F401

from fuzzing import TRIED, fuzzed, fuzzed_deltas, fuzzed_torch_files

# Per model, with all that was imported; seconds and MB.
_LIMITS = ("-timeout=20", "-rss_limit_mb=2048", "-verbosity=0", "-len_control=0")
# Bytes that a model is chosen by, at most; models to begin with; and after how many it is told how far it is.
_MAX_INPUT_BYTES, _SEEDS, _REPORT_INTERVAL = 2048, 200, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where what fails is saved")
    parser.add_argument("files", nargs="*", help="what has failed, to be tried again")
    parser.add_argument("--deltas", action="store_true", help="deltas that are applied, in place of models")
    parser.add_argument("--pytorch", action="store_true", help="PyTorch files, in place of models")
    given = parser.parse_args()
    target = fuzzed_torch_files if given.pytorch else fuzzed_deltas if given.deltas else fuzzed
    given.found.mkdir(exist_ok=True)
    ends = time.monotonic() + given.seconds
    told = 0
    folders = [] if given.files else [seeds(given.seed)]

    def try_one(choices: bytes) -> None:
        nonlocal told
        target.hypothesis.fuzz_one_input(choices)
        tried, over = TRIED.total(), time.monotonic() > ends
        if tried >= told + _REPORT_INTERVAL or over:
            told = tried
            print(
                f"{tried:,} tried: {TRIED['merged']:,} merged, {TRIED['applied']:,} applied, {TRIED['refused']:,} refused",
                flush=True,
            )
        if over and folders:
            shutil.rmtree(folders[0])
            os._exit(0)

    saved = f"-artifact_prefix={given.found.resolve()}/"
    options = (*_LIMITS, f"-max_len={_MAX_INPUT_BYTES}", f"-seed={given.seed + 1}", saved)
    atheris.Setup([sys.argv[0], *options, *given.files, *folders], try_one)
    atheris.Fuzz()


def seeds(seed: int) -> str:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    generator = random.Random(seed)
    for k in range(_SEEDS):
        (folder / str(k)).write_bytes(generator.randbytes(_MAX_INPUT_BYTES))
    return str(folder)


if __name__ == "__main__":
    main()
