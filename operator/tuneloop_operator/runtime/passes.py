"""One pass: observe, decide, carry out. And the workers that do them, and what becomes of errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tuneloop_operator.cluster.apply import Applier, Outcome
from tuneloop_operator.cluster.cache import Object
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.errors import (
    AlreadyExists,
    ApiError,
    ChildRefused,
    Conflict,
    Forbidden,
    NameConflict,
    NotFound,
    NotLeader,
    ServerError,
    Unreachable,
)
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain.decision import Decision, Key
from tuneloop_operator.runtime.logs import about
from tuneloop_operator.runtime.metrics import Metrics
from tuneloop_operator.runtime.queue import FIRST_BACKOFF, LONGEST_BACKOFF, WakeQueue

log = logging.getLogger(__name__)

LONGEST_PASS = 120.0
CONFLICT_BACKOFF = 0.05
OUTAGE_BACKOFF = 5.0
"""Longest backoff while the API server is away: no object's fault, and work shall go on soon after."""
TAKEN_SECONDS = 30.0
"""How often a name that is taken is looked at, where the decision does not say."""
REFUSED_SECONDS = 10.0
"""What the API server refused is not tried again sooner, but for a wake: the spec may be another."""
IDLE_PAUSE = 1.0
"""A pass that wrote nothing does not ask for the next one sooner than this."""


MOMENT = 0.25
"""News of children come in groups: what a pass wrote, and what controllers make of it, is looked at once, so much later."""
CHAIN = 8
"""Passes that may follow one another after a moment because each wrote something."""


current_key: ContextVar[Key | None] = ContextVar("current_key", default=None)
"""Whose pass this is."""


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Passes:
    """Takes keys from the queue and carries out their passes."""

    registrations: dict[str, Registration[Any]]
    cluster: Cluster
    applier: Applier
    queue: WakeQueue
    metrics: Metrics
    now: Callable[[], datetime] = utc_now
    _in_a_row: dict[Key, int] = field(default_factory=dict)
    """Passes of a key that changed something, one after another."""

    async def work(self) -> None:
        """One worker; runs until it is cancelled."""
        while True:
            await self.run_one(await self.queue.take())

    async def run_one(self, key: Key) -> None:
        """A pass and what follows from its end. Never raises but for cancellation."""
        started = time.monotonic()
        current_key.set(key)
        try:
            async with asyncio.timeout(LONGEST_PASS):
                outcome = await self._pass(key)
        except Exception as error:  # noqa: BLE001 - whatever it was, the others go on
            outcome = await self._after(key, error)
        finally:
            self.queue.release(key)  # cancelled on the way
        self.metrics.passes.labels(key.kind, outcome).inc()
        self.metrics.pass_duration.labels(key.kind).observe(time.monotonic() - started)

    async def _pass(self, key: Key) -> str:
        """The pass itself; returns its outcome for the metrics."""
        owner = self.cluster.cache.get(key.kind, key.namespace, key.name)
        if owner is None or owner["metadata"].get("deletionTimestamp"):
            self.queue.done(key)
            return "gone"
        if owner["metadata"]["uid"] in self.cluster.conflicts:
            await self.cluster.forget_free_names(owner["metadata"]["uid"])
        self.cluster.forget_refusals_of_another_spec(owner["metadata"]["uid"], owner["metadata"].get("generation", 0))
        registration, now = self.registrations[key.kind], self.now()
        snapshot = await registration.observe(key, self.cluster, self.cluster.settings, now)
        if snapshot is None:
            self.queue.done(key)
            return "gone"
        decision = registration.decide(snapshot, self.cluster.settings, now)
        return await self._carry_out(key, owner, decision, now)

    async def _carry_out(self, key: Key, owner: Object, decision: Decision, now: datetime) -> str:
        uid = owner["metadata"]["uid"]
        known = self._known_problems(uid)
        try:
            outcome = await self.applier.carry_out(owner, decision, now)
        except (NameConflict, ChildRefused) as error:
            self.metrics.errors.labels(key.kind, error.label).inc()
            is_news = not ({error.key} | self._known_problems(uid)) <= known
            if is_news:
                log.warning("%s", error, extra=about(key))
            is_refused = isinstance(error, ChildRefused)
            again_in = max(decision.requeue_after or TAKEN_SECONDS, REFUSED_SECONDS if is_refused else 0.0)
            self.queue.done(key, 0.0 if is_news else again_in)
            return "failed" if is_refused else "conflict"
        if outcome.event_errors:
            self.metrics.errors.labels(key.kind, "event").inc(outcome.event_errors)
        self.queue.done(key, self._next_look(key, outcome, decision))
        if not outcome.is_changed:
            return "unchanged"
        log.info("%s", _told(outcome), extra=about(key))
        return "changed"

    def _known_problems(self, uid: str) -> frozenset[Key]:
        """Children that were told of already: their names are taken, or they are refused."""
        return frozenset(self.cluster.conflicts.get(uid, ())) | {refusal.key for refusal in self.cluster.refused(uid)}

    def _next_look(self, key: Key, outcome: Outcome, decision: Decision) -> float | None:
        """A pass that wrote something is followed by another: what is counted before it is done is written by the first, done by the
        second, and the write itself wakes nobody, since its answer is in the cache before its event comes. Passes that change something
        every time do not chase one another for long."""
        if not outcome.is_changed:
            self._in_a_row.pop(key, None)
            return None if decision.requeue_after is None else max(decision.requeue_after, IDLE_PAUSE)
        self._in_a_row[key] = self._in_a_row.get(key, 0) + 1
        longest = MOMENT if self._in_a_row[key] <= CHAIN else IDLE_PAUSE
        return longest if decision.requeue_after is None else min(decision.requeue_after, longest)

    async def _after(self, key: Key, error: Exception) -> str:
        """Counts, tells and answers an error; returns the outcome for the metrics."""
        label = "unreachable" if isinstance(error, TimeoutError) else getattr(error, "label", "bug")
        self.metrics.errors.labels(key.kind, label).inc()
        if isinstance(error, NotLeader):
            # A leader that was starved for a while may find its Lease run out, and renew it as if nothing had happened. A new leader looks
            # at everything anyway.
            self.queue.failed(key, FIRST_BACKOFF, OUTAGE_BACKOFF)
            return "fenced"
        if isinstance(error, Forbidden) and error.is_namespace_ending:
            self.queue.done(key)
            return "gone"
        if isinstance(error, (Conflict, AlreadyExists, NotFound)):
            await self._refresh(key, error.key if isinstance(error, Conflict) else None)
            self.queue.failed(key, CONFLICT_BACKOFF)
            return "conflict"
        is_outage = isinstance(error, (ServerError, Unreachable, TimeoutError))
        seconds = self.queue.failed(key, FIRST_BACKOFF, OUTAGE_BACKOFF if is_outage else LONGEST_BACKOFF)
        if is_outage or isinstance(error, ApiError):
            log.warning("%s; again in %.1f s", error, seconds, extra=about(key))
        else:
            log.error("a pass failed; again in %.1f s", seconds, exc_info=error, extra=about(key))
        return "failed"

    async def _refresh(self, *keys: Key | None) -> None:
        """Reads anew what a 409 showed to be out of date, in case the watch is behind."""
        try:
            for key in dict.fromkeys(keys):
                if key is not None:
                    await self.cluster.refresh(key)
        except (ApiError, Unreachable) as error:
            log.info("could not refresh after a conflict: %s", error)


def _told(outcome: Outcome) -> str:
    parts = ["status"] if outcome.status else []
    for word, keys in (("created", outcome.created), ("applied", outcome.applied), ("deleted", outcome.deleted)):
        parts += [f"{word} {key.kind} {key.name}" for key in keys]
    return "wrote " + ", ".join(parts)
