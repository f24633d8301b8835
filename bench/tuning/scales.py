"""Compares the searches of λ on the demonstration's models, and a live model with a merge for each λ.

`negmerge demo --seeds 3` writes the models. For each seed and for the paper's rule it prints what the demonstration's grid of 121 values
and a bracket search choose on validation data, and how often they evaluate. Then it prints how long 21 values of λ take without the evaluations: moving
a live model, merging in memory, and merging files, in alternating rounds. It fails if the bracket's scale is worse than the grid's or takes as
many evaluations.

    python bench/tuning/scales.py [negmerge-demo]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import negmerge_fast as nm
from negmerge_fast import demo
from negmerge_fast.search.selection import PAPER_SCALES

ROUNDS = 7


def compare(folder: Path, seed: int) -> bool:
    """Print what both searches choose; returns whether the bracket's scale is as good, in fewer evaluations."""
    base, finetuned = models(folder)
    evaluate = demo._Evaluator(demo._load(seed)["validation"], lambda: None)
    network = demo._network(seed)
    network.load_state_dict(base)
    delta = nm.consensus_delta(network, finetuned)
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[[torch.nn.Module], float]:
        def score(model: torch.nn.Module) -> float:
            counts[name] += 1
            return evaluate(model)[name]

        return score

    found = {}
    for search, scales in (("grid", demo.Settings().grid), ("bracket", None)):
        counts.clear()
        found[search] = chosen = nm.select_scale(
            network, delta, forget=counted("forget"), retain=counted("retain"), scales=scales, search=search
        )
        print(
            f"seed {seed}  {search:<8} λ {chosen.scale:<6g} forget {chosen.forget:.4f}  retain {chosen.retain:.4f} "
            f"(floor {chosen.floor:.4f})  evaluations: retain {counts['retain']}, forget {counts['forget']}"
        )
    fewer = counts["retain"] < len(demo.Settings().grid)
    return found["bracket"].forget <= found["grid"].forget and fewer


def models(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    paths = [folder / "base", *sorted(folder.glob("finetuned-*"))]
    base, *finetuned = (load_file(path / "model.safetensors") for path in paths)
    return base, finetuned


def time_scales(folder: Path) -> None:
    """Print how long the paper's 21 values of λ take, evaluations apart."""
    base, finetuned = models(folder)
    paths = sorted(folder.glob("finetuned-*"))
    network, live_network = demo._network(0), demo._network(0)
    for each in (network, live_network):
        each.load_state_dict(base)
    delta = nm.consensus_delta(network, finetuned)

    def in_memory() -> None:
        for scale in PAPER_SCALES:
            network.load_state_dict(nm.merge(base, finetuned, scale=scale))

    def from_files() -> None:
        with tempfile.TemporaryDirectory() as out:
            for scale in PAPER_SCALES:
                nm.merge_checkpoints(folder / "base", paths, Path(out) / str(scale), scale=scale)
                network.load_state_dict(load_file(Path(out) / str(scale) / "model.safetensors"))

    def begin() -> None:
        network.load_state_dict(base)
        with nm.consensus_delta(network, finetuned).live(network):
            pass

    with delta.live(live_network) as live:

        def moved() -> None:
            for scale in PAPER_SCALES:
                live.scale = scale

        candidates = {
            "moving a live model": moved, "merging for each λ": in_memory, "merging files for each λ": from_files,
            "(once: the delta and a live block)": begin,
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(ROUNDS):
            for name, candidate in candidates.items():
                began = time.perf_counter()
                candidate()
                seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in middle.items():
        print(
            f"21 λ: {name:<35} {1000 * each:8.2f} ms, {each / middle['moving a live model']:6.1f} × the first"
        )


def main() -> int:
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "negmerge-demo")
    folders = sorted(output.glob("seed-*"))
    if not folders:
        raise SystemExit(f"{output}: no models, expected those of: negmerge demo --seeds 3 --output {output}")
    warnings.simplefilter("ignore", nm.MergeWarning)
    as_good = [compare(folder, int(folder.name.removeprefix("seed-"))) for folder in folders]
    time_scales(folders[0])
    return 0 if all(as_good) else 1


if __name__ == "__main__":
    sys.exit(main())
