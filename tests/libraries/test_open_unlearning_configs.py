"""The recipe's configurations, composed by Hydra in a folder with the groups and keys that open-unlearning's have."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from library_models import MARKS

pytest.importorskip("hydra")
pytestmark = MARKS

RECIPE = Path(__file__).parents[2] / "examples" / "open_unlearning"

# A stand-in: the groups of open-unlearning's configs/, with what the recipe selects and overrides, and little else.
CONFIGS = {
    "train": "defaults: [_self_, {model: Llama-3.1-8B-Instruct}, {trainer: finetune}, {data: finetune}, {eval: tofu}, {hydra: default}, "
    "{paths: default}, {experiment: null}]\nmode: train\ntask_name: ???\n",
    "eval": "# @package _global_\ndefaults: [_self_, {model: Llama-3.1-8B-Instruct}, {eval: tofu}, {paths: default}, {hydra: eval}, "
    "{experiment: null}]\nmodel: {model_args: {device_map: cuda}}\nmode: eval\ntask_name: ???\nseed: 0\n",
    **{
        f"model/{name}": "model_args: {pretrained_model_name_or_path: other, attn_implementation: flash_attention_2, torch_dtype: bfloat16}\n"
        for name in (
            "Llama-3.1-8B-Instruct",
            "Llama-3.2-1B-Instruct",
            "Llama-3.2-3B-Instruct",
            "Llama-2-7b-hf",
        )
    },
    "trainer/finetune": "handler: FinetuneTrainer\nargs: {per_device_train_batch_size: 8, gradient_accumulation_steps: 4, learning_rate: 1e-5, "
    "num_train_epochs: 10, seed: 0, do_eval: true, eval_on_start: true, eval_strategy: epoch, report_to: wandb, "
    "output_dir: '${paths.output_dir}'}\n",
    "data/finetune": "defaults: [{datasets@train: TOFU_QA_full}, {datasets@eval: null}]\n",
    "data/datasets/TOFU_QA_full": "TOFU_QA_full: {handler: QADataset}\n",
    "data/datasets/TOFU_QA_forget": "TOFU_QA_forget: {handler: QADataset, args: {hf_args: {name: forget10, path: locuslab/TOFU}}}\n",
    "data/datasets/MUSE_forget": "MUSE_forget: {handler: PretrainingDataset, args: {hf_args: {name: raw, path: muse-bench/MUSE-News}}}\n",
    "eval/tofu": "# @package eval.tofu\ndefaults: [{tofu_metrics: [forget_Q_A_Prob, mia_loss, model_utility]}]\nhandler: TOFUEvaluator\n"
    "output_dir: ${paths.output_dir}\nmetrics: {}\noverwrite: false\nforget_split: forget10\nholdout_split: holdout10\n"
    "retain_logs_path: null\nquestion_key: question\n",
    **{
        f"eval/{group}_metrics/{name}": f"# @package eval.{group}.metrics.{name}\nhandler: some\n"
        for group, names in {
            "tofu": ("forget_Q_A_Prob", "mia_loss", "model_utility"),
            "muse": ("forget_verbmem_ROUGE", "retain_knowmem_ROUGE", "privleak"),
        }.items()
        for name in names
    },
    "paths/default": "root_dir: .\noutput_dir: ${paths.root_dir}/saves/${mode}/${task_name}\n",
    "hydra/default": "run: {dir: '${paths.output_dir}'}\n",
    "hydra/eval": "defaults: [default]\nrun: {dir: '${paths.output_dir}'}\n",
}

# Writes the configuration that it was given, and the scores of an evaluation, as the scripts of its name do.
SCRIPT = """
import json, pathlib, hydra
from omegaconf import OmegaConf

@hydra.main(version_base=None, config_path="../configs", config_name="{name}.yaml")
def main(cfg):
    found = OmegaConf.to_container(cfg, resolve=True)
    out = pathlib.Path(found["paths"]["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "found.json").write_text(json.dumps(found))
    for name, each in (found.get("eval") or {{}}).items():
        (out / f"{{name.upper()}}_SUMMARY.json").write_text(json.dumps(dict.fromkeys(each["metrics"], 0.5)))
    print("evaluated")

main()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in CONFIGS.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "src").mkdir()
    for name in ("train", "eval"):
        (tmp_path / "src" / f"{name}.py").write_text(SCRIPT.format(name=name))
    (tmp_path / "negmerge").symlink_to(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(experiment: str, *overrides: str) -> dict[str, Any]:
    command = [
        sys.executable, "src/train.py", "--config-name=train.yaml", "--config-dir=negmerge/configs",
        f"experiment={experiment}", "task_name=one", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(Path("saves/finetune/one/found.json").read_text())
    return found


def test_finetuning_of_tofu(folder: Path) -> None:
    found = train(
        "finetune/tofu/negmerge",
        "forget_split=forget05",
        "trainer.args.learning_rate=3e-5",
        "trainer.args.seed=4",
    )
    assert (
        found["model"]["model_args"]["pretrained_model_name_or_path"]
        == "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
    )
    assert list(found["data"]["train"]) == ["TOFU_QA_forget"]
    assert found["data"]["train"]["TOFU_QA_forget"]["args"]["hf_args"]["name"] == "forget05"
    assert found.get("eval") is None
    given = found["trainer"]["args"]
    assert (given["learning_rate"], given["seed"], given["report_to"]) == (3e-5, 4, "none")
    assert (given["do_eval"], given["eval_on_start"], given["eval_strategy"]) == (False, False, "no")
    assert given["output_dir"] == "./saves/finetune/one"


def test_finetuning_of_muse(folder: Path) -> None:
    found = train("finetune/muse/negmerge", "data_split=Books")
    assert found["model"]["model_args"]["pretrained_model_name_or_path"] == "muse-bench/MUSE-Books_target"
    assert list(found["data"]["train"]) == ["MUSE_forget"]
    assert found["data"]["train"]["MUSE_forget"]["args"]["hf_args"] == {
        "name": "raw",
        "path": "muse-bench/MUSE-Books",
    }
    assert found.get("eval") is None and found["trainer"]["args"]["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    ("suite", "override", "metrics"),
    [
        ("tofu", "forget_split=forget05", ["forget_Q_A_Prob", "model_utility"]),
        ("muse", "data_split=Books", ["forget_verbmem_ROUGE", "retain_knowmem_ROUGE"]),
    ],
)
def test_evaluation(
    suite: str, override: str, metrics: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It prints scores of the metrics that it asks for, and of no others; paths may have any characters."""
    main = runpy.run_path("negmerge/evaluate.py")["main"]
    main(suite, "/models/it's λ=0.5, {a}", "saves/eval/at 0.5", override)
    printed, logged = capfd.readouterr()
    assert json.loads(printed) == {"forget": 0.5, "retain": 0.5} and "evaluated" in logged
    found = json.loads(Path("saves/eval/at 0.5/found.json").read_text())
    assert found["model"]["model_args"]["pretrained_model_name_or_path"] == "/models/it's λ=0.5, {a}"
    evaluation = found["eval"][suite]
    assert sorted(evaluation["metrics"]) == metrics and evaluation["overwrite"] is True
    key, value = override.split("=")
    assert evaluation[key] == value and list(found["eval"]) == [suite]
