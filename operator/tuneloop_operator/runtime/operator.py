"""The operator: cache, informer, queue, workers, Lease and probes, put together, started and stopped in order."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from tuneloop_operator.cluster.apply import Applier
from tuneloop_operator.cluster.cache import Object, controller
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.credentials import Credentials
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.cluster.transport import Transport
from tuneloop_operator.runtime.answers import Event, Listing
from tuneloop_operator.runtime.informer import Informer
from tuneloop_operator.runtime.leases import Elector
from tuneloop_operator.runtime.lists import Sweeper, prime
from tuneloop_operator.runtime.metrics import Metrics, Objects
from tuneloop_operator.runtime.passes import MOMENT, Passes, current_key
from tuneloop_operator.runtime.probes import Health, Probes
from tuneloop_operator.runtime.queue import WakeQueue
from tuneloop_operator.runtime.routes import Routes
from tuneloop_operator.settings import Settings

if TYPE_CHECKING:
    from tuneloop_operator.runtime.scaler import Scaler

log = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
"""How long passes may go on after SIGTERM."""


class Operator:
    """One replica. Every replica watches, so that a failover starts with a full cache; only the leader works."""

    def __init__(self, settings: Settings, credentials: Credentials, registrations: Sequence[Registration[Any]]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.transport = Transport(credentials, self.metrics.request_observed)
        self.lease_transport = Transport(credentials, self.metrics.request_observed)  # a storm of work must not delay the Lease
        self.elector = Elector(self.lease_transport, settings, self._led)
        guard = self.elector.guard if settings.leader_election else (lambda: None)
        self.cluster = Cluster(self.transport, settings, guard=guard)
        self.cluster.written = self._written
        self.cluster.on_write = self._wake
        self.cache = self.cluster.cache
        self.routes = Routes(registrations, self.cache)
        self.queue = WakeQueue()
        self.applier = Applier(self.cluster)
        self.passes = Passes(self.routes.registrations, self.cluster, self.applier, self.queue, self.metrics)
        self.sweeper = Sweeper(self.cluster, self.routes.kinds, self._wake, self._swept)
        self.informer = Informer(
            credentials, settings, self.routes.kinds, self._received, self._listed, lambda: self.metrics.watch_restarts.inc()
        )
        self.is_primed = False
        health = Health(self.lease_transport, lambda: self.informer.signs_of_life, settings.silence_seconds)
        self.probes = Probes(health, lambda: self.is_primed, self._registries())
        self.scaler: Scaler | None = None
        self._workers: list[asyncio.Task[None]] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        await self.probes.start(self.settings.metrics_port)
        tasks = []
        try:
            if not await _either(prime(self.cluster, self.routes.kinds), stop):
                return
            self.is_primed = True
            kinds = tuple(kind for kind in self.routes.kinds if kind not in self.cluster.unserved)
            self.informer.kinds = self.sweeper.kinds = kinds
            _settle_memory()
            self.informer.start()
            tasks.append(asyncio.create_task(self.sweeper.run(), name="sweeper"))
            if self.settings.leader_election:
                tasks.append(asyncio.create_task(self.elector.run(), name="elector"))
            else:
                self._led(True)
            await self._serve_scaler(kinds)
            log.info("watching %s", ", ".join(kinds))
            await _either(_first_end(tasks), stop)
        finally:
            await self._end(tasks)

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        """Workers finish their passes while the Lease is still renewed; then it is released."""
        self.informer.stop()
        if self.scaler is not None:
            await self.scaler.stop()
        workers, self._workers = self._workers, []  # nothing is woken from here on
        await self.queue.drain(DRAIN_SECONDS)
        await _cancel([*workers, *tasks])
        if self.settings.leader_election:
            await self.elector.release()
        await self.informer.join()
        await self.probes.stop()
        await self.cluster.close()
        await self.lease_transport.close()

    async def _serve_scaler(self, kinds: tuple[str, ...]) -> None:
        """Where KEDA may ask it: its library is loaded nowhere else."""
        if self.settings.scaler_address is not None and "ScaledObject" in kinds:
            from tuneloop_operator.runtime.scaler import Scaler

            self.scaler = Scaler(self.cluster)
            await self.scaler.start(f"[::]:{self.settings.scaler_port}")

    # --- leadership ---

    def _led(self, is_leader: bool) -> None:
        """Workers exist while this replica leads; a new leader looks at everything."""
        self.metrics.leader.set(is_leader)
        for worker in self._workers:
            worker.cancel()
        self._workers = []
        self.queue.clear()
        if is_leader:
            self._workers = [asyncio.create_task(self.passes.work(), name=f"worker {n}") for n in range(self.settings.workers)]
            for kind in self.routes.registrations:
                for key in self.cache.keys(kind):
                    self.queue.wake(key)

    # --- events ---

    def _received(self, event: Event) -> None:
        """Cache and wake; no logic, cannot fail."""
        kind, type_, obj = event
        known = self.cache.get(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if type_ == "DELETED":
            is_news = self.cache.remove(kind, obj)
            self.applier.forget(obj["metadata"].get("uid", ""))
        else:
            is_news = self.cache.put(kind, obj)
        if is_news:
            self._wake(kind, obj)
            if known is not None and controller(known) != controller(obj):
                self._wake(kind, known)  # taken away from its owner

    def _written(self, kind: str, obj: Object) -> None:
        """An own write wakes neither the object nor its owner, whose pass it was, but whoever watches its kind."""
        if self._workers:
            for key in self.routes.watchers(kind, obj):
                self.queue.wake(key)

    def _listed(self, listing: Listing) -> None:
        """A watch begins anew: what came and went meanwhile brings no event."""
        if any(self.cache.is_older(listing.kind, place, version) for place, version in listing.found.items()):
            self.sweeper.want(listing.kind)
        namespaces = (listing.namespace,) if listing.namespace else ()
        for obj in self.cache.sweep(listing.kind, listing.found, listing.version, namespaces):
            self._swept(listing.kind, obj)

    def _swept(self, kind: str, obj: Object) -> None:
        self.metrics.swept.labels(kind).inc()
        self.applier.forget(obj["metadata"].get("uid", ""))
        self._wake(kind, obj)

    def _wake(self, kind: str, obj: Object) -> None:
        if not self._workers:
            return  # whoever leads looks at everything when it begins
        own = current_key.get()
        within = 0.0 if kind in self.routes.registrations else MOMENT
        for key in self.routes.targets(kind, obj):
            if key != own:  # a pass that wrote is followed by another anyway
                self.queue.wake(key, within)

    # --- metrics ---

    def _registries(self) -> tuple[CollectorRegistry, CollectorRegistry]:
        self.metrics.watch_number("queue_depth", "Keys that are due and not yet taken by a worker.", lambda: self.queue.depth)
        self.metrics.watch_number("queue_scheduled", "Keys that wait for their time.", lambda: self.queue.scheduled)
        objects = CollectorRegistry(auto_describe=False)
        objects.register(Objects(self.cache, lambda: self.informer.signs_of_life))
        return self.metrics.registry, objects


def _settle_memory() -> None:
    """What is there now stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def _either(work: Any, stop: asyncio.Event) -> bool:
    """Runs the coroutine until it ends (True) or `stop` is set (False)."""
    tasks = [asyncio.ensure_future(work), asyncio.create_task(stop.wait())]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await _cancel(list(pending))
    if tasks[0] in done:
        tasks[0].result()
    return tasks[0] in done


async def _first_end(tasks: list[asyncio.Task[None]]) -> None:
    """None of these ends by itself; if one does, its error ends the process, and the kubelet starts it again."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
