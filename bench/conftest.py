"""The suite as a plug-in of pytest-benchmark: options, timing of cases, rows, progress and tables."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SIZES, Case, Size, cases

from negmerge_fast.benchmark import append, table
from negmerge_fast.benchmark.candidates import (
    PUBLIC,
    Refused,
    candidate,
    check,
    failure,
    min_rounds,
    without_compilation,
)  # fmt: skip
from negmerge_fast.benchmark.records import line, on_gpu
from negmerge_fast.benchmark.timers import clock, wall
from negmerge_fast.benchmark.timing import Timing, timing_of
from negmerge_fast.benchmark.workload import Lacking, release, shared_workload
from negmerge_fast.core.errors import first_line

ORDER = ["test_limits", "test_memory", "test_layouts", "test_files"]
RESULTS = Path(__file__).parent / "results" / "suite.jsonl"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--all", action="store_true", help="measure all cases, not only the usual ones")
    group.addoption(
        "--size", choices=list(SIZES), default="usual", help="tiny: to test the suite, not the machine"
    )
    group.addoption("--results", metavar="FILE", help="where rows are appended (bench/results/suite.jsonl)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--size") == "tiny" and not config.getoption("--results"):
        raise pytest.UsageError("--size tiny: its rows are no measurements, give them a --results FILE")
    if os.environ.get("NEGMERGE_AUTOTUNE"):
        raise pytest.UsageError(
            "NEGMERGE_AUTOTUNE is set: launch parameters would not be those of other users"
        )
    if not config.option.collectonly:
        results = Path(config.getoption("--results") or RESULTS)
        if not os.access(results if results.exists() else results.absolute().parent, os.W_OK):
            raise pytest.UsageError(f"{results}: cannot be written")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")  # after a wrong result
    config.pluginmanager.register(Suite(config), "negmerge-suite")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite, config = Path(metafunc.module.__file__).stem.removeprefix("test_"), metafunc.config
    params = []
    for case in cases(suite, SIZES[config.getoption("--size")]):
        if case.usual or config.getoption("--all"):
            timer = (
                wall(case.device) if case.candidate == PUBLIC or case.suite == "files" else clock(case.device)
            )
            marks = [pytest.mark.benchmark(timer=timer, disable_gc=True), *_not_measured(case, config)]
            params.append(pytest.param(case, id=str(case), marks=marks))
    metafunc.parametrize("case", params)


def _not_measured(case: Case, config: pytest.Config) -> Iterator[pytest.MarkDecorator]:
    has_gpu = torch.cuda.is_available()
    if on_gpu(case.device):
        yield pytest.mark.gpu
        if not has_gpu:
            yield pytest.mark.skip(reason=no_gpu())
    elif has_gpu and (case.baseline or case.suite == "layouts") and not config.getoption("--all"):
        yield pytest.mark.skip(reason="the CPU's baselines and layouts, beside a GPU (--all times them)")


@cache
def no_gpu() -> str:
    """Why torch uses no GPU, and what it wants of a driver."""
    if torch.version.cuda is None:
        return "no CUDA device: this torch is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0]
        return f"no CUDA device: {reason}; this torch wants a driver for CUDA {torch.version.cuda} or newer"
    return "no CUDA device"


@pytest.fixture(scope="session")
def build() -> Path:
    """The build folder of the checkout, which is on a disk. Temporary directories may be in memory."""
    folder = Path(__file__).parents[1] / "build"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def size(pytestconfig: pytest.Config) -> Size:
    return SIZES[pytestconfig.getoption("--size")]


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Path:
    """The file that rows are appended to."""
    return Path(pytestconfig.getoption("--results") or RESULTS)


Time = Callable[..., None]


@pytest.fixture
def time(benchmark: Any, size: Size, results: Path, record_property: Any) -> Iterator[Time]:
    """Measure a Timing with pytest-benchmark and append its row. min_rounds, taken: see Timing.rounds."""
    if not benchmark.enabled:
        pytest.skip("benchmarks are disabled")

    def time(timing: Timing, min_rounds: int, copies: int = 1, taken: float = 0.0, **more: Any) -> None:
        rounds = timing.rounds(size.seconds, min_rounds, taken)
        benchmark.pedantic(timing.run, setup=timing.setup, rounds=rounds)
        row = timing.result(benchmark.stats.stats.data, copies, **more)
        benchmark.extra_info.update(row)
        append(results, [row])
        record_property("row", row)

    yield time


@pytest.fixture
def time_merge(time: Time, size: Size) -> Time:
    """Time the candidate of a case on its workload in memory, if its result is right."""

    def time_merge(case: Case) -> None:
        assert case.shapes is not None
        failed = None
        try:
            workload = shared_workload(case.layout, case.shapes, case.dtype, case.n, case.device, size.rotate)
            chosen = candidate(workload, case.candidate)
            differing, first_call = check(workload, chosen)
            timing = timing_of(workload, chosen, case.suite, as_called=case.candidate == PUBLIC)
            taken, found = (
                without_compilation(case.candidate, first_call),
                {"differing": differing, "first_call": first_call},
            )
            time(timing, min_rounds(case.candidate), workload.copies, taken, **found)
        except Lacking as error:
            failed = str(error)
        except Refused as error:
            pytest.fail(str(error), pytrace=False)
        except Exception as error:
            if not case.baseline:
                raise
            failed = f"{case.candidate} of {case.layout}, {case.dtype}, n = {case.n}: {failure(error)}"
        if failed is not None:  # here, where the exception no longer refers to the workload's memory
            gc.collect()
            pytest.skip(failed)

    return time_merge


@pytest.fixture(scope="module", autouse=True)
def free_workload() -> Iterator[None]:
    """Free the workload before and after each file of the suite."""
    release()
    gc.collect()
    yield
    release()


def pytest_benchmark_group_stats() -> list[Any]:
    """Turn off pytest-benchmark's own tables."""
    return []


class Suite:
    """Output of the suite: a line for each case, then tables, then a line for each reason why cases were not measured."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.results = config.getoption("--results") or RESULTS
        self.rows: list[dict[str, Any]] = []
        self.missing: Counter[str] = Counter()
        self.total = self.done = 0

    def write(self, text: str) -> None:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(text)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the files of the suite, rooflines first."""
        items.sort(key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else -1)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = sum(not item.get_closest_marker("skip") for item in session.items)

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        if isinstance(report, pytest.TestReport):
            return ("" if report.passed and report.when != "call" else report.outcome), "", ""
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        said = None
        if report.skipped and isinstance(report.longrepr, tuple):
            self.missing[report.longrepr[2].removeprefix("Skipped: ")] += 1
            self.done += report.when == "call"
        elif report.failed:
            said = f"FAILED {report.nodeid}"
            self.done += 1
        elif row := dict(report.user_properties).get("row"):
            self.rows.append(row)  # type: ignore[arg-type]
            said = line(row)  # type: ignore[arg-type]
            self.done += 1
        if said:
            self.write(f"[{self.done}/{self.total}] {said}")

    def pytest_terminal_summary(self) -> None:
        if self.rows:
            self.write("")
            self.write(table(self.rows))
            self.write(f"\n{len(self.rows)} rows appended to {self.results}")
        for reason, count in self.missing.items():
            self.write(f"not measured: {reason}: {count} case{'s' * (count > 1)}")
