"""Consensus deltas in memory: the bits and counts of merges, for every λ, and what is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import negmerge_fast as nm
from negmerge_fast.deltas import memory, storage
from negmerge_fast.deltas.job import delta_checkpoints

# The paper's 21 values with both signs, and some that overflow.
SCALES = [sign * k / 20 for k in range(21) for sign in (1, -1)] + [16.0, 1e30, 1e300]
TYPES = [
    pytest.param(base, models, id=f"{base}-{models}".replace("torch.", ""))
    for base, models in [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
    ]
]
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (5, 7), "vector": (3000,), "empty": (0, 3), "number": (), "blocks": (64, 33), "word": (64,),
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


def family(
    base: torch.dtype = torch.float32, models: torch.dtype | None = None, n: int = 3, hostile: bool = False
) -> list[Tensors]:
    """A base and n models. hostile: with zeros, subnormals, infinities, NaNs and numbers near the largest among them."""
    generator = torch.Generator().manual_seed(n)
    found: list[Tensors] = [{} for _ in range(n + 1)]
    for name, shape in SHAPES.items():
        middle = torch.randn(shape, generator=generator)
        found[0][name] = middle.to(base)
        for model in found[1:]:
            moved = middle + 0.1 * torch.randn(shape, generator=generator) + 0.05
            model[name] = moved.to(models or base)
    if hostile:
        for k, model in enumerate(found):
            vector = model["vector"]
            limits = torch.finfo(vector.dtype)
            odd = [torch.nan, torch.inf, -torch.inf, -0.0, limits.max, limits.min, limits.smallest_normal / 4]
            vector[40 * k : 40 * k + 7] = torch.tensor(odd, dtype=torch.float64).to(vector.dtype)
    return found


def copy(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(same_bits(t, right[name]) for name, t in left.items())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nm.MergeWarning)
        yield


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("min_agreement", [1.0, 0.6])
@pytest.mark.parametrize(("base", "models"), TYPES)
def test_the_bits_and_counts_of_a_merge(
    base: torch.dtype, models: torch.dtype, min_agreement: float, backend: str
) -> None:
    held = family(base, models, hostile=True)
    delta = nm.consensus_delta(held[0], held[1:], min_agreement=min_agreement, backend=backend)
    live_model = copy(held[0])
    with delta.live(live_model, backend=backend) as live:
        for scale in SCALES:
            merged, applied = copy(held[0]), copy(held[0])
            stats = nm.merge_(merged, held[1:], scale=scale, min_agreement=min_agreement)
            assert delta.apply_(applied, scale, backend=backend).tensors == stats.tensors
            live.scale = scale
            assert equal(applied, merged) and equal(live_model, merged)
            assert live.stats.tensors == stats.tensors
            changed = delta.changed(held[0], scale, backend=backend)
            assert changed == live.changed
            differing = {n: int((_bits(t) != _bits(held[0][n])).sum()) for n, t in merged.items()}
            assert {name: each.changed for name, each in changed.tensors.items()} == differing
        live.scale = None
        assert equal(live_model, held[0]) and live.stats.elements == 0
        live.scale = 0.9
    assert equal(live_model, held[0])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def test_the_counts_of_a_delta() -> None:
    held = family(torch.bfloat16, hostile=True)
    delta = nm.consensus_delta(held[0], held[1:])
    stats = nm.merge_(copy(held[0]), held[1:], scale=1e-3)
    assert delta.stats.tensors == stats.tensors and delta.stats.consensus_ratio == stats.consensus_ratio
    assert (delta.models, delta.min_agreement, delta.inputs) == (3, 1.0, "finetuned")
    changed = delta.changed(held[0], 1e-3)  # BF16 rounds most of such steps away
    assert 0 < changed.fraction < delta.stats.consensus_ratio and changed.elements == stats.elements
    assert changed.tensors["vector"].fraction == changed.tensors["vector"].changed / 3000


def test_task_vectors() -> None:
    base, *models = family()
    taus = [{name: t - base[name] for name, t in model.items()} for model in models]
    delta = nm.consensus_delta(base, taus, inputs="task_vectors")
    merged = nm.merge(base, taus, scale=0.7, inputs="task_vectors")
    delta.apply_(base, 0.7)
    assert equal(base, merged) and delta.inputs == "task_vectors"


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = family(hostile=True)
    whole = nm.consensus_delta(base, models)
    monkeypatch.setattr(memory, "CPU_BLOCK", 1024)
    parts = nm.consensus_delta(base, models)
    for name, delta in whole.tensors.items():
        assert delta.info == parts.tensors[name].info
        assert all(map(torch.equal, delta.packed, parts.tensors[name].packed))


def test_half() -> None:
    """Half the memory of means; those that are rounded to zero are in no mask."""
    base = {"w": torch.zeros(4)}
    models = [{"w": torch.tensor([1.0, 1.0 + 2**-8, 2.0**-149, 0.0])} for _ in range(2)]
    delta = nm.consensus_delta(base, models, half=True)
    assert delta.tensors["w"].packed.means.dtype == torch.bfloat16
    assert delta.stats.agreed == 2
    delta.apply_(base, 1.0)
    assert base["w"].tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_nonfinite_is_an_error_if_asked_for() -> None:
    base, good, bad = torch.ones(3), torch.tensor([2.0, 2.0, 2.0]), torch.tensor([2.0, torch.nan, 2.0])
    with pytest.raises(
        nm.InputError, match=r"finetuned\[1\]\['w'\]: element 1 in memory order: nan, expected"
    ):
        nm.consensus_delta({"w": base}, [{"w": good}, {"w": bad}], nonfinite="error")
    with pytest.warns(nm.MergeWarning, match="^the result: 1 element of 'w' not in the delta: not finite"):
        delta = nm.consensus_delta({"w": base}, [{"w": good}, {"w": bad}])
    with pytest.raises(nm.InputError, match=r"^delta\['w'\]: 1 element is not finite in a version, expected"):
        delta.apply_({"w": base}, 1.0, nonfinite="error")
    with pytest.warns(
        nm.MergeWarning, match="^the result: 1 element of 'w' left as in the base: not finite"
    ) as told:
        delta.apply_({"w": base.clone()}, 1.0)
    assert told[0].filename == __file__
    overflowing = nm.consensus_delta(torch.tensor([0.0, 1.0, 3e38]), [torch.tensor([0.0, 2.0, 3.2e38])])
    model = torch.tensor([0.0, 1.0, 3e38])
    with pytest.raises(
        nm.InputError, match=r"^model: element 2 in row-major order: the result is not finite"
    ):
        overflowing.apply_(model, -10.0, nonfinite="error")
    assert model.tolist() == torch.tensor([0.0, 1.0, 3e38]).tolist()
    overflowing.apply_(model, 1.0, nonfinite="error")


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(nm.InputError) as error:
        call()
    assert str(error.value) == message


def test_a_model_that_is_not_the_base() -> None:
    base, *models = family()
    delta = nm.consensus_delta(base, models)
    other = {**base, "matrix": torch.zeros(7, 5)}
    values = "other values in its middle than in the delta's base, expected that base, to which no delta was applied"
    for wrong, message in [
        (other, "delta['matrix']: shape (5, 7), expected (7, 5) like model"),
        ({**base, "more": torch.zeros(2)}, "delta['more']: missing, expected F32 (2,) like model"),
        ({n: t for n, t in base.items() if n != "word"}, "delta['word']: not in model"),
        (
            {**base, "word": base["word"].half()},
            "model['word']: dtype F16, expected F32 like the delta's base",
        ),
        (
            {**base, "word": base["word"].double()},
            "model['word']: dtype F64, expected F32 like the delta's base",
        ),
        ({**base, "word": base["word"] + 1}, f"model['word']: {values}"),
        ({**base, "number": base["number"] + 1}, f"model['number']: {values}"),
        ({**base, "word": base["vector"][:64].clone()}, f"model['word']: {values}"),
    ]:
        before = copy(wrong)
        refused(lambda wrong=wrong: delta.apply_(wrong, 0.9), message)
        refused(lambda wrong=wrong: delta.changed(wrong, 0.9), message)
        refused(lambda wrong=wrong: delta.live(wrong).__enter__(), message)
        assert equal(wrong, before)
    delta.apply_(base, 0.9)
    with pytest.raises(nm.InputError, match=values):
        delta.apply_(base, 0.9)
    for model in (base["word"], [base], 3):
        with pytest.raises(TypeError):
            delta.apply_(model, 0.9)
    for scale, message in ((float("nan"), "scale: nan, expected a finite number"),):
        refused(lambda scale=scale: delta.apply_(base, scale), message)
    with pytest.raises(TypeError, match="scale: None, expected a number"):
        delta.apply_(base, None)


@pytest.mark.parametrize("numel", [1, 31, 32, 33, 64, 65, 1001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_change_in_the_middle_is_noticed(dtype: torch.dtype, numel: int) -> None:
    base = torch.randn(numel, dtype=torch.float64).to(dtype)
    delta = nm.consensus_delta(base, [base + 1])
    scattered = torch.stack([base, base], 1)[:, 0]
    assert delta.changed(scattered, 1.0) == delta.changed(base, 1.0)
    scattered[numel // 2] += 1
    base[numel // 2] += 1
    for model in (base, scattered):
        with pytest.raises(nm.InputError, match=r"^model: other values in its middle"):
            delta.apply_(model, 1.0)


def test_what_is_not_chosen_is_left_alone() -> None:
    base, *models = family()
    delta = nm.consensus_delta(base, models, exclude="word|vector")
    assert delta.tensors.keys() == base.keys() - {"word", "vector"}
    merged = nm.merge(base, models, scale=0.9, exclude="word|vector")
    model = copy(base)
    with delta.live(model) as live:
        live.scale = 0.9
        assert equal(model, merged)
    assert equal(model, base)
    delta.apply_(base, 0.9)
    assert equal(base, merged)


def test_names_that_differ() -> None:
    base, *models = family()
    delta = nm.consensus_delta(base, models)
    merged = nm.merge(base, models, scale=0.9)
    wrapped = {f"module.{name}": t.clone() for name, t in base.items()}
    with pytest.warns(nm.MergeWarning) as told:
        delta.apply_(wrapped, 0.9)
    assert [each.filename for each in told] == [__file__]
    assert equal({name.removeprefix("module."): t for name, t in wrapped.items()}, merged)
    other = {f"x/{name}": t.clone() for name, t in base.items()}
    delta.apply_(other, 0.9, rename={"^": "x/"})
    assert equal({name.removeprefix("x/"): t for name, t in other.items()}, merged)


def test_tied_weights() -> None:
    """Written once; a delta of tied weights fits ones that are not, and the other way."""
    base, *models = (
        torch.randn(8, 8, generator=torch.Generator().manual_seed(k)).abs() + k for k in range(4)
    )
    merged = nm.merge(base, models, scale=0.5)
    apart = [{"embed": t.clone(), "head": t.clone()} for t in (base, *models)]
    tied = [{"embed": t, "head": t} for t in (base, *models)]
    for made in (apart, tied):
        delta = nm.consensus_delta(made[0], made[1:])
        for like in (apart, tied):
            model = {n: t.clone() for n, t in like[0].items()}
            if like is tied:
                model["head"] = model["embed"]
            stats = delta.apply_(model, 0.5)
            assert same_bits(model["embed"], merged) and same_bits(model["head"], merged)
            assert stats.elements == (64 if like is tied else 128)
        embedded = {"embed": base.clone()}
        delta.apply_(embedded, 0.5)
        assert same_bits(embedded["embed"], merged)
    apart[2]["head"] += 1
    delta = nm.consensus_delta(apart[0], apart[1:])
    refused(
        lambda: delta.apply_(tied[0], 0.5),
        "delta['head']: differs from 'embed', expected equal: model['head'] is tied to it",
    )


def test_kinds_of_models() -> None:
    base, *models = [torch.randn(6, 5) for _ in range(4)]
    merged = nm.merge(base, models, scale=0.9)
    delta = nm.consensus_delta(base.numpy(), [t.numpy() for t in models])
    array, strided = base.numpy().copy(), torch.stack([base, base], 2)[..., 1]
    dense, negative = base.mT.contiguous().mT, torch._neg_view(-base)
    parameter = torch.nn.Parameter(base.clone())
    for model in (base.clone(), array, strided, dense, negative, parameter):
        held = torch.from_numpy(model) if isinstance(model, np.ndarray) else model
        with delta.live(model) as live:
            live.scale = -3
            live.scale = 0.9
            assert same_bits(held.resolve_neg(), merged)
        assert same_bits(held.resolve_neg(), base)
        delta.apply_(model, 0.9)
        assert same_bits(held.resolve_neg(), merged)
    scattered = nm.consensus_delta(base.mT.contiguous().mT, [t.mT.contiguous().mT for t in models])
    assert all(map(torch.equal, scattered.tensors[""].packed, delta.tensors[""].packed))
    frozen = base.numpy().copy()
    frozen.setflags(write=False)
    refused(
        lambda: delta.apply_(frozen, 0.9),
        "model: read-only numpy array, expected one that can be written in place",
    )
    assert delta.changed(frozen, 0.9).elements == 30


def test_shared_memory_is_refused() -> None:
    base = {"a": (t := torch.randn(8, 8)), "b": t[1:].clone()}
    delta = nm.consensus_delta(base, [{n: t + 1 for n, t in base.items()}])
    base["b"] = t[1:]
    refused(
        lambda: delta.apply_(base, 0.9),
        "model['b']: shares memory with model['a'], which is written in place",
    )


def test_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *models = family(torch.bfloat16, torch.float64, hostile=True)
    for half in (False, True):
        delta = nm.consensus_delta(base, models, half=half, min_agreement=0.6)
        for limit, files in ((1 << 30, 1), (1 << 12, 5)):
            monkeypatch.setattr(storage, "MAX_FILE_BYTES", limit)
            path = tmp_path / f"{half}-{files}"
            delta.save(path)
            assert len(list(path.glob("*.safetensors"))) == files
            loaded = nm.load_delta(path)
            assert (
                loaded.tensors.keys() == delta.tensors.keys() and loaded.stats.tensors == delta.stats.tensors
            )
            assert (loaded.models, loaded.min_agreement, loaded.inputs) == (3, 0.6, "finetuned")
            for name, each in delta.tensors.items():
                assert loaded.tensors[name].info == each.info
                assert all(map(torch.equal, loaded.tensors[name].packed, each.packed))
            applied, expected = copy(base), copy(base)
            loaded.apply_(applied, 0.9), delta.apply_(expected, 0.9)
            assert equal(applied, expected)
    with pytest.raises(nm.InputError, match=r"exists, expected a new directory"):
        delta.save(path)
    with pytest.raises(nm.InputError, match=r"no directory .*, expected one to write to"):
        delta.save(tmp_path / "none" / "delta")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["False-1", "False-5", "True-1", "True-5"]


def test_a_loaded_delta_says_what_it_leaves(tmp_path: Path) -> None:
    """Which tensors were chosen is not in the file."""
    base, *models = family()
    nm.consensus_delta(base, models, exclude="word").save(tmp_path / "delta")
    expected = nm.merge(base, models, scale=0.9, exclude="word")
    with pytest.warns(nm.MergeWarning, match="^model: 'word': not in the delta, left as it is$") as told:
        nm.load_delta(tmp_path / "delta").apply_(base, 0.9)
    assert [each.filename for each in told] == [__file__]
    assert equal(base, expected)


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a bit too many": (lambda t: t["w.mask"].__setitem__(0, 255), "tensor 'w.mask': 9 bits set, expected 5, one for each mean"),
    "a bit behind the end": (
        lambda t: (t["w.mask"].__setitem__(2, 255)),
        "tensor 'w.mask': bits set behind element 16, expected zeros",
    ),
    "zero": (lambda t: t["w.mean"].__setitem__(3, -0.0), "tensor 'w.mean': element 3: -0.0, expected a finite number but zero"),
    "nan": (lambda t: t["w.mean"].__setitem__(4, torch.nan), "tensor 'w.mean': element 4: nan, expected a finite number but zero"),
    "inf": (lambda t: t["w.mean"].__setitem__(0, -torch.inf), "tensor 'w.mean': element 0: -inf, expected a finite number but zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_malformed_deltas(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    base = torch.zeros(17)
    model = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    nm.consensus_delta({"w": base}, [{"w": model}]).save(tmp_path / "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata)
    refused(lambda: nm.load_delta(tmp_path / "delta"), f"{file}: {message}")


def test_foreign_files(tmp_path: Path) -> None:
    save_file({"w.mask": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(
        lambda: nm.load_delta(tmp_path / "model.safetensors"),
        f"{tmp_path / 'model.safetensors'}: format 'pt', expected negmerge-delta: not a consensus delta",
    )
    with pytest.raises(nm.InputError, match="expected a consensus delta"):
        nm.load_delta(tmp_path)


def test_a_delta_knows_its_size() -> None:
    base, *models = family()
    delta = nm.consensus_delta(base, models)
    assert delta.nbytes == sum(t.nbytes for each in delta.tensors.values() for t in each.packed)
    assert delta.nbytes < sum(t.nbytes for t in base.values()) * 0.6
    moved = delta.to("meta")
    assert all(t.is_meta for each in moved.tensors.values() for t in each.packed)
    assert repr(delta).startswith("Delta(models=3, tensors=6, nbytes=")


@pytest.mark.parametrize("copied", [deepcopy, lambda delta: pickle.loads(pickle.dumps(delta))])
def test_a_delta_is_copied_and_pickled(copied: Callable[[nm.Delta], nm.Delta]) -> None:
    base, *models = family()
    delta = copied(nm.consensus_delta(base, models))
    merged = nm.merge(base, models, scale=0.9)
    delta.apply_(base, 0.9)
    assert all(same_bits(tensor, merged[name]) for name, tensor in base.items()) and delta.models == 3


@pytest.mark.parametrize("half", [False, True])
def test_a_delta_of_files_is_that_of_memory(tmp_path: Path, half: bool) -> None:
    base, *models = family(torch.bfloat16, torch.float32, hostile=True)
    folders = [tmp_path / name for name in ("base", "ft-0", "ft-1", "ft-2")]
    for folder, tensors in zip(folders, (base, *models), strict=True):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    delta_checkpoints(folders[0], folders[1:], tmp_path / "delta", nonfinite="keep-base", half=half)
    loaded, delta = nm.load_delta(tmp_path / "delta"), nm.consensus_delta(base, models, half=half)
    assert loaded.stats.tensors == delta.stats.tensors
    for name, each in delta.tensors.items():
        assert loaded.tensors[name].info == each.info
        assert all(map(torch.equal, loaded.tensors[name].packed, each.packed))
    applied, expected = copy(base), copy(base)
    assert loaded.apply_(applied, 0.9).tensors == delta.apply_(expected, 0.9).tensors
    assert equal(applied, expected)


INTERPRETED = """
import torch
import negmerge_fast as nm
from negmerge_fast.backends import registry
try:
    registry.choose_apply("triton", "cpu")
except nm.InputError as error:
    print("skipped:", error)
    raise SystemExit
base, *models = [torch.randn(3000, generator=torch.Generator().manual_seed(k)) for k in range(4)]
models = [base + model.abs() - 0.2 for model in models]
delta, before = nm.consensus_delta(base, models), base.clone()
with delta.live(base, backend="triton") as live:
    for scale in (0.5, -0.7, 16.0):
        merged, applied = nm.merge(before, models, scale=scale), before.clone()
        stats = delta.apply_(applied, scale, backend="triton")
        live.scale = scale
        assert torch.equal(merged, applied) and torch.equal(merged, base)
        assert stats.tensors == live.stats.tensors and stats.agreed == delta.stats.agreed
assert torch.equal(base, before)
print("same")
"""


def test_triton_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout)
    assert done.stdout == "same\n"
