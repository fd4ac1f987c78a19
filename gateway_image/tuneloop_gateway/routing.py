"""Which revision and which replica a request goes to; while there is none, it waits here."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

from tuneloop_gateway.configuration import Configuration, adapter_of, takes_traffic
from tuneloop_gateway.contract import Revision, RevisionState
from tuneloop_gateway.endpoints import Endpoint, Endpoints
from tuneloop_gateway.errors import Refused

RETRY_AFTER_SECONDS = 5


@dataclass
class RevisionCount:
    """What one revision did since the process started."""

    requests: int = 0
    errors: int = 0
    in_flight: int = 0
    warm: bool = False
    warm_up_seconds: float = 0.0


@dataclass(frozen=True)
class Target:
    revision: Revision
    endpoint: Endpoint


class Router:
    """Weighted choice of a revision for each request, then its least busy replica."""

    def __init__(self, configuration: Configuration, endpoints: Endpoints, wait_seconds: float) -> None:
        self._configuration, self._endpoints, self._wait_seconds = configuration, endpoints, wait_seconds
        self._random = random.Random()
        self._running, self._last_at = 0, time.monotonic()
        self._held_bytes, self._is_closing = 0, False
        self.held = 0
        """Requests that wait for a replica."""
        self.counts: dict[str, RevisionCount] = {}
        configuration.on_change(endpoints.notify)

    def count(self, revision: str) -> RevisionCount:
        return self.counts.setdefault(revision, RevisionCount())

    @property
    def wait_seconds(self) -> float:
        """How long a request waits for a replica."""
        return self._configuration.current.hold_seconds or self._wait_seconds

    @property
    def idle_seconds(self) -> float:
        return 0.0 if self._running else time.monotonic() - self._last_at

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, from its arrival to its end."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._last_at = time.monotonic()

    def close(self) -> None:
        """The process ends: nothing waits on."""
        self._is_closing = True
        self._endpoints.notify()

    def forget_gone(self) -> None:
        """Counts of revisions that the configuration no longer has, once their last request ended."""
        names = {r.name for r in self._configuration.current.revisions}
        self.counts = {name: count for name, count in self.counts.items() if name in names or count.in_flight}

    def choose(self, avoid: Set[Endpoint] = frozenset(), session: str = "") -> Target | None:
        """A target whose replica is not in `avoid`; None where there is none now."""
        if self._configuration.current.asleep:
            return None  # its last replicas may be about to go
        now = time.monotonic()
        prompts = self._configuration.prompts
        open_ones: list[Revision] = []
        for revision in self._configuration.current.revisions:
            if not takes_traffic(revision) or revision.name not in prompts:
                continue
            if self._endpoints.choices(revision.service, avoid, now, adapter_of(revision)):
                open_ones.append(revision)
        if not open_ones:
            return None
        revision = open_ones[0] if len(open_ones) == 1 else self._by_weight(open_ones, session)
        endpoint = self._endpoints.least_busy(revision.service, avoid, now, adapter_of(revision))
        return Target(revision, endpoint) if endpoint else None

    def _by_weight(self, revisions: list[Revision], session: str) -> Revision:
        """A session's place is the same in every replica and after a restart. The canary comes first: those that it has, it keeps when its
        weight rises. Each canary has other sessions, so that nobody is always the first to try."""
        ordered = sorted(revisions, key=lambda r: (r.state is not RevisionState.CANDIDATE, r.name))
        total = sum(revision.weight for revision in ordered)
        place = (session_place(session, ordered[0].name) if session else self._random.random()) * total
        for revision in ordered:
            place -= revision.weight
            if place < 0:
                return revision
        return ordered[-1]

    async def wait(self, session: str = "", size: int = 0) -> Target:
        """A target, waited for within bounds: `size` is what the request keeps in memory. Raises Refused 503 with Retry-After."""
        target = self.choose(session=session)
        if target is not None:
            return target
        if self._held_bytes + size > self._configuration.current.limits.max_held_bytes:
            raise Refused(503, "Too many requests wait for the model to start.", code="overloaded", retry_after=RETRY_AFTER_SECONDS)
        self.held, self._held_bytes = self.held + 1, self._held_bytes + size
        try:
            return await self._hold(session, time.monotonic() + self.wait_seconds)
        finally:
            self.held, self._held_bytes = self.held - 1, self._held_bytes - size

    async def _hold(self, session: str, deadline: float) -> Target:
        while (target := self.choose(session=session)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or self._is_closing:
                raise Refused(503, "No replica of the model is ready.", code="no_replica_ready", retry_after=RETRY_AFTER_SECONDS)
            await self._endpoints.changed(min(left, 1.0))
        return target

    async def again(self, avoid: set[Endpoint], session: str = "") -> Target | None:
        """A target for another attempt: a replica not tried yet, else (after a moment) the same one; None where all are gone."""
        target = self.choose(avoid, session)
        if target is None:
            await asyncio.sleep(self._random.uniform(0.1, 0.3))
            target = self.choose(avoid, session) or self.choose(session=session)
        return target


def session_place(session: str, salt: str) -> float:
    """From 0 to 1, evenly over sessions."""
    digest = hashlib.blake2b(session.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest) / 2**64
