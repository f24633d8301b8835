"""A report in a headless browser, if one is installed: no errors, no requests, and colours that differ."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from report_models import save_llama

from negmerge_fast.reports import api
from negmerge_fast.reports.findings import Point
from negmerge_fast.reports.statistics import consensus_statistics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here"),
]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    base, *models = save_llama(tmp_path)
    files = api.render(consensus_statistics(base, models), [Point(0, 0.9, 1), Point(1, 0.1, 0.97)])
    return api.publish(files, tmp_path / "report").parent


@pytest.fixture
def served(report: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the report, and what was requested."""
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            requested.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=report))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/index.html", requested
    server.shutdown()
    thread.join()
    server.server_close()


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER
    return subprocess.run(
        [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--disable-background-networking", "--no-first-run", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=2000", *arguments,
        ],
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page's console got: what is forbidden by its policy, and every error."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_page_opens_without_errors_and_requests(served: tuple[str, list[str]], tmp_path: Path) -> None:
    """Its policy forbids all requests, and the console would tell of one that was tried."""
    address, requested = served
    done = browse(tmp_path, "--dump-dom", address)
    assert "What each model removes" in done.stdout
    assert console(done) == []
    assert requested == ["/index.html"]


def test_a_request_would_be_seen(served: tuple[str, list[str]], report: Path, tmp_path: Path) -> None:
    """The test above can fail: the same page, with a picture of elsewhere and one of this folder."""
    page = report / "index.html"
    html = page.read_text()
    page.write_text(
        html.replace("</main>", '<img src="https://example.org/x.png"><img src="layers.png"></main>')
    )
    address, _ = served
    assert len(console(browse(tmp_path, "--dump-dom", address))) >= 2
    policy = html[html.index("<meta http-equiv") : html.index('<link rel="icon"')]
    page.write_text(page.read_text().replace(policy, "").replace("https://example.org", ""))
    again = tmp_path / "again"  # with a profile of its own: the first page would be taken from the cache
    again.mkdir()
    browse(again, "--dump-dom", address)
    assert "/layers.png" in served[1]


def test_light_dark_and_print_differ(report: Path, tmp_path: Path) -> None:
    address = (report / "index.html").as_uri()
    backgrounds = []
    for name, scheme in (("light", 1), ("dark", 0)):
        path = tmp_path / f"{name}.png"
        done = browse(
            tmp_path, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,1500", f"--screenshot={path}", address
        )  # fmt: skip
        assert console(done) == []
        with Image.open(path) as image:
            backgrounds.append(image.convert("L").getpixel((5, 5)))
    assert backgrounds[0] > 230 and backgrounds[1] < 40
    done = browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", address)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert console(done) == []
