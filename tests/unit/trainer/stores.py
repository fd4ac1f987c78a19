"""Stores on this machine for tests: Debian's registry over a folder, the S3 server of `dev/s3`, and servers that misbehave."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from tuneloop_trainer.contract import Manifest
from tuneloop_trainer.manifests import publish

ROOT = Path(__file__).parents[3]
ACCESS, SECRET = "tuneloop-test", "hidden-" + secrets.token_hex(8)
STARTING_SECONDS = 15


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_model(root: Path, text: str = "weights") -> tuple[Path, Manifest]:
    """A packaged model, small."""
    root.mkdir(parents=True, exist_ok=True)
    building, folder = root / "building", root / "model"
    building.mkdir()
    (building / "model.safetensors").write_bytes(text.encode() * 1000)
    (building / "config.json").write_text("{}")
    (building / "README.md").write_text("# tiny")
    metadata: dict[str, str | int | float | bool | None] = {"model": "tiny", "format": "Merged", "base_uri": "hf://org/tiny"}
    return folder, publish(building, folder, "model", metadata)


def write_secret(folder: Path, **keys: str) -> str:
    """As Kubernetes mounts a Secret: one file for each key."""
    folder.mkdir(parents=True)
    for name, value in keys.items():
        (folder / name).write_text(value)
    return str(folder)


# --- real servers -------------------------------------------------------------


@contextmanager
def served(command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A program until the block ends; it is waited for until it takes connections."""
    process = subprocess.Popen(command, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} did not start") from None
                threading.Event().wait(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def registry(folder: Path, password_file: Path | None = None) -> Iterator[str]:
    """The address of a real OCI registry."""
    port = free_port()
    lines = ["version: 0.1", f"storage: {{filesystem: {{rootdirectory: {folder}}}}}", f"http: {{addr: '127.0.0.1:{port}'}}"]
    lines.append("log: {level: error, accesslog: {disabled: true}}")
    if password_file is not None:
        lines.append(f"auth: {{htpasswd: {{realm: test, path: {password_file}}}}}")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("\n".join(lines))
    with served(["docker-registry", "serve", str(folder / "config.yaml")], port, {"OTEL_TRACES_EXPORTER": "none"}):
        yield f"127.0.0.1:{port}"


def has_registry() -> bool:
    return shutil.which("docker-registry") is not None


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """The endpoint of a real S3 server with the bucket `models`."""
    (folder / "models").mkdir(parents=True)
    port = free_port()
    with served([str(ROOT / "dev" / "s3"), "serve", str(folder), str(port)], port, {"ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET}):
        yield f"http://127.0.0.1:{port}"


def has_s3() -> bool:
    """Whether the server was built: `dev/s3 install`."""
    return subprocess.run([str(ROOT / "dev" / "s3"), "built"], check=False, capture_output=True).returncode == 0


# --- servers that misbehave ---------------------------------------------------


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Address of a server on this machine, for the time of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(status: int | None) -> Iterator[tuple[str, list[str]]]:
    """Address and log of a server that gives every request this status; None: it takes the request and says nothing."""
    asked: list[str] = []
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle_anything(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if status is None:
                done.wait(20)
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_POST = do_HEAD = handle_anything

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    with listening(Handler) as address:
        try:
            yield address, asked
        finally:
            done.set()


class FakeBucket:
    """An S3 of one bucket `data`, whose every answer a test can change."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.truncated_at: int | None = None
        """Bytes of a body after which the connection is closed."""
        self.ends_at: int | None = None
        """Bytes of an object after which its pieces are empty, each whole by its own account."""
        self.grows: bytes = b""
        """Appended to an object once a piece of it was read."""
        self.failures: list[int] = []
        """Statuses of the next answers."""
        self.asked: list[str] = []
        self.address = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        self.asked.append(f"{handler.command} {path}")
        key = path.removeprefix("/data").strip("/")
        if self.failures:
            self._send(handler, self.failures.pop(0))
        elif "list-type=2" in query:
            self._list(handler, parse_qs(query).get("prefix", [""])[0])
        elif key not in self.objects:
            self._send(handler, 404)
        else:
            self._object(handler, key)

    def _object(self, handler: BaseHTTPRequestHandler, key: str) -> None:
        content = self.objects[key]
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": "Sun, 01 Mar 2026 12:00:00 GMT"}
        asked = handler.headers.get("Range")
        if asked is None:
            self._send(handler, 200, content, headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        piece = content[: self.ends_at][int(first) : int(last) + 1]
        self._send(handler, 206, piece, headers | {"Content-Range": f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}"})
        if self.grows:
            self.objects[key] += self.grows

    def _list(self, handler: BaseHTTPRequestHandler, prefix: str) -> None:
        found = {key: len(content) for key, content in self.objects.items() if key.startswith(prefix) and "/" not in key[len(prefix) :]}
        entries = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in found.items())
        body = f'<?xml version="1.0"?><ListBucketResult><KeyCount>{len(found)}</KeyCount>{entries}</ListBucketResult>'
        self._send(handler, 200, body.encode())

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if self.truncated_at is not None and len(body) > self.truncated_at:
            handler.wfile.write(body[: self.truncated_at])
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.wfile.write(body)


@contextmanager
def fake_bucket() -> Iterator[FakeBucket]:
    bucket = FakeBucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            bucket.answer(self)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    with listening(Handler) as address:
        bucket.address = f"http://{address}"
        yield bucket
