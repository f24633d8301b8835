"""Evaluates a model with open-unlearning and prints its scores as `negmerge select` reads them. Run it in open-unlearning's folder.

python negmerge/evaluate.py tofu|muse MODEL OUTPUT [OVERRIDE...]

OUTPUT is where open-unlearning writes its results. It keeps what it finds there, so that each model needs a directory of its own.
An override is one of Hydra's, such as model=Llama-3.2-3B-Instruct or forget_split=forget05.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"
# The metrics of forgetting, better the lower, and of what is kept, better the higher.
SCORES = {
    "tofu": {"forget": "forget_Q_A_Prob", "retain": "model_utility"},
    "muse": {"forget": "forget_verbmem_ROUGE", "retain": "retain_knowmem_ROUGE"},
}


def quoted(path: str) -> str:
    """A value that Hydra's grammar takes as it is."""
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def main(benchmark: str, model: str, output: str, *overrides: str) -> None:
    command = [
        sys.executable, "src/eval.py", "--config-name=eval.yaml", f"--config-dir={CONFIGS}",
        f"experiment=eval/{benchmark}/negmerge",
        f"model.model_args.pretrained_model_name_or_path={quoted(model)}",
        f"paths.output_dir={quoted(output)}",
        *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    summary = json.loads((Path(output) / f"{benchmark.upper()}_SUMMARY.json").read_text(encoding="utf-8"))
    print(json.dumps({score: summary[metric] for score, metric in SCORES[benchmark].items()}))


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in SCORES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
