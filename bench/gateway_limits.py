"""What limits by key add to a request: `python -m bench.gateway_limits` (or `make bench-gateway-limits`).

Two gateways on one PostgreSQL, one with requests and tokens a minute limited (never reached), one without; otherwise as
`bench.gateway`, whose load this is. Rounds through the two alternate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvloop
from bench.gateway import CLIENT_CORE, GATEWAY_CORE, Pool, free_port, gateway_environment, one_round, percentile, server

POSTGRESQL = Path(__file__).parents[1] / "dev" / "postgresql"
LIMITS = {"requestsPerMinute": 1_000_000, "tokensPerMinute": 1_000_000_000}


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a server of our own, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="tuneloop-bench-"))
    process = subprocess.Popen((POSTGRESQL, "serve", folder), stderr=subprocess.DEVNULL)
    try:
        ready = folder / "data" / "postmaster.pid"
        deadline = time.monotonic() + 60
        while not (ready.exists() and ready.read_text().rstrip().endswith("ready")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("PostgreSQL did not start.")
            time.sleep(0.1)
        yield subprocess.run((POSTGRESQL, "url", folder), check=True, capture_output=True, text=True).stdout.strip()
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20, help="length of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200)
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[CLIENT_CORE % len(cores)]})
    engine_port, ports = free_port(), (free_port(), free_port())
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        url = stack.enter_context(postgresql())
        engine = (sys.executable, "-m", "bench.null_engine", str(engine_port))
        stack.enter_context(server(engine, None, dict(os.environ), f"http://127.0.0.1:{engine_port}/health"))
        for port, limits in zip(ports, ({}, LIMITS), strict=True):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "url").write_text(url)
            environment = gateway_environment(folder, engine_port, port, free_port(), limits=limits)
            command = (sys.executable, "-m", "tuneloop_gateway")
            stack.enter_context(server(command, cores[GATEWAY_CORE], environment, f"http://127.0.0.1:{port}/readyz"))
        rng = random.Random(1)
        sides = {"free": ports[0], "limited": ports[1]}
        for port in ports:
            runner.run(one_round("warm-up", port, options.rate, 2, rng))
        pools: dict[str, list[Pool]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, port in sides.items():
                pools[name].append(runner.run(one_round(name, port, options.rate, options.seconds, rng)))
    free, limited = ([latency for pool in pools[name] for latency in pool.latencies] for name in sides)
    result = {
        "limits_added_p50_ms": round(percentile(limited, 0.5) - percentile(free, 0.5), 3),
        "limits_added_p99_ms": round(percentile(limited, 0.99) - percentile(free, 0.99), 3),
        "free_p50_ms": round(percentile(free, 0.5), 3),
        "failed": sum(pool.failed for side in pools.values() for pool in side),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
