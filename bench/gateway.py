"""What the gateway adds to a request, beside other proxies: `python -m bench.gateway` (or `make bench-gateway`).

A null engine answers at once. An open-loop client sends 1 KiB requests at a fixed mean rate (Poisson arrivals) over 64
connections; a latency counts from when a request was due, so that waiting is not hidden. Rounds direct to the engine, through the
gateway and through each of the others (`bench.proxies`) take turns; who is not asked stands still. The one that is asked has core 0
to itself, the gateway with capture (redacting, into SQLite) and drift detection on, the latter looking at every request, which is more
than any deployment does. Then: streams, how much later their first byte comes, and by how much the time between two events differs;
and the highest rate at which nothing is shed. With `--engine URL` an engine that runs takes the null engine's place, and the highest
rate is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop
from bench.null_engine import STREAM_EVENTS
from bench.proxies import PEERS, Proxy, available

GATEWAY_CORE, CLIENT_CORE = 0, 1
CONNECTIONS = 64
BODY_BYTES = 1024
STREAM_RATE = 50.0
LOWEST_RATE = 50.0
"""Where the search for a proxy's highest rate begins, in requests a second."""
PATH = "/v1/chat/completions"
KEY = f"sk-{secrets.token_hex(32)}"
"""For all of them; one of the others starts with no key that looks weak."""
MODEL = "bench"


# --- load ------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it; as little of HTTP as the two servers speak."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.due, self.buffer = pool, 0.0, b""
        self.streamed = False
        self.events: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]  # a TCP transport
        self.pool.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.pool.broken(self)

    def send(self, request: bytes, due: float, *, stream: bool) -> None:
        self.due, self.buffer, self.streamed, self.events = due, b"", stream, []
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        if self.streamed:
            self.events += [time.perf_counter()] * (self.buffer.count(b"data:", end) - len(self.events))
        head = self.buffer[:end].lower() + b"\r\n"
        at = head.find(b"content-length:")
        if at < 0:
            if not self.buffer.endswith(b"0\r\n\r\n"):
                return
        elif len(self.buffer) < end + 4 + int(head[at + 15 : head.find(b"\r\n", at)]):
            return
        self.pool.answered(self, int(self.buffer[9:12]))


class Pool:
    """The connections to one server, and what came back."""

    def __init__(self, port: int) -> None:
        self.port, self.idle = port, deque[Connection]()
        self.waiting: list[tuple[bytes, float, bool]] = []
        self.latencies: list[float] = []
        self.first_bytes: list[float] = []
        self.gaps: list[float] = []
        """Seconds between two events of a stream."""
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
            self.idle.popleft().send(request, due, stream=stream)
        else:
            self.waiting.append((request, due, stream))
            self.most_waiting = max(self.most_waiting, len(self.waiting))

    def answered(self, connection: Connection, status: int) -> None:
        now = time.perf_counter()
        self.latencies.append(now - connection.due)
        if connection.events:
            self.first_bytes.append(connection.events[0] - connection.due)
            self.gaps += [later - earlier for earlier, later in pairwise(connection.events)]
        self.failed += status != 200
        if self.waiting:
            request, due, stream = self.waiting.pop(0)
            connection.send(request, due, stream=stream)
        else:
            self.idle.append(connection)

    def broken(self, connection: Connection) -> None:
        if self._closing:
            return
        self.failed += connection not in self.idle
        self.idle = deque(c for c in self.idle if c is not connection)


def _vocabulary() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(4000)]


WORDS = _vocabulary()


def make_requests(rng: random.Random, rate: float, seconds: float, *, stream: bool = False) -> list[bytes]:
    """Whole HTTP requests, enough for a round; bodies of exactly BODY_BYTES, no text twice."""
    requests = []
    for _ in range(int(rate * seconds * 1.1) + 100):
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": ""}], "max_tokens": 16}
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

    process = subprocess.Popen(command, env=environment, preexec_fn=pin, stdout=subprocess.DEVNULL)  # a line for each request
    try:
        deadline = time.monotonic() + 120
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


def peak_mib(pid: int) -> float:
    """The most memory that the process had."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- measurements ----------------------------------------------------------------


@dataclass
class Asked:
    """One server and what was measured of it."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None
    rounds: list[Pool]
    streams: list[Pool]
    cpu: float = 0.0
    rate: float = 0.0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The server goes on for so long."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
        before = self.seconds()
        yield
        self.cpu += self.seconds() - before
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def seconds(self) -> float:
        return cpu_seconds(self.process.pid) if self.process is not None else 0.0

    def latencies(self) -> list[float]:
        return [latency for pool in self.rounds for latency in pool.latencies]

    def figures(self, direct: Asked) -> dict[str, Any]:
        """Of the rounds, and beside those without a proxy."""
        own, streams, through = self.latencies(), _of(self.streams), _of(direct.streams)
        found = {
            "p50_ms": percentile(own, 0.5),
            "p99_ms": percentile(own, 0.99),
            "failed": sum(pool.failed for pool in (*self.rounds, *self.streams)),
            "inter_chunk_p50_ms": percentile(streams[1], 0.5),
            "inter_chunk_p99_ms": percentile(streams[1], 0.99),
            "requests_per_second": round(self.rate),
        }
        if self.process is not None:
            found |= {
                "added_p50_ms": found["p50_ms"] - percentile(direct.latencies(), 0.5),
                "added_p99_ms": found["p99_ms"] - percentile(direct.latencies(), 0.99),
                "first_byte_delay_p50_ms": percentile(streams[0], 0.5) - percentile(through[0], 0.5),
                "first_byte_delay_p99_ms": percentile(streams[0], 0.99) - percentile(through[0], 0.99),
                "inter_chunk_delay_p99_ms": found["inter_chunk_p99_ms"] - percentile(through[1], 0.99),
                "cpu_ms_per_request": 1000 * self.cpu / max(len(own), 1),
                "peak_mib": peak_mib(self.process.pid),
            }
        return {name: round(value, 3) for name, value in found.items()}


def _of(streams: Sequence[Pool]) -> tuple[list[float], list[float]]:
    return [first for pool in streams for first in pool.first_bytes], [gap for pool in streams for gap in pool.gaps]


async def one_round(name: str, port: int, rate: float, seconds: float, rng: random.Random) -> Pool:
    pool = await offer(port, rate, seconds, make_requests(rng, rate, seconds), rng)
    print(
        f"{name:>16}: {len(pool.latencies)} answers, {pool.failed} failed, "
        f"p50 {percentile(pool.latencies, 0.5):.2f} ms, p99 {percentile(pool.latencies, 0.99):.2f} ms", flush=True
    )  # fmt: skip
    return pool


async def highest_rate(name: str, port: int, seconds: float, rng: random.Random, start: float) -> float:
    """Steps of 50 % until a request is shed, fails, or the answers fall behind the requests; 0 where they do at once."""
    rate, best = start, 0.0
    while rate < 20_000:
        pool = await offer(port, rate, seconds, make_requests(rng, rate, seconds), rng)
        late = percentile(pool.latencies, 0.99)
        print(
            f"{name:>16}: {rate:6.0f} requests/s: {pool.failed} shed or failed, p99 {late:.1f} ms, most waiting {pool.most_waiting}",
            flush=True,
        )
        if pool.failed or late > 1000:
            break
        best, rate = rate, rate * 1.5
    return best


def measure(runner: asyncio.Runner, servers: Sequence[Asked], options: argparse.Namespace) -> None:
    """All figures, against servers that run; each stands still before and after."""
    rng = random.Random(options.seed)
    for asked in servers:
        with asked.alone():
            runner.run(one_round("warm-up", asked.port, min(options.rate, 50), 2, rng))
        asked.cpu = 0.0
    for number in range(options.rounds):
        print(f"round {number + 1}")
        for asked in servers:
            with asked.alone():
                asked.rounds.append(runner.run(one_round(asked.name, asked.port, options.rate, options.seconds, rng)))
    spent = [asked.cpu for asked in servers]
    rate, seconds = min(STREAM_RATE, options.rate), min(options.seconds, 10)
    for _ in range(min(options.rounds, 2)):
        for asked in servers:
            with asked.alone():
                requests = make_requests(rng, rate, seconds, stream=True)
                asked.streams.append(runner.run(offer(asked.port, rate, seconds, requests, rng, stream=True)))
    for asked in servers if not options.engine else ():
        with asked.alone():
            start = LOWEST_RATE if asked.process is not None else options.rate
            asked.rate = runner.run(highest_rate(asked.name, asked.port, min(options.seconds, 5), rng, start))
    for asked, seconds in zip(servers, spent, strict=True):
        asked.cpu = seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--engine", help="one that runs, and calls its model 'bench': http://127.0.0.1:PORT")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("Only one core: proxy and client would disturb each other.")
    if not options.engine:
        os.sched_setaffinity(0, {cores[CLIENT_CORE]})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        servers, internal_port, missing = started(stack, folder, options, cores)
        measure(runner, servers, options)
        os.kill(servers[1].process.pid, signal.SIGCONT) if servers[1].process else None
        state = read_state(internal_port)
        figures = {asked.name: asked.figures(servers[0]) for asked in servers}
        for asked in servers:
            if asked.process is not None:
                asked.process.send_signal(signal.SIGCONT)  # so that it hears that it is to end
    own = figures["tuneloop"]
    headline = (
        "added_p50_ms",
        "added_p99_ms",
        "requests_per_second",
        "first_byte_delay_p50_ms",
        "first_byte_delay_p99_ms",
        "failed",
        "cpu_ms_per_request",
    )
    captured = {"captured": state["capture"]["captured"], "capture_dropped": state["capture"]["dropped"]}
    drift = {"drift": (state["drift"] or {}).get("status"), "stream_events": STREAM_EVENTS}
    print(json.dumps({name: own[name] for name in headline} | captured | drift | figures | {"missing": missing}))
    return 0


def started(stack: ExitStack, folder: Path, options: argparse.Namespace, cores: Sequence[int]) -> tuple[list[Asked], int, dict[str, str]]:
    """The engine, the gateway, and the others, each standing still but the engine; the gateway's internal port; and what is missing."""
    port, internal_port, *others = (free_port() for _ in range(2 + len(PEERS)))
    engine_port = int(options.engine.rpartition(":")[2]) if options.engine else free_port()
    if not options.engine:
        command = (sys.executable, "-m", "bench.null_engine", str(engine_port))
        stack.enter_context(server(command, cores[CLIENT_CORE], dict(os.environ), f"http://127.0.0.1:{engine_port}/health"))
    wanted = [name for name in options.peers.split(",") if name]
    peers, missing = available(wanted, folder, f"http://127.0.0.1:{engine_port}", MODEL, KEY, others[: len(wanted)])
    environment = gateway_environment(folder, engine_port, port, internal_port)
    ours = Proxy("tuneloop", port, (sys.executable, "-m", "tuneloop_gateway"), environment, f"http://127.0.0.1:{port}/readyz")
    servers = [Asked("direct", engine_port, None, [], [])]
    for proxy in (ours, *peers):
        process = stack.enter_context(server(proxy.command, cores[GATEWAY_CORE], proxy.environment, proxy.ready))
        process.send_signal(signal.SIGSTOP)
        servers.append(Asked(proxy.name, proxy.port, process, [], []))
    return servers, internal_port, missing


if __name__ == "__main__":
    sys.exit(main())
