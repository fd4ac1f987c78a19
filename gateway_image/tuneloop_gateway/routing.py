"""Which revision and which replica a request goes to."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Set
from dataclasses import dataclass

from tuneloop_gateway.configuration import Configuration, takes_traffic
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
        self._configuration, self._endpoints, self.wait_seconds = configuration, endpoints, wait_seconds
        self._random = random.Random()
        self.counts: dict[str, RevisionCount] = {}
        configuration.on_change(endpoints.notify)

    def count(self, revision: str) -> RevisionCount:
        return self.counts.setdefault(revision, RevisionCount())

    def forget_gone(self) -> None:
        """Counts of revisions that the configuration no longer has, once their last request ended."""
        names = {r.name for r in self._configuration.current.revisions}
        self.counts = {name: count for name, count in self.counts.items() if name in names or count.in_flight}

    def choose(self, avoid: Set[Endpoint] = frozenset(), session: str = "") -> Target | None:
        """A target whose replica is not in `avoid`; None where there is none now."""
        now = time.monotonic()
        prompts = self._configuration.prompts
        open_ones: list[Revision] = []
        for revision in self._configuration.current.revisions:
            if takes_traffic(revision) and revision.name in prompts and self._endpoints.choices(revision.service, avoid, now):
                open_ones.append(revision)
        if not open_ones:
            return None
        revision = open_ones[0] if len(open_ones) == 1 else self._by_weight(open_ones, session)
        endpoint = self._endpoints.least_busy(revision.service, avoid, now)
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

    async def wait(self, avoid: Set[Endpoint] = frozenset(), session: str = "") -> Target:
        """A target, waited for within bounds. Raises Refused 503 with Retry-After."""
        target = self.choose(avoid, session)
        deadline = time.monotonic() + self.wait_seconds
        while target is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Refused(503, "No replica of the model is ready.", code="no_replica_ready", retry_after=RETRY_AFTER_SECONDS)
            await self._endpoints.changed(min(left, 1.0))
            target = self.choose(avoid, session)
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
