"""Arrays of NumPy and by DLPack: merged if torch can view them, else refused by name."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import typed
from array_cases import arrays, expected
from bits import same_bits

import negmerge_fast as nm


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


class ByDLPack:
    """An array that has the DLPack protocol only."""

    def __init__(self, held: Any, old: bool = False) -> None:
        self.held, self.old = held, old

    def __dlpack__(self, **options: Any) -> Any:
        if self.old and options.pop("max_version", None):
            raise TypeError("max_version")
        if isinstance(self.held, torch.Tensor):  # only newer versions of torch take max_version
            options = {} if self.old else options
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.held.__dlpack_device__()


def speaks_dlpack_1() -> bool:
    try:
        np.ones(1).__dlpack__(max_version=(1, 0))
    except TypeError:  # before numpy 2.1
        return False
    return True


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda a: a,
    "transposed": lambda a: a.T,
    "every other": lambda a: a[:, ::2],
    "in Fortran's order": np.asfortranarray,
    "one element": lambda a: a[1, 2, ...],
    "empty": lambda a: a[:0],
    "odd address": lambda a: np.frombuffer(bytearray(b"\0" + a.tobytes()), a.dtype, offset=1),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("view", VIEWS)
def test_numpy_arrays(view: str, dtype: Any) -> None:
    held = [VIEWS[view](a) for a in arrays(6, 8, dtype=dtype)]
    plain = expected(held)
    merged = nm.merge(held[0], held[1:], scale=0.9)
    assert type(merged) is np.ndarray and same_bits(torch.from_numpy(merged), plain)
    assert not np.shares_memory(merged, held[0])
    address = held[0].ctypes.data
    stats = nm.merge_(held[0], held[1:], scale=0.9)
    assert held[0].ctypes.data == address and stats.elements == plain.numel()
    assert same_bits(torch.from_numpy(np.array(held[0])), plain)


def test_merge_into_a_numpy_view_writes_nothing_else() -> None:
    base, *finetuned = arrays(6, 8)
    whole, hoped = base.copy(), base.copy()
    hoped[:, 2:5] = expected([base, *finetuned])[:, 2:5]
    nm.merge_(whole[:, 2:5], [a[:, 2:5] for a in finetuned], scale=0.9)
    assert same_bits(torch.from_numpy(whole), torch.from_numpy(hoped)) and (whole != base).any()


@pytest.mark.parametrize("mixed", [False, True])
def test_models_of_arrays_integers_and_tensors(mixed: bool) -> None:
    a, b = arrays(5, 4), arrays(7, dtype=np.float16)
    models: list[dict[str, Any]] = [
        {"a": x, "b": y, "steps": np.arange(k, k + 3), "flags": np.array([True, False])}
        for k, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    if mixed:
        models[0]["b"] = torch.from_numpy(b[0].copy())
        models[1] = {n: torch.from_numpy(t) for n, t in models[1].items()}
        models[2]["a"] = ByDLPack(a[2])
    merged = nm.merge(models[0], models[1:], scale=0.9)
    assert list(merged) == ["a", "b", "steps", "flags"]
    assert all(type(merged[n]) is (type(t) if n == "b" else np.ndarray) for n, t in models[0].items())
    for name, held in {"a": a, "b": b}.items():
        assert same_bits(torch.as_tensor(merged[name]), expected(held))
    assert merged["steps"].tolist() == [0, 1, 2]
    assert not np.shares_memory(merged["steps"], models[0]["steps"])
    stats = nm.merge_(models[0], models[1:], scale=0.9)
    assert all((np.asarray(models[0][n]) == np.asarray(merged[n])).all() for n in merged)
    assert list(stats.tensors) == ["a", "b"]


def test_read_only_arrays_are_read_without_a_warning() -> None:
    held = [read_only(a) for a in arrays(20)]
    integers = {"n": read_only(np.arange(3))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(torch.from_numpy(nm.merge(held[0], held[1:], scale=0.9)), expected(held))
        base = {"w": held[0].copy(), **integers}
        nm.merge_(base, [{"w": a, **integers} for a in held[1:]], scale=0.9)
    assert same_bits(torch.from_numpy(base["w"]), expected(held))
    code = (
        "import numpy as np, negmerge_fast as nm; a = np.ones(3); a.flags.writeable = False; "
        "nm.merge(a, [np.broadcast_to(1.0, 3), a], scale=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_mapped_files(tmp_path: Any) -> None:
    held = arrays(30)
    for k, array in enumerate(held):
        np.save(tmp_path / f"{k}.npy", array)
    base = np.load(tmp_path / "0.npy", mmap_mode="r+")
    models = [np.load(tmp_path / f"{k}.npy", mmap_mode="r") for k in (1, 2, 3)]
    nm.merge_(base, models, scale=0.9)
    base.flush()
    assert same_bits(torch.from_numpy(np.load(tmp_path / "0.npy")), expected(held))
    with pytest.raises(nm.InputError, match="base: read-only numpy array, expected one that can be written"):
        nm.merge_(models[0], models[1:], scale=0.9)


def test_tied_arrays_stay_tied() -> None:
    base, *finetuned = arrays(4, 5)
    plain = expected([base, *finetuned])
    models = [{"embed": a, "head": a[:], "too": torch.from_numpy(a)} for a in (base, *finetuned)]
    merged = nm.merge(models[0], models[1:], scale=0.9)
    assert merged["embed"] is merged["head"] and type(merged["too"]) is torch.Tensor
    assert np.shares_memory(merged["embed"], merged["too"].numpy())
    assert nm.merge_(models[0], models[1:], scale=0.9).elements == 20
    assert same_bits(torch.from_numpy(base), plain)


def test_task_vectors_of_arrays() -> None:
    base, *finetuned = arrays(50)
    taus = [a - base for a in finetuned]
    tau, named = (
        nm.merge_task_vectors(taus),
        nm.merge_task_vectors([{"w": t, "n": np.arange(2)} for t in taus]),
    )
    assert type(tau) is type(named["w"]) is np.ndarray and (tau == named["w"]).all() and len(named) == 1
    whole = nm.merge(base, taus, scale=0.5, inputs="task_vectors")
    nm.negate_(base, tau, scale=0.5)
    assert (base == whole).all()
    with pytest.raises(nm.InputError, match=r"task_vectors\[0\]: torch.int64, expected a floating-point"):
        nm.merge_task_vectors([np.arange(3)])


@pytest.mark.parametrize("old", [False, True])
def test_dlpack(old: bool) -> None:
    held = arrays(6, 5)
    by_dlpack = [ByDLPack(a, old) for a in held]
    merged = nm.merge(by_dlpack[0], by_dlpack[1:], scale=0.9)
    assert type(merged) is torch.Tensor and same_bits(merged, expected(held))
    named = nm.merge({"w": by_dlpack[0]}, [{"w": f} for f in by_dlpack[1:]], scale=0.9)
    assert same_bits(named["w"], merged)
    integers = {"n": ByDLPack(np.arange(3), old), "w": torch.ones(2)}
    other = {**integers, "w": torch.zeros(2)}
    assert type(nm.merge(integers, [other], scale=0.9)["n"]) is torch.Tensor
    nm.merge_(integers, [other], scale=0.9)  # reads them only
    if old or not speaks_dlpack_1():
        with pytest.raises(
            nm.InputError, match="base: ByDLPack that is read-only, or does not say otherwise"
        ):
            nm.merge_(by_dlpack[0], by_dlpack[1:], scale=0.9)
    else:
        nm.merge_(by_dlpack[0], by_dlpack[1:], scale=0.9)
        assert same_bits(torch.from_numpy(held[0]), merged)


def test_an_older_torch_that_asks_for_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a capsule that it can read. A second capsule tells whether the array may be written."""

    def view(array: Any) -> torch.Tensor:
        capsule = array.__dlpack__()
        assert '"dltensor"' in repr(capsule)
        return torch.from_dlpack(capsule)

    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", view)
    test_dlpack(old=False)
    test_dlpack(old=True)


@pytest.mark.skipif(not speaks_dlpack_1(), reason="numpy's DLPack has no flags before 2.1")
def test_dlpack_flags_are_respected() -> None:
    base, *finetuned = arrays(6)
    nm.merge(ByDLPack(read_only(base)), finetuned, scale=0.9)
    with pytest.raises(nm.InputError, match="base: ByDLPack that is read-only"):
        nm.merge_(ByDLPack(base), finetuned, scale=0.9)

    class Copies(ByDLPack):
        def __dlpack__(self, **options: Any) -> Any:
            return self.held.__dlpack__(**{**options, "max_version": (1, 0), "copy": True})

    for function in (nm.merge, nm.merge_):
        with pytest.raises(nm.InputError, match=r"finetuned\[0\]: Copies that gives a copy"):
            function(finetuned[0], [Copies(finetuned[1])], scale=0.9)


def odd_strides() -> np.ndarray:
    return np.ones(3, [("w", "f4"), ("flag", "u1")])["w"]


VIEWED = "expected one that torch can view without a copy"
NO_VIEW: dict[str, tuple[Callable[[], Any], str]] = {
    "other byte order": (lambda: np.ones(3, ">f4"), f"numpy array of dtype >f4, {VIEWED}"),
    "integers of it": (lambda: np.ones(3, ">i8"), f"numpy array of dtype >i8, {VIEWED}"),
    "objects": (lambda: np.ones(3, object), r"numpy array of dtype object, "),
    "texts": (lambda: np.array(["a", "b", "c"]), "numpy array of dtype <U1, "),
    "times": (lambda: np.ones(3, "m8[s]"), r"numpy array of dtype timedelta64\[s\], "),
    "a structure": (lambda: np.ones(3, [("w", "f4")]), r"numpy array of dtype \[\('w', '<f4'\)\], "),
    "long doubles": (
        lambda: np.ones(3, np.longdouble),
        "numpy array of dtype (longdouble|float128), strides ",
    ),
    "backwards": (lambda: np.ones(3, np.float32)[::-1], r"numpy array of dtype float32, strides \(-4,\), "),
    "odd strides": (odd_strides, r"numpy array of dtype float32, strides \(5,\), "),
    "a mask": (lambda: np.ma.ones(3), "MaskedArray of numpy, expected one without a mask"),
    "a scalar": (lambda: np.float32(3), "float32, (expected a tensor|but base is ndarray)"),
    "a number": (lambda: 3.0, "float, (expected a tensor|but base is ndarray)"),
    "a list": (lambda: [1.0, 2.0, 3.0], "list, (expected a tensor|but base is ndarray)"),
    "backwards by DLPack": (lambda: ByDLPack(np.ones(3)[::-1]), "ByDLPack with a negative stride"),
    "the same, old": (lambda: ByDLPack(np.ones(3)[::-1], old=True), "ByDLPack with a negative stride"),
    "no DLPack for it": (lambda: ByDLPack(np.ones(3, ">f4")), f"ByDLPack: .*, {VIEWED}"),
    "with a gradient": (lambda: ByDLPack(torch.ones(3, requires_grad=True)), f"ByDLPack: .*, {VIEWED}"),
}


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("case", NO_VIEW)
def test_arrays_that_torch_cannot_view_are_refused_by_name(case: str, single: bool) -> None:
    make, message = NO_VIEW[case]
    good, other = np.ones(3, np.float32), np.full(3, 2, np.float32)
    for function in (nm.merge, nm.merge_):
        for which in range(3):
            versions: list[Any] = [good, other, other]
            versions[which] = make()
            where = ["base", r"finetuned\[0\]", r"finetuned\[1\]"][which] + ("" if single else r"\['w'\]")
            models = versions if single else [{"first": good, "w": v} for v in versions]
            if not single:
                models[0] = {**models[0], "first": good.copy()}
            with pytest.raises((nm.InputError, TypeError), match=f"^{where}: {message}"):
                function(models[0], models[1:], scale=1.0)
            assert (good == 1).all() and (other == 2).all()


def test_nothing_is_written_before_all_is_checked() -> None:
    held = arrays(6)
    base = {"a": held[0].copy(), "b": read_only(held[0].copy())}
    with pytest.raises(nm.InputError, match=r"base\['b'\]: read-only numpy array"):
        nm.merge_(base, [{"a": a, "b": a} for a in held[1:]], scale=0.9)
    assert (base["a"] == held[0]).all()
    with pytest.raises(nm.InputError, match=r"finetuned\[0\]: shares memory with base"):
        nm.merge_(held[0][:4], [held[0][2:]], scale=0.9)
    with pytest.raises(nm.InputError, match="base: several of its elements share memory"):
        nm.merge_(np.lib.stride_tricks.as_strided(held[0], (3, 2), (4, 4)), [np.ones((3, 2))], scale=0.9)
    with pytest.raises(TypeError, match="finetuned: ndarray, expected a list of models"):
        nm.merge(held[0], np.stack(held[1:]), scale=0.9)
    with pytest.raises(TypeError, match=r"finetuned\[0\]: ndarray, but base is dict"):
        nm.merge({"w": held[0]}, [held[1]], scale=0.9)


def test_memory_lives_as_long_as_the_result() -> None:
    merged = nm.merge(np.ones(10_000), [np.full(10_000, 2.0), ByDLPack(np.full(10_000, 3.0))], scale=1.0)
    assert (merged == -0.5).all() and ctypes.c_double.from_address(merged.ctypes.data).value == -0.5


def test_runtime_types_are_those_of_the_type_checker() -> None:
    typed.check()


def bfloats(*shape: int) -> list[np.ndarray]:
    return arrays(*shape, dtype=pytest.importorskip("ml_dtypes").bfloat16)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy of a bfloat16 array, by way of its bits."""
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


@pytest.mark.parametrize("view", VIEWS)
def test_bfloat16_of_ml_dtypes(view: str) -> None:
    held = [VIEWS[view](a) for a in bfloats(6, 8)]
    plain = expected([as_tensor(a) for a in held])
    merged = nm.merge(held[0], held[1:], scale=0.9)
    assert type(merged) is np.ndarray and merged.dtype == held[0].dtype
    assert same_bits(as_tensor(merged), plain) and not np.shares_memory(merged, held[0])
    nm.merge_(held[0], held[1:], scale=0.9)
    assert same_bits(as_tensor(held[0]), plain)


def test_models_with_bfloat16_of_ml_dtypes() -> None:
    """Beside tensors and other arrays; tied; as task vectors; read-only."""
    held, others = bfloats(4, 5), arrays(3)
    plain = expected([as_tensor(a) for a in held])
    models: list[dict[str, Any]] = [{"a": a, "tied": a[:], "b": b} for a, b in zip(held, others, strict=True)]
    models[1]["a"] = as_tensor(held[1])
    models[2] = {name: read_only(array) for name, array in models[2].items()}
    merged = nm.merge(models[0], models[1:], scale=0.9)
    assert merged["a"] is merged["tied"] and same_bits(as_tensor(merged["a"]), plain)
    assert merged["a"].dtype == held[0].dtype and same_bits(torch.from_numpy(merged["b"]), expected(others))
    taus = [a.astype(np.float32) for a in held]
    assert nm.merge_task_vectors([held[0], held[1]]).dtype == held[0].dtype
    assert nm.merge_task_vectors([held[0], taus[1]]).dtype == np.float32
    with pytest.raises(nm.InputError, match="base: read-only numpy array"):
        nm.merge_(models[2]["a"], [held[1]], scale=0.9)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3", "int4", "uint4"])
def test_other_types_of_ml_dtypes_are_refused_by_name(name: str) -> None:
    array = np.ones(3).astype(getattr(pytest.importorskip("ml_dtypes"), name))
    with pytest.raises(nm.InputError, match=rf"base\['w'\]: .*{name}, expected"):
        nm.merge({"w": array}, [{"w": array}], scale=0.9)
