"""A hub on this machine: one repository, of a model or a data set, whose every answer a test can change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tests.unit.trainer.stores import listening

from tuneloop_trainer import hub as hub_client

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/tiny"


class Hub:
    """Serves the files of a folder as `org/tiny`; `main` is at `commit`."""

    def __init__(self, folder: Path, kind: str = "models") -> None:
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.changed: dict[str, bytes] = {}
        """What is sent instead of a file, which its description does not tell."""
        self.kind = kind
        self.tokens: set[str | None] = set()
        """Of the `Authorization` headers that came."""
        self.gated_by: str | None = None
        """The one token that opens the repository; None: it is open to all."""
        self.commit = COMMIT
        self.failures: list[int] = []
        """Statuses of the next answers; 0 closes the connection without one."""
        self.asked: list[str] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        self.asked.append(f"{handler.command} {path}")
        self.tokens.add(handler.headers.get("Authorization"))
        root = "" if self.kind == "models" else "/datasets"
        if self.failures:
            self._fail(handler, self.failures.pop(0))
        elif self.gated_by is not None and handler.headers.get("Authorization") != f"Bearer {self.gated_by}":
            self._fail(handler, 403 if handler.headers.get("Authorization") else 401)
        elif path == f"/api/{self.kind}/{REPOSITORY}" or path in self._revisions():
            siblings = [self._sibling(name) for name in sorted(self.files)]
            self._send(handler, json.dumps({"id": REPOSITORY, "sha": self.commit, "siblings": siblings}).encode())
        elif path.startswith(tuple(f"{root}/{REPOSITORY}/resolve/{name}/" for name in ("main", self.commit))):
            name = unquote(path.partition("/resolve/")[2].partition("/")[2])
            self._send(handler, self.changed.get(name, self.files[name]))
        else:
            self._fail(handler, 404)

    def _revisions(self) -> tuple[str, ...]:
        return tuple(f"/api/{self.kind}/{REPOSITORY}/revision/{name}" for name in ("main", self.commit))

    def _sibling(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        about: dict[str, Any] = {"rfilename": name, "size": len(content)}
        if name.endswith(".parquet"):
            about["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return about | {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

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
        codes = {404: "RepoNotFound", 403: "GatedRepo"} | ({401: "GatedRepo"} if self.gated_by is not None else {})
        handler.send_response(status)
        if status in codes:
            handler.send_header("X-Error-Code", codes[status])
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@contextmanager
def serving(folder: Path, kind: str = "models") -> Iterator[Hub]:
    hub = Hub(folder, kind)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    with listening(Handler) as address:
        hub.url = f"http://{address}"
        yield hub


@contextmanager
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str = "models") -> Iterator[Hub]:
    """The hub that the client in this process asks, without waiting between attempts."""
    monkeypatch.setattr(hub_client, "DELAYS", (0.0, 0.0))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between attempts of its own
    with serving(folder, kind) as served:
        # Both are made of HF_ENDPOINT when the client is imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield served
