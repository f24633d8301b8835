"""Loading of the pickle of a PyTorch file by torch.load(weights_only=True), after a look at what it would do.

torch's own unpickler calls a short list of functions. With these a pickle can still take all memory or time, or crash the process:
bytearray(10**12), a key of a million nested tuples, a tensor that is larger than its storage. So its opcodes are followed first, on a
stack of mere sizes: nothing is built, nothing is called. What torch.save writes for tensors in dicts passes.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..core.errors import first_line, short_repr

# Bytes that the objects of a pickle may take, by a rough estimate; of 100,000 tensors some 340 MB.
_MAX_OBJECT_BYTES = 384 << 20
# Opcodes of a long pickle have at least so many bytes: 2.5 on average in states of optimizers, 2 in lists of small numbers.
_MANY_OPCODES, _BYTES_PER_OPCODE = 250_000, 1.5
# Objects in each other, and how many there are if each is counted wherever it is used: hashes and texts go through all of them.
_MAX_DEPTH, _MAX_VISITED = 100, 10_000_000
_MAX_EXTENTS = 64
_KEYS_HELD = 2

# What is called in state dicts: other functions of torch's list are refused here.
_CALLED = {
    "collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex", "builtins.bytearray", "torch.Size", "torch.device", "_codecs.encode",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2",
    "torch.serialization._get_layout",
}  # fmt: skip
# Functions that rebuild tensors which have no place in a safetensors file.
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device whose numbers are a NumPy array",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_NAMED = re.compile(
    r"torch\.(cuda\.)?\w+Storage|torch\.storage\.\w+Storage"
    r"|torch\.(u?int|bits|float|bfloat|complex|qu?int|double|half|long|short|bool|strided|sparse|per_)\w*"
)

_MALFORMED = "a malformed pickle, expected one as torch.save writes it"
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


class PickleError(ValueError):
    """A pickle that is not loaded, in a line without the name of its file."""


class GlobalError(PickleError):
    """A pickle that refers to something which weights_only does not load."""


class CutError(PickleError):
    """A pickle without its end."""


class StorageId(NamedTuple):
    """A storage that a pickle asks for: its name in the file, the class of its elements, and how many there are."""

    key: str
    kind: str
    numel: int


class LoadedStorage(NamedTuple):
    """A storage as torch made it: its name in the file, and its bytes."""

    key: str
    nbytes: int


class _Global(str):
    """The name of a function, a class or a dtype."""


class _Object:
    """Something that has a size.

    Attributes:
        kind: "tuple", "list", "dict", "set", "storage", "tensor", "bytes" or "object"; for a tensor that cannot be merged, what it is.
        items: Of a list or a short tuple; the first keys of a dict; the number of elements of a storage, or of bytes.
        visited: How many objects it has, each counted wherever it is used.
        depth: How many of them are in each other.
        used: Whether it is in another one: then it is complete.
    """

    __slots__ = ("depth", "items", "kind", "used", "visited")

    def __init__(self, kind: str, items: Sequence[Any] = ()) -> None:
        self.kind, self.items = kind, list(items)
        self.visited, self.depth, self.used = 1, 0, False

    def add(self, item: Any) -> None:
        """Put an item, or a key or a value, into this one."""
        if not isinstance(item, _Object):
            self.visited += 1
            return
        if item.kind in _OTHER_TENSORS.values():
            raise PickleError(f"{item.kind}, expected a plain tensor")
        item.used = True
        self.visited += item.visited
        self.depth = max(self.depth, item.depth + 1)
        if self.visited > _MAX_VISITED or self.depth > _MAX_DEPTH:
            raise PickleError("too many objects in each other, expected tensors in dicts")


_INT, _SHORT, _DOUBLE, _UINT = (
    struct.Struct("<i"),
    struct.Struct("<H"),
    struct.Struct(">d"),
    struct.Struct("<I"),
)
_MARK = object()
# By opcode: a constant, and the bytes that it takes; and containers in the same way.
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_EMPTY = {b"]": ("list", 250), b"}": ("dict", 250), b")": ("tuple", 150), b"\x8f": ("set", 400)}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
# Of a tensor that torch builds, and of the storage behind it.
_CALL_BYTES = 400


class _Machine:
    """The opcodes of a pickle, followed from one position to the end of the pickle.

    Attributes:
        at: The next byte.
        storages: What the pickle asks for, in its order.
    """

    def __init__(self, raw: bytes, at: int) -> None:
        self.raw, self.at = raw, at
        self.storages: list[StorageId] = []
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.bytes = 0

    def take(self, size: int) -> bytes:
        taken = self.raw[self.at : self.at + size]
        if len(taken) < size:
            raise CutError("ends within its pickle: truncated")
        self.at += size
        return taken

    def line(self) -> str:
        end = self.raw.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise CutError("ends within its pickle: truncated")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def push(self, value: Any, nbytes: int = 24) -> None:
        self.stack.append(value)
        self.bytes += nbytes
        if self.bytes > _MAX_OBJECT_BYTES:
            raise PickleError(f"its pickle makes objects of more than {_MAX_OBJECT_BYTES >> 20} MiB")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError(_MALFORMED)
        return value

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleError(_MALFORMED)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def run(self) -> Any:
        """Follow all opcodes to the last, and return what would be loaded."""
        begin, opcodes = self.at, 0
        while (opcode := self.take(1)) != b".":
            opcodes += 1
            if opcodes > _MANY_OPCODES and opcodes * _BYTES_PER_OPCODE > self.at - begin:
                raise PickleError("its pickle is mostly opcodes, expected names and numbers of tensors")
            if opcode in _CONSTANTS:
                self.push(_CONSTANTS[opcode], 8)
            elif opcode in _EMPTY:
                kind, nbytes = _EMPTY[opcode]
                self.push(_Object(kind), nbytes + 8)
            elif opcode in _TUPLES:
                self.tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1])
            elif opcode in _OPCODES:
                _OPCODES[opcode](self)
            else:
                raise PickleError(
                    f"its pickle has the opcode {opcode!r}, which torch.save does not write by default"
                )
        return self.pop()

    def tuple(self, items: list[Any]) -> None:
        is_long = len(items) > _MAX_EXTENTS
        made = _Object("long tuple", ()) if is_long else _Object("tuple", items)
        for item in items:
            made.add(item)
        self.push(made, 150 + 16 * len(items))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"), 60 + 4 * size)

    def set_items(self, pairs: list[Any]) -> None:
        container = self.open("dict")
        if len(pairs) % 2:
            raise PickleError(_MALFORMED)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self.use(key)
            if len(container.items) < _KEYS_HELD:
                container.items.append(key)
            try:
                container.add(key)
                container.add(value)
            except PickleError as error:
                raise PickleError(
                    f"tensor {short_repr(key)}: {error}" if isinstance(key, str) else str(error)
                ) from None
        self.bytes += 50 * len(pairs)

    def append(self, items: list[Any]) -> None:
        container = self.open("list")
        for item in items:
            container.add(item)
        container.items += items
        self.bytes += 16 * len(items)

    def open(self, kind: str) -> _Object:
        """The object on top of the stack, which something is put into."""
        container = self.stack[-1]
        if not isinstance(container, _Object) or container.kind != kind or container.used:
            raise PickleError(f"its pickle changes what is not a {kind} of its own")
        return container

    def use(self, value: Any) -> None:
        """Count the time to hash or convert a value, at a byte for each object in it."""
        self.bytes += 8 * (value.visited if isinstance(value, _Object) else 1)

    def name(self) -> None:
        module, name = self.line(), self.line()
        full = _Global(f"{_OLD_MODULES.get(module, module)}.{name}")
        if (
            full not in _CALLED
            and full not in _OTHER_TENSORS
            and full not in _TYPES
            and not _NAMED.fullmatch(full)
        ):
            raise GlobalError(str(full))
        self.push(full, 16)

    def load_storage(self) -> None:
        pid = self.pop()
        items = pid.items if isinstance(pid, _Object) and pid.kind == "tuple" else []
        if len(items) not in (5, 6) or items[0] != "storage" or not isinstance(items[1], _Global):
            raise PickleError("its pickle refers to something else than storages, expected a state dict")
        _, _, key, location, numel, *view = items
        if not (
            isinstance(key, str) and isinstance(location, str) and type(numel) is int and 0 <= numel < 1 << 63
        ):
            raise PickleError(
                f"storage {short_repr(key)} of {short_repr(numel)} elements, expected a name and a size"
            )
        if view not in ([], [None]):
            raise PickleError(
                f"storage {short_repr(key)} is a view of another one: load it and save it again with torch.save"
            )
        self.storages.append(StorageId(key, str(items[1]), numel))
        self.push(_Object("storage", [numel]), _CALL_BYTES)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if (
            not isinstance(function, _Global)
            or not isinstance(arguments, _Object)
            or arguments.kind != "tuple"
        ):
            raise PickleError("its pickle calls what is not named in it")
        if function not in _CALLED and function not in _OTHER_TENSORS:
            raise GlobalError(str(function))
        self.use(arguments)
        self.push(self.call(function, arguments), _CALL_BYTES)

    def call(self, function: str, arguments: _Object) -> _Object:
        items, name = arguments.items, function.rpartition(".")[2]
        if function in _OTHER_TENSORS:
            return _Object(_OTHER_TENSORS[function])
        if name == "_rebuild_from_type_v2":
            if len(items) != 4 or items[0] not in _CALLED or not _is(items[2], "tuple"):
                raise PickleError("a malformed tensor, expected one as torch.save writes it")
            if items[1] not in _TYPES:
                return _Object("a tensor subclass")
            return self.call(items[0], items[2])
        if name.startswith("_rebuild_parameter"):
            if not items or not _is(items[0], "tensor"):
                raise PickleError("a parameter of no tensor, expected one")
            return _Object("tensor")
        if name.startswith("_rebuild_tensor"):
            _refuse_misfit(items, name == "_rebuild_tensor_v3")
            return _Object("tensor")
        if name in ("encode", "bytearray"):
            return self.bytes_of(name, items)
        if name == "complex" and not (len(items) == 2 and all(type(item) is float for item in items)):
            raise PickleError("its pickle calls builtins.complex, but not for two numbers")
        if name in ("Size", "device", "_get_layout") and any(
            isinstance(i, _Object) and i.depth for i in items
        ):
            raise PickleError(_MALFORMED)
        if name in ("set", "Counter", "OrderedDict", "Size"):  # each call copies what it is given
            self.bytes += 64 * sum(item.visited for item in items if isinstance(item, _Object))
        made = _Object("dict" if name in ("OrderedDict", "Counter") else "object")
        for item in items:
            made.add(item)
        return made

    def bytes_of(self, name: str, items: list[Any]) -> _Object:
        """The bytes of a text, or a bytearray of them. Each call makes others."""
        if name == "bytearray" and not items:
            return _Object("object")
        if name == "bytearray" and len(items) == 1 and _is(items[0], "bytes"):
            size = items[0].items[0]
        elif (
            name == "encode" and len(items) == 2 and type(items[0]) is str and items[1] in ("latin1", "utf-8")
        ):
            size = 2 * len(items[0])
        else:
            raise PickleError(f"its pickle calls {name}, but not for plain bytes")
        self.bytes += size
        return _Object("bytes", [size])

    def build(self) -> None:
        state = self.pop()
        container = self.open("dict")
        if not _is(state, "dict") or state.items != ["_metadata"]:  # another one might stand for a method
            raise PickleError("its pickle sets attributes, expected none but the _metadata of a state dict")
        container.add(state)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Object) and value.kind == kind


def _refuse_misfit(items: list[Any], is_untyped: bool) -> None:
    """Refuse a tensor that is not within its storage. torch would make the storage larger. is_untyped: its elements are bytes."""
    if len(items) < 4 or not _is(items[0], "storage") or not all(_is(item, "tuple") for item in items[2:4]):
        raise PickleError("a malformed tensor, expected one as torch.save writes it")
    offset, shape, strides = items[1], items[2].items, items[3].items
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise PickleError(
            f"a tensor of shape {short_repr(shape)}, strides {short_repr(strides)} and offset {short_repr(offset)}, expected sizes"
        )
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= items[0].items[0]:
        raise PickleError(
            f"a tensor of shape {short_repr(shape)}, strides {short_repr(strides)} and offset {offset} in a storage of "
            f"{items[0].items[0]} {'bytes' if is_untyped else 'elements'}, expected it inside"
        )


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise PickleError(_MALFORMED)
    machine.push(machine.memo[index], 8)


def _put(machine: _Machine, index: int) -> None:
    value = machine.pop()
    machine.memo[index] = value
    machine.stack.append(value)
    machine.bytes += 100


def _long(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.take(1)[0]), "little", signed=True), 32)


# Modules of Python 2.
_OLD_MODULES = {"__builtin__": "builtins"}
_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: _refuse_protocol(m.take(1)[0]),
    b"c": _Machine.name,
    b"R": _Machine.reduce,
    b"Q": _Machine.load_storage,
    b"b": _Machine.build,
    b"(": lambda m: m.push(_MARK, 8),
    b"t": lambda m: m.tuple(m.pop_to_mark()),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"J": lambda m: m.push(_INT.unpack(m.take(4))[0]),
    b"K": lambda m: m.push(m.take(1)[0]),
    b"M": lambda m: m.push(_SHORT.unpack(m.take(2))[0]),
    b"G": lambda m: m.push(_DOUBLE.unpack(m.take(8))[0]),
    b"X": lambda m: m.text(_UINT.unpack(m.take(4))[0]),
    b"U": lambda m: m.text(m.take(1)[0]),
    b"\x8a": _long,
    b"h": lambda m: _get(m, m.take(1)[0]),
    b"j": lambda m: _get(m, _UINT.unpack(m.take(4))[0]),
    b"q": lambda m: _put(m, m.take(1)[0]),
    b"r": lambda m: _put(m, _UINT.unpack(m.take(4))[0]),
}


def _refuse_protocol(protocol: int) -> None:
    if protocol not in (2, 3):  # with tensors alone, 3 differs in this number
        raise PickleError(
            f"pickled with protocol {protocol}, expected 2, the one that torch.save uses by default"
        )


class Inspection(NamedTuple):
    """What a pickle would do.

    Attributes:
        end: The byte behind it.
        storages: What it asks for, in its order.
        value: What it would give, if that is a text, a number or a list.
    """

    end: int
    storages: list[StorageId]
    value: Any


def inspect_pickle(raw: bytes, begin: int = 0) -> Inspection:
    """Follow the opcodes of a pickle.

    Raises:
        PickleError: If torch.load(weights_only=True) would not load it, or it is no state dict's.
    """
    machine = _Machine(raw, begin)
    try:
        value = machine.run()
    except PickleError:
        raise
    except (IndexError, UnicodeDecodeError, TypeError) as error:
        raise PickleError(f"{_MALFORMED} ({first_line(error)[:80]})") from None
    return Inspection(machine.at, machine.storages, value.items if _is(value, "list") else value)


def load_entry(pickled: bytes, storages: Sequence[StorageId]) -> tuple[Any, dict[int, LoadedStorage]]:
    """Load the inspected data.pkl of a zip file, with storages on "meta": they have a size and no bytes.

    Returns:
        What was pickled; and the storages by their address (untyped_storage()._cdata), which is theirs while what was pickled lives.
    """
    import zipfile  # slow to import, for few checkpoints

    # In an archive of its own: torch reads none that others wrote, and does not need the storages.
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", pickled)
    packed.seek(0)
    return _load(packed, storages, lambda storage: type(storage)(storage.nbytes(), device="meta"))


def load_legacy(pickles: bytes, storages: Sequence[StorageId]) -> tuple[Any, dict[int, LoadedStorage]]:
    """load_entry for the inspected pickles of a legacy file. Its storages have memory, which nobody has touched.

    Args:
        pickles: All of them: the object is the fourth.
        storages: What the object asks for, each once.
    """
    # In place of storages on "meta", torch would make others where they are used again.
    return _load(io.BytesIO(pickles), storages, lambda storage: storage)


def _load(
    file: io.BytesIO, storages: Sequence[StorageId], placed: Callable[[Any], Any]
) -> tuple[Any, dict[int, LoadedStorage]]:
    import torch

    made: list[Any] = []  # in the order of what the pickle asks for; kept, so that no address is used twice

    def restore(storage: Any, _: str) -> Any:
        made.append(placed(storage))
        return made[-1]

    try:
        with torch.serialization.skip_data(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location=restore, weights_only=True, mmap=False)
    except Exception as error:  # of many types
        if found := _REFUSED_GLOBAL.search(str(error)):
            raise GlobalError(found[1]) from None
        raise PickleError(f"torch.load(weights_only=True): {first_line(error)[:200]}") from None
    if len(made) != len(storages):
        raise PickleError(f"torch loads {len(made)} storages, expected {len(storages)}")
    pairs = zip(made, storages, strict=True)
    return loaded, {storage._cdata: LoadedStorage(each.key, storage.nbytes()) for storage, each in pairs}
