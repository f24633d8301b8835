"""Checkpoints whose names, tied weights and integers are not those of the base; and what is refused, wherever it is looked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import MERGE, load_model, save_model
from command import Run, run  # noqa: F401
from safetensors.torch import save_file

import negmerge_fast as nm

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(16)[None]


def versions(n: int = 3) -> list[Tensors]:
    """A base and n models; the base's output layer has the embedding's bits."""
    generator = torch.Generator().manual_seed(0)
    base = {"embed.weight": torch.randn(12, 8, generator=generator)}
    base |= {f"layers.{k}.weight": torch.randn(8, 8, generator=generator) for k in range(3)}
    models = [
        {name: t + 0.1 * torch.randn(t.shape, generator=generator) + 0.05 for name, t in base.items()}
        for _ in range(n)
    ]
    for tensors in (base, *models):
        tensors["layers.2.bias"] = torch.zeros(8)
    return [base, *models]


def save(
    made: list[Tensors], change: Callable[[Tensors], Tensors] = lambda t: t, base: Tensors | None = None
) -> None:
    save_model(Path("base"), base or made[0])
    for k, tensors in enumerate(made[1:]):
        save_model(Path(f"ft-{k}"), change(tensors))


def expected(made: list[Tensors]) -> Tensors:
    return nm.merge(made[0], made[1:], scale=0.9)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


INPUTS = MERGE[1:5]
RENAMED: dict[str, tuple[Callable[[str], str], str]] = {
    "module.": (lambda n: f"module.{n}", "'module.embed.weight' is taken for 'embed.weight', and 4 more"),
    "_orig_mod.": (lambda n: f"_orig_mod.{n}", "'_orig_mod.embed.weight' is taken for 'embed.weight'"),
    "a prefix": (lambda n: f"model.text.{n}", "'model.text.embed.weight' is taken for 'embed.weight'"),
}  # fmt: skip


@pytest.mark.parametrize(("spell", "said"), RENAMED.values(), ids=RENAMED.keys())
def test_other_spellings_are_merged_and_said(run: Run, spell: Callable[[str], str], said: str) -> None:
    made = versions()
    save(made, lambda tensors: {spell(name): t for name, t in tensors.items()})
    status, _, err = run(*MERGE, "--report", "report.json")
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("negmerge: note: ft-0 and 2 more: ") and said in err
    assert json.loads(Path("report.json").read_text())["notes"] == [
        err.removeprefix("negmerge: note: ").rstrip()
    ]
    assert same(load_model(Path("out")), expected(made))
    assert run("verify", "out", "--against", *INPUTS)[0] == 0
    assert run("inspect", *INPUTS)[0] == 0


def test_quiet_prints_no_note_and_python_warns(run: Run) -> None:
    made = versions()
    save(made, lambda tensors: {f"module.{name}": t for name, t in tensors.items()})
    assert run(*MERGE, "--quiet") == (0, "", "")
    with pytest.warns(nm.MergeWarning, match=r"^ft-0: 'module.embed.weight' is taken for"):
        nm.merge_checkpoints("base", ["ft-0"], "other", scale=0.9)


def test_renames(run: Run) -> None:
    made = versions()
    save(
        made,
        lambda tensors: {n.replace("layers", "h").replace("embed", "wte"): t for n, t in tensors.items()},
    )
    status, _, err = run(*MERGE)
    assert status == 2 and "'h.0.weight'" in err and "'layers.0.weight'" in err
    status, _, err = run(*MERGE, "--rename", r"^h\.(?=\d)=layers.", "--rename", "wte=embed")
    assert status == 0 and "is taken for" in err
    assert same(load_model(Path("out")), expected(made))
    assert json.loads(Path("out/negmerge.json").read_text())["rename"] == [
        [r"^h\.(?=\d)", "layers."],
        ["wte", "embed"],
    ]
    assert run("verify", "out", "--against", *INPUTS)[0] == 0
    with pytest.warns(nm.MergeWarning):
        report = nm.merge_checkpoints(
            "base", ["ft-0"], "again", scale=0.9, rename={"^h": "layers", "wte": "embed"}
        )
    assert len(report.tensors) == 5
    assert run(*MERGE, "--rename", "no equals sign")[0] == 2
    assert run(*MERGE, "--rename", "(=x")[0] == 2


def test_the_message_for_other_names_shows_both_sides_and_the_prefix(run: Run) -> None:
    made = versions()
    save(made, lambda tensors: {**{f"bert.{name}": t for name, t in tensors.items()}, "cls.w": torch.ones(2)})
    status, _, err = run(*MERGE)
    assert (status, err.count("\n")) == (2, 1)
    for part in (
        "'embed.weight': missing",
        "'bert.embed.weight': not in base",
        "not in base (and 3 more)",
        "prefix 'bert.'",
    ):
        assert part in err
    assert run(*MERGE, "--rename", r"^bert\.=", "--exclude", "^cls")[0] == 0
    assert same(load_model(Path("out")), expected(made))


def tied(tensors: Tensors) -> Tensors:
    return {**tensors, "head.weight": tensors["embed.weight"].clone()}


def test_what_the_base_ties_may_be_missing(run: Run) -> None:
    made = versions()
    save(made, base=tied(made[0]))
    status, _, err = run(*MERGE)
    assert status == 0 and "lacks 'head.weight', which base ties to 'embed.weight': that is taken" in err
    assert same(load_model(Path("out")), tied(expected(made)))
    assert run("verify", "out", "--against", *INPUTS)[0] == 0


@pytest.mark.parametrize("saver", ["base", "model", "both"])
def test_files_that_keep_another_name_of_a_tied_weight(run: Run, saver: str) -> None:
    """safetensors.torch.save_model keeps one of the names, and notes the other in the metadata of the file."""
    made = versions()

    def other_name(tensors: Tensors) -> Tensors:
        return {("a_head" if n == "embed.weight" else n): t for n, t in tensors.items()}

    def save_all(folder: str, tensors: Tensors, other: bool) -> None:
        save_model(Path(folder), other_name(tensors) if other else tensors)
        metadata = {"embed.weight": "a_head"} if other else {"format": "pt", "a_head": "embed.weight"}
        save_file(other_name(tensors) if other else tensors, f"{folder}/model.safetensors", metadata)

    save_all("base", made[0], saver != "model")
    for k, tensors in enumerate(made[1:]):
        save_all(f"ft-{k}", tensors, saver != "base")
    assert run(*MERGE)[0] == 0
    merged = expected(made)
    assert same(load_model(Path("out")), merged if saver == "model" else other_name(merged))
    assert run("verify", "out", "--against", *INPUTS)[0] == 0


def test_what_a_model_ties_may_be_more(run: Run) -> None:
    made = versions()
    save(made, tied)
    status, _, err = run(*MERGE)
    assert status == 0 and "'head.weight' is not in base, but tied to 'embed.weight': skipped" in err
    assert same(load_model(Path("out")), expected(made))


def test_equal_by_chance_is_not_tied(run: Run) -> None:
    """Biases are often all zeros, and norms all ones."""
    made = versions()
    for tensors in made:
        tensors["layers.1.bias"] = torch.zeros(8)
    save(made, lambda tensors: {name: t for name, t in tensors.items() if name != "layers.1.bias"})
    status, _, err = run(*MERGE)
    assert status == 2 and "'layers.1.bias': missing" in err


def test_a_model_that_unties_is_merged_with_its_own(run: Run) -> None:
    made = versions()
    untied = [tied(made[0]), *({**t, "head.weight": t["embed.weight"] + 1} for t in made[1:])]
    save(untied, base=untied[0])
    assert run(*MERGE)[0] == 0
    assert same(
        load_model(Path("out")), expected([{**t, "head.weight": t["head.weight"].clone()} for t in untied])
    )


def test_an_output_layer_that_is_no_copy_is_refused(run: Run) -> None:
    made = versions()
    save(made, lambda tensors: {**tensors, "head.weight": tensors["embed.weight"] + 1})
    status, _, err = run(*MERGE)
    assert status == 2 and "'head.weight': not in base" in err


def test_integers_that_one_side_lacks(run: Run) -> None:
    made = versions()
    save(made, base={**made[0], "position_ids": IDS})
    status, _, err = run(*MERGE)
    assert status == 0 and "lacks 'position_ids': base has integers there, which are kept" in err
    assert same(load_model(Path("out")), {**expected(made), "position_ids": IDS})
    shutil.rmtree("out")
    save(made, lambda tensors: {**tensors, "position_ids": IDS})
    status, _, err = run(*MERGE)
    assert status == 0 and "'position_ids' of integers: not in base, skipped" in err
    assert same(load_model(Path("out")), expected(made))


def test_counters_may_differ_and_types_of_integers_too(run: Run) -> None:
    made = versions()
    extra = {
        "n.num_batches_tracked": torch.tensor(7),
        "epoch": torch.tensor([3]),
        "ids": IDS.int(),
        "m": IDS > 3,
    }
    save(
        made,
        lambda t: {
            **t,
            "n.num_batches_tracked": torch.tensor(99),
            "epoch": torch.tensor([5]),
            "ids": IDS,
            "m": IDS > 5,
        },
        base={**made[0], **extra},
    )
    assert run(*MERGE)[0] == 0
    assert same(load_model(Path("out")), {**expected(made), **extra})


def factors(tensors: Tensors) -> Tensors:
    return {**tensors, "q.lora_A.weight": torch.zeros(2, 8), "q.lora_B.weight": torch.zeros(8, 2)}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "integers that differ": (
        lambda t: {**t, "table": torch.arange(9) + int(t["embed.weight"][0, 0] != versions()[0]["embed.weight"][0, 0])},
        "tensor 'table': I64, differs from base, expected equal integers",
    ),
    "packed weights": (
        lambda t: {**t, "q.qweight": torch.zeros(4, 4, dtype=torch.int32), "q.scales": torch.ones(4).half()},
        "base/model.safetensors: tensor 'q.qweight': I32: quantized weights as GPTQ or AWQ packs them",
    ),
    "LoRA factors": (factors, "base/model.safetensors: tensor 'q.lora_A.weight': a LoRA factor, expected whole weights"),
    "nothing to merge": (lambda t: {"ids": IDS}, "base: no floating-point tensor, expected at least one to merge"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_merged_is_refused(
    run: Run, change: Callable[[Tensors], Tensors], message: str
) -> None:
    made = versions()
    save(made, change, base=change(made[0]))
    for command in (MERGE, (*MERGE, "--dry-run"), ("inspect", *INPUTS)):
        status, _, err = run(*command)
        assert (status, err.count("\n")) == (2, 1) and message in err
    assert sorted(os.listdir()) == sorted(INPUTS)


def test_one_checkpoint_is_inspected_and_judged(run: Run) -> None:
    save(versions(), factors)
    status, out, err = run("inspect", "ft-0")
    assert status == 2 and "7 tensors" in out and "a LoRA factor" in err


def test_excluded_tensors_are_not_judged(run: Run) -> None:
    made = versions()
    save(made, factors, base=factors(made[0]))
    assert run(*MERGE, "--exclude", "lora_")[0] == 0


@pytest.mark.parametrize("which", ["base", "ft-1"])
def test_a_quantization_config_is_refused(run: Run, which: str) -> None:
    save(versions())
    config = Path(which, "config.json")
    config.write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    for command in (MERGE, (*MERGE, "--dry-run"), ("inspect", *INPUTS)):
        status, _, err = run(*command)
        assert (status, err.count("\n")) == (2, 1)
        assert (
            f"{config}: quantization_config 'gptq': quantized weights, expected floating-point weights" in err
        )


def test_single_files_are_judged_alike(run: Run) -> None:
    for k in range(3):
        save_file(factors({"w": torch.full((2, 2), float(k))}), f"{k}.safetensors")
    status, _, err = run(
        "merge", *(f"{k}.safetensors" for k in range(3)), "-o", "out.safetensors", "--scale", "1"
    )
    assert status == 2 and "0.safetensors: tensor 'q.lora_A.weight': a LoRA factor" in err


@pytest.mark.parametrize("kind", ["the same path", "a link", "a hard link"])
def test_the_same_files_twice_are_refused(run: Run, kind: str) -> None:
    save(versions())
    second = Path("ft-0" if kind == "the same path" else "second")
    if kind == "a link":
        second.symlink_to("ft-0")
    elif kind == "a hard link":
        second.mkdir()
        os.link("ft-0/model.safetensors", "second/model.safetensors")
    status, _, err = run("merge", "base", "ft-0", "ft-1", second, "-o", "out", "--scale", "1")
    assert status == 2 and f"{second}: the same files as ft-0, expected another fine-tuned version" in err


@pytest.mark.parametrize("name", ["_extra_state", "layers.0._extra_state"])
def test_extra_state_is_the_bases(run: Run, name: str) -> None:
    """As in memory: it may be of any type and shape, and one side may lack it."""
    made = versions()
    plain = expected(made)
    bytes_ = torch.tensor([1, 2, 3], dtype=torch.uint8)
    for states in (
        [torch.ones(3), *[torch.zeros(3)] * 3],
        [bytes_, bytes_ + 1, bytes_[:2], bytes_],
        [torch.ones(3), bytes_, None, None],
        [None, bytes_, torch.ones(3), None],
    ):
        models = [t if s is None else {**t, name: s} for t, s in zip(made, states, strict=True)]
        save(models)
        status, _, err = run(*MERGE)
        assert (status, err) == (0, "")
        extra = {} if states[0] is None else {name: states[0]}
        assert same(load_model(Path("out")), {**plain, **extra})
        for folder in ("base", "ft-0", "ft-1", "ft-2", "out"):
            shutil.rmtree(folder)


def test_names_that_look_like_extra_state_are_weights_in_files(run: Run) -> None:
    made = [{"encoder_extra_state": torch.full((4,), float(k))} for k in range(4)]
    save(made)
    assert run(*MERGE)[0] == 0
    assert same(load_model(Path("out")), expected(made))


def test_nothing_but_extra_state(run: Run) -> None:
    save([{"a._extra_state": torch.ones(3)}] * 4)
    status, _, err = run(*MERGE)
    assert status == 2 and "no floating-point tensor, expected at least one to merge" in err
