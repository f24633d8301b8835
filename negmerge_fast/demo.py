"""Demonstration: a small network learns ten digits from real data and forgets five of them by NegMerge.

For each seed, a convolutional network is trained on all digits of scikit-learn's handwritten set. It is then fine-tuned
many times on the digits to forget, each time with other hyperparameters. Every model is saved as a checkpoint
directory, and merged by the same engine as `negmerge merge`, which makes the deltas of all other methods, too. λ is searched
on validation data by the paper's rule, on a live model, for every method alike. The table shows test data.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .core.errors import InputError, MergeWarning
from .deltas.memory import Delta, consensus_delta
from .search.api import select_scale
from .search.result import NoScaleError
from .streaming.api import merge_checkpoints

FORGET = (5, 6, 7, 8, 9)
# The paper's rule for λ: the retained accuracy may fall to this fraction of the original's, no further.
KEPT = 0.95
# As the table has them: methods of methods/, with their usual numbers. None: each model alone, of which the best counts.
METHODS = {
    "best single": None,
    "uniform mean": "mean",
    "TIES (top 20 %)": "ties",
    "MagMax": "magmax",
    "conflicting only": "conflict",
    "NegMerge": "negmerge",
}
_PICTURE = "forgetting.png"
_MERGED = {"model.safetensors", "config.json", "negmerge.json"}

OnProgress = Callable[[], None]
State = dict[str, torch.Tensor]
Curve = Sequence[Any]  # a ScalePoint with both scores for each λ


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment of one seed."""

    models: int = 24
    base_epochs: int = 40
    max_epochs: int = 10  # epochs of the longest fine-tuning
    grid: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(121))


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 8, 8] in 0 … 1 and their digits [N]."""

    images: torch.Tensor
    digits: torch.Tensor

    def only(self, digits: Iterable[int]) -> Split:
        chosen = torch.isin(self.digits, torch.tensor(list(digits)))
        return Split(self.images[chosen], self.digits[chosen])


def run(
    seeds: int = 1,
    output: Path | None = None,
    report: Path | None = None,
    progress: OnProgress | None = None,
    quiet: bool = False,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Run the demonstration, print its table, and return its report.

    Args:
        seeds: The number of seeds. Each trains its own models.
        output: The directory for checkpoints and the picture (./negmerge-demo).
        report: The path of a JSON file for the report.
        progress: Called often. It may raise to stop.
        quiet: Whether to show no progress bar.
        settings: Sizes of the experiment.

    Returns:
        The report: a row for each method and seed, and a summary for each method.

    Raises:
        InputError: If a path cannot be written to, or scikit-learn or matplotlib is missing.
    """
    began = time.perf_counter()
    settings = settings or Settings()
    output = Path("negmerge-demo") if output is None else output
    _check_paths(output, report, seeds)
    _require_extras()
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Curve]] = []
    # One step for each model that is trained, and one for the search of each method.
    steps = seeds * (settings.models + 2 + len(METHODS))
    with tqdm(total=steps, desc="demo", unit="step", leave=False, disable=True if quiet else None) as bar:
        for seed in range(seeds):
            found, drawn = _run_seed(
                seed, output / f"seed-{seed}", settings, progress or (lambda: None), bar.update
            )
            rows += found
            curves.append(drawn)
    summary = [_summarise(method, rows) for method in dict.fromkeys(row["method"] for row in rows)]
    picture = output / _PICTURE
    _draw(curves, picture)
    result = {
        "seeds": seeds,
        "models": settings.models,
        "grid": {"from": settings.grid[0], "to": settings.grid[-1], "values": len(settings.grid)},
        "rows": rows,
        "summary": summary,
        "seconds": time.perf_counter() - began,
    }
    if report is not None:
        report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(_table(summary, seeds, settings))
    print(
        f"Picture: {picture}. Merged model: {output / 'seed-0' / 'merged'}. {result['seconds']:.0f} s in all."
    )
    return result


def _check_paths(output: Path, report: Path | None, seeds: int) -> None:
    if seeds < 1:
        raise InputError(f"seeds: {seeds}, expected at least 1")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: not a directory, expected a place for the demo's models")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.absolute().parent}: no such directory, expected one to hold {output.name}")
    if (output / _PICTURE).is_dir():
        raise InputError(f"{output / _PICTURE}: a directory, expected a place for the picture")
    if (
        report is not None
        and not report.absolute().parent.is_dir()
        and report.absolute().parent != output.absolute()
    ):
        raise InputError(f"{report.absolute().parent}: no such directory, expected one to hold {report.name}")
    if report is not None and report.is_dir():
        raise InputError(f"{report}: a directory, expected a file for the report")
    for folder in (output / f"seed-{seed}" for seed in range(seeds)):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: not a directory, expected a place for a seed's models")
        # The merge at the end would refuse these files too, but only after all the training.
        merged = folder / "merged"
        unknown_files = {path.name for path in merged.iterdir()} - _MERGED if merged.is_dir() else set()
        if unknown_files:
            raise InputError(f"{merged / min(unknown_files)}: not negmerge's, so {merged} is not replaced")


def _require_extras() -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError(
            "negmerge demo needs scikit-learn and matplotlib: pip install 'negmerge_fast[demo]'"
        ) from None


def _load(seed: int) -> dict[str, Split]:
    """The digits, split into training, validation and test data."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    order = range(len(data.target))
    train, rest = train_test_split(order, test_size=0.5, random_state=seed, stratify=data.target)
    check, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=data.target[rest])
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    digits = torch.tensor(data.target)
    return {
        name: Split(images[part], digits[part])
        for name, part in (("train", train), ("validation", check), ("test", test))
    }


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """Hyperparameters. shift moves images by up to a pixel; noise is the standard deviation of added noise."""

    epochs: int
    rate: float
    decay: float = 0.0
    shift: bool = False
    noise: float = 0.0


def _hyperparameters(k: int, max_epochs: int) -> Training:
    """Hyperparameters of the k-th fine-tuned model. All combinations are used once before one is used again."""
    rates, epochs, decays = (3e-4, 5e-4, 1e-3), (max_epochs // 2, max_epochs), (0.0, 0.01)
    return Training(
        epochs=epochs[k // 3 % 2],
        rate=rates[k % 3],
        decay=decays[k // 6 % 2],
        shift=bool(k // 12 % 2),
        noise=0.05 * (k // 12 % 2),
    )


def _train(network: nn.Module, data: Split, training: Training, seed: int, on_progress: OnProgress) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=training.rate, weight_decay=training.decay)
    for _ in range(training.epochs):
        on_progress()
        for batch in torch.split(torch.randperm(len(data.digits), generator=generator), 64):
            images = data.images[batch]
            if training.shift:
                rows, columns = torch.randint(-1, 2, (2,), generator=generator).tolist()
                images = images.roll((rows, columns), (2, 3))
            if training.noise:
                images = images + training.noise * torch.randn(images.shape, generator=generator)
            optimiser.zero_grad()
            functional.cross_entropy(network(images), data.digits[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def _save(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"architecture": "conv16-conv32-linear64-linear10"}) + "\n")


class _Evaluator:
    """Accuracies of a network, in 0 … 1, on one split: on the digits to forget and on those to retain."""

    def __init__(self, data: Split, on_progress: OnProgress) -> None:
        self.data, self.on_progress = data, on_progress
        self.to_forget = torch.isin(data.digits, torch.tensor(FORGET))

    def __call__(self, network: nn.Module) -> dict[str, float]:
        self.on_progress()
        with torch.no_grad():
            right = network(self.data.images).argmax(1) == self.data.digits
        chosen = {"forget": self.to_forget, "retain": ~self.to_forget}
        return {name: right[each].double().mean().item() for name, each in chosen.items()}


def _candidates(name: str, network: nn.Module, finetuned: list[State]) -> Iterable[Delta]:
    """What a method may take off the network, scaled by λ."""
    method = METHODS[name]
    if method is None:
        return (consensus_delta(network, [state]) for state in finetuned)
    return [consensus_delta(network, finetuned, method=method)]


def _search(network: nn.Module, delta: Delta, evaluate: _Evaluator, settings: Settings) -> tuple[Any, Curve]:
    """The chosen point, which is the base's if no λ forgets, and all points."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # accuracies on a fine grid are never quite monotone
        try:
            found = select_scale(
                network, delta, evaluate=evaluate, scales=settings.grid, retain_floor=KEPT, progress=False
            )
        except NoScaleError as error:
            return error.points[0], error.points
    return next(point for point in found.points if point.scale == found.scale), found.points


def _run_seed(
    seed: int, folder: Path, settings: Settings, on_progress: OnProgress, step: Callable[[], object]
) -> tuple[list[dict[str, Any]], dict[str, Curve]]:
    data = _load(seed)
    network, retrained, finetuned = _train_all(seed, folder, data, settings, on_progress, step)
    on_validation, on_test = (_Evaluator(data[part], on_progress) for part in ("validation", "test"))
    rows, curves = [], {}

    def add(method: str, model: nn.Module, scale: float | None = None, ratio: float | None = None) -> None:
        scored = {"method": method, "seed": seed, **on_test(model)}
        rows.append({**scored, "lambda": scale, "consensus_ratio": ratio})

    add("original", network)
    add("retrained", retrained)
    for method in METHODS:
        found = [
            (delta, *_search(network, delta, on_validation, settings))
            for delta in _candidates(method, network, finetuned)
        ]
        delta, point, curves[method] = min(found, key=lambda each: (each[1].forget, -each[1].retain))
        with delta.live(network) as live:
            live.scale = point.scale
            ratio = _merge_files(folder, settings, network, point.scale) if method == "NegMerge" else None
            add(method, network, point.scale, ratio)
        step()
    return rows, curves


def _train_all(
    seed: int,
    folder: Path,
    data: dict[str, Split],
    settings: Settings,
    on_progress: OnProgress,
    step: Callable[[], object],
) -> tuple[nn.Module, nn.Module, list[State]]:
    """Train the original, one without the digits to forget, and fine-tuned models; save each as a checkpoint."""
    forget, retain = data["train"].only(FORGET), data["train"].only(set(range(10)) - set(FORGET))
    trained = Training(settings.base_epochs, 1e-3)
    network, retrained, tuned = (_network(seed) for _ in range(3))
    for name, model, split in (("base", network, data["train"]), ("retrained", retrained, retain)):
        _train(model, split, trained, seed, on_progress)
        _save(model, folder / name)
        step()
    finetuned = []
    for k in range(settings.models):
        tuned.load_state_dict(network.state_dict())
        _train(tuned, forget, _hyperparameters(k, settings.max_epochs), 1000 * seed + k, on_progress)
        _save(tuned, folder / f"finetuned-{k:02d}")
        finetuned.append({name: tensor.clone() for name, tensor in tuned.state_dict().items()})
        step()
    return network, retrained, finetuned


def _merge_files(folder: Path, settings: Settings, network: nn.Module, scale: float) -> float:
    """Merge the checkpoints as `negmerge merge` does, compare the result with the network, return the consensus ratio."""
    from safetensors.torch import load_file

    out, dirs = folder / "merged", [folder / f"finetuned-{k:02d}" for k in range(settings.models)]
    report = merge_checkpoints(folder / "base", dirs, out, scale=scale, overwrite=True)
    held = load_file(out / "model.safetensors")
    for name, tensor in network.state_dict().items():
        if not torch.equal(held[name].view(torch.int32), tensor.view(torch.int32)):  # bits: -0.0 is not 0.0
            raise RuntimeError(f"{out}: {name}: the merged files differ from the merge in memory")
    return report.consensus_ratio


def _summarise(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of a method's results over the seeds."""
    summary: dict[str, Any] = {"method": method}
    for key in ("forget", "retain", "consensus_ratio", "lambda"):
        values = [row[key] for row in rows if row["method"] == method and row[key] is not None]
        summary[f"{key}_mean"] = statistics.fmean(values) if values else None
        summary[f"{key}_std"] = statistics.pstdev(values) if values else None
    return summary


def _table(summary: list[dict[str, Any]], seeds: int, settings: Settings) -> str:
    over = f"mean ± deviation over {seeds} seeds" if seeds > 1 else "of one seed (--seeds for more)"
    lines = [
        f"The digits 5-9 are to be forgotten, 0-4 kept; {settings.models} models were fine-tuned on the former.",
        f"Accuracy on test data and consensus ratio in %, {over}. λ is searched on",
        f"validation data, for every method in {len(settings.grid)} values from {settings.grid[0]:g} to "
        f"{settings.grid[-1]:g} (on this problem the useful range",
        "reaches well past 1): the lowest forget accuracy with a retain accuracy ≥ 95 % of the original's.",
        f"Breadcrumbs and DARE add up the models' differences: λ of these is searched from 0 to {settings.grid[-1] / settings.models:g}.",
        "",
        f"{'method':<18}{'forget ↓':>14}{'retain ↑':>14}{'consensus ratio':>18}{'λ':>15}",
    ]

    def cell(row: dict[str, Any], key: str, factor: int, digits: int) -> str:
        mean, deviation = row[f"{key}_mean"], row[f"{key}_std"]
        if mean is None:
            return "-"
        return f"{factor * mean:.{digits}f}" + (f" ± {factor * deviation:>4.{digits}f}" if seeds > 1 else "")

    for row in summary:
        lines.append(
            f"{row['method']:<18}{cell(row, 'forget', 100, 1):>14}{cell(row, 'retain', 100, 1):>14}"
            f"{cell(row, 'consensus_ratio', 100, 1):>18}{cell(row, 'lambda', 1, 2):>15}"
        )
    return "\n".join(lines)


def _draw(curves: list[dict[str, Curve]], path: Path) -> None:
    """Draw one curve for each method, along λ, averaged over the seeds."""
    from matplotlib.figure import Figure

    # pyplot would keep figures and a backend for the whole process.
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for method in curves[0]:
        points = [
            [
                100 * statistics.fmean(values)
                for values in zip(*((s.forget, s.retain) for s in scores), strict=True)
            ]
            for scores in zip(*(of_seed[method] for of_seed in curves), strict=True)
        ]
        style = (
            {"color": "black", "linewidth": 2.2, "zorder": 3} if method == "NegMerge" else {"linewidth": 1.4}
        )
        axes.plot(*zip(*points, strict=True), label=method, marker=".", markersize=5, **style)
    kept = 100 * KEPT * statistics.fmean(of_seed["NegMerge"][0].retain for of_seed in curves)
    axes.axhline(kept, color="black", linestyle="--", linewidth=1)
    axes.annotate("95 % of the original", (99, kept), va="bottom", ha="right", fontsize=9)
    axes.set(
        xlabel="accuracy on the digits to forget (%)", ylabel="accuracy on the digits to keep (%)",
        xlim=(-2, 102), ylim=(84, 101), title="Forgetting as λ grows from 0 (top right): validation data, mean of the seeds",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", framealpha=1)
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, dpi=130, format="png")
    os.replace(staged, path)
