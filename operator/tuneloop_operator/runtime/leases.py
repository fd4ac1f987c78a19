"""Who leads: a Lease of our own, renewed every 2 s, given up by its holder after 6 s without renewal, and taken by others after 9 s.

The holder's 6 s count from before the last successful renewal was sent, the others' 9 s from when they last saw the Lease change: the
holder has stopped before anybody else starts, whatever the clocks say (only differences of one machine's clock are used). A process that
was stopped in between notices on the clock before its next write; one that was stopped between that look and its write is fenced by the
write's own precondition.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp

from tuneloop_operator.cluster.errors import AlreadyExists, ApiError, Conflict, NotFound, NotLeader, Unreachable
from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.cluster.transport import Transport
from tuneloop_operator.settings import Settings

log = logging.getLogger(__name__)

NAME = "tuneloop-operator"


def clock() -> float:
    """Seconds that also pass while the process, or the machine, sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Elector:
    """Runs for the Lease until it is told to stop; calls `on_change` in the loop whenever leadership begins or ends."""

    def __init__(
        self, transport: Transport, settings: Settings, on_change: Callable[[bool], None], now: Callable[[], float] = clock
    ) -> None:
        self.transport = transport
        self.settings = settings
        self.on_change = on_change
        self.now = now
        self.valid_until = float("-inf")
        self._is_leading = False
        self._seen: tuple[str, float] = ("", float("-inf"))
        self._lease: dict[str, Any] | None = None

    @property
    def is_leader(self) -> bool:
        return self.now() < self.valid_until

    def guard(self) -> None:
        """Raises NotLeader unless the Lease is held and fresh."""
        if not self.is_leader:
            raise NotLeader("the Lease is not held")

    async def run(self) -> None:
        while True:
            await self._attempt()
            self._tell()
            await self._pause()

    async def release(self) -> None:
        """Hands over at once; called after the last write."""
        if self.is_leader and self._lease is not None:
            self.valid_until = float("-inf")
            self._tell()
            spec = {**self._lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
            try:
                await self._put({**self._lease, "spec": spec})
            except (ApiError, Unreachable):
                log.info("the Lease could not be released; it expires")

    def _tell(self) -> None:
        if self.is_leader != self._is_leading:
            self._is_leading = self.is_leader
            log.info("leading" if self._is_leading else "not leading any more")
            self.on_change(self._is_leading)

    async def _pause(self) -> None:
        """Until the next attempt, or the moment at which leadership ends."""
        seconds = float(self.settings.retry_seconds)
        remaining = self.valid_until - self.now()
        if self._is_leading and remaining < seconds:
            await asyncio.sleep(max(remaining, 0.0))
            self._tell()
            seconds = 0.2
        await asyncio.sleep(seconds)

    async def _attempt(self) -> None:
        """Takes or renews the Lease if it is free or ours."""
        sent_at = self.now()
        try:
            # The last answer is good enough to renew by: another's write since makes the PUT a 409.
            if self._lease is None or not self.is_leader:
                self._lease = await self._read()
            if self._lease is None:
                self._lease = await self._create()
            elif self._may_take(self._lease):
                sent_at = self.now()
                self._lease = await self._put({**self._lease, "spec": self._spec(self._lease["spec"])})
            else:
                return
        except (Conflict, AlreadyExists, NotFound):
            self._lease = None
            return
        except (ApiError, Unreachable) as error:
            self._lease = None
            log.warning("the Lease could not be renewed: %s", error)
            return
        self.valid_until = sent_at + self.settings.renew_seconds

    def _may_take(self, lease: dict[str, Any]) -> bool:
        spec, version = lease["spec"], lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, self.now())
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self.settings.identity):
            return True
        return self.now() > self._seen[1] + max(int(spec.get("leaseDurationSeconds") or 0), 1)

    def _spec(self, old: dict[str, Any]) -> dict[str, Any]:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        is_new = old.get("holderIdentity") != self.settings.identity
        return {
            "holderIdentity": self.settings.identity,
            "leaseDurationSeconds": self.settings.lease_seconds,
            "acquireTime": stamp if is_new else old.get("acquireTime", stamp),
            "renewTime": stamp,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (1 if is_new and old else 0),
        }

    async def _read(self) -> dict[str, Any] | None:
        try:
            return await self._request("get", "GET", self._path(NAME))
        except NotFound:
            return None

    async def _create(self) -> dict[str, Any]:
        metadata = {"name": NAME, "namespace": self.settings.namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": self._spec({})}
        return await self._request("create", "POST", self._path(), body)

    async def _put(self, lease: dict[str, Any]) -> dict[str, Any]:
        return await self._request("update", "PUT", self._path(NAME), lease)

    async def _request(self, verb: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        limits = aiohttp.ClientTimeout(total=float(self.settings.retry_seconds))
        try:
            async with asyncio.timeout(self.settings.retry_seconds + 0.5):  # a 429 may make the transport wait
                return await self.transport.request(verb, method, path, body=body, limits=limits)
        except TimeoutError as error:
            raise Unreachable(f"{method} {path}: no answer in time") from error

    def _path(self, name: str | None = None) -> str:
        return KINDS["Lease"].path(self.settings.namespace, name)
