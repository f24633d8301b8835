"""Cases of DTensors that every rank runs. test_dtensor.py starts this as a program: dtensor_ranks.py FOLDER.

Each rank of a group of 2 and of one of 4 runs all cases, and writes which failed to FOLDER. Shards are cut without
communication, so that a case that fails on one rank keeps no other waiting.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter_files import PREFIX, save_adapter
from bits import same_bits
from safetensors.torch import load_file, save_file

import negmerge_fast as nm
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.tensors.dtensor import box_of

SECONDS = 60  # a rank that takes longer is killed
WORLDS = (2, 4)
CASES: dict[str, Callable[[int], None]] = {}


def case(function: Callable[[int], None]) -> Callable[[int], None]:
    CASES[function.__name__] = function
    return function


def distribute(full: torch.Tensor, mesh: Any, *placements: Any) -> Any:
    """A DTensor with a copy of a tensor's values, of which this rank keeps its shard."""
    everywhere = DTensor.from_local(full.clone(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def versions(*shape: int, dtype: torch.dtype = torch.float32, n: int = 3) -> list[torch.Tensor]:
    """A base and n models that agree on about half of its elements, the same on all ranks."""
    random = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=random)
    return [base.to(dtype)] + [
        (base + 0.1 * torch.randn(shape, generator=random) + 0.05).to(dtype) for _ in range(n)
    ]


def layouts(world: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    line = init_device_mesh("cpu", (world,))
    yield from [(line, (Shard(0),)), (line, (Shard(1),)), (line, (Replicate(),))]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        for first, second in ("00", "01", "10", "R1", "0R", "RR"):
            yield grid, tuple(Replicate() if p == "R" else Shard(int(p)) for p in (first, second))


def holds(tensor: Any, full: torch.Tensor, like: Any) -> None:
    """Check that a DTensor has this rank's shard of a tensor, and the placements of another DTensor."""
    assert type(tensor) is DTensor and not tensor.requires_grad
    assert (tensor.placements, tensor.device_mesh) == (like.placements, like.device_mesh)
    assert (tensor.shape, tensor.stride()) == (like.shape, like.stride())
    assert same_bits(tensor.to_local(), distribute(full, like.device_mesh, *like.placements).to_local())


@contextmanager
def communicating(number: int = 0) -> Iterator[None]:
    with CommDebugMode() as seen:
        yield
    assert seen.get_total_counts() == number, seen.get_comm_counts()


@contextmanager
def refused(message: str) -> Iterator[None]:
    try:
        yield
    except (nm.InputError, TypeError) as error:
        assert str(error) == message, str(error)
    else:
        raise AssertionError(f"not refused: {message}")


@case
def any_placement(world: int) -> None:
    """All layouts and dtypes at once, also with more ranks than rows, and with empty tensors."""
    full: dict[str, list[torch.Tensor]] = {}
    distributed: dict[str, list[Any]] = {}
    types = [
        (torch.float32,) * 2,
        (torch.bfloat16,) * 2,
        (torch.float16, torch.float64),
        (torch.float64,) * 2,
    ]
    for shape in ((8, 12), (7, 5), (3, 1), (1, 3), (0, 4), (2, 3, 5)):
        for of_base, of_models in types:
            for i, (mesh, placements) in enumerate(layouts(world)):
                base, *models = versions(*shape, dtype=of_models)
                name = f"{shape} {of_base} {i}"
                full[name] = [base.to(of_base), *models]
                distributed[name] = [distribute(t, mesh, *placements) for t in full[name]]
    base, *models = ({name: held[k] for name, held in distributed.items()} for k in range(4))
    addresses = [t.to_local().data_ptr() for t in base.values()]
    with communicating():
        merged = nm.merge(base, models, scale=0.9)
    for name, held in full.items():
        holds(base[name], held[0], base[name])
        holds(merged[name], plain_merge(held[0], held[1:], 0.9)[0], base[name])
    with communicating():
        stats = nm.merge_(base, models, scale=0.9)
    assert addresses == [t.to_local().data_ptr() for t in base.values()]
    for name, held in full.items():
        holds(base[name], plain_merge(held[0], held[1:], 0.9)[0], base[name])
        assert stats.tensors[name].elements == base[name].to_local().numel()


@case
def counts_add_up(world: int) -> None:
    """Sums of counts over the ranks are the model's, where each element is on one rank."""
    full = versions(7, 5)
    base, *models = (distribute(t, init_device_mesh("cpu", (world,)), Shard(0)) for t in full)
    stats = nm.merge_(base, models, scale=0.9)
    counts = torch.tensor([stats.elements, stats.agreed, stats.nonfinite, stats.vetoed_by_zero])
    dist.all_reduce(counts)
    assert counts.tolist() == [35, *plain_merge(full[0], full[1:], 0.9)[1:]]


@case
def other_methods(world: int) -> None:
    """Random choices are those of the whole tensor; what would have to know all of it is refused, unless the rank holds it."""
    full = versions(8, 12)
    weight = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    dare, ties = nm.method("dare", drop=0.5, seed=3), nm.method("ties", density=0.5)
    for mesh, placements in layouts(world):
        base, *models = (distribute(t, mesh, *placements) for t in full)
        for weights in (weight, distribute(weight, mesh, *placements)):
            with communicating():
                merged = nm.merge(base, models, scale=0.9, method="magmax", weights=weights)
            wanted = nm.merge(full[0], full[1:], scale=0.9, method="magmax", weights=weight)
            holds(merged, wanted, base)
        box = box_of(base, "")
        found = f"base: a shard from {box.offset} of shape {box.shape}, expected" if box else ""
        for method, said in (
            (dare, "one of the first dimension alone for method dare" if box and box.shape[1] < 12 else None),
            (ties, "a whole tensor: method ties compares all of its elements" if box else None),
        ):
            if said:
                with refused(f"{found} {said}"):
                    nm.merge_(base, models, scale=0.9, method=method)
                holds(base, full[0], base)
            else:
                wanted = nm.merge(full[0], full[1:], scale=0.9, method=method)
                holds(nm.merge(base, models, scale=0.9, method=method), wanted, base)
                delta = nm.consensus_delta(base, models, method=method)
                delta.apply_(moved := distribute(full[0], mesh, *placements), 0.9)
                holds(moved, wanted, base)
    line = init_device_mesh("cpu", (world,))
    base, *models = (distribute(t, line, Shard(0)) for t in full)
    sharded = distribute(weight, line, Shard(1))
    with refused("weights: placements (Shard(dim=1),), expected (Shard(dim=0),) like base"):
        nm.merge_(base, models, scale=0.9, weights=sharded)


@case
def task_vectors(world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    base, *full = versions(7, 5, dtype=torch.bfloat16)
    full[1] = full[1].float()
    taus = [distribute(t, mesh, Shard(0)) for t in full]
    zeros = torch.zeros(7, 5)
    with communicating():
        mean = nm.merge_task_vectors(taus)
        holds(mean, plain_merge(zeros, full, -1.0, task_vectors=True)[0], distribute(zeros, mesh, Shard(0)))
        nm.merge_(distributed := distribute(base, mesh, Shard(0)), taus, scale=0.9, inputs="task_vectors")
        holds(distributed, plain_merge(base, full, 0.9, task_vectors=True)[0], distributed)
        nm.negate_(distributed := distribute(base, mesh, Shard(0)), mean, scale=0.9)
        tau = plain_merge(zeros, full, -1.0, task_vectors=True)[0]
        holds(distributed, plain_merge(base, [tau], 0.9, task_vectors=True)[0], distributed)


@case
def beside_others(world: int) -> None:
    """A mapping of DTensors, plain tensors, arrays and integers: each is returned as its own kind."""
    mesh = init_device_mesh("cpu", (world,))
    full = versions(7, 5)
    whole, counter = plain_merge(full[0], full[1:], 0.9)[0], torch.arange(14).view(7, 2)

    def model(t: torch.Tensor, k: int) -> dict[str, Any]:
        return {
            "plain": t.clone(),
            "array": t.numpy().copy(),
            "sharded": distribute(t, mesh, Shard(0)),
            "strided": distribute(t.mT, mesh, Shard(0)),
            "parameter": torch.nn.Parameter(distribute(t, mesh, Shard(1))),
            "counter": distribute(counter + k, mesh, Shard(0)),
        }

    base, *models = (model(t, k) for k, t in enumerate(full))
    for merged in (nm.merge(base, models, scale=0.9), base):
        if merged is base:
            stats = nm.merge_(base, models, scale=0.9)
            assert "counter" not in stats.tensors and "sharded" in stats.tensors
        assert same_bits(merged["plain"], whole) and isinstance(merged["array"], np.ndarray)
        assert same_bits(torch.from_numpy(merged["array"]), whole)
        holds(merged["sharded"], whole, base["sharded"])
        holds(merged["strided"], whole.mT, base["strided"])
        holds(merged["parameter"].detach(), whole, base["parameter"].detach())
        assert merged["parameter"].requires_grad == (merged is base)
        holds(merged["counter"], counter, base["counter"])


@case
def scattered_shards(world: int) -> None:
    """Shards that are not contiguous: every second column of wider ones."""
    mesh, full = init_device_mesh("cpu", (world,)), versions(8, 6)

    def spread(t: torch.Tensor) -> Any:
        here = distribute(t, mesh, Shard(0)).to_local()
        wide = torch.zeros(here.shape[0], 12)[:, ::2].copy_(here)
        return DTensor.from_local(wide, mesh, [Shard(0)], run_check=False)

    base, *models = map(spread, full)
    whole = plain_merge(full[0], full[1:], 0.9)[0]
    assert not base.to_local().is_contiguous()
    assert same_bits(nm.merge(base, models, scale=0.9).to_local(), spread(whole).to_local())
    nm.merge_(base, models, scale=0.9)
    assert same_bits(base.to_local(), spread(whole).to_local())


@case
def tied(world: int) -> None:
    mesh, full = init_device_mesh("cpu", (world,)), versions(8, 4)
    whole = plain_merge(full[0], full[1:], 0.9)[0]
    base, *models = ({"embed": (t := distribute(f, mesh, Shard(0))), "head": t.detach()} for f in full)
    merged = nm.merge(base, models, scale=0.9)
    assert merged["head"] is merged["embed"]
    assert list(nm.merge_(base, models, scale=0.9).tensors) == ["embed"]
    holds(base["head"], whole, base["head"])
    part = base["embed"].to_local()
    whole_part = DTensor.from_local(part, mesh, [Replicate()], run_check=False)
    shapes = f"shape ({8 // world}, 4), expected (8, 4)"
    for other, found in ((part, "Tensor, expected a DTensor"), (whole_part, shapes)):
        both = {"embed": base["embed"], "head": other}
        with refused(f"base['head']: {found} like base['embed'], whose memory it has"):
            nm.merge(both, [both], scale=0.9)


@case
def names_that_differ(world: int) -> None:
    """A tied weight that versions lack, a prefix, and a choice of names."""
    mesh, full = init_device_mesh("cpu", (world,)), versions(8, 4)
    whole = plain_merge(full[0], full[1:], 0.9)[0]
    base, *models = (
        {"embed": distribute(t, mesh, Shard(0)), "norm": distribute(t, mesh, Shard(1))} for t in full
    )
    base["head"] = base["embed"].detach()
    with communicating():
        merged = nm.merge(base, models, scale=0.9)
        assert merged["head"] is merged["embed"]
        holds(merged["embed"], whole, base["embed"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merged = nm.merge(base, [{f"module.{n}": t for n, t in m.items()} for m in models], scale=0.9)
        assert [w.category for w in caught] == [nm.MergeWarning]
        holds(merged["head"], whole, base["embed"])
        merged = nm.merge(base, models, scale=0.9, include="norm")
        holds(merged["norm"], whole, base["norm"])
        holds(merged["embed"], full[0], base["embed"])
        assert merged["head"] is merged["embed"] and merged["embed"] is not base["embed"]
        with refused(
            "base['head']: is not chosen, but tied to base['embed'], which is: expected both or neither"
        ):
            nm.merge_(base, models, scale=0.9, exclude="head")
        assert list(nm.merge_(base, models, scale=0.9, exclude="embed|head").tensors) == ["norm"]
    holds(base["embed"], full[0], base["embed"])


@case
def fully_sharded_before_dtensors(world: int) -> None:
    """FSDP 1 gathers copies for its state dict."""
    base, *models = (network(seed) for seed in (0, 1, 2))
    wrapped = FullyShardedDataParallel(base, device_id=torch.device("cpu"), use_orig_params=True)
    before = [p.detach().clone() for p in wrapped.parameters()]
    whole = nm.merge(wrapped, models, scale=0.9)
    plain = nm.merge(network(0), models, scale=0.9)
    assert all(same_bits(whole[name], t) for name, t in plain.items())
    try:
        nm.merge_(wrapped, models, scale=0.9)
    except nm.InputError as error:
        assert "a copy that the module's state dict gives (by a hook, or FSDP 1)" in str(error), error
    else:
        raise AssertionError("not refused")
    assert all(map(same_bits, [p.detach() for p in wrapped.parameters()], before))


@case
def seen_by_autograd(world: int) -> None:
    mesh, full = init_device_mesh("cpu", (world,)), versions(8, 4)
    for of_local in (False, True):
        base, *models = (distribute(t, mesh, Shard(0)) for t in full)
        saved = base.to_local() if of_local else base
        result = (saved * saved.detach().clone().requires_grad_()).sum()
        nm.merge_(base, models, scale=0.9)
        try:
            result.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            raise AssertionError("went unnoticed")


@case
def in_inference_mode(world: int) -> None:
    mesh, full = init_device_mesh("cpu", (world,)), versions(7, 4)
    with torch.inference_mode():
        base, *models = (distribute(t, mesh, Shard(0)) for t in full)
        holds(nm.merge(base, models, scale=0.9), plain_merge(full[0], full[1:], 0.9)[0], base)
    assert base.is_inference()
    nm.merge_(base, models, scale=0.9)
    with torch.inference_mode():
        holds(base, plain_merge(full[0], full[1:], 0.9)[0], base)


@case
def different_placements(world: int) -> None:
    """They are refused by name, on every rank, before anything is written."""
    line = init_device_mesh("cpu", (world,))
    ranks = list(range(world))
    backwards = DeviceMesh("cpu", ranks[::-1])
    full = versions(world + 1, 4)
    good = distribute(full[0], line, Shard(0))
    taller = distribute(torch.ones(world + 2, 4), line, Shard(0))
    turned, moved = distribute(full[1], line, Shard(1)), distribute(full[1], backwards, Shard(0))
    summands = DTensor.from_local(torch.ones(2, 4), line, [Partial()], run_check=False)
    one, two = (
        DTensor.from_local(torch.ones(rows, 4), line, [Shard(0)], shape=(world, 4), stride=(4, 1))
        for rows in (1, 2)
    )
    for base, model, problem in (
        (good, full[1], "Tensor, expected a DTensor"),
        (full[0], good, "DTensor, expected none"),
        (good, taller, f"shape ({world + 2}, 4), expected ({world + 1}, 4)"),
        (good, turned, "placements (Shard(dim=1),), expected (Shard(dim=0),)"),
        (good, moved, f"on ranks {ranks[::-1]} of cpu, expected {ranks} of cpu"),
        (one, two, "a shard of shape (2, 4), expected (1, 4)"),
        (summands, summands, None),
    ):
        message = (
            f"finetuned[1]['w']: {problem} like base"
            if problem
            else "base['w']: placements (Partial(sum),), expected Shard or Replicate"
        )
        models = [{"w": base, "v": full[1]}, {"w": model, "v": full[2]}]
        for function in (nm.merge, nm.merge_):
            with communicating(), refused(message):
                function({"v": (first := full[0].clone()), "w": base}, models, scale=0.9)
            assert same_bits(first, full[0])
    with refused("tau: placements (Shard(dim=1),), expected (Shard(dim=0),) like base"):
        nm.negate_(good, turned, scale=0.9)
    with refused("task_vectors[1]: Tensor, expected a DTensor like task_vectors[0]"):
        nm.merge_task_vectors([good, full[1]])


@case
def equal_ranks_are_enough(world: int) -> None:
    full = versions(7, 4)
    names = [None, ("x",), ("y",), None]
    base, *models = (
        distribute(t, init_device_mesh("cpu", (world,), mesh_dim_names=n), Shard(0))
        for t, n in zip(full, names, strict=True)
    )
    assert models[0].device_mesh != models[1].device_mesh
    nm.merge_(base, models, scale=0.9)
    holds(base, plain_merge(full[0], full[1:], 0.9)[0], base)


@case
def shared_memory(world: int) -> None:
    full = versions(8, 4)
    base, *models = (distribute(t, init_device_mesh("cpu", (world,)), Shard(0)) for t in full)
    with refused("finetuned[0]['w']: shares memory with base['w'], which is written in place"):
        nm.merge_({"w": base}, [{"w": base}], scale=0.9)
    with refused("finetuned[0]['v']: shares memory with base['w'], which is written in place"):
        nm.merge_({"w": base, "v": models[0]}, [{"w": models[1], "v": base}], scale=0.9)
    holds(base, full[0], base)


@case
def not_finite_on_one_rank(world: int) -> None:
    """Kept and counted without communication. As an error, all ranks raise before any has written."""
    layout = list(layouts(world))
    full = [t.clone() for t in versions(8, 12)]
    full[2][-1, -1] = torch.inf
    for mesh, placements in layout:
        base, *models = (distribute(t, mesh, *placements) for t in full)
        with communicating():
            stats = nm.merge_(distribute(full[0], mesh, *placements), models, scale=0.9)
        assert stats.nonfinite == (distribute(full[2], mesh, *placements).to_local().isinf().sum())
        last = base.to_local().numel() - 1
        message = (
            f"finetuned[1]['w']: element {last} in memory order of this rank's shard: inf, expected finite numbers"
            if stats.nonfinite
            else "an element on another rank is not finite (the error there names it), expected finite numbers"
        )
        for function in (nm.merge, nm.merge_):
            with communicating(mesh.ndim), refused(message):
                function({"w": base}, [{"w": t} for t in models], scale=0.9, nonfinite="error")
            holds(base, full[0], base)
        with communicating(mesh.ndim):
            nm.merge_(base, models[:1], scale=0.9, nonfinite="error")
        holds(base, plain_merge(full[0], full[1:2], 0.9)[0], base)


@case
def some_ranks_only(world: int) -> None:
    """A mesh of two ranks. The other ranks hold nothing and do not communicate."""
    mesh, full = DeviceMesh("cpu", [0, 1]), versions(7, 4)
    base, *models = (distribute(t, mesh, Shard(0)) for t in full)
    for nonfinite in ("keep-base", "error"):
        merged = nm.merge(base, models, scale=0.9, nonfinite=nonfinite)
        assert type(merged) is DTensor and merged.device_mesh == mesh and merged.shape == (7, 4)
        if dist.get_rank() < 2:
            holds(merged, plain_merge(full[0], full[1:], 0.9)[0], base)
    stats = nm.merge_(base, models, scale=0.9, nonfinite="error")
    assert dist.get_rank() < 2 or stats.elements == 0


def network(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    for p in model.parameters() if seed else ():
        p.data += 0.05
    return model


def shardings(world: int, layers: range) -> Iterator[Callable[[torch.nn.Sequential], torch.nn.Sequential]]:
    """FSDP2 of some layers and the whole, in one and two dimensions and over tensor parallelism: what shards a network so."""
    whole_rows = ColwiseParallel(output_layouts=Replicate())
    line, grid = init_device_mesh("cpu", (world,)), None
    meshes = [line]
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        meshes += [grid, grid["outer"]]
    for i, mesh in enumerate(meshes):

        def shard(model: torch.nn.Sequential, i: int = i, mesh: Any = mesh) -> torch.nn.Sequential:
            if i == 2:
                parallelize_module(model, grid["inner"], {"0": whole_rows, "2": whole_rows})
            for k in layers:
                fully_shard(model[k], mesh=mesh)
            return fully_shard(model, mesh=mesh)

        yield shard


@case
def fully_sharded(world: int) -> None:
    """Whole modules, before and after a step."""
    full = [network(0), *(network(seed) for seed in (1, 2, 3))]
    whole = nm.merge(full[0], full[1:], scale=0.9)
    for shard in shardings(world, range(3)):
        base, *models = (shard(network(seed)) for seed in range(4))
        state = base.state_dict()
        with communicating():
            merged = nm.merge(base, models, scale=0.9)
            nm.merge_(base, models, scale=0.9)
        for result in (merged, base.state_dict()):
            assert list(result) == list(whole)
            for name, value in whole.items():
                assert type(result[name]) is type(state[name])
                if isinstance(state[name], DTensor):
                    # Not cut as by distribute: FSDP cuts what tensor parallelism has cut.
                    assert same_bits(result[name].full_tensor(), value), name
                    assert result[name].placements == state[name].placements
                else:
                    assert same_bits(result[name], value), name
        plain = network(0)
        plain.load_state_dict(whole)
        # Sharded likewise: torch's products of a part of a matrix may have other last bits than those of all of it.
        shard(plain).eval(), base.eval()
        x = torch.ones(2, 5)
        assert torch.equal(base(x), plain(x))
        base(x).sum().backward()
        torch.optim.SGD(base.parameters(), 0.1).step()
        nm.merge_(base, models, scale=0.9, nonfinite="error")


@case
def deltas(world: int) -> None:
    """A delta of whole tensors is cut to shards; one of shards fits these alone. Nothing is communicated."""
    types = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float64)]
    full: dict[str, list[torch.Tensor]] = {}
    distributed: dict[str, list[Any]] = {}
    for shape in ((8, 12), (7, 5), (3, 1), (1, 3), (0, 4), (40, 100), (4, 3, 50)):
        for of_base, of_models in types:
            for i, (mesh, placements) in enumerate(layouts(world)):
                base, *models = versions(*shape, dtype=of_models)
                name = f"{shape} {of_base} {i}"
                full[name] = [base.to(of_base), *models]
                distributed[name] = [distribute(t, mesh, *placements) for t in full[name]]
    whole, *others = ({name: held[k] for name, held in full.items()} for k in range(4))
    base, *models = ({name: held[k] for name, held in distributed.items()} for k in range(4))
    with communicating():
        of_whole, of_shards = nm.consensus_delta(whole, others), nm.consensus_delta(base, models)
        for delta in (of_whole, of_shards):
            with delta.live(base) as live:
                for scale in (-0.3, 0.9):
                    live.scale = scale
                for name, held in full.items():
                    holds(base[name], plain_merge(held[0], held[1:], 0.9)[0], base[name])
                    assert live.stats.tensors[name].elements == base[name].to_local().numel()
            for name, held in full.items():
                holds(base[name], held[0], base[name])
            applied = {name: t.clone() for name, t in base.items()}
            merged = {name: t.clone() for name, t in base.items()}
            stats = nm.merge_(merged, models, scale=0.9)
            found = delta.apply_(applied, 0.9)
            for name, counted in stats.tensors.items():
                assert (counted.elements, counted.agreed) == (
                    found.tensors[name].elements,
                    found.tensors[name].agreed,
                )
                assert same_bits(applied[name].to_local(), merged[name].to_local())
            assert delta is of_whole or found.tensors == stats.tensors


@case
def deltas_that_do_not_fit(world: int) -> None:
    mesh, full = init_device_mesh("cpu", (world,)), versions(8, 20)
    rows = [distribute(t, mesh, Shard(0)) for t in full]
    whole, of_rows = nm.consensus_delta(full[0], full[1:]), nm.consensus_delta(rows[0], rows[1:])
    columns, other = distribute(full[0], mesh, Shard(1)), distribute(torch.ones(9, 20), mesh, Shard(0))
    rank, height, width = dist.get_rank(), 8 // world, 20 // world
    part = f"expected the part from ({height * rank}, 0) of shape ({height}, 20): the delta is of a shard"
    with refused(f"model: all of it, {part}"):
        of_rows.apply_(full[0].clone(), 0.9)
    with refused(f"model: the part from (0, {width * rank}) of shape (8, {width}), {part}"):
        of_rows.apply_(columns, 0.9)
    with refused("delta: shape (8, 20), expected (9, 20) like model"):
        whole.apply_(other, 0.9)
    with refused("delta: of a DTensor's shard, expected a delta of whole tensors"):
        of_rows.save("delta")
    # Only the ranks that hold the middle see that these are other values.
    middle = (8 * 20 * 4 - 64) // 8 // 20 // height, (8 * 20 * 4 + 64) // 8 // 20 // height
    if middle == (rank, rank):
        with refused(
            "model: other values in its middle than in the delta's base, expected that base, to which no delta was applied"
        ):
            whole.apply_(distribute(full[0] + 1, mesh, Shard(0)), 0.9)


@case
def fully_sharded_and_live(world: int) -> None:
    """FSDP2, also over tensor parallelism: forward passes see each λ, and the former bits afterwards."""
    delta = nm.consensus_delta(network(0), [network(seed) for seed in (1, 2, 3)])
    x = torch.ones(2, 5)
    for i, shard in enumerate(shardings(world, range(2))):
        model = shard(network(0)).eval()
        before = {name: t.full_tensor() for name, t in model.named_parameters()}
        first = model(x)
        with delta.live(model) as live:
            for scale in (0.5, 0.9):
                live.scale = scale
                plain = network(0)
                delta.apply_(plain, scale)
                shard(plain).eval()  # for the same products
                assert torch.equal(model(x), plain(x)), (i, scale)
        assert torch.equal(model(x), first)
        model.reshard()
        after = {name: t.full_tensor() for name, t in model.named_parameters()}
        assert all(same_bits(t, before[name]) for name, t in after.items())


@case
def adapters(world: int) -> None:
    """Factors, whole tensors and rows of them are cut to the shard; with a full model beside them, too."""
    shapes = {"a": (8, 12), "b": (7, 5), "c": (3, 16), "embed": (9, 4), "norm": (6, 5), "unchanged": (4, 4)}
    random = torch.Generator().manual_seed(0)
    full = {f"{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    other = {name: t + 0.05 * torch.randn(t.shape, generator=random) for name, t in full.items()}
    indices, paths = [8, 2, 5], []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2):
            factors = {
                m: (torch.randn(2, columns, generator=random), torch.randn(rows, 2, generator=random))
                for m, (rows, columns) in list(shapes.items())[:3]
            }
            config = {"modules_to_save": ["norm"], "trainable_token_indices": {"embed": indices}}
            paths.append(path := save_adapter(Path(folder) / f"{k}", factors, 2, 3.0, **config))
            held = load_file(path / "adapter_model.safetensors")
            held[f"{PREFIX}norm.weight"] = torch.randn(shapes["norm"], generator=random)
            held[f"{PREFIX}embed.token_adapter.trainable_tokens_delta"] = torch.randn(3, 4, generator=random)
            save_file(held, path / "adapter_model.safetensors")
        for mesh, placements in layouts(world):
            base = {name: distribute(t, mesh, *placements) for name, t in full.items()}
            third = {name: distribute(t, mesh, *placements) for name, t in other.items()}
            for versions_of, expected in (
                (paths, nm.merge(full, paths, scale=0.9)),
                ([third, *paths], nm.merge(full, [other, *paths], scale=0.9)),
            ):
                with communicating():
                    merged = nm.merge(base, versions_of, scale=0.9)
                    delta = nm.consensus_delta(base, versions_of)
                for name, tensor in expected.items():
                    holds(merged[name], tensor, base[name])
                moved = {name: distribute(t, mesh, *placements) for name, t in full.items()}
                delta.apply_(moved, 0.9)
                for name, tensor in expected.items():
                    holds(moved[name], tensor, base[name])


@case
def not_by_the_operators(world: int) -> None:
    """The operators refuse DTensors with torch's own error, which names the operator; graphs, too."""
    base, model = (distribute(t, init_device_mesh("cpu", (world,)), Shard(0)) for t in versions(8, 4, n=1))
    for operator in (torch.ops.negmerge.merge, torch.ops.negmerge.merge_):
        try:
            operator([base], [model], 0.9)
        except NotImplementedError as error:
            assert "Operator negmerge.merge" in str(error) and "sharding strategy" in str(error), error
        else:
            raise AssertionError("taken")


def without_distributed() -> None:
    """Check that a merge of tensors that are not flat does not import the module of DTensors."""
    full = versions(7, 5)
    base, *models = (t.mT.contiguous().mT for t in full)
    assert same_bits(nm.merge(base, models, scale=0.9), plain_merge(full[0], full[1:], 0.9)[0])
    assert "torch.distributed.tensor" not in sys.modules


def run_all(rank: int, world: int, folder: Path) -> None:
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    failed = {}
    for name, function in CASES.items():
        try:
            function(world)
        except BaseException:
            failed[name] = traceback.format_exc()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


if __name__ == "__main__":
    without_distributed()

    # The ranks are forks of this process, so that modules are imported only once.
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    fork = multiprocessing.get_context("fork")
    for world in WORLDS:
        ranks = [fork.Process(target=run_all, args=(r, world, Path(sys.argv[1]))) for r in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
