"""Arrays of NumPy and of libraries with DLPack as torch tensors: views of the caller's memory, never copies."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch

from ..core.errors import InputError

_EXPECTED = "expected one that torch can view without a copy"
# np.dtype.isbuiltin of dtypes that another package has added to NumPy.
_REGISTERED = 2
_UNSIGNED = {1: torch.uint8, 2: torch.uint16}


class SupportsDLPack(Protocol):
    """An array that other libraries can view by DLPack: of CuPy, JAX and others."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


def is_array(value: object) -> bool:
    """Whether a value is an array that as_tensor takes, and not a tensor."""
    return not isinstance(value, torch.Tensor) and (
        isinstance(value, np.ndarray)
        or (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"))
    )


def as_tensor(array: Any, where: str, written: bool) -> torch.Tensor:
    """An array of any dtype as a tensor on the same memory.

    Args:
        array: The array.
        where: Its label in errors.
        written: Whether it will be written, if its dtype is a floating-point one.

    Raises:
        InputError: If torch cannot view the array as it is, or it is read-only and will be written.
        TypeError: If it has a mask.
    """
    if isinstance(array, np.ndarray):
        return _of_numpy(array, where, written)
    return _of_dlpack(array, where, written)


def _of_numpy(array: np.ndarray[Any, Any], where: str, written: bool) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{where}: {type(array).__name__} of numpy, expected one without a mask")
    dtype = _ml_dtype(array.dtype)
    if written and (array.dtype.kind == "f" or dtype) and not array.flags.writeable:
        raise InputError(f"{where}: read-only numpy array, expected one that can be written in place")
    try:
        plain = array.view(f"u{dtype.itemsize}") if dtype else array
        tensor = torch.from_numpy(plain if plain.flags.writeable else np.asarray(_Unlocked(plain)))
        return tensor.view(dtype) if dtype else tensor
    except (TypeError, ValueError, RuntimeError):  # byte order, dtype or strides that torch does not have
        strides = f", strides {array.strides}" if array.dtype.isnative and array.dtype.kind in "biufc" else ""
    found = f"numpy array of dtype {array.dtype}{strides}"
    raise InputError(f"{where}: {found}, {_EXPECTED}")


def _ml_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The torch dtype of a dtype that NumPy has from ml_dtypes, such as bfloat16: it is told by its name.

    The package need not be installed here. Whether a tensor of that dtype can be merged is not decided here.
    """
    found = getattr(torch, dtype.name, None) if dtype.isbuiltin == _REGISTERED and dtype.isnative else None
    return found if isinstance(found, torch.dtype) and found.itemsize == dtype.itemsize else None


def as_array(tensor: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A tensor on the CPU as an array on the same memory; dtype is what the array is of that the result is like."""
    if _ml_dtype(dtype) is not tensor.dtype:
        return tensor.numpy()
    array: np.ndarray[Any, Any] = tensor.view(_UNSIGNED[tensor.itemsize]).numpy().view(dtype)
    return array


class _Unlocked:
    """A read-only array that NumPy takes for a writable one. torch would warn otherwise; nobody writes to it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps the memory
        self.__array_interface__ = array.__array_interface__
        self.__array_interface__["data"] = array.__array_interface__["data"][0], False


def _of_dlpack(array: Any, where: str, written: bool) -> torch.Tensor:
    kind = type(array).__name__
    inspected = _Inspected(array)
    try:
        view = torch.utils.dlpack.from_dlpack(inspected)
    except _NegativeStrideError:
        raise InputError(f"{where}: {kind} with a negative stride, {_EXPECTED}") from None
    except Exception as error:  # another library may raise anything
        said = " ".join(str(error).split())
        raise InputError(f"{where}: {kind}: {said}, {_EXPECTED}") from error
    if inspected.copied:
        raise InputError(f"{where}: {kind} that gives a copy, {_EXPECTED}")
    if written and view.is_floating_point() and not inspected.writable:
        raise InputError(
            f"{where}: {kind} that is read-only, or does not say otherwise by DLPack 1.0, "
            "expected one that can be written in place, or torch.from_dlpack of it"
        )
    return view


class _NegativeStrideError(Exception):
    """A negative stride, for which torch would end the process."""


class _Inspected:
    """An array whose DLPack capsules are inspected on the way to torch, which reads neither flags nor signs of strides.

    Attributes:
        copied: The capsule holds a copy.
        writable: The capsule says that it may be written. Before DLPack 1.0 there is no flag for it.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.copied, self.writable = False, False

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        # A TypeError is passed on: torch then asks again with fewer arguments.
        self._inspect_capsule(capsule := self._array.__dlpack__(**options))
        if "max_version" not in options:
            # An older torch takes no versioned capsule. One is made only to inspect its flags.
            with suppress(TypeError, BufferError):
                self._inspect_capsule(self._array.__dlpack__(**options, max_version=(1, 0)))
        return capsule

    def _inspect_capsule(self, capsule: Any) -> None:
        if _is_valid(capsule, b"dltensor_versioned"):
            new = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
            self.writable, self.copied = not new.flags & 1, bool(new.flags & 2)
            strided = new.tensor
        else:
            strided = _Strided.from_address(_pointer(capsule, b"dltensor"))
        if strided.strides and any(strided.strides[i] < 0 for i in range(strided.ndim)):
            raise _NegativeStrideError


class _Strided(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h; flags: 1 read-only, 2 copied."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Strided),
    )


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
