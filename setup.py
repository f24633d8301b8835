"""What pyproject.toml cannot say: which folders are packages, and how the compiled part is built.

CMake builds negmerge_fast._native out of csrc/. A machine that lacks what it takes gets the package without it, or
without its CUDA kernel; why is written beside the library, where negmerge_fast/backends/native.py reads it.

The environment variable NEGMERGE_CUDA says whether the CUDA kernel is compiled: 0 no, 1 yes or fail; if it is not set,
where it can be. An editable install compiles it for the GPUs of this machine, a wheel for all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path
from subprocess import PIPE, STDOUT

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().with_name("csrc")

# Where NVIDIA's installers put CUDA.
CUDA = "/usr/local/cuda"


class NotBuilt(Exception):
    """Why the library, or one with CUDA, was not built: one line."""


def cuda_wanted(value: str | None) -> bool | None:
    """What NEGMERGE_CUDA says; None: if it can be had."""
    if value not in (None, "0", "1"):
        raise SystemExit(f"NEGMERGE_CUDA={value}: expected 0, 1 or not set")
    return None if value is None else value == "1"


def architectures(listed: str, gpus_here: list[int] | None = None) -> list[int]:
    """The GPU architectures to compile for, of those that `nvcc --list-gpu-arch` lists in no order.

    gpus_here: this machine's, for a build that stays on it; None for a wheel. A wheel gets the lowest of each major version:
    its code runs on the others of that version. A build that stays gets those of its GPUs; without a GPU the oldest of the
    wheel's, since each takes nvcc as long again (11 s). Other GPUs, newer ones among them, compile the intermediate code that
    comes along for each when they first use it, which takes 7 to 10 s.
    """
    known = {int(number) for number in re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)}
    known = {number for number in known if number >= 80}  # what the kernel needs
    if not known:
        raise NotBuilt("nvcc lists no GPU architectures from 80 on, expected CUDA 12 or 13")
    lowest = {number // 10: number for number in sorted(known, reverse=True)}
    if gpus_here is None:
        return sorted(lowest.values())
    oldest = min(known)
    found = {max(k for k in known if oldest <= k <= gpu) for gpu in gpus_here if gpu >= oldest}
    return sorted(found) or [oldest]


def installed_gpus() -> list[int]:
    """The compute capabilities of this machine's NVIDIA GPUs, 90 for 9.0; empty where nvidia-smi finds none."""
    try:
        printed = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except NotBuilt:
        return []
    return sorted(
        {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", printed, re.MULTILINE)}
    )


def first_error(output: str) -> str | None:
    """What a compiler or, if none has anything to say, CMake complained of first, as one line."""
    compiler = re.search(r"^.*(?:\berror|\bfatal\s*): .*$", output, re.MULTILINE)
    cmake = re.search(r"^CMake Error.*\n((?:  .*\n|\n)+)", output, re.MULTILINE)
    found = compiler[0] if compiler else cmake[1] if cmake else ""
    return textwrap.shorten(found, 200, placeholder=" ...") or None


def run(*command: str | Path) -> str:
    """Runs a program; returns and prints what it printed."""
    environment = {**os.environ, "LC_ALL": "C"}  # first_error reads English
    try:
        done = subprocess.run(
            command, env=environment, text=True, errors="backslashreplace", stdout=PIPE, stderr=STDOUT
        )
    except OSError as error:
        raise NotBuilt(f"{command[0]}: {error.strerror}") from None
    print(done.stdout, flush=True)
    if done.returncode:
        raise NotBuilt(first_error(done.stdout) or f"{command[0]} ended with exit status {done.returncode}")
    return done.stdout


def program(*names: str) -> str:
    """The first of these programs that is on PATH or beside this Python."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    raise NotBuilt(f"no {' or '.join(names)} on PATH")


def cuda_compiler() -> str:
    """What CUDACXX names, or the nvcc of CUDA_HOME, of CUDA_PATH or of PATH, in the order of torch's own builds.

    Where neither CUDA_HOME nor CUDA_PATH is set, not even to nothing, also that of /usr/local/cuda.
    """
    if named := os.environ.get("CUDACXX"):
        return named
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [
        *(f"{home}/bin" for home in homes if home),
        os.environ.get("PATH", os.defpath),
        *([] if homes else [f"{CUDA}/bin"]),
    ]
    if found := shutil.which("nvcc", path=os.pathsep.join(folders)):
        return found
    raise NotBuilt(
        f"no nvcc in CUDA_HOME or CUDA_PATH, {'or on PATH' if homes else f'on PATH or in {CUDA}/bin'}"
    )


def build(library: Path, cuda: bool, stays_here: bool) -> list[int]:
    """Builds the library, and returns the GPU architectures that it has code for."""
    options = {}
    gpus = []
    if cuda:
        nvcc = cuda_compiler()
        gpus = architectures(run(nvcc, "--list-gpu-arch"), installed_gpus() if stays_here else None)
        options = {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": ";".join(map(str, gpus))}
        # NVIDIA's packages for pip have lib/, where their nvcc looks for lib64/.
        libraries = Path(shutil.which(nvcc) or nvcc).parents[1] / "lib"
        if (libraries / "libcudart_static.a").exists():
            options["CMAKE_CUDA_FLAGS"] = f"-L{libraries}"
    if "CXX" not in os.environ:
        program("c++", "g++", "clang++")  # CMake would say less clearly that there is none
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 is not installed") from None
    cmake = program("cmake")
    options |= {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(library.parent),
        "CMAKE_MAKE_PROGRAM": program("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    # Always a new folder: CMake would keep to the compilers and programs of an earlier build, which may be gone.
    with tempfile.TemporaryDirectory() as folder:
        run(
            cmake, "-S", CSRC, "-B", folder, "-G", "Ninja", *(f"-D{name}={options[name]}" for name in options)
        )
        run(cmake, "--build", folder)
    return gpus


def build_what_can_be(library: Path, stays_here: bool) -> dict[str, object]:
    """Builds with CUDA, without, or not at all; returns what negmerge_fast/backends/native.py says of it.

    stays_here: whether only this machine will use the library.
    """
    wanted = cuda_wanted(os.environ.get("NEGMERGE_CUDA"))
    no_cuda = "left out by NEGMERGE_CUDA=0"
    if wanted is not False:
        try:
            return {"cpu": None, "cuda": None, "cuda_architectures": build(library, True, stays_here)}
        except NotBuilt as error:
            no_cuda = str(error)
    if wanted:
        raise SystemExit(f"NEGMERGE_CUDA=1, but the CUDA kernel cannot be compiled: {no_cuda}")
    try:
        return {"cpu": None, "cuda": no_cuda, "cuda_architectures": build(library, False, stays_here)}
    except NotBuilt as error:
        return {"cpu": str(error), "cuda": str(error), "cuda_architectures": []}


class BuildNative(build_ext):
    """setuptools says where the library goes: into the wheel or, for an editable install, into the source."""

    def run(self) -> None:
        library, info = self.files()
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        info.unlink(missing_ok=True)
        built = build_what_can_be(library, stays_here=self.editable_mode)
        info.write_text(json.dumps(built, indent=2) + "\n")
        print(f"negmerge_fast._native: {json.dumps(built)}", flush=True)

    def files(self) -> list[Path]:
        """The library, and what is said of it."""
        library = Path(self.get_ext_fullpath("negmerge_fast._native")).absolute()
        return [library, library.with_suffix(".json")]

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable install that links to each file on its own: what a wheel would have where, and where it is."""
        built = Path(self.build_lib, "negmerge_fast")
        return {str(built / file.name): str(file) for file in self.files() if file.exists()}


if __name__ == "__main__":
    setup(
        # negmerge_fast/kernels is a link to kernels/. That folder has no __init__.py: in a checkout it would hide the
        # package `kernels` of Hugging Face.
        packages=[*find_packages(include=["negmerge_fast", "negmerge_fast.*"]), "negmerge_fast.kernels"],
        package_data={"negmerge_fast": ["py.typed"], "negmerge_fast.reports": ["page.html"]},
        # With or without a library in it, the wheel is for one Python on one kind of machine: what it says of its build is.
        ext_modules=[Extension("negmerge_fast._native", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
