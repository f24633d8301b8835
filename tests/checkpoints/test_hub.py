"""Names of the hub and its cache, of which the tests make their own. No network is used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import load_model, read_manifest, save_model
from command import Run
from command import run as run
from hub_server import COMMIT, Hub, serving
from safetensors.torch import save_file

import negmerge_fast as nm
from negmerge_fast.checkpoints import hub
from negmerge_fast.core.errors import InputError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
OTHERS = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
OTHER_COMMIT = "f" * 40


def cached(
    cache: Path, name: str, weights: dict[str, torch.Tensor], commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A model in a cache, with links to blobs as huggingface_hub makes them."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = save_model(folder / "snapshots" / commit, weights, [[key] for key in weights])
    (folder / "blobs").mkdir(exist_ok=True)
    for file in sorted(snapshot.iterdir()):
        blob = folder / "blobs" / f"{commit[:4]}-{file.name}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in a folder with nothing else."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "hub").mkdir(parents=True)
    return tmp_path / "home" / "hub"


def refused(path: str | Path) -> str:
    with pytest.raises(InputError) as error:
        hub.find(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_name_is_the_snapshot_of_main(cache: Path) -> None:
    snapshot = cached(cache, "org/name", WEIGHTS)
    assert hub.find("org/name") == (snapshot, f"org/name: revision {COMMIT} in the cache")
    assert hub.resolve("org/name@main") == snapshot == hub.resolve(f"org/name@{COMMIT}")
    assert hub.name_of(snapshot) == f"org/name@{COMMIT}"


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache: Path) -> None:
    main = cached(cache, "org/name", WEIGHTS)
    other = cached(cache, "org/name", OTHERS, OTHER_COMMIT, "refs/pr/1")
    assert hub.resolve("org/name") == main
    assert hub.resolve("org/name@refs/pr/1") == other == hub.resolve(f"org/name@{OTHER_COMMIT}")
    message = refused("org/name@v2")
    assert message.startswith(
        "org/name@v2: no such file or directory, and the hub is not asked, as HF_HUB_OFFLINE is set"
    )
    assert f"not in the cache {cache}, which has org/name@{COMMIT}, org/name@{OTHER_COMMIT}" in message


def test_a_path_that_exists_wins(cache: Path) -> None:
    cached(cache, "org/name", WEIGHTS)
    save_model(Path("org/name"), OTHERS)
    assert hub.find("org/name") == (Path("org/name"), None)
    shutil.rmtree("org/name")
    Path("org/name").symlink_to("nowhere")
    assert hub.find("org/name") == (Path("org/name"), None)


@pytest.mark.parametrize(
    "path",
    [
        "name", "./org/name", "../org/name", "/org/name", "org/name/more", "org/model.safetensors", "org/x.npy", "org/x.pt",
        "org/na me", "org/na--me", "org/na..me", "org/name@", "org/", "/", "org/" + "n" * 97, "models/x.json", "@x/y", "örg/name",
    ],
)  # fmt: skip
def test_what_is_no_name_is_a_path(cache: Path, path: str) -> None:
    assert hub.find(path) == (Path(path), None)


def test_a_path_of_python_is_no_name(cache: Path) -> None:
    cached(cache, "org/name", WEIGHTS)
    assert hub.find(Path("org/name")) == (Path("org/name"), None)
    with pytest.raises(InputError, match=r"^org/name: no such file or directory$"):
        nm.merge_checkpoints(Path("org/name"), ["x"], "out", scale=1)


@pytest.mark.parametrize(
    "variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"]
)
def test_the_cache_is_where_the_environment_says(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv(variable, str(tmp_path / "here"))
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    assert hub.cache_folder() == tmp_path / "here" / below.get(variable, "")


def test_roots_of_a_cache_with_one_model(cache: Path) -> None:
    snapshot = cached(cache, "org/name", WEIGHTS)
    folder = cache / "models--org--name"
    (cache / "version.txt").write_text("1")
    (cache / "models--org--empty" / "refs").mkdir(parents=True)
    (cache / "datasets--org--data" / "snapshots" / COMMIT).mkdir(parents=True)
    (cache.parent / "token").write_text("")
    for root in (folder / "snapshots", folder, cache, cache.parent, f"{cache}/"):
        assert hub.find(root) == (snapshot, f"{Path(root)}: org/name@{COMMIT}")
    assert hub.find(snapshot) == (snapshot, None)


def test_roots_of_a_cache_with_several_models_or_revisions(cache: Path) -> None:
    main = cached(cache, "org/name", WEIGHTS)
    cached(cache, "org/name", OTHERS, OTHER_COMMIT, "v1")
    folder = cache / "models--org--name"
    assert hub.resolve(folder) == main  # as the hub takes it
    (folder / "refs" / "main").unlink()
    message = refused(folder)
    assert message.startswith(f"{folder}: a cache of the hub with 2 revisions, expected one of ")
    assert str(main) in message and OTHER_COMMIT in message
    cached(cache, "org/name-2", WEIGHTS)
    for root in (cache, cache.parent):
        assert (
            refused(root)
            == f"{cache}: a cache of the hub with 2 models, expected one of org/name, org/name-2"
        )


def test_a_model_is_no_cache(cache: Path) -> None:
    """Whatever lies beside its weights."""
    path = save_model(Path("model"), WEIGHTS)
    cached(path / "hub", "org/name", OTHERS)
    cached(path, "org/name", OTHERS)
    assert hub.find(path) == (path, None)


def test_shards_that_are_missing_are_named(cache: Path) -> None:
    snapshot = cached(cache, "org/name", WEIGHTS)
    shard = "model-00002-of-00002.safetensors"
    for spoil in ((snapshot / shard).resolve(), snapshot / shard, snapshot / "model.safetensors.index.json"):
        spoil.unlink()  # the blob, the link; then only the name of the other shard tells
        assert refused("org/name").endswith(f"; in the cache {snapshot} is without {shard}")
    for file in snapshot.iterdir():
        if file.suffix == ".safetensors":
            file.unlink()
    assert refused("org/name").endswith(f"; in the cache {snapshot} is without all weights")


def test_what_the_list_of_files_has_and_the_cache_lacks(cache: Path) -> None:
    """huggingface_hub keeps the list. Weights are needed; of other files it is said."""
    snapshot = cached(cache, "org/name", WEIGHTS)
    names = [*(file.name for file in snapshot.iterdir()), "vocab.txt", "model.onnx", "README.md"]
    listed = cache / "models--org--name" / "trees" / f"{COMMIT}.json"
    listed.parent.mkdir()

    def list_files(*more: str) -> None:
        listed.write_text(
            json.dumps({"format_version": 1, "files": {name: {"size": 1} for name in [*names, *more]}})
        )

    list_files()
    assert hub.find("org/name") == (
        snapshot, f"org/name: revision {COMMIT} in the cache, without vocab.txt, README.md"
    )  # fmt: skip
    list_files("modules.json", "2_Dense/model.safetensors")
    assert "without vocab.txt, README.md, modules.json, 2_Dense/model.safetensors" in refused("org/name")
    for content in ("", "[]", "{}", '{"files": 1}', "[" * 10_000):
        listed.write_text(content)
        assert hub.find("org/name").note == f"org/name: revision {COMMIT} in the cache"


def test_malformed_indexes_are_told_of_by_whoever_opens_them(cache: Path) -> None:
    snapshot = cached(cache, "org/name", WEIGHTS)
    index = snapshot / "model.safetensors.index.json"
    index.unlink()
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        if "1" not in content:
            assert hub.resolve("org/name") == snapshot


def test_without_huggingface_hub_the_cache_can_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(cache, "org/name", WEIGHTS)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.resolve("org/name") == snapshot
    message = "org/other: no such file or directory, and the hub can only be asked with huggingface_hub: pip install huggingface_hub"
    assert refused("org/other") == f"{message}; not in the cache {cache}"


def test_ordinary_paths_do_not_import_it() -> None:
    code = "import sys; from negmerge_fast.checkpoints import hub; hub.find('.'); print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


LISTED = [
    ({"model.safetensors", "config.json", "vocab.txt"}, {"pytorch_model.bin", "tf_model.h5", "model.onnx", ".gitattributes"}),
    ({"model.safetensors"}, {"consolidated.safetensors", "model.fp16.safetensors", "onnx/model.onnx", "checkpoint-5/model.safetensors"}),
    (
        {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
        {"consolidated-00001-of-00002.safetensors", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"},
    ),
    ({"pytorch_model.bin", "config.json"}, {"flax_model.msgpack", "training_args.pt"}),
    ({"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}, {"model.gguf"}),
    ({"adapter_model.safetensors", "adapter_config.json"}, {"adapter_model.bin", "training_args.bin", "optimizer.pt"}),
    ({"adapter_model.bin", "adapter_config.json"}, {"training_args.bin"}),
    ({"model.fp16.safetensors"}, {"model.bin"}),
    ({"classifier.pt"}, {"classifier.onnx"}),
    ({"delta.safetensors"}, set()),
    ({"modules.json", "model.safetensors", "2_Dense/model.safetensors", "2_Dense/config.json"}, {"2_Dense/pytorch_model.bin"}),
    ({"model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"}, {"v1-5-pruned.safetensors"}),
    ({"model.safetensors", "additional_chat_templates/rag.jinja"}, {"assets/logo.txt"}),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "others"), LISTED)
def test_only_what_is_read_or_copied_is_fetched(wanted: set[str], others: set[str]) -> None:
    assert set(hub.files_to_fetch(sorted(wanted | others))) == wanted


# --- Commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def models_by_name(cache: Path) -> list[str]:
    """A base and two versions in the cache, by their names."""
    names = ["org/base", "org/ft-0", "org/ft-1@v1"]
    for k, name in enumerate(names):
        weights = {key: tensor + k / 8 for key, tensor in WEIGHTS.items()}
        model, _, revision = name.partition("@")
        cached(cache, model, weights, ref=revision or "main")
    return names


def test_every_command_takes_names(models_by_name: list[str], run: Run, cache: Path) -> None:
    def done(*arguments: object) -> tuple[str, str]:
        status, out, err = run(*arguments)
        assert status == 0, err
        return out, err

    base = models_by_name[0]
    out, _ = done("inspect", *models_by_name)
    assert "can be merged: 2 tensors" in out
    _, err = done("merge", *models_by_name, "--output", "out", "--scale", 0.5, "--report", "report.json")
    notes = [f"{name}: revision {COMMIT} in the cache" for name in models_by_name]
    assert err.splitlines() == [f"negmerge: note: {note}" for note in notes]
    report = json.loads(Path("report.json").read_text())
    assert report["notes"] == notes
    assert report["base"] == str(cache / "models--org--base" / "snapshots" / COMMIT)
    manifest = read_manifest()
    assert manifest["base"]["path"] == f"org/base@{COMMIT}"
    assert [model["path"] for model in manifest["models"]] == [f"org/ft-0@{COMMIT}", f"org/ft-1@{COMMIT}"]
    assert not any(file.is_symlink() for file in Path("out").iterdir())
    done("verify", "out", "--against", *models_by_name)
    done("delta", *models_by_name, "--output", "delta")
    done("inspect", base, "delta")
    _, err = done("apply", base, "delta", "--scale", 0.5, "--output", "applied")
    assert notes[0] in err
    for name, tensor in load_model(Path("out")).items():
        assert torch.equal(tensor, load_model(Path("applied"))[name])
    done("report", *models_by_name, "--output", "page")
    command = 'echo \'{"forget": -{scale}, "retain": 1}\' #{model}'
    done("select", base, "delta", "--eval", command, "--output", "chosen", "--scale", 0.5)
    status, _, err = run("merge", *models_by_name, "org/absent", "--output", "out-2", "--scale", 0.5)
    assert (
        status == 2
        and err.startswith("negmerge: org/absent: no such file or directory, ")
        and err.count("\n") == 1
    )


@pytest.mark.filterwarnings("ignore::negmerge_fast.MergeWarning")
def test_every_function_takes_names(models_by_name: list[str], cache: Path) -> None:
    base, *models = models_by_name
    with pytest.warns(nm.MergeWarning, match="org/base: revision"):
        nm.merge_checkpoints(base, (name for name in models), "out", scale=0.5)  # type: ignore[arg-type]
    assert nm.verify_checkpoint("out", against=[base, *models]).blocks
    with pytest.warns(nm.MergeWarning, match="org/base: revision"):
        (cache / "models--org--delta" / "snapshots").mkdir(parents=True)
        nm.delta_checkpoints(base, models, cache / "models--org--delta" / "snapshots" / COMMIT)
    (cache / "models--org--delta" / "refs").mkdir()
    (cache / "models--org--delta" / "refs" / "main").write_text(COMMIT)
    with pytest.warns(nm.MergeWarning, match="org/delta: revision"):
        nm.apply_delta(base, "org/delta", "applied", scale=0.5)
    assert nm.consensus_statistics(base, models).model_count == 2
    assert nm.consensus_statistics("org/delta").model_count == 2
    for name, tensor in load_model(Path("out")).items():
        assert torch.equal(tensor, load_model(Path("applied"))[name])


def test_adapters_of_the_hub_are_merged_in_memory(cache: Path) -> None:
    snapshot = cache / "models--org--adapter" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    factors = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.tensor([[1.0], [-1.0]])}
    save_file(
        {f"base_model.model.a.{name}": tensor for name, tensor in factors.items()},
        snapshot / "adapter_model.safetensors",
    )
    (snapshot / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["a"]}'
    )
    (cache / "models--org--adapter" / "refs").mkdir()
    (cache / "models--org--adapter" / "refs" / "main").write_text(COMMIT)
    merged = nm.merge({"a.weight": torch.zeros(2, 3)}, ["org/adapter"], scale=1)
    assert merged["a.weight"].tolist() == [[-2.0] * 3, [2.0] * 3]


# --- Fetching, from a hub on this machine -------------------------------------------------------------------------


@pytest.fixture
def local_hub(cache: Path, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    model = save_model(tmp_path / "served", WEIGHTS, [["a"], ["b"]])
    for name in ("pytorch_model.bin", "model.onnx", "vocab.txt"):
        (model / name).write_bytes(b"some text\n")
    with serving({"org/name": model}) as found:
        yield found


def fetched(hub_: Hub, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run negmerge beside that hub. It reads where that is when it is imported, so that it takes another process."""
    variables = {**os.environ, "HF_ENDPOINT": hub_.address, "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-m", "negmerge_fast", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.processes
def test_a_model_is_fetched_once(local_hub: Hub, cache: Path) -> None:
    done = fetched(local_hub, "inspect", "org/name")
    assert (done.returncode, done.stderr) == (0, "")
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    assert done.stdout.startswith(f"{snapshot}: directory, 2 weight files")
    assert {file.name for file in snapshot.iterdir()} == {
        "config.json", "tokenizer.json", "vocab.txt", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert hub.find("org/name") == (snapshot, f"org/name: revision {COMMIT} in the cache")
    # What is missing is fetched again, and nothing else.
    local_hub.asked.clear()
    for path in (snapshot / "vocab.txt", snapshot / "model-00002-of-00002.safetensors"):
        path.resolve().unlink()
        path.unlink()
    assert fetched(local_hub, "inspect", "org/name").returncode == 0
    assert sorted(local_hub.asked) == ["model-00002-of-00002.safetensors", "vocab.txt"]
    # Files that only a base needs can do without.
    (snapshot / "vocab.txt").unlink()
    local_hub.status = 500
    assert fetched(local_hub, "inspect", "org/name").returncode == 0


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("org/absent", None, "has no such model, or a private one: `hf auth login`"),
        ("org/name@nowhere", None, "has org/name without a revision nowhere"),
        ("org/name", 401, "has no such model, or a private one: `hf auth login`"),
        ("org/name", 403, "wants its terms accepted first, at https://huggingface.co/org/name, and `hf auth login`"),
    ],
)  # fmt: skip
def test_refusals_of_the_hub_are_one_line(
    local_hub: Hub, cache: Path, name: str, status: int | None, message: str
) -> None:
    local_hub.status = status
    done = fetched(local_hub, "inspect", name)
    assert done.returncode == 2
    expected = (
        f"negmerge: {name}: no such file or directory, and the hub {message}; not in the cache {cache}\n"
    )
    assert done.stderr == expected


@pytest.mark.processes
def test_a_hub_out_of_reach_is_one_line(local_hub: Hub, cache: Path) -> None:
    done = fetched(local_hub, "inspect", "org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert re.fullmatch(
        f"negmerge: org/name: no such file or directory, and the hub cannot be asked: [^\n]+; not in the cache {re.escape(str(cache))}\n",
        done.stderr,
    )
