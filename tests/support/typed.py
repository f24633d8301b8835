"""Calls with the types that a type checker must infer. mypy reads this file, and test_arrays.py runs it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch

import negmerge_fast as nm

Floats = np.ndarray[Any, np.dtype[np.float32]]


class ByDLPack:
    """An array that has the DLPack protocol only."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None) -> Any:
        return self._tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._tensor.__dlpack_device__()


def check() -> None:
    tensor = torch.ones(3)
    array: Floats = np.ones(3, np.float32)
    parameter = torch.nn.Parameter(torch.ones(3))
    module, by_dlpack = torch.nn.Linear(2, 2), ByDLPack(tensor)
    mixed: dict[str, torch.Tensor | Floats] = {"a": torch.ones(3), "b": array}

    of_tensor: torch.Tensor = nm.merge(tensor, [tensor, array], scale=0.9)
    of_parameter: torch.Tensor = nm.merge(parameter, [parameter], scale=1, min_agreement=0.8, backend="torch")
    of_array: Floats = nm.merge(array, [array, tensor], scale=0.9, nonfinite="error")
    of_dlpack: torch.Tensor = nm.merge(by_dlpack, [by_dlpack], scale=0.9, inputs="task_vectors")
    of_module: OrderedDict[str, torch.Tensor] = nm.merge(module, [module, module.state_dict()], scale=0.9)
    of_state: dict[str, torch.Tensor] = nm.merge(OrderedDict(module.state_dict()), [module], scale=0.9)
    of_parameters: dict[str, torch.Tensor] = nm.merge({"w": parameter}, [{"w": array}], scale=0.9)
    of_arrays: dict[str, Floats] = nm.merge({"w": array}, [{"w": tensor}], scale=0.9)
    of_mixed: dict[str, Any] = nm.merge(mixed, [mixed], scale=0.9)
    assert type(of_tensor) is type(of_parameter) is type(of_dlpack) is torch.Tensor
    assert type(of_array) is type(of_arrays["w"]) is type(of_mixed["b"]) is np.ndarray
    assert type(of_parameters["w"]) is type(of_mixed["a"]) is torch.Tensor
    assert type(of_module) is type(of_state) is OrderedDict and of_module.keys() == of_state.keys()
    assert type(of_parameters) is dict
    tau: torch.Tensor = nm.merge_task_vectors([tensor, tensor], nonfinite="error")
    array_tau: Floats = nm.merge_task_vectors([array, array])
    named_tau: dict[str, torch.Tensor] = nm.merge_task_vectors([{"w": tensor}, {"w": tensor}])
    array_taus: dict[str, Floats] = nm.merge_task_vectors([{"w": array}])
    module_tau: OrderedDict[str, torch.Tensor] = nm.merge_task_vectors([module, module])
    assert type(tau) is type(named_tau["w"]) is type(module_tau["weight"]) is torch.Tensor
    assert type(array_tau) is type(array_taus["w"]) is np.ndarray

    stats: nm.Stats = nm.merge_(array, [np.ones(3), torch.ones(3)], scale=0.9)
    stats = nm.negate_(mixed, mixed_tau(), scale=0.9)
    assert stats.elements == 6


def mixed_tau() -> dict[str, torch.Tensor | Floats]:
    return {"a": np.ones(3, np.float32), "b": torch.ones(3)}


def refused() -> int:
    """Calls that a type checker must refuse. Never called."""
    nm.merge(torch.ones(3), [torch.ones(3)])  # type: ignore[call-overload]  # no scale
    nm.merge(torch.ones(3), [torch.ones(3)], scale="1")  # type: ignore[arg-type]
    nm.merge(3, [torch.ones(3)], scale=1)  # type: ignore[call-overload]
    return nm.merge(np.ones(3), [torch.ones(3)], scale=1)  # type: ignore[return-value]
