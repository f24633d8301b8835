"""The public face, written out: Python names and signatures, operators, the command line, and the fields of JSON.

What stands in these lists others build on. A change of a list is a change for them, and belongs in the changelog.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from checkpoint_files import negmerge

import negmerge_fast as nm

RESULTS = Path(__file__).parents[1] / "bench" / "results"

NAMES = [
    "Changed", "ConsensusStatistics", "DamageError", "Delta", "InputError", "Live", "MergeWarning", "Method", "NoScaleError", "Report", "Rule",
    "ScalePoint", "SelectedScale", "Stats", "TensorStats", "Verified", "__version__", "apply_delta", "consensus_delta",
    "consensus_statistics", "delta_checkpoints", "load_delta", "merge", "merge_", "merge_checkpoints", "merge_task_vectors", "method", "negate_",
    "select_scale", "verify_checkpoint", "write_report",
]  # fmt: skip

SIGNATURES = {
    "Changed": "(elements, changed, tensors=<factory>)",
    "apply_delta": (
        "(base, delta, output, *, scale, nonfinite='error', keep=(), drop=(), backend='auto', device='auto', memory_budget=None, "
        "threads=None, overwrite=False, resume=False, format='auto', progress=None)"
    ),
    "consensus_delta": (
        "(base, finetuned, *, min_agreement=1.0, inputs='finetuned', nonfinite='keep-base', include=None, exclude=None, rename=(), "
        "half=False, backend='auto', adapters_as='difference', method='negmerge', weights=None)"
    ),
    "delta_checkpoints": (
        "(base, finetuned, output, *, half=False, min_agreement=1.0, inputs='finetuned', nonfinite='error', include=None, exclude=None, "
        "rename=(), keep=(), drop=(), backend='auto', memory_budget=None, threads=None, overwrite=False, resume=False, "
        "adapters_as='difference', method='negmerge', weights=None, progress=None)"
    ),
    "load_delta": "(path, device='cpu')",
    "merge": (
        "(base, finetuned, *, scale, min_agreement=1.0, inputs='finetuned', nonfinite='keep-base', include=None, "
        "exclude=None, rename=(), backend='auto', adapters_as='difference', method='negmerge', weights=None)"
    ),
    "merge_": (
        "(base, finetuned, *, scale, min_agreement=1.0, inputs='finetuned', nonfinite='keep-base', include=None, "
        "exclude=None, rename=(), backend='auto', adapters_as='difference', method='negmerge', weights=None)"
    ),
    "merge_checkpoints": (
        "(base, finetuned, output, *, scale, min_agreement=1.0, inputs='finetuned', nonfinite='error', include=None, "
        "exclude=None, rename=(), keep=(), drop=(), backend='auto', device='auto', memory_budget=None, threads=None, skip_unchanged=None, "
        "overwrite=False, resume=False, adapters_as='difference', format='auto', method='negmerge', weights=None, progress=None)"
    ),
    "merge_task_vectors": (
        "(task_vectors, *, min_agreement=1.0, nonfinite='keep-base', include=None, exclude=None, rename=(), "
        "backend='auto', method='negmerge')"
    ),
    "method": "(name, **numbers)",
    "negate_": (
        "(base, tau, *, scale, nonfinite='keep-base', include=None, exclude=None, rename=(), backend='auto', weights=None)"
    ),
    "verify_checkpoint": "(output, against=None, *, weights=None, blocks=64, seed=0, threads=None, progress=None)",
    "consensus_statistics": (
        "(base, finetuned=(), *, inputs='finetuned', include=None, exclude=None, rename=(), adapters_as='difference', "
        "memory_budget=None, threads=None, progress=None)"
    ),
    "write_report": "(statistics, output, *, points=None, overwrite=False)",
    "ConsensusStatistics": (
        "(source, base, models, model_count, min_agreement, elements, agreed, consensus_ratio, nonfinite, vetoed_by_zero, notes, "
        "prefixes, dissent, magnitudes, tensors)"
    ),
    "Report": (
        "(base, models, output, method, weights, scale, min_agreement, backend, device, elements, agreed, consensus_ratio, nonfinite, "
        "vetoed_by_zero, masked, bytes_read, bytes_skipped, bytes_written, bytes_done_before, seconds, notes, adapters, "
        "skipped_files, large_files, tensors)"
    ),
    "Method": (
        "(name, gate, election, reduction, density=1.0, gamma=0.0, over='tensor', drop=0.0, seed=0, mask_scale=0.0, model_weights=None)"
    ),
    "Rule": "(scale, min_agreement=1.0, choices=None)",
    "Stats": "()",
    "TensorStats": "(elements=0, agreed=0, nonfinite=0, vetoed_by_zero=0, masked=0)",
    "Verified": "(output, version, files, bytes, not_listed, blocks, bytes_compared)",
    "DamageError": "(found)",
    "select_scale": (
        "(model, delta, *, forget=None, retain=None, evaluate=None, scales=None, search='grid', retain_floor=0.95, forget_target=None, "
        "resolution=None, points=None, progress=True, rename=(), backend='auto')"
    ),
    "SelectedScale": "(scale, forget, retain, rule, floor, forget_target, search, points, notes=())",
    "ScalePoint": "(scale, forget=None, retain=None, seconds=0.0)",
    "NoScaleError": "(message, points, notes=())",
}

METHODS = {
    "Delta.apply_": "(self, model, scale, *, nonfinite='keep-base', rename=(), backend='auto')",
    "Delta.changed": "(self, model, scale, *, rename=(), backend='auto')",
    "Delta.live": "(self, model, *, rename=(), backend='auto')",
    "Delta.save": "(self, path)",
    "Delta.to": "(self, device)",
    "SelectedScale.plot": "(self, path=None)",
}

# Beside the fields above, which frozen dataclasses have as attributes.
ATTRIBUTES = {
    "Changed": ["fraction"],
    "ConsensusStatistics": ["to_json"],
    "Delta": ["apply_", "changed", "live", "nbytes", "save", "stats", "to"],
    "Live": ["changed", "scale", "stats"],
    "Report": ["to_json"],
    "Method": ["choices", "is_negmerge", "needs_bounds", "of_json", "ranks", "to_json"],
    "Rule": ["required"],
    "ScalePoint": [],
    "SelectedScale": ["plot", "to_json"],
    "Stats": [
        "add",
        "agreed",
        "consensus_ratio",
        "elements",
        "include",
        "masked",
        "nonfinite",
        "tensors",
        "vetoed_by_zero",
    ],
    "TensorStats": [],
    "Verified": [],
}

SCHEMAS = {
    "merge": (
        "negmerge::merge(Tensor[] base, Tensor[] finetuned, float scale, float min_agreement=1., bool task_vectors=False, "
        'str backend="auto") -> (Tensor[], Tensor)'
    ),
    "merge_": (
        "negmerge::merge_(Tensor(a!)[] base, Tensor[] finetuned, float scale, float min_agreement=1., "
        'bool task_vectors=False, str backend="auto") -> Tensor'
    ),
}

# How often the demo trains unless told otherwise.
DEMO_SEEDS = 1

# Arguments; then options: names, metavar, type, default.
COMMANDS = {
    "merge": [
        "[BASE]",
        "[FINETUNED]...",
        "--output -o OUT text, required",
        "--format auto|safetensors|pt = auto",
        "--config CONFIG.yml text = None",
        "--scale λ|RE=λ text = ('1',)",
        "--add boolean = False",
        "--output-adapter boolean = False",
        "--method negmerge|k-of-n|mean|task-arithmetic|conflict|magmax|ties|breadcrumbs|dare|dare-ties|consensus|emr = negmerge",
        "--density float = None",
        "--gamma float = None",
        "--over tensor|model = None",
        "--drop-rate float = None",
        "--seed integer = None",
        "--mask-scale float = None",
        "--weights FILE text = None",
        "--task-vectors boolean = False",
        "--adapters-as difference|merged = difference",
        "--min-agreement float = 1.0",
        "--nonfinite error|keep-base = error",
        "--include RE text = None",
        "--exclude RE text = None",
        "--rename RE=TEXT text = ()",
        "--keep GLOB text = ()",
        "--drop GLOB text = ()",
        "--backend auto|cuda|triton|cpu|torch = auto",
        "--device auto|cpu|cuda:0 text = auto",
        "--memory-budget SIZE text = auto",
        "--threads N integer = None",
        "--skip-unchanged / --no-skip-unchanged boolean = None",
        "--report FILE.json text = None",
        "--dry-run boolean = False",
        "--overwrite boolean = False",
        "--resume boolean = False",
        "--quiet -q boolean = False",
    ],
    "verify": [
        "OUT",
        "--against boolean = False",
        "[--against BASE FINETUNED...]",
        "--weights FILE text = None",
        "--blocks N integer from 1 = 64",
        "--seed integer = 0",
        "--quiet -q boolean = False",
    ],
    "inspect": ["PATHS..."],
    "info": [],
    "demo": [
        f"--seeds integer from 1 = {DEMO_SEEDS}",
        "--output DIR text = negmerge-demo",
        "--report FILE.json text = None",
        "--quiet -q boolean = False",
    ],
    "bench": [
        "--device auto|cpu|cuda:0 text = auto",
        "--report FILE.jsonl text = None",
        "--quiet -q boolean = False",
    ],
    "apply": [
        "BASE",
        "DELTA",
        "--output -o OUT text, required",
        "--format auto|safetensors|pt = auto",
        "--scale λ|RE=λ text, required",
        "--nonfinite error|keep-base = error",
        "--keep GLOB text = ()",
        "--drop GLOB text = ()",
        "--backend auto|cuda|triton|cpu|torch = auto",
        "--device auto|cpu|cuda:0 text = auto",
        "--memory-budget SIZE text = auto",
        "--threads N integer = None",
        "--report FILE.json text = None",
        "--dry-run boolean = False",
        "--overwrite boolean = False",
        "--resume boolean = False",
        "--quiet -q boolean = False",
    ],
    "delta": [
        "BASE",
        "[FINETUNED]...",
        "--output -o D text, required",
        "--half boolean = False",
        "--method negmerge|k-of-n|mean|task-arithmetic|conflict|magmax|ties|breadcrumbs|dare|dare-ties|consensus|emr = negmerge",
        "--density float = None",
        "--gamma float = None",
        "--over tensor|model = None",
        "--drop-rate float = None",
        "--seed integer = None",
        "--mask-scale float = None",
        "--weights FILE text = None",
        "--task-vectors boolean = False",
        "--adapters-as difference|merged = difference",
        "--min-agreement float = 1.0",
        "--nonfinite error|keep-base = error",
        "--include RE text = None",
        "--exclude RE text = None",
        "--rename RE=TEXT text = ()",
        "--keep GLOB text = ()",
        "--drop GLOB text = ()",
        "--backend auto|cuda|triton|cpu|torch = auto",
        "--memory-budget SIZE text = auto",
        "--threads N integer = None",
        "--report FILE.json text = None",
        "--dry-run boolean = False",
        "--overwrite boolean = False",
        "--resume boolean = False",
        "--quiet -q boolean = False",
    ],
    "mergekit": ["CONFIG.yml OUT [OPTION OF mergekit-yaml]..."],
    "report": [
        "BASE",
        "[FINETUNED]...",
        "--output -o DIR text, required",
        "--points FILE.jsonl text = None",
        "--task-vectors boolean = False",
        "--adapters-as difference|merged = difference",
        "--include RE text = None",
        "--exclude RE text = None",
        "--rename RE=TEXT text = ()",
        "--memory-budget SIZE text = auto",
        "--threads N integer = None",
        "--overwrite boolean = False",
        "--quiet -q boolean = False",
    ],
    "select": [
        "BASE",
        "DELTA",
        "--eval CMD text, required",
        "--output -o OUT text, required",
        "--format auto|safetensors|pt = auto",
        "--scale float = ()",
        "--search grid|bracket = grid",
        "--retain-floor float = 0.95",
        "--forget-target SCORE float = None",
        "--resolution STEP float = None",
        "--points FILE.jsonl text = None",
        "--keep-models boolean = False",
        "--nonfinite error|keep-base = error",
        "--keep GLOB text = ()",
        "--drop GLOB text = ()",
        "--backend auto|cuda|triton|cpu|torch = auto",
        "--device auto|cpu|cuda:0 text = auto",
        "--memory-budget SIZE text = auto",
        "--threads N integer = None",
        "--report FILE.json text = None",
        "--overwrite boolean = False",
        "--quiet -q boolean = False",
    ],
}

# What each command is called with at least.
ARGUMENTS = {
    "merge": ["base", "model", "--output", "out", "--scale", "1"],
    "verify": ["out"],
    "inspect": ["path"],
    "info": [],
    "demo": [],
    "bench": [],
    "apply": ["base", "delta", "--output", "out", "--scale", "1"],
    "delta": ["base", "model", "--output", "delta"],
    "mergekit": ["config.yml", "out"],
    "report": ["base", "--output", "report"],
    "select": ["base", "delta", "--eval", "true {model}", "--output", "out"],
}

REPORT = [
    "base", "models", "output", "method", "weights", "scale", "min_agreement", "backend", "device", "elements", "agreed", "consensus_ratio",
    "nonfinite", "vetoed_by_zero", "masked", "bytes_read", "bytes_skipped", "bytes_written", "bytes_done_before", "seconds", "notes", "adapters",
    "skipped_files", "large_files", "tensors",
    "tensors[].name", "tensors[].elements", "tensors[].agreed", "tensors[].nonfinite", "tensors[].vetoed_by_zero", "tensors[].masked",
]  # fmt: skip

STATISTICS = [
    "source", "base", "models", "model_count", "min_agreement", "elements", "agreed", "consensus_ratio", "nonfinite", "vetoed_by_zero",
    "notes",
    "prefixes", "prefixes[].models", "prefixes[].agreed", "prefixes[].nonfinite", "prefixes[].vetoed_by_zero",
    "prefixes[].broken_by_zero", "prefixes[].broken_by_sign",
    "dissent", "dissent[].sole_by_zero", "dissent[].sole_by_sign", "dissent[].sole_by_nonfinite", "dissent[].against_majority",
    "magnitudes", "magnitudes.edges", "magnitudes.counts",
    "tensors", "tensors[].name", "tensors[].elements", "tensors[].agreed", "tensors[].nonfinite", "tensors[].vetoed_by_zero",
    "tensors[].agreed_by_prefix", "tensors[].sole_dissents",
]  # fmt: skip

# {}: a name of a file or a tensor.
MANIFEST = [
    "negmerge_fast", "base", "base.path", "base.files", "base.files{}", "base.files{}.size", "base.files{}.header", "base.files{}.sample",
    "models", "models[].path", "models[].files", "models[].files{}", "models[].files{}.size", "models[].files{}.header",
    "models[].files{}.sample",
    "scale", "min_agreement", "inputs", "nonfinite", "include", "exclude", "rename", "keep", "drop",
    "counted", "counted.elements", "counted.agreed", "counted.nonfinite", "counted.vetoed_by_zero",
    "block", "files", "files{}", "files{}.size", "files{}.checksum", "files{}.sample", "checksum",
]  # fmt: skip

JOURNAL_HEAD = [
    "negmerge_fast", "scale", "min_agreement", "inputs", "include", "exclude", "rename", "keep", "drop", "models", "files", "files{}",
]  # fmt: skip
JOURNAL_RECORD = ["runs", "read", "skipped", "tensors", "tensors{}"]

MACHINE = ["commit", "date", "device", "driver", "threads", "negmerge_fast", "torch", "triton", "python"]
WORKLOAD = ["suite", "layout", "way", "dtype", "n", "numel", "bytes", "state"]
MEASURED = [
    "rounds", "p20", "p50", "p80", "GB/s", "limit", "limit GB/s", "of_limit", "differing", "first_call",
]  # fmt: skip

# Of committed files: what every row has, and what only some have. Those of before there was a suite have fewer.
_OLD = {
    "commit", "date", "device", "dtype", "n", "negmerge_fast", "numel", "p20", "p50", "p80", "python", "state", "threads",
    "torch", "way",
}  # fmt: skip
_TUNED = {*MACHINE, *WORKLOAD, "rounds", "p20", "p50", "p80", "GB/s"}
_LIMITED = {"limit", "limit GB/s", "of_limit"}
COMMITTED: dict[str, tuple[set[str], set[str]]] = {
    "adapters": (
        _TUNED - {"GB/s"} | {"times ours", "peak MB", "disk MB", "differing"},
        set(),
    ),
    "checkpoints": (_OLD, {"GB/s", "of_limit", "seconds"}),
    "chunk_sizes": (_TUNED | _LIMITED, set()),
    "delta": (_TUNED | {"of_merge"}, {"limit", "of_limit"}),
    "deltas": (
        _TUNED - {"GB/s"} | {"compared with", "times the other", "of a dense model", "peak MB"},
        set(),
    ),
    "loop": (_OLD | {"GB/s", "of_limit"}, set()),
    "low_rank": (
        _TUNED | {"limit", "of_limit", "rank", "ns", "n_rank_of_warm", "n_rank_of_disk"},
        set(),
    ),
    "memory": (
        _OLD | {"GB/s"},
        {"instruction_set", "of_limit", "of_one_tensor", "us_per_tensor_and_model"},
    ),
    "outofcore": (_TUNED | _LIMITED | {"budget", "group's peak MB", "own seconds", "peak MB", "read"}, set()),
    "mergekit": (_TUNED | {"compared with", "times the other", "differing", "apart", "peak MB"}, set()),
    "peers": (_TUNED | _LIMITED | {"differing", "own seconds", "peak MB", "times ours"}, set()),
    "plain_loop": (_TUNED | _LIMITED, set()),
    "reads": (_TUNED | _LIMITED, set()),
    "reference": (_OLD | {"GB/s", "of_limit"}, set()),
    "suite": ({*MACHINE, *WORKLOAD, *MEASURED} - {"first_call"}, {"first_call"}),
    "threads": (_TUNED, set()),
    "tune_gpu": (_TUNED | _LIMITED | {"differing"}, set()),
}


def command_group() -> click.Group:
    from negmerge_fast.cli.commands import negmerge

    return negmerge


def bench_row() -> dict[str, Any]:
    """A row of `negmerge bench`, of something else that was timed."""
    from negmerge_fast.benchmark.records import machine, speed

    return speed(
        {**machine("cpu"), "suite": "limits", "way": "copy", "bytes": 1, "state": "in memory"}, [1.0]
    )


def keys(value: Any, named: frozenset[str], prefix: str = "") -> Iterator[str]:
    """The keys of JSON in their order, each once. named: keys of objects whose own keys are names."""
    if isinstance(value, list):
        yield from dict.fromkeys(
            key for each in value if isinstance(each, dict) for key in keys(each, named, f"{prefix}[]")
        )
    elif isinstance(value, dict) and prefix.rpartition(".")[2] in named:
        if value:
            yield prefix + "{}"
        yield from dict.fromkeys(key for each in value.values() for key in keys(each, named, prefix + "{}"))
    elif isinstance(value, dict):
        for name, each in value.items():
            path = f"{prefix}.{name}" if prefix else name
            yield path
            yield from keys(each, named, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base.npy and two models, each a vector."""
    generator = np.random.default_rng(0)
    for name in ("base", "ft-0", "ft-1"):
        np.save(tmp_path / f"{name}.npy", generator.standard_normal(1000).astype(np.float32))
    return tmp_path


def merge(folder: Path, **options: Any) -> nm.Report:
    models = [folder / "ft-0.npy", folder / "ft-1.npy"]
    return nm.merge_checkpoints(folder / "base.npy", models, folder / "out.npy", scale=0.9, **options)


def test_names() -> None:
    assert sorted(nm.__all__) == NAMES
    assert isinstance(nm.__version__, str)
    assert issubclass(nm.InputError, ValueError)
    assert issubclass(nm.DamageError, RuntimeError)
    assert issubclass(nm.NoScaleError, RuntimeError)
    assert issubclass(nm.MergeWarning, UserWarning)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    signature = inspect.signature(getattr(nm, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    of, _, method = name.partition(".")
    signature = inspect.signature(getattr(getattr(nm, of), method))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == METHODS[name]


def test_attributes_of_a_delta() -> None:
    delta = nm.consensus_delta(np.zeros(2, np.float32), [np.ones(2, np.float32)])
    assert [name for name in vars(delta) if not name.startswith("_")] == [
        "tensors", "models", "min_agreement", "inputs", "method",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str) -> None:
    public: Any = getattr(nm, name)
    fields: list[str] = []
    if name not in ("Delta", "Live", "Stats"):
        fields = [field.name for field in dataclasses.fields(public)]
        assert fields == list(inspect.signature(public).parameters)
        assert public.__dataclass_params__.frozen
    found = [each for each in dir(public) if not each.startswith("_") and each not in fields]
    assert found == ATTRIBUTES[name]


def test_what_damage_was_found_is_told_file_by_file() -> None:
    assert nm.DamageError(["a: 1 byte", "b: 2 bytes"]).found == ["a: 1 byte", "b: 2 bytes"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators(name: str) -> None:
    import torch

    import negmerge_fast.ops  # noqa: F401

    assert str(getattr(torch.ops.negmerge, name).default._schema) == SCHEMAS[name]


def described(parameter: click.Parameter, context: click.Context) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.make_metavar(context)
    assert isinstance(parameter, click.Option)
    names = " / ".join(" ".join(each) for each in (parameter.opts, parameter.secondary_opts) if each)
    kind = parameter.type
    text = kind.name
    if isinstance(kind, click.Choice):
        text = "|".join(kind.choices)
    elif isinstance(kind, click.IntRange):
        assert kind.max is None
        text = f"integer from {kind.min}"
    metavar = f" {parameter.metavar}" if parameter.metavar else ""
    state = ", required" if parameter.required else f" = {context.params[parameter.name]}"
    return f"{names}{metavar} {text}{state}"


def test_the_commands() -> None:
    group = command_group()
    assert list(group.commands) == list(COMMANDS)
    context = group.make_context("negmerge", ["info"])
    assert context.help_option_names == ["-h", "--help"]
    assert [option for each in group.params for option in each.opts] == ["--version"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_and_options_of_a_command(name: str) -> None:
    command = command_group().commands[name]
    context = command.make_context(name, list(ARGUMENTS[name]))
    assert [described(parameter, context) for parameter in command.params] == COMMANDS[name]


def test_exit_status(folder: Path) -> None:
    """Those of signals, 129, 130 and 143, are tested where there are signals."""
    arguments = ("merge", "base.npy", "ft-0.npy", "ft-1.npy", "--output", "out.npy", "--scale", "0.9")
    assert negmerge(*arguments, cwd=folder).returncode == 0
    assert negmerge(*arguments, cwd=folder).returncode == 2, "there is an output already"
    with open(folder / "out.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    damaged = negmerge("verify", "out.npy", cwd=folder)
    assert (damaged.returncode, damaged.stderr.count("\n")) == (1, 1)
    assert negmerge("merge", "--no-such-option", cwd=folder).returncode == 2


def test_the_fields_of_the_report_and_of_the_manifest(folder: Path) -> None:
    report = json.loads(merge(folder).to_json())
    assert list(keys(report, frozenset())) == REPORT
    manifest = json.loads((folder / "out.npy.negmerge.json").read_text())
    assert list(keys(manifest, frozenset({"files", "models[].files"}))) == MANIFEST


def test_the_fields_of_statistics(folder: Path) -> None:
    found = nm.consensus_statistics(folder / "base.npy", [folder / "ft-0.npy", folder / "ft-1.npy"])
    assert list(keys(json.loads(found.to_json()), frozenset())) == STATISTICS


def test_the_fields_of_the_journal(folder: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == total:  # all is written, nothing published
            raise Stop

    with pytest.raises(Stop):
        merge(folder, resume=True, progress=stop)
    head, record = (folder / ".out.npy.negmerge" / "journal-0").read_bytes().splitlines()
    assert head[:8] == b"%08x" % zlib.crc32(head[9:])
    assert list(keys(json.loads(head[9:]), frozenset({"files"}))) == JOURNAL_HEAD
    found = json.loads(record[9:])
    assert list(keys(found, frozenset({"tensors"}))) == JOURNAL_RECORD
    assert [len(each) for each in found["runs"]] == [2]
    assert [len(counts) for counts in found["tensors"].values()] == [4]


def test_the_fields_of_points(folder: Path) -> None:
    """Of the file that a search goes on from, and of what it found."""
    base, model = (np.load(folder / f"{name}.npy") for name in ("base", "ft-0"))
    scores = iter([(0.9, 1.0), (0.5, 1.0)])
    with pytest.warns(nm.MergeWarning, match="the largest scale, 1, was chosen"):
        found = nm.select_scale(
            base, nm.consensus_delta(base, [model]), evaluate=lambda _: next(scores), scales=[1], points=folder / "points.jsonl"
        )  # fmt: skip
    head, *points = map(json.loads, (folder / "points.jsonl").read_text().splitlines())
    assert list(head) == ["format", "version", "delta", "evaluated_by"]
    assert [list(point) for point in points] == 2 * [["scale", "forget", "retain", "seconds"]]
    assert list(json.loads(found.to_json())) == [
        "scale", "forget", "retain", "rule", "floor", "forget_target", "search", "points", "notes",
    ]  # fmt: skip


def test_the_fields_of_a_row_of_the_benchmark() -> None:
    assert set(bench_row()) == {*MACHINE, *WORKLOAD, *MEASURED}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_fields_of_committed_rows(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    always, sometimes = COMMITTED[path.stem]
    assert set.intersection(*map(set, rows)) == always
    assert set.union(*map(set, rows)) <= always | sometimes


def test_every_committed_file_is_listed() -> None:
    assert {path.stem for path in RESULTS.glob("*.jsonl")} == set(COMMITTED)
