"""Answers GET /progress, /metrics and /healthz from the launcher while the worker is busy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tuneloop_trainer import metrics
from tuneloop_trainer.contract import PROGRESS_LIMIT, Progress


class ProgressServer:
    """A small HTTP server in its own thread. `read` is asked for the newest progress at each request."""

    def __init__(self, port: int, read: Callable[[], Progress]) -> None:
        self._server = _Server(("", port), _handler(read))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16


def _handler(read: Callable[[], Progress]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "tuneloop"
        sys_version = ""
        timeout = 5

        def do_GET(self) -> None:
            path = self.path.split("?", 1)[0]
            if path == "/progress":
                self._answer(200, "application/json", read().model_dump_json(by_alias=True).encode()[:PROGRESS_LIMIT])
            elif path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4; charset=utf-8", metrics.render(read()))
            elif path == "/healthz":
                self._answer(200, "text/plain", b"ok\n")
            else:
                self._answer(404, "text/plain", b"not found\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Polled every few seconds: not worth a log line."""

    return Handler
