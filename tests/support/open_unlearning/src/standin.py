"""A stand-in for open-unlearning, which needs a GPU, a network and its data sets: its command lines, and its files in the same directories.

Its models are two matrices. Fine-tuning moves them along one direction, which is what there is to forget, and elsewhere at random. What
its commands refuse, hydra would: overrides of what the configuration does not have, and experiments that no directory has.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

SIZES = {"model.embed_tokens.weight": (64, 32), "model.layers.0.mlp.up_proj.weight": (96, 32)}
# Keys that the recipe overrides, of configs/train.yaml, configs/eval.yaml and what they include.
KNOWN = {
    "experiment", "task_name", "model", "forget_split", "holdout_split", "retain_logs_path", "data_split", "paths.output_dir",
    "model.model_args.pretrained_model_name_or_path", "model.model_args.torch_dtype", "model.model_args.attn_implementation",
    "trainer.args.learning_rate", "trainer.args.num_train_epochs", "trainer.args.weight_decay", "trainer.args.seed",
}  # fmt: skip
# Experiments that it has itself.
EXPERIMENTS = {"eval/tofu/default", "eval/muse/default"}

State = dict[str, np.ndarray]


def numbers(seed: int) -> State:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(size).astype(np.float32) for name, size in SIZES.items()}


BASE, FORGET = numbers(0), numbers(1)


def arguments(config: str) -> dict[str, str]:
    """Overrides by key, and the text of the experiment's file as "text"."""
    found, folders = {}, []
    for each in sys.argv[1:]:
        key, equals, value = each.partition("=")
        if key == "--config-name":
            assert value == config, each
        elif key == "--config-dir":
            folders.append(Path(value))
        else:
            assert equals and key in KNOWN, f"Could not override {key!r}"
            found[key] = re.sub(r"^'(.*)'$", r"\1", value)
    experiment = found["experiment"]
    files = [folder / "experiment" / f"{experiment}.yaml" for folder in folders]
    texts = [file.read_text() for file in files if file.is_file()]
    assert texts or experiment in EXPERIMENTS, f"Could not find 'experiment/{experiment}'"
    assert "task_name" in found or "task_name: ???" not in "".join(texts), (
        "Missing mandatory value: task_name"
    )
    return {"text": "".join(texts), **found}


def train() -> None:
    given = arguments("train.yaml")
    out = Path("saves", "finetune", given["task_name"])
    steps = 2e4 * float(given["trainer.args.learning_rate"]) * int(given["trainer.args.num_train_epochs"])
    noise = numbers(100 + int(given["trainer.args.seed"]))
    out.mkdir(parents=True)
    state = {name: BASE[name] + np.float32(steps) * (FORGET[name] + noise[name]) for name in BASE}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    # What Trainer and hydra leave beside it.
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}\n')
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "trainer_state.json",
        ".hydra/config.yaml",
        "FinetuneTrainer.log",
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}\n")
    (out / "training_args.bin").write_bytes(b"PK\x03\x04 pickled arguments")


def evaluate() -> None:
    given = arguments("eval.yaml")
    benchmark = given["experiment"].split("/")[1]
    out = Path(given.get("paths.output_dir", f"saves/eval/{given.get('task_name')}"))
    model = given["model.model_args.pretrained_model_name_or_path"]
    file = out / f"{benchmark.upper()}_EVAL.json"
    out.mkdir(parents=True, exist_ok=True)
    (out / "eval.log").write_text("")
    found = {} if "overwrite: true" in _evaluation(given) or not file.is_file() else _read(file)
    print("[INFO] ***** Running evaluation suite *****")  # to standard output, as hydra's logs
    if not found:
        scores = _scores(load_file(Path(model) / "model.safetensors"))
        names = {
            "tofu": ("forget_Q_A_Prob", "model_utility"),
            "muse": ("forget_verbmem_ROUGE", "retain_knowmem_ROUGE"),
        }[benchmark]
        found = {name: {"agg_value": score} for name, score in zip(names, scores, strict=True)}
        _write(file, found)
    _write(
        out / f"{benchmark.upper()}_SUMMARY.json", {name: each["agg_value"] for name, each in found.items()}
    )


def _evaluation(given: dict[str, str]) -> str:
    """The text of the evaluation that the experiment names, in the recipe's directory."""
    named = re.search(r"override /eval: (\w+)", given["text"])
    folder = next((each.partition("=")[2] for each in sys.argv if each.startswith("--config-dir=")), None)
    return Path(folder, "eval", f"{named[1]}.yaml").read_text() if named and folder else ""


def _scores(state: State) -> tuple[float, float]:
    """How much is left of what there is to forget, and how little has moved elsewhere."""
    moved = np.concatenate([(state[name] - BASE[name]).ravel() for name in BASE]).astype(np.float64)
    along = np.concatenate([FORGET[name].ravel() for name in BASE]).astype(np.float64)
    part = float(moved @ along / (along @ along))
    rest = moved - part * along
    return 1 / (1 + math.exp(-4 - 8 * part)), 0.6 * math.exp(-0.05 * float(rest @ rest / (along @ along)))


def _read(file: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(file.read_text())
    return found


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=4))
