"""A model hub on this machine: one repository, whose every answer a test can change."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/tiny"


class Hub:
    """Serves the files of a folder as `org/tiny`; `main` is at `commit`."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.commit = COMMIT
        self.failures: list[int] = []
        """Statuses of the next answers; 0 closes the connection without one."""
        self.asked: list[str] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        self.asked.append(f"{handler.command} {path}")
        if self.failures:
            self._fail(handler, self.failures.pop(0))
        elif path == f"/api/models/{REPOSITORY}" or path in self._revisions():
            siblings = [{"rfilename": name} for name in sorted(self.files)]
            self._send(handler, json.dumps({"id": REPOSITORY, "sha": self.commit, "siblings": siblings}).encode())
        elif path.startswith(f"/{REPOSITORY}/resolve/{self.commit}/"):
            self._send(handler, self.files[path.rsplit("/", 1)[1]])
        else:
            self._fail(handler, 404)

    def _revisions(self) -> tuple[str, ...]:
        return tuple(f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", self.commit))

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        handler.send_header("X-Repo-Commit", self.commit)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    def _fail(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        if status == 0:
            handler.close_connection = True
            handler.connection.close()
            return
        codes = {404: "RepoNotFound", 403: "GatedRepo"}
        handler.send_response(status)
        if status in codes:
            handler.send_header("X-Error-Code", codes[status])
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
