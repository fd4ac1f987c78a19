"""The replicas of each engine Service: which are ready, and how busy each is."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneloop_gateway.contract import ENGINE_PORT

SERVICE_LABEL = "kubernetes.io/service-name"
DOWN_SECONDS = 2.0
"""A replica that refused a connection is left alone for so long, if there is another."""


@dataclass(eq=False)
class Endpoint:
    """One replica; compared by identity."""

    address: str
    in_flight: int = 0
    down_until: float = 0.0
    adapters: frozenset[str] = frozenset()
    """Those that it said it has."""


@dataclass
class _Slices:
    by_name: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)
    """Slice -> (service, addresses)."""


def parse_slice(item: Mapping[str, Any]) -> tuple[str, str, frozenset[str]]:
    """(name, service, ready addresses) of an EndpointSlice. A condition that is absent counts as true, as Kubernetes says."""
    metadata = item["metadata"]
    ports = item.get("ports") or []
    port = next((p["port"] for p in ports if p.get("port")), ENGINE_PORT)
    addresses = set()
    for endpoint in item.get("endpoints") or []:
        conditions = endpoint.get("conditions") or {}
        if conditions.get("ready") is False or conditions.get("terminating") is True:
            continue
        for address in endpoint.get("addresses") or []:
            addresses.add(f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
    return metadata["name"], (metadata.get("labels") or {}).get(SERVICE_LABEL, ""), frozenset(addresses)


def _has(endpoint: Endpoint, adapter: str) -> bool:
    return not adapter or adapter in endpoint.adapters


class Endpoints:
    """Ready replicas by service. Static, or kept by the watch of EndpointSlices; a service's DNS name until that was heard."""

    def __init__(self, namespace: str, static: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self._namespace = namespace
        self._slices = _Slices()
        self._synced = static is not None
        self.connected = static is not None
        """The watch is open now."""
        self._by_service: dict[str, dict[str, Endpoint]] = {}
        self._fallbacks: dict[str, Endpoint] = {}
        self._changed = asyncio.Event()
        for service, addresses in (static or {}).items():
            self._set(service, frozenset(addresses))

    def ready(self, service: str) -> Collection[Endpoint]:
        """The replicas that requests may go to."""
        if not self._synced:
            return (self._fallback(service),)
        return self._by_service.get(service, {}).values()

    def addresses(self, service: str) -> list[Endpoint]:
        """All that may be asked what they have: the replicas, and the Service's DNS name while the API server is silent."""
        silent = self._synced and not self.connected
        return [*self.ready(service), *([self._fallback(service)] if silent else [])]

    def choices(self, service: str, avoid: Collection[Endpoint], now: float, adapter: str = "") -> list[Endpoint]:
        """Replicas not in `avoid`, those that are up if any is; the Service's DNS name where all are down and the API server is silent.
        With an adapter: only such as have it."""
        fresh = [e for e in self.ready(service) if e not in avoid and _has(e, adapter)]
        up = [e for e in fresh if e.down_until <= now]
        if up:
            return up
        if self._synced and not self.connected:
            fallback = self._fallback(service)
            if fallback not in avoid and fallback.down_until <= now and _has(fallback, adapter):
                return [fallback]
        return fresh

    def least_busy(self, service: str, avoid: Collection[Endpoint], now: float, adapter: str = "") -> Endpoint | None:
        return min(self.choices(service, avoid, now, adapter), key=lambda e: e.in_flight, default=None)

    def _fallback(self, service: str) -> Endpoint:
        address = f"{service}.{self._namespace}.svc:{ENGINE_PORT}"
        return self._fallbacks.setdefault(service, Endpoint(address))

    def replace(self, slices: Collection[Mapping[str, Any]]) -> None:
        """The result of a LIST."""
        self._slices.by_name = {name: (service, addresses) for name, service, addresses in map(parse_slice, slices)}
        self._synced = True
        self._rebuild()

    def update(self, item: Mapping[str, Any], *, deleted: bool) -> None:
        """One watch event."""
        name, service, addresses = parse_slice(item)
        if deleted:
            self._slices.by_name.pop(name, None)
        else:
            self._slices.by_name[name] = (service, addresses)
        self._rebuild()

    def _rebuild(self) -> None:
        merged: dict[str, set[str]] = {service: set() for service in self._by_service}
        for service, addresses in self._slices.by_name.values():
            merged.setdefault(service, set()).update(addresses)
        for service, union in merged.items():
            self._set(service, frozenset(union))
        self.notify()

    def _set(self, service: str, addresses: frozenset[str]) -> None:
        """Keeps the counters of replicas that stay."""
        old = self._by_service.get(service, {})
        self._by_service[service] = {a: old.get(a) or Endpoint(a) for a in sorted(addresses)}

    def notify(self) -> None:
        """Wakes whoever waits for a replica."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> bool:
        """Waits for a change, at most so long. False when nothing came."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
