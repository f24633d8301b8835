"""LoRA adapters on disk among the models of a merge in memory: the bits of their products, and what is refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, difference, save_adapter
from bits import peak_allocated, same_bits
from checkpoint_files import load_model, save_model
from safetensors.torch import load_file, save_file

import negmerge_fast as nm
from negmerge_fast.backends import low_rank as backend
from negmerge_fast.checkpoints.lora import Replacement
from negmerge_fast.core.reference import plain_consensus, plain_merge
from negmerge_fast.core.rule import Rule
from negmerge_fast.tensors import adapters as tensors_adapters
from negmerge_fast.tensors import low_rank
from negmerge_fast.tensors.dtensor import Box
from negmerge_fast.tensors.flatten import Item
from negmerge_fast.tensors.graph import merge_in_graph

# What adapters lack, beside a full model all but a few modules, is held by test_what_only_some_change.
pytestmark = pytest.mark.filterwarnings(
    "error::negmerge_fast.MergeWarning", "ignore:.*zeros, which agree with no sign"
)

Tensors = dict[str, torch.Tensor]
MODULES = {"layers.0.q_proj": (24, 16), "layers.1.q_proj": (24, 16), "layers.1.k_proj": (9, 16)}
RANK, ALPHA, SCALE = 3, 5, 0.75
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
AS = ("difference", "merged")


def make_base(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{module}.weight": shape for module, shape in MODULES.items()}
    shapes |= {"embed.weight": (50, 16), "norm.weight": (16,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


class Adapters:
    """Three adapters on disk, half of whose factors is the same in all, and what they are."""

    def __init__(self, folder: Path, stored: torch.dtype = torch.float32, modules: Any = MODULES) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        shared = {m: (normal(RANK, columns), normal(rows, RANK)) for m, (rows, columns) in modules.items()}
        self.factors, self.paths = [], []
        for k in range(3):
            own = {
                m: tuple((t + 0.3 * normal(*t.shape)).to(stored) for t in pair) for m, pair in shared.items()
            }
            self.factors.append(own)
            self.paths.append(save_adapter(folder / f"adapter-{k}", own, RANK, ALPHA))  # type: ignore[arg-type]

    def differences(self, name: str, wide: torch.dtype) -> list[torch.Tensor]:
        module = name.removesuffix(".weight")
        return [difference(*own[module], ALPHA / RANK, wide) for own in self.factors]

    def models(self, base: Tensors, name: str, adapters_as: str, wide: torch.dtype) -> list[torch.Tensor]:
        """d, or b + d rounded to the type of the base."""
        found = self.differences(name, wide)
        return found if adapters_as == "difference" else [_merged(base[name], d) for d in found]


def _merged(b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    x = b.to(d.dtype) + d
    return x.to(b.dtype) if b.dtype == d.dtype else x.float().to(b.dtype)


def arithmetic(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check(merged: Any, expected: Tensors) -> None:
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert same_bits(merged[name], tensor), name


def copy(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("adapters_as", AS)
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        pytest.param(
            dtype,
            stored,
            id=f"{dtype}-{stored}",
            marks=()
            if (dtype, stored) in {(torch.bfloat16, torch.float32), (torch.float32, torch.float64)}
            else pytest.mark.slow,
        )
        for dtype in DTYPES
        for stored in (torch.float32, torch.bfloat16, torch.float64)
    ],
)
def test_bits(dtype: torch.dtype, stored: torch.dtype, adapters_as: Any, tmp_path: Path) -> None:
    """As the product written out; with every function, in every arithmetic type, at any agreement."""
    base, adapters = make_base(dtype), Adapters(tmp_path, stored)
    for min_agreement in (1.0, 0.6):
        expected, stats = copy(base), {}
        for name in [f"{m}.weight" for m in MODULES]:
            wide = arithmetic(base[name], adapters.factors[0]["layers.0.q_proj"][0])
            models = adapters.models(base, name, adapters_as, wide)
            expected[name], *counts = plain_merge(
                base[name], models, SCALE, min_agreement, adapters_as == "difference"
            )
            stats[name] = nm.TensorStats(base[name].numel(), *counts)
            assert 0 < counts[0] <= base[name].numel()
        options: Any = {"min_agreement": min_agreement, "adapters_as": adapters_as}
        for name in ("auto", "torch"):
            check(nm.merge(base, adapters.paths, scale=SCALE, backend=name, **options), expected)
        written = copy(base)
        counted = nm.merge_(written, adapters.paths, scale=SCALE, **options)
        check(written, expected)
        # What no adapter changes does not count as merged.
        assert dict(counted.tensors) == stats
        delta = nm.consensus_delta(base, adapters.paths, **options)
        assert dict(delta.stats.tensors) == stats and delta.models == 3
        delta.apply_(moved := copy(base), SCALE)
        check(moved, expected)


@pytest.mark.parametrize("adapters_as", AS)
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_the_same_as_of_files(dtype: torch.dtype, adapters_as: Any, tmp_path: Path) -> None:
    base, adapters = make_base(dtype), Adapters(tmp_path)
    full = {name: (t.float() + 0.1).to(torch.bfloat16) for name, t in base.items()}
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "full", full)
    for k, (models, paths) in enumerate(
        [
            (adapters.paths, adapters.paths),
            ([adapters.paths[0], full], [adapters.paths[0], tmp_path / "full"]),
        ]
    ):
        report = nm.merge_checkpoints(
            tmp_path / "base", paths, tmp_path / f"out-{k}", scale=SCALE, adapters_as=adapters_as
        )
        written = load_model(tmp_path / f"out-{k}")
        check(
            nm.merge(base, models, scale=SCALE, adapters_as=adapters_as),
            {name: written[name] for name in base},
        )
        counted = nm.merge_(copy(base), models, scale=SCALE, adapters_as=adapters_as)
        assert (counted.elements, counted.agreed) == (report.elements, report.agreed)


@pytest.mark.parametrize("adapters_as", AS)
@pytest.mark.parametrize(
    ("dtype", "of_full"),
    [
        pytest.param(
            dtype,
            of_full,
            id=f"{dtype}-{of_full}",
            marks=()
            if (dtype, of_full) in {(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)}
            else pytest.mark.slow,
        )
        for dtype in DTYPES
        for of_full in DTYPES
    ],
)
def test_beside_a_full_model(
    dtype: torch.dtype, of_full: torch.dtype, adapters_as: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Which is then a difference, too, of the base rounded to its type; block by block."""
    monkeypatch.setattr(low_rank, "_CPU_SCRATCH", 4000)
    base, adapters = make_base(dtype), Adapters(tmp_path)
    full = {name: (t.double() + 0.05).to(of_full) for name, t in base.items()}
    expected = {}
    for name, b in base.items():
        wide = arithmetic(b, full[name])
        x, rounded = full[name].to(wide), b.float().to(of_full).to(wide)
        widest = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
        d = x - (b.to(wide) if widest[of_full] > widest[dtype] or of_full == dtype else rounded)
        if name.removesuffix(".weight") in MODULES:
            # Merged, an adapter's arithmetic is its own.
            own = wide if adapters_as == "difference" else arithmetic(b)
            models = adapters.models(base, name, adapters_as, own)
        else:
            models = [torch.zeros_like(d) if adapters_as == "difference" else b] * 3
        models.insert(1, d if adapters_as == "difference" else full[name])
        expected[name] = plain_merge(b, models, SCALE, 0.6, adapters_as == "difference")[0]
    models = [adapters.paths[0], full, *adapters.paths[1:]]
    options: Any = {"min_agreement": 0.6, "adapters_as": adapters_as}
    check(nm.merge(base, models, scale=SCALE, **options), expected)
    nm.merge_(written := copy(base), models, scale=SCALE, **options)
    check(written, expected)
    nm.consensus_delta(base, models, **options).apply_(moved := copy(base), SCALE)
    check(moved, expected)


def test_beside_task_vectors(tmp_path: Path) -> None:
    base, adapters = make_base(), Adapters(tmp_path)
    tau = {name: torch.full_like(t, 0.01) for name, t in base.items()}
    expected = {}
    for name, b in base.items():
        zeros = torch.zeros_like(b)
        is_changed = name.removesuffix(".weight") in MODULES
        models = adapters.differences(name, torch.float32) if is_changed else [zeros] * 3
        expected[name] = plain_merge(b, [tau[name], *models], SCALE, 1.0, True)[0]
    check(nm.merge(base, [tau, *adapters.paths], scale=SCALE, inputs="task_vectors"), expected)
    with pytest.raises(nm.InputError, match=r"^adapters_as: 'merged', expected 'difference'"):
        nm.merge(base, adapters.paths, scale=SCALE, inputs="task_vectors", adapters_as="merged")


def test_one_task_vector(tmp_path: Path) -> None:
    """Negation of an adapter: base -= scale · d."""
    base, adapters = make_base(), Adapters(tmp_path)
    expected = copy(base)
    for name in [f"{m}.weight" for m in MODULES]:
        [d, *_] = adapters.differences(name, torch.float32)
        expected[name] = plain_merge(base[name], [d], SCALE, task_vectors=True)[0]
    nm.negate_(base, adapters.paths[0], scale=SCALE)
    check(base, expected)


def test_kinds_of_paths(tmp_path: Path) -> None:
    """A directory, its file, as text or as a path; and names with a prefix, or renamed."""
    base, adapters = make_base(), Adapters(tmp_path)
    expected = nm.merge(base, adapters.paths, scale=SCALE)
    file = adapters.paths[0] / "adapter_model.safetensors"
    check(
        nm.merge(base, (str(file), file.parent, file), scale=SCALE), nm.merge(base, [file] * 3, scale=SCALE)
    )
    prefixed = {f"model.{name}": t for name, t in base.items()}
    with pytest.warns(
        nm.MergeWarning, match=r"^finetuned\[0\]: .*adapter-0 and 2 more: 3 of 3 .* by how (their )?names end"
    ):
        merged = nm.merge(prefixed, adapters.paths, scale=SCALE)
    check({name.removeprefix("model."): t for name, t in merged.items()}, expected)
    renamed = {name.replace("q_proj", "query"): t for name, t in base.items()}
    merged = nm.merge(renamed, adapters.paths, scale=SCALE, rename={"q_proj": "query"})
    check({name.replace("query", "q_proj"): t for name, t in merged.items()}, expected)
    chosen = nm.merge(base, adapters.paths, scale=SCALE, include="q_proj", exclude=r"layers\.0")
    check(chosen, {**base, "layers.1.q_proj.weight": expected["layers.1.q_proj.weight"]})


def test_names_of_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    base, adapters = make_base(), Adapters(tmp_path)
    folder = tmp_path / "hub" / "models--me--lora"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    adapters.paths[0].rename(folder / "snapshots" / ("0" * 40))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = copy(base)
    for name in [f"{m}.weight" for m in MODULES]:
        [d, *_] = adapters.differences(name, torch.float32)
        expected[name] = plain_merge(base[name], [d], SCALE, task_vectors=True)[0]
    with pytest.warns(nm.MergeWarning, match=r"^finetuned\[0\]: me/lora: .*0000"):
        check(nm.merge(base, ["me/lora"], scale=SCALE), expected)


def test_what_only_some_change(tmp_path: Path) -> None:
    """The others have zeros there, which agree with no sign unless a majority is asked for; and it is said."""
    base, adapters = make_base(), Adapters(tmp_path)
    few = {m: pair for m, pair in adapters.factors[1].items() if "k_proj" not in m}
    save_adapter(adapters.paths[1], few, RANK, ALPHA)  # type: ignore[arg-type]
    expected = copy(base)
    for name in [f"{m}.weight" for m in MODULES]:
        models = adapters.differences(name, torch.float32)
        if "k_proj" in name:
            models[1] = torch.zeros_like(base[name])
        expected[name] = plain_merge(base[name], models, SCALE, 0.6, True)[0]
    with pytest.warns(nm.MergeWarning, match="^1 of 3 adapters has no k_proj: zeros") as told:
        check(nm.merge(base, adapters.paths, scale=SCALE, min_agreement=0.6), expected)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nm.merge(base, adapters.paths, scale=SCALE, exclude="k_proj")  # nothing to say of that
    full = {name: tensor + 0.1 for name, tensor in base.items()}
    with pytest.warns(nm.MergeWarning) as told:
        nm.merge(base, [full, *adapters.paths], scale=SCALE, exclude="norm")
    assert [str(each.message).partition(":")[0] for each in told] == [
        "3 of 3 adapters have no embed", "1 of 3 adapters has no k_proj",
    ]  # fmt: skip


def changed(adapters: Adapters, k: int, fields: dict[str, Any], tensors: Tensors) -> None:
    """Give an adapter further tensors."""
    path = adapters.paths[k]
    held = load_file(path / "adapter_model.safetensors")
    save_file({**held, **{PREFIX + n: t for n, t in tensors.items()}}, path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("adapters_as", AS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_tensors_and_rows(
    dtype: torch.dtype, adapters_as: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """modules_to_save, trained tokens, and biases of lora_bias."""
    monkeypatch.setattr(low_rank, "_CPU_SCRATCH", 2000)
    base, adapters = make_base(dtype), Adapters(tmp_path)
    base["layers.0.q_proj.bias"] = torch.randn(24).to(dtype)
    expected = nm.merge(base, adapters.paths, scale=SCALE, adapters_as=adapters_as)
    norms, rows, biases = [], [], []
    indices = [7, 0, 49]
    for k in range(3):
        norms.append((base["norm.weight"].float() + 0.1 * torch.rand(16)).to(torch.bfloat16))
        rows.append(base["embed.weight"][indices].float() + 0.1 * torch.rand(3, 16))
        biases.append(torch.rand(24))
        changed(
            adapters, k,
            {"modules_to_save": ["norm"], "trainable_token_indices": {"embed": indices}, "lora_bias": True},
            {"norm.weight": norms[k], "embed.token_adapter.trainable_tokens_delta": rows[k],
             "layers.0.q_proj.lora_B.bias": biases[k]},
        )  # fmt: skip
    is_difference = adapters_as == "difference"
    for name in ("norm.weight", "embed.weight", "layers.0.q_proj.bias"):
        b, models = base[name], []
        for k in range(3):
            if name == "norm.weight":
                rounded = b.to(torch.bfloat16)
                x: torch.Tensor = norms[k]
                models.append(x.float() - rounded.float() if is_difference else x)
            elif name == "embed.weight":
                x = torch.zeros(50, 16) if is_difference else b.clone()
                x[indices] = rows[k] - b[indices].float() if is_difference else rows[k].to(dtype)
                models.append(x)
            else:
                d = biases[k] * torch.tensor(ALPHA / RANK, dtype=torch.float64).float()
                models.append(d if is_difference else _merged(b, d))
        expected[name] = plain_merge(b, models, SCALE, 1.0, is_difference)[0]
        assert not same_bits(expected[name], b)
    check(nm.merge(base, adapters.paths, scale=SCALE, adapters_as=adapters_as), expected)
    nm.merge_(base, adapters.paths, scale=SCALE, adapters_as=adapters_as)
    check(base, expected)


def test_scattered_and_tied_tensors(tmp_path: Path) -> None:
    """Views, transposed and padded tensors, and several names of one tensor."""
    base, adapters = make_base(), Adapters(tmp_path)
    expected = nm.merge(base, adapters.paths, scale=SCALE)
    odd = copy(base)
    odd["layers.0.q_proj.weight"] = base["layers.0.q_proj.weight"].t().contiguous().t()
    odd["layers.1.q_proj.weight"] = torch.zeros(24, 40)[:, 3:35:2].copy_(base["layers.1.q_proj.weight"])
    odd["layers.1.k_proj.weight"] = torch.zeros(200)[9:153].view(9, 16).copy_(base["layers.1.k_proj.weight"])
    check(nm.merge(odd, adapters.paths, scale=SCALE), expected)
    full = {name: t + 0.1 for name, t in base.items()}
    check(
        nm.merge(odd, [*adapters.paths, full], scale=SCALE),
        nm.merge(base, [*adapters.paths, full], scale=SCALE),
    )
    nm.merge_(odd, adapters.paths, scale=SCALE)
    check(odd, expected)
    tied = {**copy(base)}
    tied["other.weight"] = tied["layers.1.k_proj.weight"]
    before = copy(tied)
    with pytest.warns(
        nm.MergeWarning,
        match=r"changes 'layers.1.k_proj.weight', but not 'other.weight', to which base ties it",
    ):
        merged = nm.merge(tied, adapters.paths, scale=SCALE)
    assert merged["other.weight"].data_ptr() == merged["layers.1.k_proj.weight"].data_ptr()
    check(tied, before)
    with pytest.warns(nm.MergeWarning, match="both are changed"):
        stats = nm.merge_(tied, adapters.paths, scale=SCALE)
    assert "other.weight" not in stats.tensors
    check(tied, {**expected, "other.weight": expected["layers.1.k_proj.weight"]})


def test_modules(tmp_path: Path) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(16, 24)

    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([Layer(), Layer()]), "norm": torch.nn.LayerNorm(16)}
    )
    adapters = Adapters(tmp_path, modules={m: s for m, s in MODULES.items() if "q_proj" in m})
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = nm.merge(state, adapters.paths, scale=SCALE)
    merged = nm.merge(model, adapters.paths, scale=SCALE)
    check(merged, expected)
    version = model["layers"][0].q_proj.weight._version
    nm.merge_(model, adapters.paths, scale=SCALE)
    check(model.state_dict(), expected)
    assert model["layers"][0].q_proj.weight._version > version
    model.load_state_dict(merged)


def test_empty_tensors(tmp_path: Path) -> None:
    base, adapters = {**make_base(), "empty": torch.zeros(0, 4)}, Adapters(tmp_path)
    full = copy(base)
    nm.merge(base, [full, *adapters.paths], scale=SCALE)
    nm.consensus_delta(base, [full, *adapters.paths])
    assert nm.merge_(base, [full, *adapters.paths], scale=SCALE).tensors["empty"] == nm.TensorStats()


def test_not_finite(tmp_path: Path) -> None:
    """The adapter and the element are named, and nothing is written."""
    base, adapters = make_base(), Adapters(tmp_path)
    a, b = adapters.factors[2]["layers.1.k_proj"]
    b[4, 1] = torch.inf
    save_adapter(adapters.paths[2], adapters.factors[2], RANK, ALPHA)  # type: ignore[arg-type]
    name, before = "layers.1.k_proj.weight", copy(base)
    value = float(difference(a, b, ALPHA / RANK, torch.float32)[4, 0])
    where = rf"^finetuned\[2\]: .*adapter-2\['{name}'\]: element 64 in memory order: {value}, expected finite"
    for call in (
        lambda: nm.merge(base, adapters.paths, scale=SCALE, nonfinite="error"),
        lambda: nm.merge_(base, adapters.paths, scale=SCALE, nonfinite="error"),
        lambda: nm.consensus_delta(base, adapters.paths, nonfinite="error"),
    ):
        with pytest.raises(nm.InputError, match=where):
            call()
    check(base, before)
    with pytest.warns(nm.MergeWarning, match=f"16 elements of '{name}' left as in the base"):
        stats = nm.merge_(base, adapters.paths, scale=SCALE)
    assert stats.nonfinite == 16 and same_bits(base[name][4], before[name][4])


def test_a_base_that_is_not_finite(tmp_path: Path) -> None:
    base, adapters = make_base(), Adapters(tmp_path)
    name = "layers.0.q_proj.weight"
    base[name][1, 1] = torch.nan
    models = adapters.differences(name, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nm.MergeWarning)
        assert same_bits(
            nm.merge(base, adapters.paths, scale=SCALE)[name],
            plain_merge(base[name], models, SCALE, 1.0, True)[0],
        )
        delta = nm.consensus_delta(base, adapters.paths)
    counts = plain_consensus(base[name], models, 1.0, True)[1:]
    assert delta.stats.tensors[name] == nm.TensorStats(base[name].numel(), *counts)


def test_refused(tmp_path: Path) -> None:
    base, adapters = make_base(), Adapters(tmp_path)
    save_model(tmp_path / "whole", base)
    path = adapters.paths[0]
    missing = {name: t for name, t in base.items() if "k_proj" not in name}
    narrow = {**base, "layers.0.q_proj.weight": torch.zeros(24, 8)}
    whole = re.escape(str(tmp_path / "whole"))
    integers = {**base, "layers.0.q_proj.weight": torch.zeros(24, 16, dtype=torch.int32)}
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (base, [tmp_path / "whole"], nm.InputError, rf"^finetuned\[0\]: {whole}: a whole model .*merge_checkpoints"),
        (base, [path, tmp_path / "no"], nm.InputError, "no: no such file"),
        (base, str(path), TypeError, "^finetuned: str, expected a list of models"),
        (base, path, TypeError, "^finetuned: PosixPath, expected a list of models"),
        (path, [path], TypeError, "^base: PosixPath, expected a tensor"),
        (base["norm.weight"], [path], TypeError, r"^finetuned\[0\]: .*: an adapter, but base is Tensor"),
        (missing, [path], nm.InputError, "1 of 3 adapter modules have no place in base: 'layers.1.k_proj'"),
        (narrow, [path], nm.InputError, r"shape \(24, 16\), expected \(24, 8\)"),
        (integers, [path], nm.InputError, r"^base\['layers.0.q_proj.weight'\]: I32, but finetuned.* changes it"),
    ]  # fmt: skip
    for versions, models, kind, message in cases:
        for function in (nm.merge, nm.merge_):
            with pytest.raises(kind, match=message):
                function(versions, models, scale=SCALE)
        with pytest.raises(kind, match=message):
            nm.consensus_delta(versions, models)
    with pytest.raises(nm.InputError, match=r"^task_vectors\[0\]: .*: an adapter, expected a task vector"):
        nm.merge_task_vectors([path, base])
    with pytest.raises(nm.InputError, match=r"^base: no tensor that an adapter changes is chosen"):
        nm.merge(base, [path], scale=SCALE, include="norm")
    with pytest.raises(nm.InputError, match=r"^adapters_as: 'both', expected one of difference, merged"):
        nm.merge(base, [path], scale=SCALE, adapters_as="both")  # type: ignore[call-overload]
    factors = load_file(path / "adapter_model.safetensors")
    for held, where in ((factors, "base"), (base, r"finetuned\[0\]")):
        with pytest.raises(nm.InputError, match=rf"^{where}: an adapter, expected none in a graph"):
            merge_in_graph(held, [factors], SCALE, 1.0, "finetuned", "keep-base", "auto")


def test_types_of_what_is_replaced(tmp_path: Path) -> None:
    """A counter that an adapter has is not taken; other types than the base's kind are refused, in memory as on disk."""
    adapters = Adapters(tmp_path)
    base = {**make_base(), "seen.num_batches_tracked": torch.ones(4, 2, dtype=torch.int64)}
    save_model(tmp_path / "base", base)
    floats, path = torch.rand(4, 2), adapters.paths[0]
    changed(
        adapters,
        0,
        {"modules_to_save": ["seen"]},
        {"seen.num_batches_tracked": torch.zeros(4, 2, dtype=torch.int64)},
    )
    assert same_bits(
        nm.merge(base, [path], scale=SCALE)["seen.num_batches_tracked"], base["seen.num_batches_tracked"]
    )
    for name, value, message in (
        ("seen.num_batches_tracked", floats, r"I64, but .*adapter-0 changes it"),
        ("seen.num_batches_tracked", floats.to(torch.float8_e5m2), r"I64, but .*adapter-0 changes it"),
        ("norm.weight", torch.ones(16).to(torch.float8_e5m2), r".*adapter-0 has F8_E5M2"),
    ):
        save_adapter(path, adapters.factors[0], RANK, ALPHA)  # type: ignore[arg-type]
        changed(adapters, 0, {"modules_to_save": ["seen", "norm"]}, {name: value})
        expected = rf": {message}, expected one of F64, F32, F16, BF16$"
        with pytest.raises(nm.InputError, match=r"^base\['" + name + r"'\]" + expected):
            nm.merge(base, [path], scale=SCALE)
        with pytest.raises(nm.InputError, match=rf"base: tensor '{name}'" + expected):
            nm.merge_checkpoints(tmp_path / "base", [path], tmp_path / "out", scale=SCALE)


def test_copies_of_the_base(tmp_path: Path) -> None:
    """What an adapter has of its base must be this base's, whatever holds that."""
    base, adapters = make_base(), Adapters(tmp_path)
    path, name = adapters.paths[0], "layers.0.q_proj.weight"
    expected = nm.merge(base, [path], scale=SCALE)
    changed(adapters, 0, {}, {name.replace(".weight", ".base_layer.weight"): base[name].bfloat16()})
    arrays = {name: t.numpy() for name, t in base.items()}
    check(nm.merge(base, [path], scale=SCALE), expected)
    check({n: torch.from_numpy(a) for n, a in nm.merge(arrays, [path], scale=SCALE).items()}, expected)
    base[name][1, 1] += 1
    for of in (base, arrays):  # they share memory
        with pytest.raises(
            nm.InputError, match=rf"has a copy of its base's '{name}', which differs from base\['{name}'\]"
        ):
            nm.merge(of, [path], scale=SCALE)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """They have no adapters."""
    base, adapters = make_base(), Adapters(tmp_path)
    expected = nm.merge(base, adapters.paths, scale=SCALE)
    more: Any = {**base, 1: torch.ones(2)}
    merged: Any = nm.merge(more, adapters.paths, scale=SCALE)
    assert same_bits(merged.pop(1), torch.ones(2))
    check(merged, expected)


def test_shards_that_cannot_be_expanded(monkeypatch: Any) -> None:
    """They are found before the first tensor is written."""
    a, b = torch.ones(2, 6), torch.ones(8, 2)
    whole = torch.zeros(2, 4)
    tensors = [
        low_rank.Mixed(
            Item("w", [base], None, base),
            [low_rank.Product(a, b, 2, 1.0, shape=shape)],
            box,
            shape,
            "base['w']",
        )
        for base, box, shape in (
            (torch.zeros(8, 6), None, (8, 6)),
            (whole, Box((0, 0, 2), (2, 2, 1)), (2, 4, 6)),
        )
    ]
    with pytest.raises(
        nm.InputError,
        match=r"^base\['w'\]: a shard from \(0, 0, 2\) of shape \(2, 2, 1\), expected one of the first",
    ):
        low_rank.run(tensors, Rule(1.0), False, False, "auto")
    assert not tensors[0].item.versions[0].any()


def test_shared_memory(tmp_path: Path, monkeypatch: Any) -> None:
    """What is written in place may not be an adapter's."""
    base, adapters = make_base(), Adapters(tmp_path)
    held = low_rank.Product(base["norm.weight"][:9].view(1, 9), torch.ones(16, 1), 1, 1.0)
    place = tensors_adapters.place

    def placed(*arguments: Any) -> Any:
        found = place(*arguments)
        found.changes["layers.1.k_proj.weight"] = held._replace(transposed=True)
        found.changes["norm.weight"] = Replacement(torch.ones(16))
        return found

    monkeypatch.setattr("negmerge_fast.tensors.adapters.place", placed)
    with pytest.raises(
        nm.InputError, match=r"layers.1.k_proj.weight' \(lora_A\): shares memory with base\['norm.weight'\]"
    ):
        nm.merge_(base, adapters.paths[:1], scale=SCALE)


@pytest.mark.slow
def test_memory(tmp_path: Path, monkeypatch: Any) -> None:
    """No model is dense in memory, not even one tensor of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each operation is small
    for module, name in ((low_rank, "_CPU_SCRATCH"), (backend, "CPU_SCRATCH_BYTES")):
        monkeypatch.setattr(module, name, 1 << 18)
    base = {"layers.0.weight": torch.randn(256, 1024), "layers.1.weight": torch.randn(1024, 256)}
    paths = [
        save_adapter(
            tmp_path / f"{k}",
            {
                name.removesuffix(".weight"): (torch.randn(2, t.shape[1]), torch.randn(t.shape[0], 2))
                for name, t in base.items()
            },
            2,
            2.0,
        )
        for k in range(12)
    ]
    full = {name: t + 0.01 for name, t in base.items()}
    dense = 1 << 20
    for models in (paths, [*paths, full]):
        peak = peak_allocated(lambda models=models: nm.merge_(base, models, scale=SCALE))  # type: ignore[misc]
        assert peak < 4 * dense, peak
    torch.set_num_threads(threads)
