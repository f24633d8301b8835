"""Outputs in another format than the base's: the numbers of a merge of safetensors files, in every format in and out."""

from __future__ import annotations

import json
import random
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from checkpoint_files import family, flip, save_model
from command import Run, run  # noqa: F401
from interrupted import contents, finish, kill_all, make_models, start, under_way
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_chunks import record_every_chunk, set_chunk_bytes

import negmerge_fast as nm
from negmerge_fast.core.reference import plain_merge
from negmerge_fast.output.writer import Writer
from negmerge_fast.streaming.plan import Extent
from negmerge_fast.streaming.worker import Worker

Tensors = dict[str, torch.Tensor]
MODELS = ("base", "ft-0", "ft-1")


def as_file(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"), metadata={"format": "pt"})
    return path.with_suffix(".safetensors")


def as_pt(path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def as_wrapped(path: Path, tensors: Tensors) -> Path:
    torch.save({"epoch": 3, "state_dict": tensors, "optimizer": {"lr": 0.1}}, path.with_suffix(".pth.tar"))
    return path.with_suffix(".pth.tar")


def as_directory(path: Path, tensors: Tensors) -> Path:
    return save_model(path, tensors)


def as_shards(path: Path, tensors: Tensors) -> Path:
    names = list(tensors)
    return save_model(path, tensors, [names[:3], names[3:]])


def as_bin(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "test"}')
    (path / "tokenizer.json").write_text("{}")
    torch.save(tensors, path / "pytorch_model.bin")
    return path


def as_bin_shards(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "test"}')
    (path / "tokenizer.json").write_text("{}")
    names, weight_map = list(tensors), {}
    for k, part in enumerate((names[:3], names[3:])):
        file = f"pytorch_model-{k + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, path / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


KINDS: dict[str, Callable[[Path, Tensors], Path]] = {
    "file": as_file, "pt": as_pt, "wrapped": as_wrapped, "directory": as_directory, "shards": as_shards, "bin": as_bin,
    "bin shards": as_bin_shards,
}  # fmt: skip


def made(folder: Path, kind: str, tensors: Sequence[Tensors] | None = None) -> list[Path]:
    folder.mkdir(exist_ok=True)
    tensors = family(n=2) if tensors is None else tensors
    return [KINDS[kind](folder / name, each) for name, each in zip(MODELS, tensors, strict=True)]


def merge(paths: Sequence[Path], out: Path, **options: Any) -> nm.Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nm.MergeWarning)
        return nm.merge_checkpoints(paths[0], paths[1:], out, **{"scale": 0.9, **options})


def loaded(out: Path, keys: Sequence[str] = ()) -> Tensors:
    """What an output holds, as other programs load it."""
    files = sorted(p for p in (out.iterdir() if out.is_dir() else [out]) if p.suffix not in (".json", ".md"))
    found: Tensors = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                assert opened.metadata()["format"] == "pt"
            found.update(load_file(file))
            continue
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        whole, mapped = (torch.load(file, weights_only=True, mmap=mmap) for mmap in (False, True))
        for key in keys:
            assert list(whole) == [key]
            whole, mapped = whole[key], mapped[key]
        assert all(same_bits(whole[name], mapped[name]) for name in whole)
        found.update(whole)
    return found


def check(out: Path, tensors: Sequence[Tensors], keys: Sequence[str] = ()) -> None:
    found = loaded(out, keys)
    assert found.keys() == tensors[0].keys()
    for name, base in tensors[0].items():
        models = [each[name] for each in tensors[1:]]
        expected = plain_merge(base, models, 0.9)[0] if base.is_floating_point() else base
        assert same_bits(found[name], expected), name


@pytest.mark.parametrize("wanted", ["auto", "pt"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_format_in_and_out(tmp_path: Path, kind: str, wanted: Any) -> None:
    paths = made(tmp_path / kind, kind)
    is_pt = wanted == "pt"
    out = tmp_path / ("out" if paths[0].is_dir() else "out.pt" if is_pt else "out.safetensors")
    report = merge(paths, out, format=wanted)
    check(out, family(n=2), ["state_dict"] if kind == "wrapped" and is_pt else ())
    assert nm.verify_checkpoint(out, paths).blocks
    if out.is_dir():
        names = {p.name for p in out.iterdir()}
        suffix = ".bin" if is_pt else ".safetensors"
        assert {Path(name).suffix for name in names} == {suffix, ".json"} and {
            "config.json",
            "tokenizer.json",
        } < names
    written = [out] if out.is_file() else [p for p in out.iterdir() if p.name != "negmerge.json"]
    assert report.bytes_written == sum(p.stat().st_size for p in written)
    # The output is a base, and a model, like any other.
    again = merge([out, *paths[1:]], tmp_path / f"again{out.suffix}", format=wanted)
    assert again.elements == report.elements


@pytest.mark.parametrize("kind", ["pt", "file"])
def test_the_bytes_do_not_depend_on_names_chunks_or_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    paths = made(tmp_path / "models", kind)
    outs = [tmp_path / "a.pt", tmp_path / "b.pth", tmp_path / "c.bin"]
    merge(paths, outs[0], format="pt")
    set_chunk_bytes(monkeypatch, 512)
    merge(paths, outs[1], format="pt", threads=1)
    merge(paths, outs[2], format="pt", backend="torch", threads=3)
    assert len({out.read_bytes() for out in outs}) == 1


def tied(n: int = 2) -> list[Tensors]:
    """Models whose head is the embedding, and with views of one storage."""
    tensors = family(n=n)
    for each in tensors:
        rows = torch.cat([each["embed"], each["embed"] + 1])
        each |= {"head": each["embed"], "first": rows[:60], "last": rows[40:], "flat": each["embed"].view(-1)}
        each |= {"columns": each["half"].t(), "norm": rows.double()[::2, 3]}
    return tensors


@pytest.mark.parametrize("wrapped", [False, True])
def test_shared_storage_and_strides(tmp_path: Path, wrapped: bool) -> None:
    tensors = tied()
    paths = made(tmp_path / "models", "wrapped" if wrapped else "pt", tensors)
    notes = merge(paths, tmp_path / "out.safetensors").notes
    assert f"{paths[0]}: tied weights are written once: 'head' is 'embed'" in notes
    found = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "head": "embed"}
    assert found.keys() == tensors[0].keys() - {"head"}
    merge(paths, tmp_path / "out.pt", format="pt")
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    whole = whole["state_dict"] if wrapped else whole
    assert list(whole) == [name for name in tensors[0] if name != "head"] + ["head"]
    assert whole["head"].data_ptr() == whole["embed"].data_ptr() != whole["first"].data_ptr()
    for name in found:
        expected = tensors[0][name]
        if expected.is_floating_point():
            expected = plain_merge(expected, [each[name] for each in tensors[1:]], 0.9)[0]
        assert same_bits(found[name], expected) and same_bits(whole[name], expected), name
        assert whole[name].is_contiguous()


def test_weights_that_are_tied_in_the_base_only(tmp_path: Path) -> None:
    tensors = tied()
    tensors[1]["head"] = tensors[1]["embed"].clone()  # of the same numbers
    paths = made(tmp_path / "models", "pt", tensors)
    merge(paths, tmp_path / "out.safetensors")
    tensors[2]["head"] = tensors[2]["embed"] + 1
    as_pt(paths[2], tensors[2])
    message = (
        r"ft-1\.pt: tensor 'head': differs from 'embed', to which it is tied in base, expected equal weights"
    )
    with pytest.raises(nm.InputError, match=message):
        merge(paths, tmp_path / "no.safetensors")
    merge(paths, tmp_path / "some.safetensors", exclude="^embed$")


def test_names_that_save_model_left_out_are_there_again(tmp_path: Path) -> None:
    tensors = [{"a": each["embed"], "norm": each["norm"]} for each in family(n=2)]
    paths = []
    for name, each in zip(MODELS, tensors, strict=True):
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(each, paths[-1], metadata={"format": "pt", "b": "a"})
    merge(paths, tmp_path / "out.pt", format="pt")
    whole = torch.load(tmp_path / "out.pt", weights_only=True)
    assert whole.keys() == {"a", "norm", "b"} and whole["b"].data_ptr() == whole["a"].data_ptr()


class Stop(Exception):
    pass


def bytes_of(out: Path) -> dict[str, bytes]:
    return contents(out) if out.is_dir() else {"": out.read_bytes()}


@pytest.mark.parametrize(
    ("kind", "out", "at"),
    [
        pytest.param(kind, out, at, marks=() if at == usual else pytest.mark.slow)
        for kind, out, usual in (
            ("pt", "out.safetensors", 1.0),
            ("pt", "out.pt", 0.3),
            ("shards", "out", 0.7),
        )
        for at in (0.3, 0.7, 1.0)
    ],
)
def test_a_merge_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, out: str, at: float
) -> None:
    paths = made(tmp_path / "models", kind)
    options: dict[str, Any] = {"resume": True, "threads": 1, "format": "auto" if "safe" in out else "pt"}
    merge(paths, tmp_path / f"expected-{out}", **options)
    record_every_chunk(monkeypatch)

    def progress(done: int, total: int) -> None:
        if done >= at * total:
            raise Stop

    with pytest.raises(Stop):
        if at == 1.0:  # when the checksums in the file are written, and the manifest is not
            monkeypatch.setattr(Writer, "finish", lambda *_: progress(1, 1))
            merge(paths, tmp_path / out, **options)
        else:
            merge(paths, tmp_path / out, progress=progress, **options)
    monkeypatch.undo()
    assert merge(paths, tmp_path / out, **options).bytes_done_before
    assert bytes_of(tmp_path / out) == bytes_of(tmp_path / f"expected-{out}")
    before = (tmp_path / out).stat().st_mtime_ns
    assert not merge(paths, tmp_path / out, **options).bytes_written  # it is finished
    assert (tmp_path / out).stat().st_mtime_ns == before


def test_unfinished_output_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = made(tmp_path / "models", "directory")
    record_every_chunk(monkeypatch)

    def stop(done: int, total: int) -> None:
        if done > 0.5 * total:
            raise Stop

    with pytest.raises(Stop):
        merge(paths, tmp_path / "out", resume=True, format="pt", progress=stop)
    with pytest.raises(
        nm.InputError, match="journal-0: the unfinished output was made with format 'pt', expected None"
    ):
        nm.merge_checkpoints(paths[0], paths[1:], tmp_path / "out", scale=0.9, resume=True)


def test_a_name_of_a_file_must_end_as_its_format_says(tmp_path: Path) -> None:
    paths = made(tmp_path / "models", "pt")
    with pytest.raises(
        nm.InputError,
        match=r"out\.pt: expected a file name that ends in \.safetensors, as --format says, or --format pt$",
    ):
        merge(paths, tmp_path / "out.pt")
    with pytest.raises(
        nm.InputError, match=r"out\.bin\.x: expected a file name that ends in \.pt, as --format says$"
    ):
        merge(paths, tmp_path / "out.bin.x", format="pt")
    with pytest.raises(
        nm.InputError, match=r"expected a file name that ends in \.safetensors, like base, or --format pt$"
    ):
        merge(made(tmp_path / "other", "file"), tmp_path / "out.pt")


def test_an_older_output_is_replaced_by_one_of_another_format(tmp_path: Path) -> None:
    paths = made(tmp_path / "models", "shards")
    for wanted, suffix in (("auto", ".safetensors"), ("pt", ".bin"), ("safetensors", ".safetensors")):
        merge(paths, tmp_path / "out", format=wanted, overwrite=True)
        assert {p.suffix for p in (tmp_path / "out").iterdir()} == {suffix, ".json"}
        check(tmp_path / "out", family(n=2))
    paths = made(tmp_path / "files", "pt")
    merge(paths, tmp_path / "out.pt", format="pt")
    before = (tmp_path / "out.pt").read_bytes()
    merge(paths, tmp_path / "out.pt", scale=0.5, format="pt", overwrite=True)
    assert (tmp_path / "out.pt").read_bytes() != before
    (tmp_path / "out.pt").write_bytes(before)
    with pytest.raises(nm.InputError, match="is not replaced"):
        merge(paths, tmp_path / "out.pt", format="pt", overwrite=True)


@pytest.mark.parametrize(
    ("kind", "wanted", "out"),
    [
        ("pt", "auto", "out.safetensors"),
        pytest.param("pt", "pt", "out.pth", marks=pytest.mark.slow),
        ("shards", "pt", "out"),
    ],
)
@pytest.mark.filterwarnings("ignore::negmerge_fast.MergeWarning")
def test_a_delta_of_any_format_and_several_scales(tmp_path: Path, kind: str, wanted: Any, out: str) -> None:
    tensors = tied() if kind == "pt" else family(n=2)
    paths = made(tmp_path / "models", kind, tensors)
    nm.delta_checkpoints(paths[0], paths[1:], tmp_path / "delta")
    reports = nm.apply_delta(paths[0], tmp_path / "delta", tmp_path / out, scale=[0.9, 0.5], format=wanted)
    outs = [Path(report.output) for report in reports]
    suffix = Path(out).suffix
    assert [each.name for each in outs] == [f"out-0.9{suffix}", f"out-0.5{suffix}"]
    merge(paths, tmp_path / f"merged{suffix}", format=wanted)
    merged, applied = loaded(tmp_path / f"merged{suffix}"), loaded(outs[0])
    assert merged.keys() == applied.keys() and all(same_bits(merged[n], applied[n]) for n in merged)
    for each in outs:
        assert nm.verify_checkpoint(each, [paths[0], tmp_path / "delta"]).blocks


def test_a_delta_is_applied_to_its_base_in_another_format(tmp_path: Path) -> None:
    paths = made(tmp_path / "models", "pt")
    nm.delta_checkpoints(paths[0], paths[1:], tmp_path / "delta")
    base = as_file(tmp_path / "converted", family(n=0)[0])
    with pytest.warns(
        nm.MergeWarning,
        match="in another format than the base of .*delta, with the same 64 bytes of each tensor",
    ):
        nm.apply_delta(base, tmp_path / "delta", tmp_path / "out.safetensors", scale=0.9)
    check(tmp_path / "out.safetensors", family(n=2))
    changed = family(n=0)[0]
    changed["brain"][64] = 3
    other = as_file(tmp_path / "other", changed)
    with pytest.raises(nm.InputError, match=r"tensor 'brain': other numbers than in the base of"):
        nm.apply_delta(other, tmp_path / "delta", tmp_path / "no.safetensors", scale=0.9)
    # In the same format it has to be the same file.
    changed = family(n=0)[0]
    changed["embed"][0, 0] = 3
    with pytest.raises(nm.InputError, match=r"not one of the files that .*delta was made of"):
        nm.apply_delta(
            as_pt(tmp_path / "third", changed), tmp_path / "delta", tmp_path / "no.safetensors", scale=0.9
        )


def test_a_name_that_safetensors_files_cannot_have(tmp_path: Path) -> None:
    name = "__metadata__"
    paths = made(tmp_path / "models", "pt", [{name: each["embed"]} for each in family(n=2)])
    with pytest.raises(
        nm.InputError, match=r"base\.pt: a tensor '.*', a name that a safetensors file cannot have"
    ):
        merge(paths, tmp_path / "out.safetensors")
    merge(paths, tmp_path / "out.pt", format="pt")
    assert list(torch.load(tmp_path / "out.pt", weights_only=True)) == [name]


def test_a_vector_has_no_other_format(tmp_path: Path) -> None:
    import numpy as np

    for name in MODELS:
        np.save(tmp_path / f"{name}.npy", np.ones(3, np.float32))
    paths = [tmp_path / f"{name}.npy" for name in MODELS]
    with pytest.raises(nm.InputError, match=r"base\.npy: a vector without names, expected --format auto"):
        nm.merge_checkpoints(paths[0], paths[1:], tmp_path / "out.npy", scale=0.9, format="pt")


def test_copied_tensors_and_a_small_budget(tmp_path: Path) -> None:
    paths = made(tmp_path / "models", "pt")
    report = merge(
        paths, tmp_path / "out.pt", format="pt", include="embed", memory_budget="6MB", nonfinite="keep-base"
    )
    whole, tensors = torch.load(tmp_path / "out.pt", weights_only=True), family(n=2)
    assert [each["name"] for each in report.tensors] == ["embed"]
    expected = {
        **tensors[0],
        "embed": plain_merge(*[tensors[0]["embed"], [t["embed"] for t in tensors[1:]]], 0.9)[0],
    }
    assert all(same_bits(whole[name], expected[name]) for name in expected)


def test_tensors_are_merged_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, seen = made(tmp_path / "models", "pt"), []
    process = Worker._process_natively

    def note(self: Worker, native: Any, chunk: Extent, *more: Any) -> Any:
        done = process(self, native, chunk, *more)
        seen.extend([done is not None] * bool(chunk.slices))
        return done

    monkeypatch.setattr(Worker, "_process_natively", note)
    merge(paths, tmp_path / "out.pt", format="pt", backend="cpu")
    check(tmp_path / "out.pt", family(n=2))
    assert len(seen) >= 4 and all(seen)


def test_the_command_line(tmp_path: Path, run: Run) -> None:
    made(tmp_path / "models", "bin")
    models = [f"models/{name}" for name in MODELS]
    arguments = ("merge", *models, "-o", "out", "--scale", "0.9", "--format", "pt")
    status, out, err = run(*arguments, "--dry-run")
    assert (status, err) == (0, "") and "output    " in out and not (tmp_path / "out").exists()
    status, out, err = run(*arguments, "--report", "report.json")
    assert (status, err) == (0, "")
    check(tmp_path / "out", family(n=2))
    assert run("verify", "out", "--against", *models)[0] == 0
    status, out, err = run("inspect", "out", *models[1:])
    assert (status, err) == (0, "") and "can be merged: 6 tensors" in out
    status, out, err = run("merge", *models, "-o", "again", "--scale", "0.9")
    assert status == 0 and err == "negmerge: note: models/base: pytorch_model.bin becomes model.safetensors\n"
    assert json.loads((tmp_path / "again" / "negmerge.json").read_text())["format"] == "safetensors"
    flip(tmp_path / "out" / "pytorch_model.bin", 20)
    assert run("verify", "out")[0] == 1
    status, _, err = run(*arguments[:-1], "bin")
    assert status == 2 and "'bin' is not one of" in err


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed(tmp_path: Path, ranks: int) -> None:
    make_models(tmp_path)
    arguments = (
        "merge",
        "base",
        "ft-0",
        "ft-1",
        "-o",
        "out",
        "--scale",
        "0.9",
        "--threads",
        "1",
        "--format",
        "pt",
    )
    processes = start(tmp_path, "--resume", ranks=ranks, arguments=arguments)
    under_way(tmp_path, processes, journals=ranks)
    kill_all(processes, random.Random(0))
    done = finish(start(tmp_path, "--resume", ranks=3 - ranks, wait=0.0, arguments=arguments))
    assert all(status == 0 for status, _, _ in done), done
    merge([tmp_path / name for name in MODELS], tmp_path / "expected", format="pt")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "expected")
    assert loaded(tmp_path / "out")


@pytest.mark.processes
def test_two_processes(tmp_path: Path) -> None:
    paths = made(tmp_path, "pt", tied())
    names = [path.name for path in paths]
    arguments = ("merge", *names, "-o", "out.pt", "--scale", "0.9", "--threads", "1", "--format", "pt")
    done = finish(start(tmp_path, ranks=2, wait=0.0, arguments=arguments))
    assert [status for status, _, _ in done] == [0, 0], done
    merge(paths, tmp_path / "expected.pt", format="pt")
    assert bytes_of(tmp_path / "out.pt") == bytes_of(tmp_path / "expected.pt")
    assert loaded(tmp_path / "out.pt")
