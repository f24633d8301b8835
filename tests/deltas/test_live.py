"""Live models: whatever happens in the block, the model has its former bits afterwards."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import peak_allocated, same_bits

import negmerge_fast as nm
from negmerge_fast.backends import registry


def versions(*shape: int, n: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator)
    moved = [(base + 0.1 * torch.randn(shape, generator=generator) + 0.05).to(dtype) for _ in range(n)]
    return [base.to(dtype), *moved]


def versions_of_two_types() -> list[dict[str, torch.Tensor]]:
    """These need two batches."""
    pairs = zip(versions(50), versions(50, dtype=torch.half), strict=True)
    return [dict(zip("ab", pair, strict=True)) for pair in pairs]


def net(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    for p in model.parameters() if seed else ():
        p.data += 0.05
    return model.eval()


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(t, right[name]) for name, t in left.items())


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_nothing_is_printed_when_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of modules are None then, before what a script's variables hold is deleted."""
    base, *models = versions(50)
    with nm.consensus_delta(base, models).live(base) as live:
        live.scale = 0.5
    module = sys.modules[type(live).__module__]
    for name in [name for name in vars(module) if not name.startswith("__")]:
        monkeypatch.setattr(module, name, None)
    live.__del__()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_module(device: str) -> None:
    base, *models = (net(seed).to(device) for seed in range(4))
    before, delta = state(base), nm.consensus_delta(base, models)
    x = torch.randn(2, 5, device=device)
    with delta.live(base) as live:
        assert live.scale is None and equal(state(base), before)
        scales: list[Any] = [0.5, -1, {"^0": 0.3, r"bias$": -0.0, "": 0.7}, 0.7]
        for scale in scales:
            live.scale = scale
            with pytest.raises(nm.InputError, match=r"^scale: 'x' is the first to match no tensor"):
                live.scale = {"x": 1.0, "": 0.2}
            assert live.scale == scale
            merged = net(0).to(device)
            merged.load_state_dict(nm.merge(merged, models, scale=scale))
            assert equal(state(base), state(merged)) and torch.equal(base(x), merged(x))
            applied = net(0).to(device)
            delta.apply_(applied, scale)
            assert equal(state(applied), state(merged))
    assert equal(state(base), before) and all(p.requires_grad for p in base.parameters())


def test_only_elements_in_the_mask_are_kept() -> None:
    """A third of the base here, and temporaries of blocks."""
    base, *models = versions(1 << 23, dtype=torch.bfloat16)
    delta = nm.consensus_delta(base, models)
    live = delta.live(base)
    assert 2 * delta.stats.agreed < peak_allocated(live.__enter__) < base.nbytes / 2
    live.scale = 0.9
    live.__exit__(None, None, None)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Stop, KeyboardInterrupt, GeneratorExit])
def test_an_exception(error: type[BaseException]) -> None:
    base, *models = versions(1000)
    before, delta = base.clone(), nm.consensus_delta(base, models)
    with pytest.raises(error), delta.live(base) as live:
        live.scale = 0.9
        assert not same_bits(base, before)
        raise error
    assert same_bits(base, before)


def test_a_mistake_in_the_block() -> None:
    base, *models = versions(1000)
    before, delta = base.clone(), nm.consensus_delta(base, models)
    for wrong, error in (("1", TypeError), (float("inf"), nm.InputError), (True, TypeError)):
        with pytest.raises(error, match=r"^scale: "), delta.live(base) as live:
            live.scale = 0.9
            live.scale = wrong
        assert same_bits(base, before)


def test_a_backend_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails between two batches, once: the move is half done."""
    base, *models = versions_of_two_types()
    before = {name: t.clone() for name, t in base.items()}
    delta = nm.consensus_delta(base, models)
    choose, calls = registry.choose_apply, []

    def failing(*arguments: Any) -> Any:
        name, apply = choose(*arguments)

        def applied(batch: Any, scale: float | None, threads: int | None = None) -> Any:
            calls.append(scale)
            if len(calls) == 4:
                raise RuntimeError("the device has failed")
            return apply(batch, scale, threads)

        return name, applied

    monkeypatch.setattr(registry, "choose_apply", failing)
    with pytest.raises(RuntimeError, match="the device has failed"), delta.live(base) as live:
        live.scale = 0.5
        live.scale = 0.7
    assert calls == [0.5, 0.5, 0.7, 0.7, None, None] and equal(base, before)


def test_ctrl_c_during_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The move is finished, and then all is restored."""
    base, *models = versions_of_two_types()
    before = {name: t.clone() for name, t in base.items()}
    delta = nm.consensus_delta(base, models)
    choose, calls = registry.choose_apply, []

    def interrupted(*arguments: Any) -> Any:
        name, apply = choose(*arguments)

        def applied(batch: Any, scale: float | None, threads: int | None = None) -> Any:
            calls.append(scale)
            signal.raise_signal(signal.SIGINT)
            return apply(batch, scale, threads)

        return name, applied

    monkeypatch.setattr(registry, "choose_apply", interrupted)
    with pytest.raises(KeyboardInterrupt), delta.live(base) as live:
        live.scale = 0.5
    assert calls == [0.5, 0.5, None, None] and equal(base, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_random_moments() -> None:
    base, *models = versions(20_000)
    before, delta = base.clone(), nm.consensus_delta(base, models)
    random.seed(0)
    gc.freeze()  # what other tests left would be searched at every collection
    for _ in range(30):
        timer = threading.Timer(random.uniform(0, 0.01), os.kill, (os.getpid(), signal.SIGINT))
        live = None
        try:
            timer.start()
            with delta.live(base) as live:
                while True:
                    live.scale = 0.5
                    live.scale = 0.7
        except KeyboardInterrupt:
            pass
        timer.join()
        del live
        gc.collect()
        assert same_bits(base, before)
    gc.unfreeze()


def test_a_block_that_nobody_ended() -> None:
    base, *models = versions(100)
    before, delta = base.clone(), nm.consensus_delta(base, models)
    live = delta.live(base).__enter__()
    live.scale = 0.9
    del live
    gc.collect()
    assert same_bits(base, before)


CTRL_C = """
import sys, torch, negmerge_fast as nm
base = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
before, delta = base.clone(), nm.consensus_delta(base, [base + 1, base + 2])
try:
    with delta.live(base) as live:
        live.scale = 0.5
        print("ready", flush=True)
        while True:
            live.scale = 0.9
            live.scale = -1
except KeyboardInterrupt:
    print(torch.equal(base.view(torch.int32), before.view(torch.int32)))
"""


@pytest.mark.slow
def test_a_real_ctrl_c() -> None:
    process = subprocess.Popen([sys.executable, "-c", CTRL_C], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "True\n" and process.returncode == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("where", ["outside", "at a move", "around"])
def test_modes_of_autograd(mode: Callable[[], Any], where: str) -> None:
    base, *models = (net(seed) for seed in range(4))
    before, delta = state(base), nm.consensus_delta(base, models)
    merged = nm.merge(net(0), models, scale=0.7)
    if where == "around":
        with mode(), delta.live(base) as live:
            live.scale = 0.7
            assert equal(state(base), merged)
    elif where == "at a move":
        with delta.live(base) as live:
            with mode():
                live.scale = 0.7
            assert equal(state(base), merged)
            base(torch.ones(2, 5)).sum().backward()
    else:
        with mode():
            live = delta.live(base).__enter__()
        live.scale = 0.7
        assert equal(state(base), merged)
        live.__exit__(None, None, None)
    assert equal(state(base), before)


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        base, *models = (t.clone() for t in versions(50))
    before = base.clone()
    with nm.consensus_delta(base, models).live(base) as live:
        live.scale = 0.9
        assert same_bits(base, nm.merge(before, models, scale=0.9))
    assert same_bits(base, before)


@pytest.mark.parametrize("when", ["a move", "the end"])
@pytest.mark.parametrize("scattered", [False, True])
def test_autograd_notices(when: str, scattered: bool) -> None:
    base, *models = versions(6, 4)
    weight = (torch.stack([base, base], 2)[..., 0] if scattered else base.clone()).requires_grad_()
    assert weight.is_contiguous() != scattered
    delta = nm.consensus_delta(base, models)
    with delta.live(weight) as live:
        live.scale = 0.5
        loss = (weight * weight).sum()
        if when == "a move":
            live.scale = 0.7
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_changes_meanwhile() -> None:
    """Elements outside of the mask stay as the user leaves them; those in it are the base's again."""
    for contiguous in (True, False):
        base = torch.zeros(2, 3)
        model = base if contiguous else torch.zeros(3, 2).T
        delta = nm.consensus_delta(base, [torch.tensor([[1.0, 0, 0], [0, 0, 1]])])
        with delta.live(model) as live:
            live.scale = 1
            assert model.tolist() == [[-1, 0, 0], [0, 0, -1]]
            model[0] = 7
            live.scale = 2
            assert model.tolist() == [[-2, 7, 7], [0, 0, -2]]
            model[1] = 8
        assert model.tolist() == [[0, 7, 7], [8, 8, 0]]


def test_tied_and_scattered() -> None:
    base, *models = versions(8, 8)
    strided = torch.stack([base, base], 2)[..., 0]
    model = {"embed": (t := base.clone()), "head": t, "strided": strided, "dense": base.T.clone().T}
    named = [dict.fromkeys(model, t) for t in models]
    delta = nm.consensus_delta(model, named)
    with delta.live(model) as live:
        for scale in (0.3, 0.8):
            live.scale = scale
            merged = nm.merge(base, models, scale=scale)
            assert all(same_bits(each, merged) for each in model.values())
        assert live.stats.elements == 3 * 64
    assert all(same_bits(each, base) for each in model.values())


def test_memory_is_live_once() -> None:
    base, *models = versions(10, 8)
    before, delta = base.clone(), nm.consensus_delta(base, models)
    column = nm.consensus_delta(base[:, 1], [t[:, 1] for t in models])
    with delta.live(base) as live:
        for other, model in ((delta, base), (delta, base.detach()), (column, base[:, 1])):
            with pytest.raises(nm.InputError) as error:
                other.live(model).__enter__()
            assert str(error.value) == "model: is live in another block, expected one block at a time"
        with delta.live(base.clone()) as second:
            second.scale = 1
        live.scale = 0.9
        with pytest.raises(nm.InputError):
            delta.apply_(base, 0.9)
    assert same_bits(base, before)
    with (
        column.live(base[:, 1]) as live,
        nm.consensus_delta(base[:, 0], [t[:, 0] for t in models]).live(base[:, 0]) as other,
    ):
        live.scale = other.scale = 0.9
        assert same_bits(base[:, :2], nm.merge(before, models, scale=0.9)[:, :2])
    assert same_bits(base, before)


def test_outside_of_the_block() -> None:
    base, *models = versions(10)
    live = nm.consensus_delta(base, models).live(base)
    open_one = "expected one that is open: with delta.live(model) as live"
    with pytest.raises(nm.InputError) as error:
        live.scale = 0.9
    assert str(error.value) == f"live: its block has not begun, {open_one}"
    with live:
        pass
    with pytest.raises(nm.InputError) as error:
        live.scale = 0.9
    assert str(error.value) == f"live: its block has ended, {open_one}"
    with pytest.raises(nm.InputError, match=r"^live: was entered before, expected a new one"):
        live.__enter__()
    assert live.scale is None


MOVED: dict[str, Callable[[torch.nn.Sequential], object]] = {
    "replaced": lambda net: setattr(net[0], "weight", torch.nn.Parameter(torch.zeros(7, 5))),
    "other memory": lambda net: setattr(net[0].weight, "data", torch.zeros(7, 5)),
    "freed": lambda net: net[0].weight.untyped_storage().resize_(0),
    "cut": lambda net: net[0].weight.untyped_storage().resize_(100),
}


@pytest.mark.parametrize("case", MOVED)
def test_memory_that_moves(case: str) -> None:
    base, *models = (net(seed) for seed in range(3))
    before, delta = state(base), nm.consensus_delta(base, models)
    gone = case in ("freed", "cut")
    message = "'0.weight': moved or replaced since the block began, expected the same memory"
    at_end = (
        "'0.weight': freed, or cut, since the block began, expected the same memory: these were not restored"
    )
    with pytest.raises(nm.InputError) as error, delta.live(base) as live:
        live.scale = 0.5
        MOVED[case](base)
        live.scale = 0.9
    assert str(error.value) == f"live: {at_end if gone else message}"
    for name, tensor in state(base).items() if not gone else ():
        assert name == "0.weight" or same_bits(tensor, before[name])
    assert same_bits(base[2].weight, before["2.weight"])


def test_what_was_replaced_since_the_last_move_is_told_of_at_the_end() -> None:
    base, *models = (net(seed) for seed in range(3))
    before, delta = state(base), nm.consensus_delta(base, models)
    with pytest.raises(nm.InputError) as error, delta.live(base) as live:
        live.scale = 0.5
        base[0].half()
    names = "'0.bias', '0.weight': moved or replaced since the block began"
    assert str(error.value) == f"live: {names}, expected the same memory: these were not restored"
    assert same_bits(base[2].weight, before["2.weight"])
    tensors = {name: t.clone() for name, t in before.items()}
    with (
        pytest.raises(nm.InputError, match=r"^live: '0\.bias': moved or replaced"),
        delta.live(tensors) as live,
    ):
        live.scale = 0.5
        del tensors["0.weight"]
        tensors["0.bias"] = [1.0]  # type: ignore[assignment]
    again = net(0)
    with delta.live(again) as live:  # here the user has the base's bits, in other memory and in the same
        live.scale = 0.5
        again.load_state_dict(again.state_dict(), assign=True)
    assert equal(state(again), before)
    with delta.live(again) as live:
        live.scale = 0.5
        live.scale = None
        again.half()


def test_a_block_that_another_thread_ends_during_an_assignment() -> None:
    base, *models = versions(1000)
    before, delta = base.clone(), nm.consensus_delta(base, models)

    class Ending:
        def __enter__(self) -> None:
            live._lock = lock
            live.__exit__(None, None, None)

        def __exit__(self, *error: object) -> None: ...

    with delta.live(base) as live:
        lock, live._lock = live._lock, Ending()  # type: ignore[assignment]
        with pytest.raises(nm.InputError, match=r"^live: its block has ended"):
            live.scale = 0.9
        assert same_bits(base, before)


def test_elements_that_are_not_finite_are_told_of() -> None:
    base = torch.tensor([1.0, 3e38])
    delta = nm.consensus_delta(base, [torch.tensor([2.0, 3.2e38])])
    with delta.live(base) as live:
        with pytest.warns(nm.MergeWarning, match="^the result: 1 element left as in the base") as told:
            live.scale = -10
        assert [each.filename for each in told] == [__file__]
        assert base.tolist() == [11, torch.tensor(3e38).item()] and live.stats.nonfinite == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            live.scale = 1
            live.scale = None
