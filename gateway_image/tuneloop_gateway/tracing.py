"""Follows `tracing` of the configuration. OpenTelemetry is loaded where it is asked for alone, and never while a request waits."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from tuneloop_gateway import contract
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.threads import in_daemon_thread

if TYPE_CHECKING:
    from tuneloop_gateway.spans import Spans

logger = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Tracing:
    """`spans` is None where no traces are asked for."""

    def __init__(self, configuration: Configuration, instance: str) -> None:
        self._configuration, self._instance = configuration, instance
        self._applied: contract.Tracing | None = None
        self.spans: Spans | None = None

    async def run(self) -> None:
        """Runs for ever."""
        while True:
            if self._configuration.current.tracing != self._applied:
                await self._apply(self._configuration.current)
            await asyncio.sleep(LOOK_SECONDS)

    async def _apply(self, config: contract.GatewayConfig) -> None:
        self._applied = config.tracing
        await self.close()
        if config.tracing is not None:
            self.spans = await asyncio.to_thread(self._open, config.tracing, config)
            logger.info("Traces go to %s.", config.tracing.endpoint)

    def _open(self, asked: contract.Tracing, config: contract.GatewayConfig) -> Spans:
        from tuneloop_gateway.spans import Spans

        return Spans(asked, config.namespace, config.deployment, self._instance)

    async def close(self) -> None:
        """Sends what waits, for some seconds."""
        spans, self.spans = self.spans, None
        if spans is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(in_daemon_thread(spans.close), CLOSE_SECONDS)
