"""Not one failed request: `python -m bench.load` (or `make bench-load`).

Two gateways as they run in pods, on one PostgreSQL, with engines that answer at once: an open loop of requests, every second one
streamed, goes through a roll-out, a rollback, a scale-in, kill -9 of an engine, a restart of each gateway and an eviction of each pod.
The client counts what failed and what was truncated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from bench.fleet import ApiServer, Fleet, Pod
from bench.gateway_limits import postgresql
from bench.load_client import Load, Service

SAMPLE_RATE = 0.1
"""Of the requests that are captured."""


@dataclass(frozen=True)
class Timing:
    """What takes its time in a cluster. The defaults are those of our pods (`render/engine.py`, `render/gateway.py`)."""

    settle: float = 4.0
    """Between two events."""
    endpoints: float = 1.0
    """Until all have heard of a pod that goes."""
    pre_stop: float = 5.0
    drain_delay: float = 6.0
    step: float = 2.0
    """Of a canary."""
    idle: float = 5.0
    """How long a client keeps a connection that it does not use: httpx' default, hence the `openai` client's."""


class Story:
    """The events, one after another, under load."""

    def __init__(self, fleet: Fleet, service: Service, timing: Timing) -> None:
        self._fleet, self._service, self._timing = fleet, service, timing

    async def begin(self) -> None:
        """Two gateways, two engines, one revision."""
        self._weigh(100)
        await self._scale_out("svc-1", 2)
        for gateway in [self._fleet.gateway() for _ in range(2)]:
            await self._add_gateway(gateway)

    def _weigh(self, *weights: int) -> None:
        """Weights of the first and the second revision; of two with traffic the second is the canary."""
        is_canary = len(weights) == 2 and all(weights)
        revisions = [
            {"name": f"r{number}", "version": number, "service": f"svc-{number}", "modelId": "bench", "weight": weight,
             "state": "Draining" if not weight else "Candidate" if is_canary and number == 2 else "Stable"}
            for number, weight in enumerate(weights, 1)
        ]  # fmt: skip
        self._fleet.configure(revisions, capture={"sampleRate": SAMPLE_RATE}, **({"window": "r2-1"} if is_canary else {}))

    async def steady(self) -> None:
        await asyncio.sleep(self._timing.settle)

    async def roll_out(self) -> None:
        """A canary at 20 and 50 percent, then everything to it; the engines before stay."""
        await self._scale_out("svc-2", 2)
        for weights in ((80, 20), (50, 50), (0, 100)):
            self._weigh(*weights)
            await asyncio.sleep(self._timing.step)

    async def roll_back(self) -> None:
        """At once; then the engines of what was rolled back go."""
        self._weigh(100, 0)
        await asyncio.sleep(self._timing.step)
        await asyncio.gather(*(self._end_engine("svc-2", engine) for engine in list(self._fleet.engines["svc-2"])))
        self._weigh(100)

    async def scale_in(self) -> None:
        """From two engines to one."""
        await self._end_engine("svc-1", self._fleet.engines["svc-1"][0])

    async def kill_an_engine(self) -> None:
        """Endpoints hear of it late; the container starts again under its address."""
        await self._scale_out("svc-1", 2)
        engine = self._fleet.engines["svc-1"][0]
        self._service.begin("kill -9 of an engine")
        await engine.end(signal.SIGKILL)
        await asyncio.sleep(self._timing.endpoints)
        self._fleet.route("svc-1", [e for e in self._fleet.engines["svc-1"] if e is not engine])
        await asyncio.sleep(self._timing.step)
        await engine.start()
        self._fleet.route("svc-1", self._fleet.engines["svc-1"])

    async def restart_gateways(self) -> None:
        """One after the other; as the Deployment has it, one goes once another one is ready in its place."""
        for gateway in list(self._fleet.gateways):
            await self._add_gateway(self._fleet.gateway())
            await self._end_gateway(gateway)

    async def evict_every_pod(self) -> None:
        """In turn, as the disruption budget has it: one is away until the one that is made in its place is ready."""
        for gateway in list(self._fleet.gateways):
            await asyncio.gather(self._end_gateway(gateway), self._add_gateway(self._fleet.gateway()))
        for engine in list(self._fleet.engines["svc-1"]):
            await asyncio.gather(self._end_engine("svc-1", engine), self._scale_out("svc-1", 2, beside=engine))

    async def _scale_out(self, service: str, replicas: int, beside: Pod | None = None) -> None:
        engines = self._fleet.engines.setdefault(service, [])
        while len([e for e in engines if e is not beside]) < replicas:
            engine = self._fleet.engine(service)
            engines.append(engine)
            await engine.start()
        self._fleet.route(service, engines)

    async def _end_engine(self, service: str, engine: Pod) -> None:
        """Endpoints leave it out a moment later, and the container hears of it after its preStop."""

        async def leave_out() -> None:
            await asyncio.sleep(self._timing.endpoints)
            self._fleet.engines[service].remove(engine)
            self._fleet.route(service, self._fleet.engines[service])

        async def end() -> None:
            await asyncio.sleep(self._timing.pre_stop)
            await engine.end()

        await asyncio.gather(leave_out(), end())

    async def _add_gateway(self, gateway: Pod) -> None:
        await gateway.start()
        self._fleet.gateways.append(gateway)
        self._service.ports.append(gateway.port)

    async def _end_gateway(self, gateway: Pod) -> None:
        """New connections go to it for a moment after it was told."""

        async def leave_out() -> None:
            await asyncio.sleep(self._timing.endpoints)
            self._fleet.gateways.remove(gateway)
            self._service.ports.remove(gateway.port)

        await asyncio.gather(leave_out(), gateway.end())


async def run_load(database_url: str, folder: Path, rate: float, timing: Timing) -> dict[str, Any]:
    """The whole story; the figures of each phase, and of all."""
    rng = random.Random(1)
    service = Service(rng, timing.idle)
    load = Load(service, rate, rng)
    async with ApiServer() as api:
        fleet = Fleet(api, folder, database_url, timing.drain_delay)
        story = Story(fleet, service, timing)
        try:
            await story.begin()
            service.begin("first seconds")
            loading = asyncio.create_task(load.run())
            for name, event in (
                ("first seconds", story.steady), ("steady", story.steady),
                ("roll-out", story.roll_out), ("rollback", story.roll_back), ("scale-in", story.scale_in),
                ("scale-out", story.kill_an_engine), ("gateway restarts", story.restart_gateways), ("evictions", story.evict_every_pod),
            ):  # fmt: skip
                service.begin(name)
                await event()
                await asyncio.sleep(timing.settle)
            load.stopped = True
            await loading
            await load.finish()
        finally:
            await fleet.close()
    return _summary(service, load)


def _summary(service: Service, load: Load) -> dict[str, Any]:
    total = {name: sum(getattr(phase, name) for phase in service.phases.values()) for name in ("sent", "failed", "truncated", "cut")}
    return {
        "requests_per_second": round(load.sent / load.seconds, 1),
        "latest_ms": round(1000 * load.late, 1),
        **total,
        "phases": {name: phase.report() for name, phase in service.phases.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=1000, help="requests a second")
    options = parser.parse_args(arguments)
    with postgresql() as url, tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(run_load(url, Path(folder), options.rate, Timing()))
    for name, phase in result["phases"].items():
        print(f"{name:22s} {phase}")
    print(json.dumps(result))
    return 1 if result["failed"] + result["truncated"] else 0


if __name__ == "__main__":
    sys.exit(main())
