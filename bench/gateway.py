"""What the gateway adds to a request: `python -m bench.gateway` (or `make bench-gateway`).

A null engine answers at once. An open-loop client sends 1 KiB requests at a fixed mean rate (Poisson arrivals) over 64
connections; a latency counts from when a request was due, so that waiting is not hidden. Rounds direct to the engine and
through the gateway alternate. The gateway has core 0 to itself, with capture (redacting, into SQLite) and drift detection on,
the latter looking at every request, which is more than any deployment does. Then: the highest rate at which nothing is shed,
and how much later the first byte of a stream comes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from bench.null_engine import STREAM_EVENTS

GATEWAY_CORE, CLIENT_CORE = 0, 1
CONNECTIONS = 64
BODY_BYTES = 1024
STREAM_RATE = 50.0
PATH = "/v1/chat/completions"
KEY = "bench-engine-key"


# --- load ------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it; as little of HTTP as the two servers speak."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.due, self.first_byte, self.buffer = pool, 0.0, 0.0, b""
        self.streamed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP transport
        self.pool.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.pool.broken(self)

    def send(self, request: bytes, due: float, *, stream: bool) -> None:
        self.due, self.first_byte, self.buffer, self.streamed = due, 0.0, b"", stream
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        if self.streamed:
            if not self.first_byte and b"data:" in self.buffer[end:]:
                self.first_byte = time.perf_counter()
            if not self.buffer.endswith(b"0\r\n\r\n"):
                return
        else:
            head = self.buffer[:end].lower()
            at = head.index(b"content-length:") + 15
            if len(self.buffer) < end + 4 + int(head[at : head.find(b"\r\n", at) if b"\r\n" in head[at:] else len(head)]):
                return
        self.pool.answered(self, int(self.buffer[9:12]))


class Pool:
    """The connections to one server, and what came back."""

    def __init__(self, port: int) -> None:
        self.port, self.idle = port, list[Connection]()
        self.waiting: list[tuple[bytes, float, bool]] = []
        self.latencies: list[float] = []
        self.first_bytes: list[float] = []
        self.failed = 0
        self.most_waiting = 0
        self._closing = False

    async def open(self, connections: int = CONNECTIONS) -> Pool:
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port)
        return self

    def close(self) -> None:
        self._closing = True
        for connection in self.idle:
            connection.transport.close()

    def submit(self, request: bytes, due: float, *, stream: bool) -> None:
        if self.idle:
            self.idle.pop().send(request, due, stream=stream)
        else:
            self.waiting.append((request, due, stream))
            self.most_waiting = max(self.most_waiting, len(self.waiting))

    def answered(self, connection: Connection, status: int) -> None:
        now = time.perf_counter()
        self.latencies.append(now - connection.due)
        if connection.first_byte:
            self.first_bytes.append(connection.first_byte - connection.due)
        self.failed += status != 200
        if self.waiting:
            request, due, stream = self.waiting.pop(0)
            connection.send(request, due, stream=stream)
        else:
            self.idle.append(connection)

    def broken(self, connection: Connection) -> None:
        if self._closing:
            return
        self.failed += 1
        self.idle = [c for c in self.idle if c is not connection]


def _vocabulary() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(4000)]


WORDS = _vocabulary()


def make_requests(rng: random.Random, rate: float, seconds: float, *, stream: bool = False) -> list[bytes]:
    """Whole HTTP requests, enough for a round; bodies of exactly BODY_BYTES, no text twice."""
    requests = []
    for _ in range(int(rate * seconds * 1.1) + 100):
        body: dict[str, Any] = {"model": "bench", "messages": [{"role": "user", "content": ""}], "max_tokens": 16}
        if stream:
            body["stream"] = True
        room = BODY_BYTES - len(json.dumps(body))
        body["messages"][0]["content"] = " ".join(rng.choices(WORDS, k=room // 3))[:room]
        raw = json.dumps(body).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        requests.append(head.encode() + raw)
    return requests


async def offer(port: int, rate: float, seconds: float, requests: Sequence[bytes], rng: random.Random, *, stream: bool = False) -> Pool:
    """An open loop of `rate` requests a second; returns when all were answered, or 10 s after the last was due."""
    pool = await Pool(port).open()
    gc.collect()
    gc.disable()
    try:
        due = time.perf_counter() + 0.05
        sent, end = 0, due + seconds
        while due < end:
            pause = due - time.perf_counter()
            if pause > 0:
                await asyncio.sleep(pause)
            pool.submit(requests[sent % len(requests)], due, stream=stream)  # there are more than needed, but for rare chance
            sent += 1
            due += rng.expovariate(rate)
        give_up = time.perf_counter() + 10
        while len(pool.latencies) + pool.failed < sent and time.perf_counter() < give_up:  # noqa: ASYNC110 - a poll disturbs less
            await asyncio.sleep(0.01)
        pool.failed += max(0, sent - len(pool.latencies) - pool.failed)
    finally:
        gc.enable()
        pool.close()
    return pool


def percentile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


# --- servers ---------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def server(command: Sequence[str], core: int | None, environment: dict[str, str], ready_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process on one core, until the block ends."""

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    process = subprocess.Popen(command, env=environment, preexec_fn=pin)
    try:
        deadline = time.monotonic() + 60
        while not _answers(ready_url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[-1]} did not start.")
            time.sleep(0.1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def gateway_environment(folder: Path, engine_port: int, port: int, internal_port: int, **more: Any) -> dict[str, str]:
    """Configuration (with `more` fields) and secrets in a folder, and the variables that point there."""
    revision = {"name": "r1", "version": 1, "service": "svc", "modelId": "bench", "state": "Stable", "weight": 100}
    prompt = {"system": "You are terse.", "template": "{{ text }}", "temperature": 0}
    drift = {"size": 2000, "horizonDays": 1e-9, "mixOverSeconds": 0, "falseAlarmEveryRequests": 100_000}
    config = {
        "generation": 1, "namespace": "bench", "deployment": "bench", "model": "bench",
        "revisions": [{**revision, "prompt": prompt}], "drift": drift, **more,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "secrets").mkdir()
    for name in ("engine-key", "internal-token", "feedback-key"):
        (folder / "secrets" / name).write_text(KEY)
    values = {
        "CONFIG": folder / "config.json", "SECRETS": folder / "secrets", "KEYS": folder / "keys", "DATA": folder, "HOST": "127.0.0.1",
        "DATABASE_URL_FILE": folder / "url",
        "PUBLIC_PORT": port, "INTERNAL_PORT": internal_port, "DRAIN_DELAY_SECONDS": 0,
        "ENDPOINTS": json.dumps({"svc": [f"127.0.0.1:{engine_port}"]}),
    }  # fmt: skip
    return {**os.environ, **{f"TUNELOOP_GATEWAY_{name}": str(value) for name, value in values.items()}}


def read_state(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/internal/state", timeout=5) as response:
        state: dict[str, Any] = json.load(response)
    return state


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- measurements ----------------------------------------------------------------


async def added_latency(
    ports: tuple[int, int], rate: float, seconds: float, rounds: int, rng: random.Random
) -> tuple[list[Pool], list[Pool]]:
    """Alternating rounds to the engine and through the gateway."""
    direct, through = list[Pool](), list[Pool]()
    for number in range(rounds):
        for pools, port in ((direct, ports[0]), (through, ports[1])):
            requests = make_requests(rng, rate, seconds)
            pool = await offer(port, rate, seconds, requests, rng)
            pools.append(pool)
            name = "direct " if port == ports[0] else "gateway"
            print(
                f"round {number + 1} {name}: {len(pool.latencies)} answers, {pool.failed} failed, "
                f"p50 {percentile(pool.latencies, 0.5):.2f} ms, p99 {percentile(pool.latencies, 0.99):.2f} ms", flush=True
            )  # fmt: skip
    return direct, through


async def highest_rate(port: int, seconds: float, rng: random.Random, start: float) -> float:
    """Steps of 25 % until a request is shed, fails, or the answers fall behind the requests."""
    rate, best = start, 0.0
    while rate < 20_000:
        requests = make_requests(rng, rate, seconds)
        pool = await offer(port, rate, seconds, requests, rng)
        late = percentile(pool.latencies, 0.99)
        print(f"{rate:6.0f} requests/s: {pool.failed} shed or failed, p99 {late:.1f} ms, most waiting {pool.most_waiting}", flush=True)
        if pool.failed or late > 1000:
            break
        best, rate = rate, rate * 1.25
    return best


async def first_bytes(ports: tuple[int, int], seconds: float, rounds: int, rng: random.Random) -> tuple[list[float], list[float]]:
    """Times to the first event of streams that the engine spreads over some 100 ms."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for found, port in zip(times, ports, strict=True):
            requests = make_requests(rng, STREAM_RATE, seconds, stream=True)
            pool = await offer(port, STREAM_RATE, seconds, requests, rng, stream=True)
            if pool.failed:
                print(f"{pool.failed} streams failed", file=sys.stderr)
            found.extend(pool.first_bytes)
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    pinned = len(cores) >= 2
    if pinned:
        os.sched_setaffinity(0, {cores[CLIENT_CORE]})
    else:
        print("Only one core: gateway and client disturb each other.", file=sys.stderr)
    engine_port, port, internal_port = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as name, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        environment = gateway_environment(Path(name), engine_port, port, internal_port)
        engine = (sys.executable, "-m", "bench.null_engine", str(engine_port))
        gateway = (sys.executable, "-m", "tuneloop_gateway")
        with (
            server(engine, cores[CLIENT_CORE] if pinned else None, dict(os.environ), f"http://127.0.0.1:{engine_port}/health"),
            server(gateway, cores[GATEWAY_CORE] if pinned else None, environment, f"http://127.0.0.1:{port}/readyz") as process,
        ):
            result = measure(runner, (engine_port, port), internal_port, process.pid, options)
    print(json.dumps(result))
    return 0


def measure(runner: asyncio.Runner, ports: tuple[int, int], internal_port: int, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, against servers that run."""
    rng = random.Random(options.seed)
    runner.run(added_latency(ports, options.rate, 1, 1, rng))  # warm-up
    before = cpu_seconds(pid)
    direct, through = runner.run(added_latency(ports, options.rate, options.seconds, options.rounds, rng))
    requests = sum(len(pool.latencies) for pool in through)
    spent = (cpu_seconds(pid) - before) / max(requests, 1)
    state = read_state(internal_port)
    latencies = [[latency for pool in pools for latency in pool.latencies] for pools in (direct, through)]
    added = {q: percentile(latencies[1], q) - percentile(latencies[0], q) for q in (0.5, 0.99)}
    streams = runner.run(first_bytes(ports, min(options.seconds, 10), min(options.rounds, 2), rng))
    rate = runner.run(highest_rate(ports[1], min(options.seconds, 5), rng, options.rate))
    return {
        "added_p50_ms": round(added[0.5], 3),
        "added_p99_ms": round(added[0.99], 3),
        "requests_per_second": round(rate),
        "first_byte_delay_p99_ms": round(percentile(streams[1], 0.99) - percentile(streams[0], 0.99), 3),
        "first_byte_delay_p50_ms": round(percentile(streams[1], 0.5) - percentile(streams[0], 0.5), 3),
        "direct_p50_ms": round(percentile(latencies[0], 0.5), 3),
        "direct_p99_ms": round(percentile(latencies[0], 0.99), 3),
        "failed": sum(pool.failed for pool in (*direct, *through)),
        "cpu_ms_per_request": round(1000 * spent, 3),
        "captured": state["capture"]["captured"],
        "capture_dropped": state["capture"]["dropped"],
        "drift": (state["drift"] or {}).get("status"),
        "stream_events": STREAM_EVENTS,
    }


if __name__ == "__main__":
    sys.exit(main())
