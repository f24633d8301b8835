"""Where an output may go: never over an input, by whatever name, nor over what negmerge did not write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from interrupted import contents
from small_models import folder, merge  # noqa: F401

import negmerge_fast as nm
from negmerge_fast.output import destination, publish, staging


@contextmanager
def mounted(source: Path, path: Path) -> Iterator[Path]:
    """A second name for a directory, while it lasts."""
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "--bind", source, path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def refused(folder: Path, out: Path, match: str) -> None:
    with pytest.raises(nm.InputError, match=match):
        nm.merge_checkpoints(
            folder / "base", [folder / "ft-0", folder / "ft-1"], out, scale=0.9, overwrite=True
        )


# What is refused at a second name of the folder of all models, or of the base.
BY_ANOTHER_NAME = {
    "base": "same/base: the output is the input",
    "ft-1": "same/ft-1: the output is the input",
    "base/inside": "same/base/inside: the output is inside the input",
    "": "same: the output is above the input",
}


@pytest.mark.parametrize("out", BY_ANOTHER_NAME)
def test_an_output_is_no_input_by_another_name(folder: Path, tmp_path: Path, out: str) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("base", "ft-0", "ft-1"):
        (folder / name).rename(models / name)
    before = contents(models)
    with mounted(models, tmp_path / "same") as same:
        refused(models, same / out, BY_ANOTHER_NAME[out])
    assert contents(models) == before and {p.name for p in tmp_path.iterdir()} == {"models", "same"}


def test_a_single_file_is_no_input_by_another_name(folder: Path, tmp_path: Path) -> None:
    inputs = [tmp_path / name / "model.safetensors" for name in ("base", "ft-0")]
    before = inputs[0].read_bytes()
    with (
        mounted(tmp_path / "base", tmp_path / "same") as same,
        pytest.raises(nm.InputError, match=r"same/model\.safetensors: the output is the input"),
    ):
        nm.merge_checkpoints(inputs[0], inputs[1:], same / "model.safetensors", scale=0.9, overwrite=True)
    assert inputs[0].read_bytes() == before


def test_an_input_that_is_mounted_in_an_older_output(folder: Path) -> None:
    """Removing the older output would empty it."""
    merge(folder)
    before = contents(folder / "base")
    with mounted(folder / "base", folder / "out" / "sub"):
        refused(folder, folder / "out", r"out/sub: an input, so .*out is not replaced")
    assert contents(folder / "base") == before


@pytest.mark.parametrize("name", ["sub", "sub dir"])
def test_what_is_mounted_in_an_older_output(folder: Path, name: str) -> None:
    """A folder of the base, or of a disk: though all files have listed names, removing them would empty it."""
    (folder / "base" / name).mkdir()
    (folder / "base" / name / "README.md").write_text("#")
    merge(folder)
    before = contents(folder / "base")
    with mounted(folder / "base" / name, folder / "out" / name):
        refused(folder, folder / "out", rf"out/{name}: a mount point, so .*out is not replaced")
    assert contents(folder / "base") == before


def test_an_output_that_is_a_mount_point(folder: Path) -> None:
    """It cannot be renamed; that is said before the work, not after it."""
    merge(folder)
    (folder / "out").rename(folder / "held")
    with mounted(folder / "held", folder / "out"):
        refused(folder, folder / "out", "out: a mount point, expected a path that can be replaced")


def test_a_base_that_gets_the_name_of_the_output_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are compared again right before the exchange."""
    merge(folder)
    merge_again, before = staging.Staging.mark, contents(folder / "base")

    def and_swap(self: staging.Staging) -> None:
        merge_again(self)
        shutil.rmtree(folder / "out")
        (folder / "base").rename(folder / "out")
        (folder / "base").symlink_to(folder / "out")

    monkeypatch.setattr(staging.Staging, "mark", and_swap)
    refused(folder, folder / "out", "out: the output is the input")
    assert contents(folder / "out") == before


def train(path: Path) -> None:
    """Put other weights of the same size in the place of a file's."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_model_that_somebody_trained_is_not_replaced(folder: Path) -> None:
    """A slip such as -o ft-3 --overwrite; though negmerge would write files of the same names."""
    shutil.copytree(folder / "ft-1", folder / "ft-3")
    before = contents(folder / "ft-3")
    refused(folder, folder / "ft-3", r"ft-3/.*: not negmerge's, so .*ft-3 is not replaced")
    assert contents(folder / "ft-3") == before


def test_a_model_that_was_trained_over_an_output_is_not_replaced(folder: Path) -> None:
    """The manifest is still there, and lists files of the same names and sizes."""
    merge(folder)
    train(folder / "out" / "model.safetensors")
    before = contents(folder / "out")
    refused(folder, folder / "out", r"out/model\.safetensors: sample .*out is not replaced")
    assert contents(folder / "out") == before
    single = [folder / name / "model.safetensors" for name in ("base", "ft-0")]
    for out in (folder / "alone.safetensors", folder / "trained.safetensors"):
        nm.merge_checkpoints(single[0], single[1:], out, scale=0.9)
    train(out)
    with pytest.raises(nm.InputError, match=r"trained\.safetensors: sample .*is not replaced"):
        nm.merge_checkpoints(single[0], single[1:], out, scale=0.9, overwrite=True)
    (folder / "alone.safetensors.negmerge.json").unlink()
    with pytest.raises(nm.InputError, match=r"negmerge\.json: missing, so .*alone\.safetensors is not negm"):
        nm.merge_checkpoints(single[0], single[1:], folder / "alone.safetensors", scale=0.9, overwrite=True)


def test_an_output_that_is_trained_over_at_the_last_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last check and the exchange; it is put back."""
    merge(folder)
    check = publish.check_existing

    def and_train(given: destination.Destination) -> None:
        check(given)
        train(folder / "out" / "model.safetensors")

    monkeypatch.setattr(publish, "check_existing", and_train)
    refused(folder, folder / "out", r"output/model\.safetensors: sample .*out is not replaced")
    with pytest.raises(nm.DamageError, match=r"model\.safetensors: checksum"):
        nm.verify_checkpoint(folder / "out")


@pytest.mark.processes
def test_a_relative_output_where_there_is_no_directory_any_more(folder: Path) -> None:
    code = (
        "import os, sys, negmerge_fast as nm\n"
        "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "base, ft = (os.path.join(sys.argv[1], name) for name in ('base', 'ft-0'))\n"
        "try: nm.merge_checkpoints(base, [ft], 'out', scale=0.9)\n"
        "except nm.InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "out: the current directory is gone, expected an absolute path\n", done


def test_an_empty_directory_may_be_replaced(folder: Path) -> None:
    (folder / "out").mkdir()
    merge(folder, overwrite=True)
    assert nm.verify_checkpoint(folder / "out").files


@pytest.mark.processes
def test_ranks_of_a_script_are_told_how_to_call_it(folder: Path) -> None:
    """Each rank of torchrun calls merge_checkpoints: the second finds the output of the first."""
    merge(folder)
    code = (
        "import negmerge_fast as nm\n"
        "try: nm.merge_checkpoints('base', ['ft-0', 'ft-1'], 'out', scale=0.9)\n"
        "except nm.InputError as error: print(error)"
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert "out: exists already" in done.stdout and "torchrun -m negmerge_fast merge" in done.stdout, done
    assert done.stdout.count("\n") == 1
