"""Random models, most of them with a few mistakes."""

from __future__ import annotations

import io
import json
import math
import os
import random
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bits import same_bits
from hostile_pytorch import Entry
from hostile_pytorch import archive as archive_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_process import negmerge
from malformed import CONTROLS, NOT_DESCRS, NOT_LITERALS, NOT_SHAPES, OTHER_DTYPES, WRONG_SHAPES, array, npy
from malformed_models import INDEX, OTHER, OUTSIDE, SHARD, STRANGE
from safetensors import safe_open
from safetensors.torch import load_file, save

from negmerge_fast.core.delta import mask_bytes
from negmerge_fast.core.hashing import hash_of
from negmerge_fast.core.reference import plain_merge

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "C64": 8,
}
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = ("a", "b", "layers.0.weight", "é", "", CONTROLS, "__metadata", "n" * 300)
INTEGERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    64,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**20,
    10**30,
)
ODD = (None, True, False, 0.0, -0.0, 2.0, 1e3, 1e300, math.nan, math.inf, "", "F32", "F64", "F4", "I16", "f32", SHARD, OTHER, INDEX, *NAMES, *OUTSIDE[:-2])  # fmt: skip
CONTAINERS = (
    "[]",
    "{}",
    "[[]]",
    '{"a":1,"a":1}',
    "[" * 100 + "]" * 100,
    "[" * 995 + "]" * 995,
    "-0",
    "1E2",
    "9" * 5000,
    '"\\ud800"',
)


NONFINITE = st.sampled_from(["keep-base", "error"])


DENSE = "2_Dense/model.safetensors"


class Object(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


class Raw(str):
    """JSON as it stands."""


class Weights(NamedTuple):
    """A .safetensors file before it is written."""

    header: Object
    payload: bytes


class Models(NamedTuple):
    """files: contents by path. strange: what replaces some of them. paths: of the base and its versions.

    nonfinite: the option of the command line.
    """

    files: dict[str, bytes]
    strange: dict[str, str]
    paths: list[str]
    nonfinite: str


def to_json(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Object):
        return "{" + ",".join(f"{json.dumps(key)}:{to_json(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    return json.dumps(value)


def weights(named: dict[str, tuple[str, tuple[int, ...]]], seed: int) -> Weights:
    header, end = Object([("__metadata__", Object([("format", "pt")]))]), 0
    for name, (dtype, shape) in named.items():
        begin, end = end, end + SIZES[dtype] * math.prod(shape)
        entry = [("dtype", dtype), ("shape", list(shape)), ("data_offsets", [begin, end])]
        header.append((name, Object(entry)))
    return Weights(header, random.Random(seed).randbytes(end))


def containers(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list):
        if value:
            yield value
        for item in value:
            yield from containers(item[1] if isinstance(value, Object) else item)


def hostile() -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(INTEGERS), st.sampled_from(ODD), st.sampled_from(CONTAINERS).map(Raw))


def change_tree(draw: st.DrawFn, tree: Object) -> None:
    """Replace, shift, rename, drop or repeat one thing in a JSON value."""
    places = list(containers(tree))
    place = places[draw(st.integers(0, len(places) - 1))]
    at = draw(st.integers(0, len(place) - 1))
    key, value = place[at] if isinstance(place, Object) else (None, place[at])
    match draw(st.sampled_from(["replace", "nudge", "rename", "drop", "again", "swap"])):
        case "drop":
            del place[at]
        case "again":
            place.append(place[at])
        case "swap":
            place[at], place[0] = place[0], place[at]
        case "rename" if key is not None:
            place[at] = (draw(st.sampled_from(["dtype", "shape", "data_offsets", *NAMES])), value)
        case "nudge" if isinstance(value, int):
            value += draw(st.integers(-8, 8))
            place[at] = value if key is None else (key, value)
        case _:
            value = draw(hostile())
            place[at] = value if key is None else (key, value)


def change_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(["overwrite", "insert", "delete", "cut", "extend", "length"])):
        case "overwrite":
            new = draw(st.binary(min_size=1, max_size=4))
            return content[:at] + new + content[at + len(new) :]
        case "insert":
            return content[:at] + draw(st.binary(max_size=4)) + content[at:]
        case "delete":
            return content[:at] + content[at + draw(st.integers(0, 9)) :]
        case "cut":
            return content[:at]
        case "extend":
            return content + bytes(draw(st.integers(0, 9)))
    length = draw(st.sampled_from(INTEGERS)) % 2**64
    return length.to_bytes(8, "little") + content[8:]


def some(draw: st.DrawFn, most: int) -> range:
    return range(draw(st.integers(0, most)))


@st.composite
def models(draw: st.DrawFn) -> Models:
    """A base and one or two versions of it, with up to three changes on any level."""
    kind = draw(st.sampled_from(["sharded", "overlay", "single", "parts", "file", "npy"]))
    count = draw(st.integers(2, 3))
    if kind == "npy":
        return vectors(draw, count)
    specs = st.tuples(st.sampled_from(list(SIZES)), st.lists(st.integers(0, 3), max_size=3).map(tuple))
    named = draw(st.dictionaries(st.sampled_from(NAMES), specs, min_size=1, max_size=4))
    jsons: dict[str, Object | Weights] = {}
    files: dict[str, bytes] = {}
    paths = []
    for k in range(count):
        model = f"m{k}.safetensors" if kind == "file" else f"m{k}"
        paths.append(model)
        versions = {
            name: (draw(st.sampled_from(FLOATS)) if k and dtype in FLOATS else dtype, shape)
            for name, (dtype, shape) in named.items()
        }
        if draw(st.integers(0, 9)) == 9:  # no version of its base
            versions[draw(st.sampled_from(NAMES))] = draw(specs)
        if kind in ("sharded", "overlay"):
            of = {name: draw(st.sampled_from([SHARD, OTHER])) for name in versions}
            for shard in sorted(set(of.values())):
                # An overlay: the first shard has all tensors, and the index names some of the second.
                copied = kind == "overlay" and shard == SHARD
                held = {name: spec for name, spec in versions.items() if copied or of[name] == shard}
                jsons[f"{model}/{shard}"] = weights(held, k)
            jsons[f"{model}/{INDEX}"] = Object([("metadata", Object()), ("weight_map", Object(of.items()))])
        else:
            if kind == "parts":
                files[f"{model}/modules.json"] = b'[{"path":""},{"path":"1_Pooling"},{"path":"2_Dense"}]'
                jsons[f"{model}/2_Dense/model.safetensors"] = weights(versions, k + 9)
            jsons[model if kind == "file" else f"{model}/model.safetensors"] = weights(versions, k)
    for _ in some(draw, 2):
        changed = jsons[draw(st.sampled_from(list(jsons)))]
        change_tree(draw, changed.header if isinstance(changed, Weights) else changed)
    for path, value in jsons.items():
        if isinstance(value, Weights):
            text = to_json(value.header).encode()
            files[path] = len(text).to_bytes(8, "little") + text + value.payload
        else:
            files[path] = to_json(value).encode()
    for _ in some(draw, 1):
        path = draw(st.sampled_from(list(files)))
        files[path] = change_bytes(draw, files[path])
    if kind != "file":
        more = st.sampled_from(
            [
                "config.json",
                "adapter_config.json",
                "x.bin",
                "x.safetensors",
                "d/e/f",
                "\x1b[2J",
                "negmerge.json",
                "adapter_model.safetensors",
                "modules.json",
                "model_index.json",
                "x.npz",
                "x.pkl",
                "x.gz",
            ]
        )
        files.update({f"m{draw(st.integers(0, 1))}/{draw(more)}": b"{}" for _ in some(draw, 1)})
    strange = {}
    for _ in some(draw, 1):
        if draw(st.integers(0, 3)) == 0:
            # A terabyte beside the base's weights is no mistake: it would be copied, if the disk had space.
            places = [path for path in files if path in jsons or not path.startswith("m0/")]
            strange[draw(st.sampled_from(places))] = draw(st.sampled_from(list(STRANGE)))
    return Models(files, strange, paths, draw(NONFINITE))


def vectors(draw: st.DrawFn, count: int) -> Models:
    shapes = ["(2,)", "(4,)", "(2, 2)", "(0,)", *NOT_SHAPES, *WRONG_SHAPES]
    descrs = ["'<f4'", "'<f2'", "'<f8'", *OTHER_DTYPES, *NOT_DESCRS]
    payload = draw(st.sampled_from([0, 4, 8, 16, 32]))
    texts = [array("(2,)", "'<f4'")] * count
    if draw(st.booleans()):
        texts = [array(draw(st.sampled_from(shapes[:4])), draw(st.sampled_from(descrs[:3])))] * count
    for _ in some(draw, 1):
        order = draw(st.sampled_from(["False", "True", "0"]))
        worse = array(draw(st.sampled_from(shapes)), draw(st.sampled_from(descrs)), order)
        texts[draw(st.integers(0, count - 1))] = draw(st.sampled_from([worse, *NOT_LITERALS.values()]))
    files = {f"m{k}.npy": npy(text, random.Random(k).randbytes(payload)) for k, text in enumerate(texts)}
    for _ in some(draw, 1):
        path = draw(st.sampled_from(list(files)))
        files[path] = change_bytes(draw, files[path])
    return Models(files, {}, list(files), draw(NONFINITE))


# Where files are quick to come and go.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
# What has been tried, by what became of it.
TRIED: Counter[str] = Counter()


def try_models(given: Models) -> None:
    """Merge models, or be refused; anything else is an AssertionError."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        os.chdir(folder)
        try:
            for path, content in given.files.items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
            for path, kind in given.strange.items():
                Path(path).unlink()
                STRANGE[kind][0](Path(path))
            judge(given)
        finally:
            os.chdir(here)


def judge(given: Models) -> None:
    before = sorted(Path().rglob("*"))
    out = "out" + Path(given.paths[0]).suffix
    options = ("--output", out, "--scale", "0.9", "--nonfinite", given.nonfinite, "--threads", "1", "--quiet")
    status, said, err = negmerge("merge", *given.paths, *options)
    if status == 0:
        TRIED["merged"] += 1
        assert not err and not said
        check_output(given.paths, out)
        return
    TRIED["refused"] += 1
    assert (status, said) == (2, ""), err
    assert err.startswith("negmerge: m") and err.endswith("\n") and err[:-1].isprintable(), err
    assert len(err) < 20_000
    assert sorted(Path().rglob("*")) == before


def check_output(paths: list[str], out: str) -> None:
    base, *versions, merged = (load(Path(path)) for path in (*paths, out))
    assert not Path(f".{out}.negmerge").exists() and merged.keys() == base.keys()
    unnamed = unindexed(Path(paths[0]))
    for name, tensor in base.items():
        expected = tensor
        if tensor.is_floating_point() and name not in unnamed:
            expected = plain_merge(tensor, [version[name] for version in versions], 0.9)[0]
        assert same_bits(merged[name], expected), name


def load(path: Path) -> dict[str, torch.Tensor]:
    """Load as the libraries do: they accept what negmerge accepts."""
    dense = load_file(path / DENSE) if (path / DENSE).is_file() and (path / "modules.json").is_file() else {}
    return load_one(path) | {f"2_Dense/{name}": tensor for name, tensor in dense.items()}


def unindexed(path: Path) -> set[str]:
    """Names of tensors that are loaded, but that the index does not name."""
    index = next(path.glob("*.index.json"), None) if path.is_dir() else None
    return set(load_one(path)) - set(json.loads(index.read_bytes())["weight_map"]) if index else set()


def load_one(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".npy":
        return {"": torch.from_numpy(np.load(path))}
    if path.is_file():
        return load_file(path)
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    index = next(path.glob("*.index.json"), None)
    shards = json.loads(index.read_bytes())["weight_map"].values() if index else os.listdir(path)
    files = sorted({path / shard for shard in shards if shard.endswith(".safetensors")})
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@settings(deadline=None, derandomize=True, max_examples=300, suppress_health_check=list(HealthCheck))
@given(models())
def fuzzed(given: Models) -> None:
    try_models(given)


class Delta(NamedTuple):
    """base, delta: contents of .safetensors files. nonfinite: the option of the command line."""

    base: bytes
    delta: bytes
    nonfinite: str


TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    """A base and a delta of it, with up to three changes on any level."""
    specs = st.tuples(st.sampled_from(FLOATS), st.sampled_from([(0,), (), (3,), (64,), (70, 2), (3, 200)]))
    named = draw(st.dictionaries(st.sampled_from(NAMES), specs, min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    base, stored, infos = Weights(Object(), b""), Weights(Object(), b""), Object()
    for name, (dtype, shape) in named.items():
        numel = math.prod(shape)
        arithmetic = "F64" if dtype == "F64" else draw(st.sampled_from(["F32", "F64"]))
        means_dtype = draw(st.sampled_from([arithmetic, "BF16"]))
        numbers = torch.randn(numel, generator=generator, dtype=torch.float64)
        raw = bytes_of(numbers.to(TORCH[dtype]))
        mask = torch.rand(numel, generator=generator) < 0.3
        means = bytes_of((1 + torch.rand(int(mask.sum()), generator=generator)).to(TORCH[means_dtype]))
        words = np.packbits(mask.numpy(), bitorder="little").tobytes().ljust(mask_bytes(numel), b"\0")
        base = with_tensor(base, name, dtype, shape, raw)
        stored = with_tensor(stored, f"{name}.mask", "U8", (len(words),), words)
        stored = with_tensor(stored, f"{name}.mean", means_dtype, (int(mask.sum()),), means)
        middle = max(len(raw) - 64, 0) // 2
        fields: list[tuple[str, Any]] = [("dtype", dtype), ("shape", list(shape)), ("arithmetic", arithmetic)]
        fields += [("nonfinite", 0), ("vetoed_by_zero", 0), ("sample", hash_of(raw[middle : middle + 64]))]
        infos.append((name, Object(fields)))
    inner = {
        "rule": Object([("min_agreement", 1.0), ("inputs", "finetuned")]),
        "base": Object(),
        "tensors": infos,
    }
    metadata: list[tuple[str, Any]] = [("format", "negmerge-delta"), ("version", "1"), ("models", "2")]
    for _ in some(draw, 1):
        change_tree(draw, inner[draw(st.sampled_from(["rule", "tensors"]))])
    metadata += [(key, to_json(value)) for key, value in inner.items()]
    stored.header.insert(0, ("__metadata__", Object(metadata)))
    for _ in some(draw, 1):
        change_tree(draw, stored.header)
    payload = stored.payload
    for _ in some(draw, 1):
        payload = change_bytes(draw, payload)
    contents = [(to_json(w.header).encode(), p) for w, p in ((base, base.payload), (stored, payload))]
    files = [len(text).to_bytes(8, "little") + text + data for text, data in contents]
    return Delta(files[0], files[1], draw(NONFINITE))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def with_tensor(file: Weights, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Weights:
    offsets = [len(file.payload), len(file.payload) + len(data)]
    entry = Object([("dtype", dtype), ("shape", list(shape)), ("data_offsets", offsets)])
    return Weights(Object([*file.header, (name, entry)]), file.payload + data)


def try_delta(given: Delta) -> None:
    """Apply a delta with two scales, or be refused; anything else is an AssertionError."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        os.chdir(folder)
        try:
            Path("base.safetensors").write_bytes(given.base)
            Path("delta.safetensors").write_bytes(given.delta)
            before = sorted(Path().rglob("*"))
            options = (
                "--scale",
                "0.9",
                "--scale=-2",
                "--nonfinite",
                given.nonfinite,
                "--threads",
                "1",
                "--quiet",
            )
            status, said, err = negmerge(
                "apply", "base.safetensors", "delta.safetensors", "--output", "out", *options
            )
            if status == 0:
                TRIED["applied"] += 1
                assert not said and err.count("\n") <= 1
                for scale in (0.9, -2.0):
                    check_applied(Path(f"out-{scale}.safetensors"), scale)
                return
            TRIED["refused"] += 1
            assert (status, said) == (2, ""), err
            assert err.startswith("negmerge: ") and err.endswith("\n") and err[:-1].isprintable(), err
            assert len(err) < 20_000
            assert sorted(Path().rglob("*")) == before
        finally:
            os.chdir(here)


def check_applied(path: Path, scale: float) -> None:
    base, stored, out = (load_file(each) for each in ("base.safetensors", "delta.safetensors", path))
    assert base.keys() == out.keys()
    for name, tensor in base.items():
        expected = tensor.reshape(-1).clone()
        if f"{name}.mask" in stored:
            means = stored[f"{name}.mean"]
            bits = np.unpackbits(stored[f"{name}.mask"].numpy(), bitorder="little")
            assert bits.sum() == len(means) and bool((means.isfinite() & (means != 0)).all())
            wide = arithmetic_of(Path("delta.safetensors"), name)
            at = torch.from_numpy(bits[: tensor.numel()]).bool()
            moved = expected[at].to(wide) + torch.tensor(scale, dtype=wide) * -means.to(wide)
            moved = moved.float() if tensor.element_size() == 2 else moved
            rounded = moved.to(tensor.dtype)
            expected[at] = torch.where(rounded.isfinite(), rounded, expected[at])
        assert same_bits(out[name].reshape(-1), expected), name


def arithmetic_of(path: Path, name: str) -> torch.dtype:
    with safe_open(path, "pt") as file:
        return TORCH[json.loads(file.metadata()["tensors"])[name]["arithmetic"]]


@settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck))
@given(deltas())
def fuzzed_deltas(given: Delta) -> None:
    try_delta(given)


class TorchFile(NamedTuple):
    """base, model: contents of a .safetensors file and of a PyTorch file."""

    base: bytes
    model: bytes


WRAPPERS = ("", "", "state_dict", "model", "ema", "optimizer", "net", "x")


@st.composite
def torch_files(draw: st.DrawFn) -> TorchFile:
    """A base and a PyTorch file of a version, with up to three changes: to its pickle, to what its archive says, to its bytes."""
    specs = st.tuples(st.sampled_from(FLOATS), st.sampled_from([(), (0,), (3,), (4, 6), (2, 3, 5)]))
    named = draw(st.dictionaries(st.sampled_from(NAMES[:5]), specs, min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    base = {
        n: torch.randn(shape, generator=generator).to(TORCH[dtype]) for n, (dtype, shape) in named.items()
    }
    model: dict[str, Any] = {}
    for name, tensor in base.items():
        version = tensor + 1
        match draw(
            st.sampled_from(["plain", "plain", "transposed", "sliced", "expanded", "parameter", "tied"])
        ):
            case "transposed" if version.dim() > 1:
                version = version.transpose(0, -1).contiguous().transpose(0, -1)
            case "sliced" if version.dim():
                version = torch.stack([version, -version], -1)[..., 0]
            case "expanded" if version.numel():
                version = version.flatten()[:1].reshape([1] * version.dim()).expand(version.shape)
            case "parameter":
                version = torch.nn.Parameter(version)
            case "tied" if model:
                version = next((t for t in model.values() if t.shape == tensor.shape), version)
        model[name] = version
    if wrapper := draw(st.sampled_from(WRAPPERS)):
        model = {wrapper: model, "epoch": 3}
    written = io.BytesIO()
    torch.save(model, written, _use_new_zipfile_serialization=draw(st.integers(0, 3)) > 0)
    content = written.getvalue()
    if content.startswith(b"PK") and draw(st.booleans()):
        content = other_archive(draw, content)
    for _ in some(draw, 1):
        content = change_bytes(draw, content)
    return TorchFile(save(base), content)


def other_archive(draw: st.DrawFn, content: bytes) -> bytes:
    """The entries of an archive in another one, whose CRCs are right, with changes to the pickle or to what is said of an entry."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [Entry(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in some(draw, 2):
        at = draw(st.integers(0, len(entries) - 1))
        number = draw(st.sampled_from(INTEGERS)) & 0xFFFFFFFF
        match draw(
            st.sampled_from(["pickle", "pickle", "pickle", "data", "field", "local", "again", "drop", "name"])
        ):
            case "pickle":
                pickled = change_bytes(draw, entries[0].data)
                entries[0] = entries[0]._replace(data=pickled)
            case "data":
                entries[at] = entries[at]._replace(data=change_bytes(draw, entries[at].data))
            case "field":
                field = draw(st.sampled_from(["method", "flags", "crc", "size", "packed", "offset"]))
                entries[at] = entries[at]._replace(
                    **{field: number & 0xFFFF if field in ("method", "flags") else number}
                )
            case "local":
                entries[at] = entries[at]._replace(
                    local={draw(st.sampled_from(["crc", "size", "packed"])): number}
                )
            case "again":
                entries.append(entries[at])
            case "drop" if len(entries) > 1:
                del entries[at]
            case "name":
                name = draw(
                    st.sampled_from(
                        ["../x", "/x", "m/data.pkl", "archive/data/1", "archive/constants.pkl", "x"]
                    )
                )
                entries[at] = entries[at]._replace(name=name)
    return archive_of(entries)


def try_torch_file(given: TorchFile) -> None:
    """Merge a PyTorch file into a base, or be refused; anything else is an AssertionError."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        os.chdir(folder)
        try:
            Path("m0.safetensors").write_bytes(given.base)
            Path("m1.pt").write_bytes(given.model)
            judge_torch_file()
        finally:
            os.chdir(here)


def judge_torch_file() -> None:
    options = (
        "--output",
        "out.safetensors",
        "--scale",
        "0.9",
        "--nonfinite",
        "keep-base",
        "--threads",
        "1",
        "--quiet",
    )
    status, said, err = negmerge("merge", "m0.safetensors", "m1.pt", *options)
    if status:
        TRIED["refused"] += 1
        assert (status, said) == (2, ""), err
        assert err.startswith("negmerge: m1.pt") and err.endswith("\n") and err[:-1].isprintable(), err
        assert len(err) < 20_000
        assert sorted(path.name for path in Path().iterdir()) == ["m0.safetensors", "m1.pt"]
        return
    TRIED["merged"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # maps of files that are not written
        is_zip = (
            Path("m1.pt").read_bytes().startswith(b"PK")
        )  # with a map, it checks no CRC of tensors, as negmerge
        loaded = torch.load("m1.pt", weights_only=True, mmap=is_zip)
    for wrapper in WRAPPERS:
        loaded = loaded[wrapper] if isinstance(loaded.get(wrapper), dict) else loaded
    base, merged = load_file("m0.safetensors"), load_file("out.safetensors")
    for name, tensor in base.items():
        expected = plain_merge(tensor, [loaded[name].detach().contiguous()], 0.9)[0]
        assert same_bits(merged[name], expected), name


@settings(deadline=None, derandomize=True, max_examples=100, suppress_health_check=list(HealthCheck))
@given(torch_files())
def fuzzed_torch_files(given: TorchFile) -> None:
    try_torch_file(given)
