"""Has every replica of a shared engine load the configuration's adapters, and knows which replica has which."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field

import aiohttp
from pydantic import ValidationError

from tuneloop_gateway.configuration import Configuration, adapter_of
from tuneloop_gateway.contract import ENGINE_ADAPTERS_PATH, MAX_ADAPTERS, LoadedAdapters, NamedAdapter, Revision, WantedAdapters
from tuneloop_gateway.endpoints import Endpoint, Endpoints

logger = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
AGAIN_SECONDS = 10.0
"""A replica that has all is asked again after so long: its process may be another by now."""
AFTER_ERROR_SECONDS = 60.0
LOAD_SECONDS = 600.0
MAX_ANSWER_BYTES = 256 << 10
MAX_ERROR = 600


@dataclass
class _Known:
    """What one replica was asked last, and said."""

    generation: int = 0
    asked_at: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class Adapters:
    """A request waits for a replica that has its adapter: one that started anew, or was added, first loads and then answers."""

    def __init__(self, configuration: Configuration, endpoints: Endpoints, session: aiohttp.ClientSession, engine_key: str) -> None:
        self._configuration, self._endpoints, self._session = configuration, endpoints, session
        self._headers = {"Authorization": f"Bearer {engine_key}"}
        self._known: dict[Endpoint, _Known] = {}

    def replicas(self, revision: Revision) -> int:
        """Ready ones that can answer for it."""
        adapter = adapter_of(revision)
        return sum(not adapter or adapter in endpoint.adapters for endpoint in self._endpoints.ready(revision.service))

    def error(self, revision: Revision) -> str:
        """Why one of its replicas could not load its adapter; "" where none said so."""
        if revision.adapter is None:
            return ""
        known = (self._known.get(endpoint) for endpoint in self._endpoints.ready(revision.service))
        return next((said.errors[revision.model_id] for said in known if said and revision.model_id in said.errors), "")

    async def run(self) -> None:
        """Asks each replica as soon as there is something to ask it. Runs for ever."""
        try:
            while True:
                self._follow()
                await self._endpoints.changed(LOOK_SECONDS)
        finally:
            for known in self._known.values():
                if known.task is not None:
                    known.task.cancel()

    def _follow(self) -> None:
        wanted, now = self._wanted(), time.monotonic()
        present = {endpoint: service for service in wanted for endpoint in self._endpoints.addresses(service)}
        for endpoint in [endpoint for endpoint in self._known if endpoint not in present]:
            task = self._known.pop(endpoint).task
            if task is not None:
                task.cancel()
        for endpoint, service in present.items():
            known = self._known.setdefault(endpoint, _Known())
            if known.task is None and self._is_due(endpoint, known, wanted[service], now):
                known.task = asyncio.create_task(self._ask(endpoint, known, wanted[service]))

    def _wanted(self) -> dict[str, WantedAdapters]:
        """By service; those that take traffic first."""
        config = self._configuration.current
        named: dict[str, dict[str, NamedAdapter]] = defaultdict(dict)
        for revision in config.revisions:
            if revision.adapter is not None and len(named[revision.service]) < MAX_ADAPTERS:
                named[revision.service][revision.model_id] = NamedAdapter(name=revision.model_id, **revision.adapter.model_dump())
        return {service: WantedAdapters(generation=config.generation, adapters=tuple(some.values())) for service, some in named.items()}

    def _is_due(self, endpoint: Endpoint, known: _Known, wanted: WantedAdapters, now: float) -> bool:
        """At once where the configuration is another, or a request found out that the replica has not what it said."""
        missing = {adapter.name for adapter in wanted.adapters} - endpoint.adapters - known.errors.keys()
        pause = LOOK_SECONDS if missing else AFTER_ERROR_SECONDS if known.errors else AGAIN_SECONDS
        return wanted.generation != known.generation or now - known.asked_at >= pause

    async def _ask(self, endpoint: Endpoint, known: _Known, wanted: WantedAdapters) -> None:
        before = endpoint.adapters
        try:
            answer = await self._put(endpoint, wanted)
            endpoint.adapters, errors = frozenset(answer.loaded), {name: said[:MAX_ERROR] for name, said in answer.errors.items()}
            if errors and errors != known.errors:
                logger.error("Replica %s could not load: %s", endpoint.address, errors)
            known.errors = errors
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError) as error:
            logger.warning("Replica %s could not be asked for its adapters: %s %s", endpoint.address, type(error).__name__, error)
        finally:
            known.generation, known.asked_at, known.task = wanted.generation, time.monotonic(), None
        if endpoint.adapters != before:
            logger.info("Replica %s has the adapters %s.", endpoint.address, ", ".join(sorted(endpoint.adapters)) or "none")
            self._endpoints.notify()

    async def _put(self, endpoint: Endpoint, wanted: WantedAdapters) -> LoadedAdapters:
        """Raises ClientError, TimeoutError or ValueError."""
        url, timeout = f"http://{endpoint.address}{ENGINE_ADAPTERS_PATH}", aiohttp.ClientTimeout(total=LOAD_SECONDS, connect=5)
        body = wanted.model_dump(mode="json", by_alias=True)
        async with self._session.put(url, json=body, headers=self._headers, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"it was answered {response.status}")
            raw = b""
            while chunk := await response.content.readany():
                raw += chunk
                if len(raw) > MAX_ANSWER_BYTES:
                    raise ValueError("the answer is too large")
        try:
            return LoadedAdapters.model_validate_json(raw)
        except ValidationError:
            raise ValueError("the answer is not as expected") from None
