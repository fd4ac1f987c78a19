"""/healthz, /readyz and /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from tuneloop_operator.cluster.errors import ApiError, Unreachable
from tuneloop_operator.cluster.transport import Transport

LIMITS = aiohttp.ClientTimeout(total=3)


class Health:
    """Healthy, unless a watch has been silent for `silence` seconds (3 minutes) in which the API server answered.

    A dead watch is a process that looks alive and does nothing; a restart helps. A dead API server is no reason to restart: whenever it is
    found not to answer, they begin anew.
    """

    def __init__(
        self,
        transport: Transport,
        signs_of_life: Callable[[], Mapping[str, float]],
        silence: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transport = transport
        self.silence = silence
        self.signs_of_life = signs_of_life
        self.clock = clock
        self.down_at = float("-inf")

    async def silent_watches(self) -> list[str]:
        """Kinds whose watch is dead while the API server answers."""
        try:
            await self.transport.request("get", "GET", "/version", limits=LIMITS)
        except (ApiError, Unreachable):
            self.down_at = self.clock()
        since = self.clock() - self.silence
        if self.down_at > since:
            return []
        return sorted(kind for kind, seen in self.signs_of_life().items() if seen < since)


class Probes:
    """The HTTP server of the operator."""

    def __init__(self, health: Health, is_ready: Callable[[], bool], registries: tuple[CollectorRegistry, ...]) -> None:
        self.health = health
        self.is_ready = is_ready
        self.registries = registries
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> None:
        app = web.Application()
        app.add_routes([web.get("/healthz", self._healthz), web.get("/readyz", self._readyz), web.get("/metrics", self._metrics)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, port=port).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        silent = await self.health.silent_watches()
        if silent:
            return web.Response(status=503, text=f"no sign of life from the watch of {', '.join(silent)}\n")
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n") if self.is_ready() else web.Response(status=503, text="the cache is being filled\n")

    async def _metrics(self, _request: web.Request) -> web.Response:
        text = b"".join(generate_latest(registry) for registry in self.registries)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})
