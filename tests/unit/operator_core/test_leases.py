"""The elector, with a Lease in memory and clocks of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from tuneloop_operator.cluster.errors import AlreadyExists, Conflict, NotFound, NotLeader, Unreachable
from tuneloop_operator.runtime.leases import Elector
from tuneloop_operator.settings import Settings


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class OneLease:
    """An API server with one Lease, and a switch to turn it off."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.is_up = True
        self.writes = 0

    async def request(self, verb: str, method: str, path: str, *, body: Any = None, limits: Any = None) -> dict[str, Any]:
        if not self.is_up:
            raise Unreachable("down")
        if method == "GET":
            if self.lease is None:
                raise NotFound(404, "NotFound", "")
            return self.lease
        current = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if method == "POST" and self.lease is not None:
            raise AlreadyExists(409, "AlreadyExists", "")
        if method == "PUT" and body["metadata"]["resourceVersion"] != current:
            raise Conflict(409, "Conflict", "")
        self.writes += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.writes)}}
        return self.lease


class Replica:
    def __init__(self, server: OneLease, clock: Clock, name: str) -> None:
        self.changes: list[bool] = []
        self.elector = Elector(server, Settings(identity=name), self.changes.append, clock)  # type: ignore[arg-type]

    async def attempt(self) -> bool:
        await self.elector._attempt()
        self.elector._tell()
        return self.elector.is_leader


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> OneLease:
    return OneLease()


@pytest.fixture
def a(server: OneLease, clock: Clock) -> Replica:
    return Replica(server, clock, "a")


@pytest.fixture
def b(server: OneLease, clock: Clock) -> Replica:
    return Replica(server, clock, "b")


async def test_one_leads_and_the_other_waits(a: Replica, b: Replica, clock: Clock) -> None:
    assert await a.attempt()
    for _ in range(20):
        clock.now += 2
        assert await a.attempt()
        assert not await b.attempt()
    assert (a.changes, b.changes) == ([True], [])


async def test_a_leader_that_cannot_renew_stops_before_another_begins(a: Replica, b: Replica, clock: Clock, server: OneLease) -> None:
    await a.attempt()
    await b.attempt()
    last_led = taken_at = 0.0
    for _ in range(120):  # a is cut off, b is not
        clock.now += 0.1
        server.is_up = False
        await a.attempt()
        server.is_up = True
        if a.elector.is_leader:
            last_led = clock.now
        if await b.attempt():
            taken_at = clock.now
            break
    assert 1005 < last_led < taken_at
    assert taken_at - last_led >= 2.9, "a margin for requests under way"
    assert taken_at <= 1010


async def test_a_write_is_refused_as_soon_as_time_is_up(a: Replica, clock: Clock) -> None:
    await a.attempt()
    a.elector.guard()
    clock.now += 6.0  # stopped, and continued: no attempt in between
    with pytest.raises(NotLeader):
        a.elector.guard()


async def test_a_leader_that_was_asleep_finds_the_lease_taken(a: Replica, b: Replica, clock: Clock) -> None:
    await a.attempt()
    await b.attempt()
    clock.now += 20
    assert await b.attempt()
    assert not await a.attempt()
    assert a.changes == [True, False]
    assert b.elector.is_leader


async def test_the_time_is_counted_from_when_the_lease_was_last_seen_to_change(a: Replica, b: Replica, clock: Clock) -> None:
    await a.attempt()
    clock.now += 100  # b comes up late: it must watch the Lease for its own 9 s, whatever renewTime says
    assert not await b.attempt()
    clock.now += 8
    assert not await b.attempt()
    clock.now += 2
    assert await b.attempt()


async def test_a_released_lease_is_taken_at_once(a: Replica, b: Replica) -> None:
    await a.attempt()
    assert not await b.attempt()
    await a.elector.release()
    assert await b.attempt()
    assert a.changes == [True, False]


async def test_a_restarted_holder_leads_at_once(a: Replica, server: OneLease, clock: Clock) -> None:
    await a.attempt()
    assert await Replica(server, clock, "a").attempt()


async def test_transitions_are_counted(a: Replica, b: Replica, server: OneLease, clock: Clock) -> None:
    await a.attempt()
    await b.attempt()
    clock.now += 10
    await b.attempt()
    assert server.lease is not None
    assert (server.lease["spec"]["leaseTransitions"], server.lease["spec"]["holderIdentity"]) == (1, "b")
