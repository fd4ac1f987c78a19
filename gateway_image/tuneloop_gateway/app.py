"""Puts the gateway together, starts it, and stops it without losing what runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from tuneloop_gateway.access_log import AccessLog
from tuneloop_gateway.adapters import Adapters
from tuneloop_gateway.allowances import OwnAllowances, SharedAllowances, is_limited
from tuneloop_gateway.capture import Capture
from tuneloop_gateway.cluster import ApiServer, ClusterWatch
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import ForgetReceipt, ForgetRequest, UsageRow
from tuneloop_gateway.curation import Curation
from tuneloop_gateway.database import Database, database_url
from tuneloop_gateway.drift.comparing import Comparing
from tuneloop_gateway.drift.monitor import Monitor
from tuneloop_gateway.endpoints import Endpoints
from tuneloop_gateway.feedback import Feedback
from tuneloop_gateway.internal import Internal
from tuneloop_gateway.keys import KeyRing, read_secrets, subject_of
from tuneloop_gateway.ledger import Ledger
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.opinions import Opinions
from tuneloop_gateway.outcomes import Outcomes
from tuneloop_gateway.probes import Prober
from tuneloop_gateway.proxy import Exchange, Proxy
from tuneloop_gateway.public import Public
from tuneloop_gateway.retention import Retention
from tuneloop_gateway.routing import Router
from tuneloop_gateway.settings import Settings
from tuneloop_gateway.state import State
from tuneloop_gateway.tracing import Tracing

logger = logging.getLogger(__name__)
FILE_SECONDS = 1.0
KEYS_SECONDS = 5.0
FLUSH_SECONDS = 8.0
RESTART_SECONDS = 1.0
CANCEL_SECONDS = 5.0
REFUSE_SECONDS = 2.0
"""Before the end, requests that still wait for an engine are told to come again, rather than cut off."""
MAX_HEADER_BYTES = 16 << 10


class Gateway:
    """Everything of one process. `start`, then `stop`."""

    def __init__(self, settings: Settings, configuration: Configuration) -> None:
        self.settings, self.configuration = settings, configuration
        config, secrets = configuration.current, read_secrets(settings.secrets_path)
        self.metrics = Metrics(config.namespace, config.deployment)
        self.keys = KeyRing(settings.keys_path, secrets.feedback_key)
        self.keys.reload()
        url = database_url(settings.database_url_path, settings.data_path)
        self.database = Database(url, f"{config.namespace}/{config.deployment}")
        self.endpoints = Endpoints(config.namespace, settings.endpoints)
        self.router = Router(configuration, self.endpoints, settings.wait_seconds)
        self.outcomes = Outcomes(configuration)
        self.proxy = Proxy(configuration, self.router, self.metrics, secrets.engine_key, self._ended, self.outcomes)
        self.adapters = Adapters(configuration, self.endpoints, self.proxy.session, secrets.engine_key)
        self.prober = Prober(configuration, self.endpoints, self.router, self.proxy.session, secrets.engine_key)
        comparing = Comparing(configuration, self.prober.training_inputs)
        self.monitor = Monitor(configuration, self.database, settings.pod_uid, comparing)
        self.capture = Capture(configuration, self.database, self.metrics, self.monitor.take)
        self.curation = Curation(self.database)
        self.retention = Retention(configuration, self.database, self.metrics)
        self._feedback_key = secrets.feedback_key
        self.allowances = SharedAllowances(self.database) if self.database.is_shared else OwnAllowances()
        feedback = Feedback(configuration, self.curation, self.metrics, secrets.feedback_key, self.outcomes)
        self.ledger, self.access_log, self.tracing = Ledger(self.database), AccessLog(), Tracing(configuration, settings.pod_uid)
        self.public = Public(
            configuration, self.keys, self.proxy, self.capture, feedback, self.monitor, self.metrics, secrets.feedback_key,
            self.allowances, self.ledger, self.access_log, self.tracing,
        )  # fmt: skip
        state = State(
            configuration, self.endpoints, self.router, self.prober, self.capture, self.monitor, self.curation, settings.pod_uid,
            self.outcomes, self.adapters,
        )  # fmt: skip
        opinions = Opinions(self.database, self.keys.anonymous.subject)
        self.internal = Internal(
            configuration, state, self.curation, opinions, self.monitor, self.metrics, secrets.internal_token, self.forget, self._usage,
        )  # fmt: skip
        self.api = ApiServer(settings.api_server, settings.token_path) if settings.api_server else None
        self._tasks: list[asyncio.Task[None]] = []
        self._public_port: web.AppRunner | None = None
        self._internal_port: web.AppRunner | None = None

    async def forget(self, whose: ForgetRequest) -> ForgetReceipt:
        """Deletes a subject's rows, and what waits here to be stored. Raises Unavailable."""
        subject = whose.subject or subject_of(whose.key or "", self._feedback_key)
        self.capture.forget(subject)
        return await self.retention.forget(subject)

    async def _usage(self, since: str, until: str) -> list[UsageRow]:
        return await self.ledger.report(since, until, self.keys.name_of)

    def _ended(self, exchange: Exchange) -> None:
        self.capture.offer(exchange)

    async def start(self) -> None:
        """Opens both ports and starts what runs beside requests."""
        beside = (
            self.retention.run, self.monitor.run, self.adapters.run, self.prober.run, self.ledger.run, self.access_log.run,
            self.tracing.run, self._follow_keys,
        )  # fmt: skip
        for work in (self.capture.prepare, self.capture.write, *beside):
            self._tasks.append(asyncio.create_task(_keep_running(work.__qualname__, work)))
        if isinstance(self.allowances, SharedAllowances) and is_limited(self.configuration.current.limits):
            self._tasks.append(asyncio.create_task(self.allowances.open()))
        if self.settings.endpoints is not None or self.api is None or self.settings.config_map is None:
            seconds = FILE_SECONDS
        else:
            seconds = FILE_SECONDS * 5
        self._tasks.append(asyncio.create_task(self.configuration.follow_file(seconds)))
        if self.api is not None:
            namespace = self.configuration.current.namespace
            watch = ClusterWatch(self.api, namespace, self.settings.config_map, self.configuration, self.endpoints)
            watch.note_services()
            self._tasks.append(asyncio.create_task(_keep_running("ClusterWatch.run", watch.run)))
        # A client that goes away cancels its request, which closes the connection to the engine; but not what it asked of the database.
        self._internal_port = await self._listen(self.internal.application(), self.settings.internal_port, cancel=False, drain_seconds=1)
        self._public_port = await self._listen(
            self.public.application(), self.settings.public_port, cancel=True, drain_seconds=self.settings.drain_seconds
        )

    async def _listen(self, app: web.Application, port: int, *, cancel: bool, drain_seconds: float) -> web.AppRunner:
        runner = web.AppRunner(
            app,
            handler_cancellation=cancel,
            access_log=None,
            keepalive_timeout=75,
            shutdown_timeout=drain_seconds,
            max_field_size=MAX_HEADER_BYTES,
            auto_decompress=False,
        )
        await runner.setup()
        await web.TCPSite(runner, self.settings.host, port, backlog=1024).start()
        return runner

    async def _follow_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_SECONDS)
            await asyncio.to_thread(self.keys.reload)

    async def stop(self) -> None:
        """Fails readiness, serves on until endpoints are updated, lets running requests end, stores what is pending."""
        if self.public.stopping:
            return
        self.public.stopping = True
        await asyncio.sleep(self.settings.drain_delay_seconds)
        started = time.monotonic()
        refusing = asyncio.get_running_loop().call_later(max(0.0, self.settings.drain_seconds - REFUSE_SECONDS), self.router.close)
        if self._public_port is not None:
            await self._public_port.cleanup()
        refusing.cancel()
        if time.monotonic() - started >= self.settings.drain_seconds:
            logger.error("Requests that ran for more than %g seconds were cut off at the end.", self.settings.drain_seconds)
        pending = (self.capture.flush(FLUSH_SECONDS), self.ledger.close(), self.tracing.close(), self.access_log.close(FLUSH_SECONDS))
        await asyncio.gather(*pending)
        async with self.database.quiet():
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=CANCEL_SECONDS)
        await self.monitor.stop()
        if self._internal_port is not None:
            await self._internal_port.cleanup()
        await self.proxy.close()
        if self.api is not None:
            await self.api.close()
        if isinstance(self.allowances, SharedAllowances):
            await self.allowances.close()
        await self.database.close()


async def _keep_running(name: str, work: Any) -> None:
    """A bug in what runs beside requests is logged and that part starts again; requests go on."""
    while True:
        try:
            coroutine: Coroutine[Any, Any, None] = work()
            await coroutine
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("%s failed; it starts again.", name)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError from None  # a task group that fails while it is cancelled tells of its failure alone
        await asyncio.sleep(RESTART_SECONDS)
