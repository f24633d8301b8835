"""How setup.py compiles the kernels, and what it records of the build. No compiler runs here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from negmerge_fast.backends import native

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("negmerge_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


@pytest.mark.parametrize(("value", "wanted"), [(None, None), ("0", False), ("1", True)])
def test_a_variable_asks_for_cuda(value: str | None, wanted: bool | None) -> None:
    assert setup.cuda_wanted(value) is wanted


@pytest.mark.parametrize("value", ["", "yes", "2", " 1"])
def test_other_values_of_the_variable_are_refused(value: str) -> None:
    with pytest.raises(SystemExit, match=f"^NEGMERGE_CUDA={value}: expected 0, 1 or not set$"):
        setup.cuda_wanted(value)


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        # CUDA 13.0, 12.9, 12.0 and 11.1; and one to come.
        (
            "compute_75 compute_80 compute_86 compute_87 compute_88 compute_89 compute_90 compute_100 compute_110 "
            "compute_103 compute_120 compute_121",
            [80, 90, 100, 110, 120],
        ),
        (
            "compute_50 compute_75 compute_80 compute_89 compute_90 compute_100 compute_101 compute_120 compute_121",
            [80, 90, 100, 120],
        ),
        ("compute_50 compute_80 compute_86 compute_90 compute_90a", [80, 90]),
        ("compute_52 compute_70 compute_80 compute_86", [80]),
        ("compute_90 compute_103 compute_100f compute_141 compute_140a", [90, 103, 141]),
    ],
)
def test_architectures_are_the_lowest_of_each_major_version(listed: str, chosen: list[int]) -> None:
    assert setup.architectures(listed.replace(" ", "\n") + "\n") == chosen


@pytest.mark.parametrize(
    ("gpus_here", "chosen"),
    [([], [80]), ([90], [90]), ([75], [80]), ([75, 90], [90]), ([86, 89], [86]), ([80, 140], [80, 121])],
)
def test_what_stays_on_a_machine_is_compiled_for_its_gpus(gpus_here: list[int], chosen: list[int]) -> None:
    listed = "compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_121\n"
    assert setup.architectures(listed, gpus_here) == chosen


@pytest.mark.parametrize(
    ("script", "found"), [("echo 9.0; echo 12.1; echo 9.0", [90, 121]), ("echo No devices; exit 6", [])]
)
def test_the_gpus_of_a_machine_are_those_of_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, found: list[int]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.installed_gpus() == found
    program.unlink()
    assert setup.installed_gpus() == []


def test_nvcc_is_looked_for_where_cuda_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nvcc_in(folder: str) -> str:
        program = tmp_path / folder / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        return str(program)

    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(setup, "CUDA", str(tmp_path / "usual"))
    with pytest.raises(
        setup.NotBuilt, match=rf"^no nvcc in CUDA_HOME or CUDA_PATH, on PATH or in {tmp_path}/usual/bin$"
    ):
        setup.cuda_compiler()
    usual = nvcc_in("usual/bin")
    assert setup.cuda_compiler() == usual
    monkeypatch.setenv("CUDA_HOME", "")  # there is none, whatever lies in the usual place
    with pytest.raises(setup.NotBuilt, match=r"^no nvcc in CUDA_HOME or CUDA_PATH, or on PATH$"):
        setup.cuda_compiler()
    on_path = nvcc_in("path")
    assert setup.cuda_compiler() == on_path
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert setup.cuda_compiler() == on_path
        expected = nvcc_in(f"{name}/bin")
        assert setup.cuda_compiler() == expected
        on_path = expected  # CUDA_HOME comes before CUDA_PATH
    monkeypatch.setenv("CUDACXX", "another")
    assert setup.cuda_compiler() == "another"


def test_libraries_of_nvcc_from_pip_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    commands = []

    def run(*command: str | Path) -> str:
        commands.append(command)
        return "compute_80\n"

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setup, "program", lambda *names: names[0])

    def flags() -> list[str]:
        commands.clear()
        assert setup.build(tmp_path / "library.so", cuda=True, stays_here=False) == [80]
        return [flag for flag in map(str, commands[1]) if flag.startswith("-DCMAKE_CUDA_FLAGS")]

    assert flags() == []
    libraries = tmp_path / "cuda" / "lib"
    libraries.mkdir(parents=True)
    (libraries / "libcudart_static.a").write_text("")
    assert flags() == [f"-DCMAKE_CUDA_FLAGS=-L{libraries}"]


@pytest.mark.parametrize("listed", ["usage: nvcc\n", "compute_52\ncompute_75\n"])
def test_a_compiler_that_lists_no_such_gpus_is_none(listed: str) -> None:
    with pytest.raises(
        setup.NotBuilt, match=r"^nvcc lists no GPU architectures from 80 on, expected CUDA 12 or 13$"
    ):
        setup.architectures(listed)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (
            "[1/6] Building a.o\nFAILED: a.o\na.cpp:3:7: error: no 'x'\n  3 | x\na.cpp:9:9: error: no 'y'",
            "a.cpp:3:7: error: no 'x'",
        ),
        ("a.cpp:1:10: fatal error: b.h: No such file", "a.cpp:1:10: fatal error: b.h: No such file"),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal : Unsupported gpu architecture"),
        (
            "-- Found\nCMake Error at a.cmake:7 (message):\n  Could\n  not find\n\n  Python.\nCall Stack:\n  b:1",
            "Could not find Python.",
        ),
        (
            "CMake Error at a:1 (b):\n  It said\n\n    a.cu(1): error: #error old",
            "a.cu(1): error: #error old",
        ),
        ("CMake Error at a:1 (b):\n  " + "long " * 100, "long " * 39 + "..."),
        ("-- no errors here", None),
    ],
)
def test_first_error_in_one_line(output: str, error: str | None) -> None:
    assert setup.first_error(output + "\n") == error


def test_message_names_a_program_that_is_missing_or_fails(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(setup.NotBuilt, match=r"^/nonexistent/nvcc: No such file or directory$"):
        setup.run("/nonexistent/nvcc", "--list-gpu-arch")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho something; exit 3\n")
    nvcc.chmod(0o755)
    with pytest.raises(setup.NotBuilt, match=f"^{nvcc} ended with exit status 3$"):
        setup.run(nvcc)
    assert "something" in capfd.readouterr().out


def test_cuda_that_cannot_be_compiled_is_skipped_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def build(library: Path, cuda: bool, stays_here: bool) -> list[int]:
        builds.append(cuda)
        if cuda:
            raise setup.NotBuilt("no nvcc on PATH")
        return []

    monkeypatch.setattr(setup, "build", build)
    monkeypatch.delenv("NEGMERGE_CUDA", raising=False)
    no_cuda = {"cpu": None, "cuda": "no nvcc on PATH", "cuda_architectures": []}
    assert setup.build_what_can_be(Path("library.so"), stays_here=True) == no_cuda
    monkeypatch.setenv("NEGMERGE_CUDA", "0")
    assert "NEGMERGE_CUDA=0" in setup.build_what_can_be(Path("library.so"), stays_here=True)["cuda"]
    assert builds == [True, False, False]
    monkeypatch.setenv("NEGMERGE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"NEGMERGE_CUDA=1, but .*: no nvcc on PATH$"):
        setup.build_what_can_be(Path("library.so"), stays_here=True)
    assert builds == [True, False, False, True]


def build_without_compilers(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "CUDACXX", "CUDA_PATH", "NEGMERGE_CUDA")
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    environment = {**inherited, "PATH": str(folder / "empty"), "CUDA_HOME": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_build_succeeds_and_removes_an_earlier_library(tmp_path: Path) -> None:
    library = tmp_path / "negmerge_fast" / f"_native{native.EXTENSION_SUFFIXES[0]}"
    library.parent.mkdir()
    library.write_text("an earlier build's")
    done = build_without_compilers(tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = library.parent.iterdir()
    info = json.loads(file.read_text())
    assert file == library.with_suffix(".json")
    assert info["cpu"] == info["cuda"] == "no c++ or g++ or clang++ on PATH"
    assert json.dumps(info) in done.stdout

    done = build_without_compilers(tmp_path, NEGMERGE_CUDA="1")
    assert done.returncode != 0
    assert re.fullmatch("NEGMERGE_CUDA=1, but .*: no nvcc in .*", done.stderr.splitlines()[-1])
    assert list(library.parent.iterdir()) == []


def test_an_installed_package_named_kernels_is_not_hidden_by_the_folder(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = (
        f"import importlib.util as u, sys; sys.path = [{str(ROOT)!r}, {str(tmp_path)!r}, *sys.path]; "
        "print(u.find_spec('kernels').origin); print(u.find_spec('negmerge_fast.kernels.merge').origin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs, ours = done.stdout.splitlines()
    assert Path(theirs) == package / "__init__.py"
    assert Path(ours) == ROOT / "negmerge_fast" / "kernels" / "merge.py"


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tried() -> None:
    """make test CONSTRAINTS=.ci/lower-bounds.txt tries them."""
    project = (ROOT / "pyproject.toml").read_text()
    # The other libraries of make libraries are those of constraints.txt.
    project = re.sub(r"^libraries = \[.*?^\]", "", project, flags=re.MULTILINE | re.DOTALL)
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)', project))
    tried = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "lower-bounds.txt").read_text(), re.MULTILINE)
    )
    build, fuzz, lint = {"pybind11", "cmake", "ninja"}, {"atheris"}, {"ruff", "mypy", "import-linter"}
    docs = {"mkdocs", "mkdocs-material", "mkdocstrings-python"}
    libraries = {"mergekit"}  # make libraries tries the oldest version: constraints.txt names it
    pinned = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}=={allowed[name]};" in pinned for name in libraries)
    assert set(allowed) - set(tried) == build | fuzz | lint | docs | libraries
    for name, version in tried.items():
        assert f"{version}.".startswith(f"{allowed[name]}."), name
