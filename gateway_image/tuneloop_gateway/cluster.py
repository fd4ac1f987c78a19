"""Watches the ConfigMap and the engines' EndpointSlices through the API server, for as long as the process lives."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tuneloop_gateway.configuration import CONFIG_KEY, Configuration, parse_config
from tuneloop_gateway.endpoints import SERVICE_LABEL, Endpoints

logger = logging.getLogger(__name__)
WATCH_SECONDS = 120
MAX_EVENT_BYTES = 4 << 20
BACKOFF_SECONDS = (0.5, 15.0)

Item = Mapping[str, Any]  # an object as the API server sends it; parsed where it is used


class Unreachable(Exception):
    """The API server did not answer as wished; the message says how."""


class ApiServer:
    """The two verbs that the gateway needs, with a projected token that is read for every request (it rotates)."""

    def __init__(self, url: str, token_path: Path) -> None:
        self._url, self._token_path = url, token_path
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            verify: ssl.SSLContext | bool = True
            if self._url.startswith("https"):
                verify = ssl.create_default_context(cafile=str(self._token_path / "ca.crt"))
            timeout = aiohttp.ClientTimeout(total=None, connect=5, sock_read=WATCH_SECONDS + 30)
            connector = aiohttp.TCPConnector(ssl=verify)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _headers(self) -> dict[str, str]:
        try:
            return {"Authorization": f"Bearer {(self._token_path / 'token').read_text().strip()}"}
        except OSError:
            return {}

    async def list(self, path: str, params: Mapping[str, str]) -> Item:
        """One LIST. Raises Unreachable."""
        try:
            async with asyncio.timeout(15), self._open().get(self._url + path, params=params, headers=self._headers()) as response:
                if response.status != 200:
                    raise Unreachable(f"LIST {path} was answered {response.status}")
                body: Item = await response.json()
                return body
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"LIST {path}: {type(error).__name__}") from error

    async def watch(self, path: str, params: Mapping[str, str], version: str) -> AsyncIterator[Item]:
        """Watch events after a version, until the server ends the watch. Raises Unreachable."""
        query = {
            **params, "watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_SECONDS),
        }  # fmt: skip
        try:
            async with self._open().get(self._url + path, params=query, headers=self._headers()) as response:
                if response.status != 200:
                    raise Unreachable(f"WATCH {path} was answered {response.status}")
                async for line in _lines(response.content):
                    yield json.loads(line)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"WATCH {path}: {type(error).__name__}") from error


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to a limit (aiohttp's own iterator stops at its buffer's size)."""
    rest = b""
    async for chunk in content.iter_any():
        rest += chunk
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line:
                yield line
        if len(rest) > MAX_EVENT_BYTES:
            raise Unreachable("an event was larger than any object may be")


class ClusterWatch:
    """Keeps configuration and endpoints up to date. What was heard last stays in force while the API server is away."""

    def __init__(self, api: ApiServer, namespace: str, config_map: str | None, configuration: Configuration, endpoints: Endpoints) -> None:
        self._api, self._namespace, self._config_map = api, namespace, config_map
        self._configuration, self._endpoints = configuration, endpoints
        self._services_changed = asyncio.Event()
        self._services: frozenset[str] = frozenset()
        configuration.on_change(self.note_services)

    def note_services(self) -> None:
        services = frozenset(r.service for r in self._configuration.current.revisions)
        if services != self._services:
            self._services = services
            self._services_changed.set()

    async def run(self) -> None:
        """Never ends by itself."""
        async with asyncio.TaskGroup() as group:
            if self._config_map:
                group.create_task(self._forever(self._follow_config))
            group.create_task(self._forever(self._follow_slices))

    async def _forever(self, follow: Callable[[], Any]) -> None:
        """Lists and watches again and again, with jittered backoff while that fails."""
        delay = BACKOFF_SECONDS[0]
        while True:
            loop = asyncio.get_running_loop()
            started = loop.time()
            try:
                await follow()
                delay = BACKOFF_SECONDS[0]
                if loop.time() - started < 1:
                    await asyncio.sleep(random.uniform(0.1, 0.3))  # a server that ends every watch at once is not to be hammered
                continue
            except Unreachable as error:
                logger.warning("%s; trying again.", error)
            except (KeyError, TypeError, AttributeError) as error:
                logger.warning("The API server sent an object of an unknown shape (%s); trying again.", type(error).__name__)
            delay = BACKOFF_SECONDS[0] if loop.time() - started > 30 else min(delay * 2, BACKOFF_SECONDS[1])
            await asyncio.sleep(random.uniform(delay / 2, delay))

    async def _follow_config(self) -> None:
        path = f"/api/v1/namespaces/{self._namespace}/configmaps"
        params = {"fieldSelector": f"metadata.name={self._config_map}"}
        listed = await self._api.list(path, params)
        for item in listed["items"]:
            self._take_config(item)
        async for event in self._api.watch(path, params, listed["metadata"]["resourceVersion"]):
            if event["type"] == "ERROR":
                return
            if event["type"] in ("ADDED", "MODIFIED"):
                self._take_config(event["object"])

    def _take_config(self, item: Item) -> None:
        raw = (item.get("data") or {}).get(CONFIG_KEY)
        config = parse_config(raw) if raw else None
        if config is not None:
            self._configuration.apply(config)

    async def _follow_slices(self) -> None:
        """Ends, to start again, when the set of services changes."""
        self._services_changed.clear()
        if not self._services:
            await self._services_changed.wait()
            return
        watching = asyncio.create_task(self._watch_slices(self._services))
        changed = asyncio.create_task(self._services_changed.wait())
        try:
            await asyncio.wait((watching, changed), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            for task in (watching, changed):
                task.cancel()
            await asyncio.gather(watching, changed, return_exceptions=True)

    async def _watch_slices(self, services: frozenset[str]) -> None:
        path = f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"
        params = {"labelSelector": f"{SERVICE_LABEL} in ({','.join(sorted(services))})"}
        try:
            listed = await self._api.list(path, params)
            self._endpoints.connected = True
            self._endpoints.replace(listed["items"])
            async for event in self._api.watch(path, params, listed["metadata"]["resourceVersion"]):
                if event["type"] == "ERROR":
                    return
                if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                    self._endpoints.update(event["object"], deleted=event["type"] == "DELETED")
        except Unreachable:
            self._endpoints.connected = False
            raise
