"""Who asks in `bench.load`: an open loop of requests to a Service, and what came back, counted phase by phase.

As behind kube-proxy, a new connection goes to any pod that is in the Service's endpoints at that moment, and stays with it. As with the
`openai` client, a connection that was idle for a few seconds is not used again. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.gateway import make_requests, percentile
from bench.null_engine import STREAM_EVENTS

LAST_CHUNK = b"0\r\n\r\n"


@dataclass
class Phase:
    """What became of the requests that were due in it."""

    sent: int = 0
    streamed: int = 0
    answered: int = 0
    failed: int = 0
    """No answer, or another one than 200."""
    truncated: int = 0
    """Ended like a whole answer and was none."""
    cut: int = 0
    """The connection broke within the answer, in this phase: its client knows."""
    reasons: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    def report(self) -> dict[str, object]:
        counts = {name: getattr(self, name) for name in ("sent", "streamed", "answered", "failed", "truncated", "cut")}
        return counts | {"p99_ms": round(percentile(self.latencies, 0.99), 1)} | ({"why": dict(self.reasons)} if self.reasons else {})


class Service:
    """The endpoints that a new connection may go to, the open connections, and the phase that a request counts for."""

    def __init__(self, rng: random.Random, idle_seconds: float) -> None:
        self.idle_seconds = idle_seconds
        self.ports: list[int] = []
        self.phases: dict[str, Phase] = {}
        self.phase = Phase()
        self.running = 0
        self._idle: list[Connection] = []
        self._rng = rng
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, name: str) -> Phase:
        self.phase = self.phases.setdefault(name, Phase())
        return self.phase

    def submit(self, request: bytes, due: float, *, stream: bool) -> None:
        self.phase.sent += 1
        self.phase.streamed += stream
        self.running += 1
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                connection.send(request, due, self.phase, stream=stream)
                return
            connection.transport.close()
        task = asyncio.create_task(self._connect(request, due, self.phase, stream=stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, request: bytes, due: float, phase: Phase, *, stream: bool) -> None:
        try:
            loop, port = asyncio.get_running_loop(), self._rng.choice(self.ports)
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", port)
        except (OSError, IndexError) as error:
            phase.failed += 1
            phase.reasons[f"no connection: {type(error).__name__}"] += 1
            self.running -= 1
        else:
            connection.send(request, due, phase, stream=stream)

    def free(self, connection: Connection) -> None:
        self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.transport.close()


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._phase: Phase | None = None
        self._due = self._used = 0.0
        self._buffer, self._streamed = bytearray(), False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP transport

    def is_usable(self) -> bool:
        return not self.transport.is_closing() and time.perf_counter() - self._used < self._service.idle_seconds

    def send(self, request: bytes, due: float, phase: Phase, *, stream: bool) -> None:
        self._phase, self._due, self._streamed = phase, due, stream
        self._buffer.clear()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._streamed and data.endswith(LAST_CHUNK):
            self._ended()
            return
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        at = self._buffer.lower().find(b"content-length:", 0, end)
        if at >= 0 and len(self._buffer) >= end + 4 + int(self._buffer[at + 15 : self._buffer.index(b"\r\n", at)]):
            self._ended()

    def _ended(self) -> None:
        phase, self._phase = self._phase, None
        if phase is None:
            return
        self._service.running -= 1
        self._used = time.perf_counter()
        head, _, body = bytes(self._buffer).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            phase.failed += 1
            phase.reasons[head[9:12].decode() + " " + body[:120].decode(errors="replace")] += 1
        elif is_whole(body, stream=self._streamed):
            phase.answered += 1
            phase.latencies.append(self._used - self._due)
        else:
            phase.truncated += 1
            phase.reasons["not whole: " + body[-120:].decode(errors="replace")] += 1
        if b"\r\nconnection: close" in head.lower():
            self.transport.close()
        else:
            self._service.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        phase, self._phase = self._phase, None
        if phase is None:
            return
        self._service.running -= 1
        if self._buffer:
            self._service.phase.cut += 1
        else:
            phase.failed += 1
            phase.reasons["connection closed without an answer"] += 1


def is_whole(body: bytes, *, stream: bool) -> bool:
    """All that the engine writes, to its last word."""
    if not stream:
        return bool(json.loads(body)["choices"][0]["finish_reason"] == "stop")
    said = body.count(b'"content"') == STREAM_EVENTS + 1 and body.count(b'"finish_reason": "stop"') == 1
    return said and b'"error"' not in body and b"data: [DONE]" in body


@dataclass
class Load:
    """Poisson arrivals at a rate, every second request streamed, until `stop`."""

    service: Service
    rate: float
    rng: random.Random
    sent: int = 0
    seconds: float = 0
    late: float = 0
    """By how much the latest request was sent after it was due: what this machine could not give."""
    stopped: bool = False

    async def run(self) -> None:
        whole, streamed = (make_requests(self.rng, min(self.rate, 1000), 2, stream=stream) for stream in (False, True))
        started = due = time.perf_counter()
        while not self.stopped:
            pause = due - time.perf_counter()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self.sent % 50 == 0:
                await asyncio.sleep(0)
            self.late = max(self.late, -pause)
            self._submit(streamed if self.sent % 2 else whole, due, stream=bool(self.sent % 2))
            due += self.rng.expovariate(self.rate)
        self.seconds = time.perf_counter() - started

    def _submit(self, requests: Sequence[bytes], due: float, *, stream: bool) -> None:
        self.service.submit(requests[self.sent // 2 % len(requests)], due, stream=stream)
        self.sent += 1

    async def finish(self, seconds: float = 60) -> None:
        """Waits for the last answers; what never came has failed."""
        deadline = time.perf_counter() + seconds
        while self.service.running and time.perf_counter() < deadline:  # noqa: ASYNC110 - a poll disturbs less
            await asyncio.sleep(0.02)
        if self.service.running:
            self.service.phase.failed += self.service.running
            self.service.phase.reasons["no answer at all"] += self.service.running
        self.service.close()
