"""PyTorch files that would run code, take all memory or time, or lie about what they hold: names, contents, and what is said of them.

What would run writes a file "pwned".
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Make = Callable[[], bytes]

COMMAND = "touch pwned"
MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
PAYLOAD = struct.pack("<2f", 1.5, -2.5)


# Pickles, opcode by opcode.


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", kind: str = "FloatStorage", numel: int = 2, more: bytes = b"") -> bytes:
    return (
        b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number(numel) + more + b"tQ"
    )


ORDERED = call(named("collections", "OrderedDict"))


def tensor(
    held: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (2,), strides: tuple[int, ...] = (1,)
) -> bytes:
    arguments = held or storage(), number(offset), numbers(*shape), numbers(*strides), b"\x89", ORDERED
    return call(named("torch._utils", "_rebuild_tensor_v2"), *arguments)


def state(*values: bytes, protocol: bytes = b"\x80\2") -> bytes:
    """A dict of tensors "a", "b", …"""
    items = b"".join(text(chr(ord("a") + k)) + value for k, value in enumerate(values))
    return protocol + b"}(" + items + b"u."


GOOD = state(tensor())
SYSTEM = named("os", "system")


# Archives, header by header.


class Entry(NamedTuple):
    """An entry, and what its headers say in place of the truth. local: in place of what the directory says, too."""

    name: str
    data: bytes = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    extra: bytes = b""
    offset: int | None = None
    local: dict[str, Any] | None = None


def header(entry: Entry, **changes: Any) -> tuple[Any, ...]:
    said = entry._replace(**changes)
    crc = zlib.crc32(entry.data) if said.crc is None else said.crc
    packed = len(entry.data) if said.packed is None else said.packed
    size = len(entry.data) if said.size is None else said.size
    return said.flags, said.method, 0, 0, crc, packed, size, len(said.name.encode())


def archive(
    entries: list[Entry],
    front: bytes = b"",
    behind: bytes = b"",
    count: int | None = None,
    zip64: tuple[int, ...] | None = None,
    gap: bytes = b"",
    comment: bytes = b"",
) -> bytes:
    """A zip archive. zip64: the last four numbers of that record."""
    body, directory = bytearray(front), bytearray()
    for entry in entries:
        at = len(body) if entry.offset is None else entry.offset
        local = header(entry, **(entry.local or {}))
        name = (entry.local or {}).get("name", entry.name).encode()
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, *local, 0) + name + entry.data
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, 20, *header(entry), len(entry.extra), 0, 0, 0, 0, at & 0xFFFFFFFF
        )
        directory += entry.name.encode() + entry.extra
    body += gap
    begin, total = len(body), len(entries) if count is None else count
    tail = b""
    if zip64:
        tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *zip64) + struct.pack(
            "<4sIQI", b"PK\6\7", 0, begin + len(directory), 1
        )
    end = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, total & 0xFFFF, total & 0xFFFF, len(directory), begin, len(comment)
    )
    return bytes(body + directory + tail + end) + comment + behind


def file(pickled: bytes = GOOD, *more: Entry, payload: bytes = PAYLOAD, **lies: Any) -> bytes:
    entries = [
        Entry("m/data.pkl", pickled),
        Entry("m/byteorder", b"little"),
        Entry("m/data/0", payload),
        Entry("m/version", b"3\n"),
    ]
    return archive([*entries, *more], **lies)


def replaced(name: str, **changes: Any) -> bytes:
    entries = [
        Entry("m/data.pkl", GOOD),
        Entry("m/byteorder", b"little"),
        Entry("m/data/0", PAYLOAD),
        Entry("m/version", b"3\n"),
    ]
    return archive([entry._replace(**changes) if entry.name == name else entry for entry in entries])


def legacy(
    pickled: bytes = GOOD, keys: tuple[str, ...] = ("0",), numel: int = 2, payload: bytes = PAYLOAD, protocol: int = 1001,
    info: bytes = b"\x80\2}.", names: bytes | None = None,
) -> bytes:  # fmt: skip
    """A file of the format before the zip files."""
    pickled = re.sub(rb"(?<!t)tQ", b"NtQ", pickled)  # storages have a view of another one here, or None
    listed = names or b"\x80\2](" + b"".join(map(text, keys)) + b"e."
    first = MAGIC + b"\x80\2" + number(protocol) + b"." + info + pickled + listed
    return first + b"".join(struct.pack("<q", numel) + payload for _ in keys)


RUNS = {
    "os.system": call(SYSTEM, text(COMMAND)), "posix.system": call(named("posix", "system"), text(COMMAND)), "nt.system": call(named("nt", "system"), text(COMMAND)),
    "subprocess": call(named("subprocess", "Popen"), b"]" + text("touch") + b"a" + text("pwned") + b"a"), "eval": call(named("builtins", "eval"), text(f"__import__('os').system('{COMMAND}')")),
    "eval of Python 2": call(named("__builtin__", "eval"), text(f"__import__('os').system('{COMMAND}')")), "exec": call(named("builtins", "exec"), text("open('pwned','w')")),
    "open": call(named("builtins", "open"), text("pwned"), text("w")), "io.open": call(named("io", "open"), text("pwned"), text("w")),
    "getattr": call(call(named("builtins", "getattr"), call(named("builtins", "__import__"), text("os")), text("system")), text(COMMAND)),
    "runpy": call(named("runpy", "run_path"), text("x.py")), "pickle.loads": call(named("pickle", "loads"), text("x")), "torch.load": call(named("torch", "load"), text("m.pt")),
    "torch.hub.load": call(named("torch.hub", "load"), text("x"), text("y")), "a name with dots": call(named("torch", "serialization.os.system"), text(COMMAND)),
    "a module with dots": call(named("torch.serialization.os", "system"), text(COMMAND)), "a method": call(named("torch", "Tensor.numpy"), tensor()), "compile": call(named("builtins", "compile"), text("1"), text("x"), text("eval")),
    "copyreg": call(named("copyreg", "_reconstructor"), SYSTEM, SYSTEM, b"N"), "functools.partial": call(named("functools", "partial"), SYSTEM, text(COMMAND)), "map": call(named("builtins", "map"), SYSTEM, b"]" + text(COMMAND) + b"a"),
    "a hook": call(named("torch._utils", "_rebuild_parameter"), tensor(), b"\x89", call(SYSTEM, text(COMMAND))), "the type of a tensor": call(named("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, named("torch", "Tensor"), b"(" + text(COMMAND) + b"t", b"N"),
    "an object": named("os", "system") + b"(" + text(COMMAND) + b"t\x81", "a module": call(named("torch.nn.modules.linear", "Linear"), b"K\1K\1"), "numpy": call(named("numpy._core.multiarray", "scalar"), b"N", b"N"),
    "a class of its own": named("__main__", "Net") + b")\x81}b", "ctypes": call(named("ctypes", "CDLL"), text("libc.so.6")),
}  # fmt: skip

# Fine: attributes of the names of methods, which are not called.
ATTRIBUTES = {
    "an attribute of a tensor": call(named("torch._tensor", "_rebuild_from_type_v2"), named("torch._utils", "_rebuild_tensor_v2"), named("torch", "Tensor"), tensor()[len(named("torch._utils", "_rebuild_tensor_v2")) : -1], b"}" + text("stride") + b"K\5s"),
    "an attribute of a parameter": call(named("torch._utils", "_rebuild_parameter_with_state"), tensor(), b"\x89", ORDERED, b"}" + text("untyped_storage") + named("torch", "Size") + b"s"),
}  # fmt: skip

# Not among the opcodes of torch's unpickler.
OPCODES = {
    "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + text(COMMAND) + b"tR", "INST": b"(" + text(COMMAND) + b"ios\nsystem\n", "OBJ": b"(" + SYSTEM + text(COMMAND) + b"o", "EXT1": b"\x82\1)R", "EXT2": b"\x83\1\0)R",
    "EXT4": b"\x84\1\0\0\0)R", "PERSID": b"Pstorage\n", "NEWOBJ_EX": SYSTEM + b")}\x92", "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 60), "NEXT_BUFFER": b"\x97", "FRAME": b"\x95" + bytes(8) + b"N", "STRING": b"S'x'\n",
    "UNICODE": b"Vx\n", "INT": b"I1\n", "LONG": b"L1L\n", "FLOAT": b"F1\n", "LONG4": b"\x8b" + struct.pack("<i", -1), "BINBYTES8": b"\x8e" + struct.pack("<Q", 1 << 62), "BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 62),
    "FROZENSET": b"(\x91", "POP": b"N0", "DUP": b"N2", "POP_MARK": b"(1", "DICT": b"(d", "LIST": b"(l", "GET": b"g0\n", "PUT": b"Np0\n", "MEMOIZE": b"N\x94", "SHORT_BINUNICODE": b"\x8c\1x", "no opcode": b"\xff",
}  # fmt: skip

TENSORS = {
    "an offset behind the storage": tensor(offset=1), "an offset below zero": tensor(offset=-1), "a huge offset": tensor(offset=2**62), "an offset of 2^64": tensor(offset=2**64), "a stride below zero": tensor(strides=(-1,)),
    "a huge stride": tensor(strides=(2**62,)), "a stride of 2^64": tensor(strides=(2**64,)), "a shape beyond the storage": tensor(shape=(3,)), "a huge shape": tensor(shape=(2**40, 2**40), strides=(0, 1)), "an extent below zero": tensor(shape=(-2,)),
    "two strides": tensor(strides=(1, 1)), "no strides": tensor(strides=()), "65 extents": tensor(shape=(1,) * 65, strides=(1,) * 65), "a size beyond the file": tensor(storage(numel=1000)), "a huge size": tensor(storage(numel=2**60)),
    "a size of 2^63": tensor(storage(numel=2**63)), "a size below zero": tensor(storage(numel=-2)), "a smaller size": tensor(storage(numel=1), shape=(1,)), "wider elements": tensor(storage(kind="DoubleStorage")), "a missing storage": tensor(storage("1")), "a storage outside": tensor(storage("../../x")),
    "a storage of no type": tensor(storage(kind="Nothing")), "a storage of a number": tensor(b"(" + text("storage") + b"K\1" + text("0") + text("cpu") + b"K\2tQ"), "a view of a storage": tensor(storage(more=b"(" + text("v") + b"K\0K\1t")),
    "no storage": tensor(b"N"), "an untyped storage as a tensor": call(named("torch", "UntypedStorage"), number(10**13)), "a storage of a module": b"(" + text("module") + named("torch", "Tensor") + text("f") + text("s") + b"tQ", "a number as a storage": b"K\1Q",
    "a tensor of a list": call(named("torch._utils", "_rebuild_tensor_v2"), b"]"), "a parameter of nothing": call(named("torch._utils", "_rebuild_parameter"), b"N", b"\x89", ORDERED), "a subclass": call(named("torch._tensor", "_rebuild_from_type_v2"), named("torch._utils", "_rebuild_tensor_v2"), named("torch.nn.parameter", "Buffer"), b")", b"N"),
    "a tensor with a state": tensor() + b"(" + storage() + b"K\0))tb", "a tensor of no call": named("torch", "Tensor"), "bytes of 1 TB": call(named("builtins", "bytearray"), number(10**12)), "a tensor of 1 TB": call(named("torch", "Tensor"), number(10**12)),
    "a text that takes long": call(named("_codecs", "encode"), text("é" * 100_000), text("punycode")), "a codec": call(named("_codecs", "encode"), text("x"), text("zip")), "a text as a function": call(text("x")), "a list as a function": call(b"]"),
    "an argument that is no tuple": named("collections", "OrderedDict") + b"]R", "a quantized tensor": call(named("torch._utils", "_rebuild_qtensor"), b"N"), "a sparse tensor": call(named("torch._utils", "_rebuild_sparse_tensor"), b"N"), "a meta tensor": call(named("torch._utils", "_rebuild_meta_tensor_no_storage"), b"N"),
    "an attribute of a dict": ORDERED + b"(" + text("x") + tensor() + b"u}" + text("items") + b"K\5sb", "two attributes of a dict": ORDERED + b"}(" + text("_metadata") + ORDERED + text("items") + b"K\5ub",
    "half a surrogate in a name": b"}" + text("\ud800") + tensor() + b"s", "attributes of a list": b"]}b", "attributes that are none": ORDERED + b"Nb", "items of a tuple": b")Na", "items of a list": b"]NNs", "an odd number of items": b"}(Nu", "no mark": b"}t", "a mark as a value": b"}(s", "nothing in the memo": b"h\x63", "no text": b"X\1\0\0\0\xff",
}  # fmt: skip


# Of a tuple, which may be a key.
DOUBLED = b"Nq\0" + b"h\0h\0\x86q\0" * 60
BOMBS: dict[str, Make] = {
    "a key of many tuples": lambda: b"\x80\2}N" + b"\x85" * 3_000_000 + b"Ns.",
    "a key that doubles": lambda: b"\x80\2}" + DOUBLED + b"Ns.",
    "a tuple that doubles": lambda: b"\x80\2" + DOUBLED + b".",
    "a list that doubles": lambda: b"\x80\2" + b"]q\0" + b"](h\0h\0eq\0" * 60 + b"K\1R.",
    "lists filled from above": lambda: b"\x80\2" + b"".join(b"]q" + bytes([k]) for k in range(60)) + b"".join(b"h%bh%bah%bh%ba" % ((bytes([k]), bytes([k + 1])) * 2) for k in range(59)) + b".",
    "a list in itself": lambda: b"\x80\2]q\0h\0a.",
    "a set of what doubles": lambda: state(call(named("builtins", "set"), b"]" + DOUBLED + b"a")),
    "a counter of what doubles": lambda: state(call(named("collections", "Counter"), b"]" + DOUBLED + b"a")),
    "bytes of a text, again and again": lambda: state(tensor(), b"](" + text("x" * 1_000_000) + b"q\0" + text("latin1") + b"q\1" + call(named("_codecs", "encode"), b"h\0", b"h\1") * 500 + b"e"),
    "bytearrays of a text, again and again": lambda: state(tensor(), b"](" + call(named("_codecs", "encode"), text("x" * 1_000_000), text("latin1")) + b"q\0" + call(named("builtins", "bytearray"), b"h\0") * 500 + b"e"),
    "sets of a list, again and again": lambda: state(tensor(), b"](](" + b"".join(b"J" + struct.pack("<i", k) for k in range(10_000)) + b"eq\0" + call(named("builtins", "set"), b"h\0") * 700 + b"e"),
    "megabytes of lists": lambda: b"\x80\2" + b"]" * 3_000_000 + b".",
    "megabytes of sets": lambda: b"\x80\2" + b"\x8f" * 3_000_000 + b".",
    "megabytes of None": lambda: b"\x80\2" + b"N" * 3_000_000 + b".",
    "megabytes of marks": lambda: b"\x80\2" + b"(" * 3_000_000 + b".",
    "lists in lists": lambda: b"\x80\2" + b"]" * 3_000_000 + b"a" * 2_999_999 + b".",
    "many tensors of one storage": lambda: b"\x80\2}" + storage() + b"q\0" + b"".join(text(str(k)) + call(named("torch._utils", "_rebuild_tensor_v2"), b"h\0K\0", numbers(2), numbers(1), b"\x89N") + b"s" for k in range(100_000)) + b".",
    "a megabyte as a name": lambda: b"\x80\2c" + b"x" * 1_000_000,
}  # fmt: skip

PICKLES = {
    "nothing": b"", "only a protocol": b"\x80\2", "no end": GOOD[:-1], "an end too early": b".", "more behind it": GOOD + b"N.", "no protocol": GOOD[2:5] + b".", "a number": b"\x80\2K\1.", "a list": b"\x80\2].", "a tensor": b"\x80\2" + tensor() + b".",
    "no tensors": b"\x80\2}.", "a key that is no text": b"\x80\2}K\1" + tensor() + b"s.", "a key that cannot be one": b"\x80\2}]Ns.", "protocol 4": state(tensor(), protocol=b"\x80\4"), "protocol 5": state(tensor(), protocol=b"\x80\5"), "a complex set": state(tensor(), call(named("builtins", "complex"), call(named("builtins", "set")))), "a complex of a text": state(tensor(), call(named("builtins", "complex"), text("1"))), "protocol 0": b"(dp0\n.", "a text of 4 GB": b"\x80\2X\xff\xff\xff\xff" + b"x" * 9,
    "another pickle": b"\x80\4\x95\x05\0\0\0\0\0\0\0}\x94.",
}  # fmt: skip

EXTRA64 = struct.pack("<2HQ", 1, 8, 2**63)
ZIPS: dict[str, Make] = {
    "a wrong CRC of the pickle": lambda: replaced("m/data.pkl", crc=1),
    "another CRC in the directory": lambda: replaced("m/data/0", local={"crc": 1}),
    "another size in the directory": lambda: replaced("m/data/0", local={"size": 4, "packed": 4}),
    "another name in the directory": lambda: replaced("m/data/0", local={"name": "m/data/1"}),
    "another method in the directory": lambda: replaced("m/data/0", local={"method": 8}),
    "a longer entry": lambda: replaced("m/data/0", size=1000, packed=1000),
    "a shorter entry": lambda: replaced("m/data.pkl", size=8, packed=8),
    "an entry behind the end": lambda: replaced("m/data/0", offset=2**31),
    "an entry within another": lambda: replaced("m/data/0", offset=0),
    "two of the same bytes": lambda: archive([Entry("m/data.pkl", GOOD), Entry("m/data/0", PAYLOAD), Entry("m/data/1", PAYLOAD, offset=len(GOOD) + 40)]),
    "compressed": lambda: replaced("m/data.pkl", method=8),
    "a bomb": lambda: archive([Entry("m/data.pkl", zlib.compressobj(9, wbits=-15).compress(bytes(10_000_000)), method=8, size=0xFFFFFFFE), Entry("m/data/0", PAYLOAD)]),
    "encrypted": lambda: replaced("m/data.pkl", flags=1, local={"flags": 1}),
    "encrypted with a mask": lambda: replaced("m/data.pkl", flags=1 << 13),
    "patched": lambda: replaced("m/data.pkl", flags=1 << 5),
    "absolute": lambda: archive([Entry("/etc/data.pkl", GOOD), Entry("/etc/data/0", PAYLOAD)]),
    "above": lambda: archive([Entry("../data.pkl", GOOD), Entry("../data/0", PAYLOAD)]),
    "above, inside": lambda: file(GOOD, Entry("m/data/../../x", b"x")),
    "backslashes": lambda: file(GOOD, Entry("m\\data\\1", b"x")),
    "a NUL": lambda: file(GOOD, Entry("m/data/1\0.pkl", b"x")),
    "a folder": lambda: file(GOOD, Entry("m/data/", b"")),
    "no folder": lambda: archive([Entry("data.pkl", GOOD), Entry("data/0", PAYLOAD)]),
    "the same name twice": lambda: file(GOOD, Entry("m/data/0", PAYLOAD)),
    "two pickles": lambda: file(GOOD, Entry("m/data.pkl", state(call(SYSTEM, text(COMMAND))))),
    "two folders": lambda: file(GOOD, Entry("n/data.pkl", GOOD)),
    "no pickle": lambda: archive([Entry("m/data/0", PAYLOAD)]),
    "no entries": lambda: archive([]),
    "empty": lambda: b"PK\3\4",
    "TorchScript": lambda: file(GOOD, Entry("m/constants.pkl", b"\x80\2).")),
    "big-endian": lambda: replaced("m/byteorder", data=b"big"),
    "another version": lambda: replaced("m/version", data=b"11\n"),
    "no version": lambda: archive([Entry("m/data.pkl", GOOD), Entry("m/data/0", PAYLOAD)]),
    "an alignment of no sense": lambda: file(GOOD, Entry("m/.storage_alignment", b"x")),
    "a byteorder of no sense": lambda: replaced("m/byteorder", data=b"little\0"),
    "a long byteorder": lambda: replaced("m/byteorder", data=b"little" * 99),
    "more entries than there are": lambda: file(count=5),
    "fewer entries than there are": lambda: file(count=3),
    "data behind the end": lambda: file(behind=b"x"),
    "a comment": lambda: file(comment=b"x"),
    "data in front": lambda: b"PK\3\4" + file(),
    "data between the directory and the entries": lambda: file(gap=bytes(99)),
    "zip64 of other numbers": lambda: file(zip64=(5, 5, 200, 300)),
    "zip64 of huge numbers": lambda: file(zip64=(2**63, 2**63, 2**63, 2**63)),
    "zip64 that is missing": lambda: file(count=0xFFFF),
    "a zip64 entry of 2^63 bytes": lambda: replaced("m/data/0", size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=EXTRA64 + bytes(8)),
    "a zip64 entry cut off": lambda: replaced("m/data/0", size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=EXTRA64[:8]),
    "a zip64 entry that is missing": lambda: replaced("m/data/0", size=0xFFFFFFFF, packed=0xFFFFFFFF),
    **{f"cut to {size} bytes": lambda size=size: file()[:size] for size in (5, 22, 60, 200, 400)},  # type: ignore[misc]
    **{f"{size} bytes cut off": lambda size=size: file()[:-size] for size in (1, 22, 23, 100)},  # type: ignore[misc]
}  # fmt: skip

LEGACY: dict[str, Make] = {
    "code in the first pickle": lambda: MAGIC[:-1] + call(SYSTEM, text(COMMAND)) + b".",
    "code in the machine's": lambda: legacy(info=b"\x80\2" + call(SYSTEM, text(COMMAND)) + b"."),
    "code in the list of storages": lambda: legacy(names=b"\x80\2" + call(SYSTEM, text(COMMAND)) + b"."),
    "another protocol": lambda: legacy(protocol=1000),
    "only the number": lambda: MAGIC,
    "no storages": lambda: legacy(keys=()),
    "another storage": lambda: legacy(keys=("1",)),
    "a storage twice": lambda: legacy(keys=("0", "0")),
    "a list of numbers": lambda: legacy(names=b"\x80\2]K\0a."),
    "a list that doubles": lambda: legacy(names=b"\x80\2" + DOUBLED + b"."),
    "another count": lambda: legacy(numel=3),
    "a huge count": lambda: legacy(numel=2**62),
    "a count below zero": lambda: legacy(numel=-2),
    "a size beyond the file": lambda: legacy(state(tensor(storage(numel=10**12)))),
    "a size that is a little longer": lambda: legacy(state(tensor(storage(numel=3)))),
    "two sizes of one storage": lambda: legacy(state(tensor(), tensor(storage(numel=1), shape=(1,)))),
    "cut": lambda: legacy(payload=PAYLOAD[:-1]),
    "left over": lambda: legacy() + b"x",
    "a view of a storage": lambda: legacy(state(tensor(storage(more=b"(" + text("v") + b"K\0K\1t")))),
}  # fmt: skip


def safetensors_zip() -> bytes:
    """A safetensors file that is an archive, too, if one reads it from its end."""
    tail = archive([Entry("m/data.pkl", state(call(SYSTEM, text(COMMAND)))), Entry("m/data/0", PAYLOAD)])
    head = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(tail), len(tail))
    return struct.pack("<Q", len(head)) + head + tail


OTHERS: dict[str, Make] = {
    "a plain pickle": lambda: b"\x80\4" + call(SYSTEM, text(COMMAND)) + b".",
    "a safetensors file": safetensors_zip,
    "a tar archive": lambda: bytes(257) + b"ustar\0" + bytes(300),
    "compressed": lambda: b"\x1f\x8b\x08" + bytes(30),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "large file storage": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3\n",
    "text": lambda: b"a model",
}  # fmt: skip


def cases() -> Iterator[tuple[str, Make]]:
    for kind, wrap in (("", file), (" in a legacy file", legacy)):
        for name, attack in {**RUNS, **OPCODES, **TENSORS}.items():
            yield f"{name}{kind}", lambda wrap=wrap, attack=attack: wrap(state(attack))  # type: ignore[misc]
            if attack in RUNS.values():
                yield f"{name}, beside{kind}", lambda wrap=wrap, attack=attack: wrap(state(tensor(), attack))  # type: ignore[misc]
        for name, pickled in PICKLES.items():
            yield f"pickle: {name}{kind}", lambda wrap=wrap, pickled=pickled: wrap(pickled)  # type: ignore[misc]
    for name, make in BOMBS.items():
        yield f"bomb: {name}", lambda make=make: file(make())  # type: ignore[misc]
    for kind, made in (("zip", ZIPS), ("legacy", LEGACY), ("other", OTHERS)):
        for name, make in made.items():
            yield f"{kind}: {name}", make


CASES = dict(cases())
