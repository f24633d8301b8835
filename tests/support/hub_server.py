"""A hub of models on this machine, as huggingface_hub talks to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A server of models at one revision each.

    Attributes:
        models: The folder of each, by name.
        asked: The names of the files that were fetched.
        status: What it answers to everything, if not None.
    """

    daemon_threads = True

    def __init__(self, models: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.asked, self.status = models, [], None

    models: dict[str, Path]
    asked: list[str]
    status: int | None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        found = self._found(path.removeprefix("api/models/"), path.startswith("api/"))
        if self.server.status or found is None:
            missing = "RevisionNotFound" if "nowhere" in path else "RepoNotFound"
            self._send(self.server.status or 404, b"{}", {"X-Error-Code": missing})
        elif isinstance(found, Path):
            content = found.read_bytes()
            if self.command == "GET":
                self.server.asked.append(found.name)
            self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(content)}"'})
        else:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _found(self, path: str, api: bool) -> object:
        for name, folder in self.server.models.items():
            if not path.startswith(f"{name}/"):
                continue
            kind, revision, *rest = path.removeprefix(f"{name}/").split("/", 2)
            if revision not in ("main", COMMIT):
                return None
            if not api:
                return folder / rest[0]
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if kind == "tree":
                return [
                    {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size,
                     "oid": _digest(file.read_bytes())}
                    for file in files
                ]  # fmt: skip
            names = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return {
                "id": name,
                "sha": COMMIT,
                "siblings": names,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
        return None

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def serving(models: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(models)
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
