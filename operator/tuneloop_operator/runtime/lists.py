"""Fills the cache by paginated lists before anything is watched, and sweeps it by lists afterwards.

kopf's own initial list delivers its events one by one and, at 5,000 objects, for half a minute; until then the cache would be half full and
decisions would rest on children that seem to be missing. And a re-list tells what is there, never what went.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from tuneloop_operator.cluster.cache import Object
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.errors import ApiError, Forbidden, NotFound, Unreachable
from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.render.names import MANAGER

log = logging.getLogger(__name__)

MANAGED = {"app.kubernetes.io/managed-by": MANAGER}
RETRY_SECONDS = 2.0
SWEEP_DELAY = 0.5
SWEEP_SECONDS = 600.0
"""All kinds are listed so often, whatever the watches say."""


async def prime(cluster: Cluster, kinds: Iterable[str]) -> None:
    """Lists every kind into the cache; waits as long as the API server, or a CRD, is missing, but for no optional one. An optional kind
    is asked for by discovery: of one that is not installed a list says Forbidden to those who have no right to it."""
    for kind in kinds:
        is_optional = KINDS[kind].is_optional
        while True:
            try:
                if is_optional and not await cluster.serves(kind):
                    cluster.unserved.add(kind)
                else:
                    await list_into(cluster, kind)
                break
            except Forbidden as error:
                log.warning("cannot list %s: %s", kind, error)
                if is_optional:
                    cluster.unserved.add(kind)
                    break
            except NotFound:
                log.warning("the API server does not serve %s: install the CRDs", kind)
            except (ApiError, Unreachable) as error:
                log.warning("cannot list %s: %s", kind, error)
            await asyncio.sleep(RETRY_SECONDS)


async def list_into(cluster: Cluster, kind: str, told: Callable[[str, Object], None] = lambda kind, obj: None) -> None:
    """Lists a kind into the cache; `told` is called with what was news."""
    resource = KINDS[kind]
    for namespace in cluster.settings.watch_namespaces or (None,):
        async for page, _ in cluster.pages(kind, namespace, selector(kind)):
            for item in page:
                # Items of a list come without what every one of them would repeat.
                obj = {"apiVersion": resource.api_version, "kind": kind, **item}
                if cluster.cache.put(kind, obj):
                    told(kind, obj)


def selector(kind: str) -> dict[str, str] | None:
    """Our own kinds are watched whole; of others, only what is ours."""
    return None if KINDS[kind].is_ours else MANAGED


class Sweeper:
    """Keeps the cache true to lists: takes what it lacks, removes what they lack. `told` hears of what came, `gone` of what went."""

    def __init__(
        self,
        cluster: Cluster,
        kinds: tuple[str, ...],
        told: Callable[[str, Object], None],
        gone: Callable[[str, Object], None],
        delay: float = SWEEP_DELAY,
    ) -> None:
        self.cluster = cluster
        self.kinds = kinds
        self.told = told
        self.gone = gone
        self.delay = delay
        self._wanted: set[str] = set()
        self._is_wanted = asyncio.Event()

    def want(self, kind: str) -> None:
        """A watch of this kind has just listed what the cache lacks."""
        self._wanted.add(kind)
        self._is_wanted.set()

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._is_wanted.wait()
            except TimeoutError:
                self._wanted.update(self.kinds)
            await asyncio.sleep(self.delay)
            self._is_wanted.clear()
            wanted, self._wanted = self._wanted, set()
            for kind in sorted(wanted):
                await self._try(kind)

    async def _try(self, kind: str) -> None:
        try:
            await list_into(self.cluster, kind, self.told)
            await self.sweep(kind)
        except (ApiError, Unreachable) as error:
            log.info("cannot list %s: %s", kind, error)
            self.want(kind)

    async def sweep(self, kind: str) -> None:
        for namespace in self.cluster.settings.watch_namespaces or (None,):
            places: list[tuple[str, str]] = []
            version = 0
            async for page, listed_at in self.cluster.pages(kind, namespace, selector(kind), metadata_only=True):
                version = version or listed_at
                places += [(obj["metadata"].get("namespace", ""), obj["metadata"]["name"]) for obj in page]
            for obj in self.cluster.cache.sweep(kind, places, version, (namespace,) if namespace else ()):
                self.gone(kind, obj)
