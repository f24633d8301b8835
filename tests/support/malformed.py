"""Malformed contents of files, by attackers, broken disks or downloads, each with a part of its error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator

from checkpoint_files import entry, raw

CONTROLS = "\n\r\t\x1b[2J\x07\x00\x7f\x85\u2028\u202e"

Make = Callable[[], bytes]


def one(shape: str = "[2]", dtype: str = '"F32"', offsets: str = "[0,8]", more: str = "") -> bytes:
    """A header of one tensor in raw JSON, and eight bytes."""
    return raw(
        f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'.encode(), bytes(8)
    )


def deep(text: str, depth: int) -> str:
    return text.replace("@", "[" * depth + "]" * depth)


A = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DEEP = {
    "shape": '{"a":{"dtype":"F32","shape":@,"data_offsets":[0,8]}}',
    "dtype": '{"a":{"dtype":@,"shape":[2],"data_offsets":[0,8]}}',
    "offsets": '{"a":{"dtype":"F32","shape":[2],"data_offsets":@}}',
    "entry": '{"a":@}',
    "metadata": '{"__metadata__":@,"a":' + A + "}",
    "text of metadata": '{"__metadata__":{"format":@},"a":' + A + "}",
    "another key": '{"a":' + A[:-1] + ',"b":@}}',
}
NOT_SIZES = [
    "[-2]", "[-1,-2]", "[2.0]", "[2e0]", "[1e3]", "[1e999]", "[true,2]", "[false]", '["2"]', "[null]", "[[2]]", "[{}]", "2", '"2"',
    "null", "true", "{}", '{"0":2}', "[9223372036854775808]", "[18446744073709551616]", "[-9223372036854775808]",
    "[99999999999999999999]", "[4294967296,4294967296]", "[4611686018427387904,4]", "[4611686018427387904,4611686018427387904,0]",
    "[9223372036854775807,9223372036854775807]", "[-0]", f"[{','.join(65 * '1')},2]", f"[{','.join(99_999 * '2')}]",
]  # fmt: skip
TOO_LARGE = [
    "[9223372036854775807]",
    "[4611686018427387903,4]",
    "[3]",
    "[1]",
    "[0]",
    "[]",
    "[2,2]",
    "[2,0]",
    "[1,1,1]",
]
NOT_OFFSETS = [
    "[8,0]", "[0]", "[0,8,8]", "[]", "null", "8", "{}", '"0,8"', "[0,8.0]", "[0,8e0]", "[false,8]", "[0,true]", "[-8,0]",
    '[0,"8"]', "[[0,8]]", "[null,8]", "[0,9223372036854775808]", "[0,18446744073709551615]", "[0,18446744073709551624]",
    "[18446744073709551608,18446744073709551616]", "[-0,8]",
]  # fmt: skip
NOT_DTYPES = [
    '"F33"', '"f32"', '"float32"', '"torch.float32"', '""', '" F32"', '"F32\\u0000"', '"\\u001b[2J"', "null", "32", "[]", "{}", "true",
    '["F32"]', '"' + "F" * 1_000_000 + '"',
]  # fmt: skip
NOT_ENTRIES = {
    "number": "3", "null": "null", "list": "[]", "text": '"x"', "true": "true", "none": "{}", "no dtype": '{"shape":[2],"data_offsets":[0,8]}',
    "no shape": '{"dtype":"F32","data_offsets":[0,8]}', "no offsets": '{"dtype":"F32","shape":[2]}',
    "one renamed": A.replace("shape", "Shape"), "a key of no sense, infinite": A[:-1] + ',"more":1e999}', "the same, inside": A[:-1] + ',"more":{"x":[-1e999]}}',
}  # fmt: skip
NOT_JSON = {
    "unfinished": '{"a":', "nothing after it": "{", "two": "{}{}", "a comma": '{"a":' + A + ",}", "a NUL after it": "{}\0",
    "single quotes": "{'a':1}", "no quotes": "{a:1}", "a comment": "{/* */}", "hexadecimal": '{"a":0x2}', "a zero in front": '{"a":02}',
    "a plus": '{"a":+2}', "NaN": '{"a":NaN}', "Infinity": '{"a":Infinity}', "-Infinity": '{"a":-Infinity}', "None": '{"a":None}',
    "ten thousand digits": '{"a":1' + "0" * 10_000 + "}", "minus ten thousand digits": '{"a":-1' + "0" * 10_000 + "}",
    "a control character": '{"a\x01":1}', "a line break in a name": '{"a\n":1}', "an escape": '{"\\x":1}', "a short escape": '{"\\u12":1}',
    "half a character": '{"\\ud800":' + A + "}", "the other half": '{"\\uDFFF":' + A + "}", "halves swapped": '{"\\udc00\\ud800":' + A + "}",
    "half a character in metadata": '{"__metadata__":{"a":"\\uD800"},"a":' + A + "}", "a colon less": '{"a" 1}', "a key less": "{:1}",
}  # fmt: skip
NOT_METADATA = [
    "3",
    '"x"',
    "[]",
    "true",
    '{"a":1}',
    '{"a":null}',
    '{"a":["x"]}',
    '{"a":{"b":"c"}}',
    '{"a":"b","c":1.5}',
]
NO_HEADER = {
    "zip": b"PK\x03\x04\x14\0\0\0" + bytes(60), "pickle": pickle.dumps({"a": [1] * 99}), "GGUF": b"GGUF\x03\0\0\0" + bytes(60), "HDF5": b"\x89HDF\r\n\x1a\n" * 8,
    "npy": b"\x93NUMPY\x01\0v\0{" + bytes(60), "a page": b"<!DOCTYPE html><html>Not found</html>",
    "text": b"garbage!" * 9, "zeros": bytes(1000), "ones": b"\xff" * 1000, "the header's length only": bytes(8),
}  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12\n" % (b"0" * 64)
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "C64": 64,
}


def headers() -> Iterator[tuple[str, bytes, str]]:
    """Contents of a .safetensors file, each with a part of its error."""
    for text in NOT_SIZES:
        yield f"shape {text}", one(shape=text), "tensor 'a': shape "
    for text in TOO_LARGE:
        yield f"shape {text} of 8 bytes", one(shape=text), "tensor 'a': 8 bytes, expected "
    for text in NOT_OFFSETS:
        yield f"offsets {text}", one(offsets=text), "tensor 'a': data_offsets "
    for text in NOT_DTYPES:
        yield f"dtype {text}", one(dtype=text), "tensor 'a': unknown dtype "
    for name, text in NOT_ENTRIES.items():
        yield (
            f"entry: {name}",
            raw(b'{"a":%b}' % text.encode(), bytes(8)),
            "dtype, shape and data_offsets in the header",
        )
    for name, text in NOT_JSON.items():
        yield f"JSON: {name}", raw(text.encode(), bytes(8)), "header is not JSON"
    for text in NOT_METADATA:
        yield (
            f"metadata {text}",
            raw(f'{{"__metadata__":{text},"a":{A}}}'.encode(), bytes(8)),
            "__metadata__ is not a mapping",
        )
    for name, content in NO_HEADER.items():
        yield name, content, "not a safetensors file"
    yield "large file storage", POINTER, "a Git LFS pointer"
    for dtype, bits in BITS.items():
        bad = raw({"a": entry(0, 3 * bits // 8 - 1, dtype, (3,))}, bytes(3 * bits // 8 - 1))
        yield f"{dtype}, a byte less", bad, f"expected {3 * bits // 8} for {dtype} of shape (3,)"
    yield "three halves of a byte", raw({"a": entry(0, 1, "F4", (3,))}, bytes(1)), "expected 2 for F4"
    for where, text in DEEP.items():
        for depth in (200, 100_000):
            yield f"{depth} lists: {where}", raw(deep(text, depth).encode(), bytes(8)), ""
    for length in range(8):
        yield f"{length} bytes", bytes(length), f"{length} bytes, expected a safetensors header"
    for length in (100_000_001, 2**31, 2**32, 2**60, 2**63 - 9, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1):
        yield (
            f"a header of {length}",
            raw({"a": entry()}, bytes(8), length=length),
            f"header of {length} bytes",
        )
    for length in (99, 5000, 99_999_999):
        yield f"a header of {length}, cut", raw({"a": entry()}, bytes(8), length=length), "truncated"
    for begin in ("[]", "null", "true", "1", '"a"', " {}", "\ufeff{}", "\n{}"):
        yield f"begins with {begin!r}", raw(begin.encode()), "header does not start with '{'"
    good = raw({"a": entry()}, bytes(8))
    for cut in range(1, 8):
        yield f"{cut} bytes cut off", good[:-cut], "truncated"
    for more in (1, 8, 4096):
        yield f"{more} bytes left over", good + bytes(more), "bytes left over"
    for name, encoded in (("UTF-16", "utf-16-le"), ("UTF-32", "utf-32-le")):
        yield name, raw(b"{" + '"a":1}'.encode(encoded)), "header is not JSON"
    for byte in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"):
        yield f"no UTF-8: {byte.hex()}", raw(b'{"' + byte + b'":1}'), "header is not JSON"
    twice = {
        "a name": f'{{"a":{A},"a":{A}}}', "a name, escaped": f'{{"a":{A},"\\u0061":{A}}}', "metadata": f'{{"__metadata__":{{}},"a":{A},"__metadata__":{{}}}}',
        "a key of metadata": f'{{"__metadata__":{{"b":"","b":""}},"a":{A}}}', "a key of an entry": f'{{"a":{A[:-1]},"shape":[2]}}}}',
        "a key of no sense": f'{{"a":{A[:-1]},"more":1,"more":1}}}}',
    }  # fmt: skip
    for name, text in twice.items():
        yield f"twice: {name}", raw(text.encode(), bytes(8)), " twice"
    begins = "begins at byte"
    yield "overlap", raw({"a": entry(), "b": entry(4, 12)}, bytes(12)), begins
    yield "the same bytes", raw({"a": entry(), "b": entry()}, bytes(8)), begins
    yield "one inside another", raw({"a": entry(0, 16, shape=(4,)), "b": entry(4, 12)}, bytes(16)), begins
    yield "a hole", raw({"a": entry(), "b": entry(9, 17)}, bytes(17)), begins
    yield "a hole in front", raw({"a": entry(1, 9)}, bytes(9)), begins
    yield "nothing, inside another", raw({"a": entry(), "b": entry(4, 4, shape=(0,))}, bytes(8)), begins
    yield "nothing, far behind", raw({"a": entry(), "b": entry(2**62, 2**62, shape=(0,))}, bytes(8)), begins
    yield "behind 2^63", raw({"a": entry(2**63 - 9, 2**63 - 1)}, bytes(8)), begins
    yield "a name of a megabyte", raw({"n" * 1_000_000: entry(1, 9)}, bytes(9)), begins
    yield "control characters", raw({CONTROLS: entry(1, 9)}, bytes(9)), begins
    yield (
        "control characters twice",
        raw(f"{{{json.dumps(CONTROLS)}:1,{json.dumps(CONTROLS)}:1}}".encode()),
        " twice",
    )


HEADERS = {name: (content, message) for name, content, message in headers()}
assert len(HEADERS) == len({content for content, _ in HEADERS.values()})


def many(begin: int, end: int) -> bytes:
    """100,000 tensors, of which the last one has other offsets."""
    places = [(8 * i, 8 * i + 8) for i in range(99_999)] + [(begin, end)]
    text = '"t%d":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    return raw(f"{{{','.join(text % (i, *place) for i, place in enumerate(places))}}}".encode(), bytes(end))


# Made when they are needed: they are long.
LONG: dict[str, tuple[Make, str]] = {
    "the last of 100,000": (lambda: many(799_992, 800_001), "tensor 't99999': 9 bytes"),
    "a hole before the last of 100,000": (lambda: many(799_993, 800_001), "tensor 't99999' begins"),
    "megabytes of lists": (lambda: raw(b'{"a":[%b0]}' % (b"[]," * 700_000)), "mostly brackets"),
    "megabytes of objects": (lambda: raw(b'{"a":[%b0]}' % (b"{}," * 700_000)), "mostly brackets"),
    "lists in lists": (lambda: raw(b'{"a":[%b0]}' % (b"[[[[[]]]]]," * 200_000)), "mostly brackets"),
    "megabytes of numbers": (lambda: raw(b'{"a":[%b0]}' % (b"0," * 1_000_000)), "mostly commas"),
    "megabytes of longer numbers": (lambda: raw(b'{"a":[%b0]}' % (b"12345, " * 300_000)), "expected dtype"),
}


# A .npy vector.


def npy(
    header: str | bytes, payload: bytes = bytes(8), version: bytes = b"\1\0", length: int | None = None
) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("latin-1")
    size = (len(text) if length is None else length).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + size + text + payload


def array(shape: str = "(2,)", descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n"


NOT_SHAPES = [
    "(-2,)", "(-1, -2)", "(True, 2)", "(18446744073709551616, 0)", "(4294967296, 4294967296)", "(9223372036854775808,)",
    f"({'1, ' * 65})", f"(0, {'9' * 4000})", f"({'9' * 4000}, {'9' * 4000})",
]  # fmt: skip
UNREADABLE_SHAPES = ["2", "[2]", "None", "'2'", "(2.0,)", "('2',)", "(1e3,)", "((2,),)", "{2}", "(None,)", f"({'9' * 5000},)", "(1 << 62,)", "(2**62,)", "range(2)"]  # fmt: skip
WRONG_SHAPES = [
    "()",
    "(0,)",
    "(1,)",
    "(3,)",
    "(2, 2)",
    "(2, 0)",
    "(4611686018427387904,)",
    "(9223372036854775807,)",
]
OTHER_DTYPES = [
    "'|O'", "'>f4'", "'<i4'", "'|b1'", "'<c8'", "'|V4'", "'<M8[s]'", "'|S4'", "'<U1'", "'<u8'", "[('a', '<f4')]", "[('a', '<f4', (2,))]",
    "('<f4', (2,))", "'f4,f4'",
]  # fmt: skip
NOT_DESCRS = [
    "None",
    "3.5",
    "''",
    "'nonsense'",
    "'<f3'",
    "[]]",
    "['<f4']",
    "'f4," * 999 + "'",
    "'O' * 9",
    "open",
    "'S99999999999999999999'",
]
NOT_LITERALS = {
    "a call": "__import__('os').system('touch pwned')", "another call": "open('pwned', 'w')", "a function": "lambda: 0", "names": "{descr: shape}",
    "many brackets": "(" * 5000, "many lists": "[" * 9000, "many minuses": "-" * 9000 + "1", "many nots": "~" * 5000 + "1", "a long number": "1" * 9990,
    "a list": "[]", "text": "'x'", "a number": "3", "None": "None", "nothing": "", "spaces": " " * 64, "a NUL": "{'descr'\0: 1}", "JSON": '{"descr": null}',
    "an unfinished one": "{'descr': '<f4'", "no shape": "{'descr': '<f4', 'fortran_order': False}", "no keys": "{}", "another key": array()[:-2] + ", 'x': 1}",
    "bytes as keys": "{b'descr': '<f4', b'fortran_order': False, b'shape': (2,)}", "an f-string": "f'{1}'", "a set": "{'descr', 'fortran_order', 'shape'}",
    "an order of 0": array(order="0"), "an order of None": array(order="None"), "longer than numpy reads": array() + " " * 20_000,
}  # fmt: skip


def vectors() -> Iterator[tuple[str, bytes, str]]:
    """Contents of a .npy file."""
    for shape in NOT_SHAPES:
        yield f"shape {shape[:99]}", npy(array(shape)), ": shape ("
    for shape in UNREADABLE_SHAPES:
        yield f"shape {shape[:99]}", npy(array(shape)), "not a .npy file"
    for shape in WRONG_SHAPES:
        yield f"shape {shape} of 8 bytes", npy(array(shape)), " bytes, expected "
    for descr in OTHER_DTYPES:
        yield f"dtype {descr}", npy(array(descr=descr)), ": dtype "
    for descr in NOT_DESCRS:
        yield f"descr {descr[:99]}", npy(array(descr=descr)), "not a .npy file"
    for name, text in NOT_LITERALS.items():
        yield f"header: {name}", npy(text), "not a .npy file"
    for version in (b"\0\0", b"\1\1", b"\2\1", b"\3\0", b"\xff\xff"):
        yield f"version {version.hex()}", npy(array(), version=version), "expected 1.0 or 2.0"
    good = npy(array())
    for size in (0, 1, 5, 7, 8, 9, 10, 40, len(good) - 9):
        yield f"the first {size} bytes", good[:size], "not a .npy file"
    for cut in (1, 4, 8):
        yield f"{cut} bytes cut off", good[:-cut], " bytes, expected "
    yield "bytes left over", good + bytes(4), " bytes, expected "
    yield "column-major", npy(array("(2, 1)", order="True")), "column-major order"
    yield "a header of 4 GB", npy(array(), version=b"\2\0", length=2**32 - 1), "not a .npy file"
    yield "a header of 64 KiB", npy(array(), length=65_535), "not a .npy file"
    yield "no Latin", npy(array().replace("descr", "d\xe9scr")), "not a .npy file"
    yield "a pickle", pickle.dumps({"a": 1}), "not a .npy file"
    yield "large file storage", POINTER, "a Git LFS pointer"
    yield "a zip", b"PK\x03\x04" + bytes(60), "not a .npy file"
    yield "zeros", bytes(1000), "not a .npy file"


VECTORS = {name: (content, message) for name, content, message in vectors()}
assert len(VECTORS) == len({content for content, _ in VECTORS.values()})
