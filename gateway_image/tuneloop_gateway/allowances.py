"""What a key may use a minute, in requests and tokens: counted in the shared database, or in this process where it is alone.

Each key has two buckets that hold a minute's allowance and fill evenly. A request takes its place in the first at once; its tokens are
taken from the second when the engine has told how many they were, so that bucket may fall below empty, and the key waits until it is
above again. With PostgreSQL one statement asks and takes for all replicas, by the server's clock. SQLite means one replica, whose memory
is exact. While PostgreSQL does not answer, each replica counts for itself: a limit is no reason to refuse everybody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from asyncpg import UndefinedTableError
from sqlalchemy.exc import SQLAlchemyError

from tuneloop_gateway.contract import Limits
from tuneloop_gateway.database import Database
from tuneloop_gateway.schema import Newer
from tuneloop_gateway.statements import FAILURES

logger = logging.getLogger(__name__)
MINUTE = 60.0
ANSWER_SECONDS = 2.0
"""A request waits no longer for the database."""
AWAY_SECONDS = 5.0
"""For so long the database is not asked again after it failed."""
CONNECTIONS = 4
AWAY: tuple[type[Exception], ...] = (*FAILURES, SQLAlchemyError, Newer)
CHARGES = 64
"""Charges that may be under way at once; more are made in this process's own count."""


@dataclass(frozen=True)
class Wait:
    """Why a request may not pass now, and for how long."""

    seconds: float
    what: str
    """requests or tokens"""


class Allowances(Protocol):
    async def take(self, subject: str, limits: Limits) -> Wait | None:
        """Takes one request; None where it may pass."""
        ...

    def charge(self, subject: str, tokens: int, limits: Limits) -> None:
        """Takes tokens that were used. Does not wait."""
        ...


def is_limited(limits: Limits) -> bool:
    return limits.requests_per_minute is not None or limits.tokens_per_minute is not None


def _request_seconds(limits: Limits) -> float:
    """The part of a minute that one request takes."""
    return MINUTE / limits.requests_per_minute if limits.requests_per_minute is not None else 0.0


def _wait(requests_until: float, tokens_until: float, now: float, limits: Limits) -> Wait | None:
    """`*_until`: when the bucket is full again."""
    if limits.tokens_per_minute is not None and tokens_until - now >= MINUTE:
        return Wait(tokens_until - now - MINUTE, "tokens")
    step = _request_seconds(limits)
    if requests_until - now > MINUTE - step + 1e-6:
        return Wait(requests_until - now - MINUTE + step, "requests")
    return None


class OwnAllowances:
    """In the memory of this process."""

    def __init__(self) -> None:
        self._until: dict[str, tuple[float, float]] = {}

    async def take(self, subject: str, limits: Limits) -> Wait | None:
        return self.take_at(subject, limits, time.monotonic())

    def take_at(self, subject: str, limits: Limits, now: float) -> Wait | None:
        requests, tokens = self._until.get(subject, (now, now))
        requests = max(requests, now)
        wait = _wait(requests, tokens, now, limits)
        if wait is None:
            self._until[subject] = (requests + _request_seconds(limits), tokens)
            if len(self._until) > 10_000:
                self._until = {s: at for s, at in self._until.items() if max(at) > now}
        return wait

    def charge(self, subject: str, tokens: int, limits: Limits) -> None:
        self.charge_at(subject, tokens, limits, time.monotonic())

    def charge_at(self, subject: str, tokens: int, limits: Limits, now: float) -> None:
        if limits.tokens_per_minute is not None and tokens > 0:
            requests, until = self._until.get(subject, (now, now))
            self._until[subject] = (requests, max(until, now) + tokens * MINUTE / limits.tokens_per_minute)


NOW = "extract(epoch from statement_timestamp())::float8"
TAKE = (
    f"INSERT INTO allowances AS a (subject, requests_until, tokens_until) VALUES ($1, {NOW} + $2::float8, {NOW}) "
    f"ON CONFLICT (subject) DO UPDATE SET requests_until = greatest(a.requests_until, {NOW}) + $2::float8 "
    f"WHERE greatest(a.requests_until, {NOW}) + $2::float8 <= {NOW} + 60.000001 "
    f"AND (NOT $3::bool OR a.tokens_until < {NOW} + 60) RETURNING 1"
)
"""No row: it may not pass."""
LOOK = f"SELECT requests_until - {NOW}, tokens_until - {NOW} FROM allowances WHERE subject = $1"
CHARGE = (
    f"INSERT INTO allowances AS a (subject, requests_until, tokens_until) VALUES ($1, {NOW}, {NOW} + $2::float8) "
    f"ON CONFLICT (subject) DO UPDATE SET tokens_until = greatest(a.tokens_until, {NOW}) + $2::float8"
)


class SharedAllowances:
    """In PostgreSQL, for all replicas; in this process's memory while that does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._own = OwnAllowances()
        self._connections = database.beside(ANSWER_SECONDS, CONNECTIONS)
        self._away_until = 0.0
        self._charges: set[asyncio.Task[None]] = set()

    async def take(self, subject: str, limits: Limits) -> Wait | None:
        if time.monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await self._ask(subject, limits)
            except AWAY as error:
                self._note(error)
        return await self._own.take(subject, limits)

    async def _ask(self, subject: str, limits: Limits) -> Wait | None:
        await self._database.prepare()
        if await self._connections.row(TAKE, subject, _request_seconds(limits), limits.tokens_per_minute is not None) is not None:
            return None
        row = await self._connections.row(LOOK, subject)
        return (row and _wait(row[0], row[1], 0.0, limits)) or Wait(0.0, "requests")

    def charge(self, subject: str, tokens: int, limits: Limits) -> None:
        if limits.tokens_per_minute is None or tokens <= 0:
            return
        if time.monotonic() < self._away_until or len(self._charges) >= CHARGES:
            self._own.charge(subject, tokens, limits)
            return
        task = asyncio.create_task(self._charge(subject, tokens, limits))
        self._charges.add(task)
        task.add_done_callback(self._charges.discard)

    async def _charge(self, subject: str, tokens: int, limits: Limits) -> None:
        try:
            await self._connections.row(CHARGE, subject, tokens * MINUTE / (limits.tokens_per_minute or tokens))
        except AWAY as error:
            self._note(error)
            self._own.charge(subject, tokens, limits)

    async def open(self) -> None:
        """Opens connections, so that the first requests do not wait for that. It is no loss where it fails: they try again."""
        with suppress(*AWAY):
            await self._database.prepare()
            await self._connections.open()

    def _note(self, error: Exception) -> None:
        now = time.monotonic()
        if now >= self._away_until:
            logger.warning("Limits are counted in this replica alone now: %s.", type(getattr(error, "orig", None) or error).__name__)
        self._away_until = now + AWAY_SECONDS
        if isinstance(error, UndefinedTableError):
            self._database.look_again()

    async def close(self) -> None:
        if self._charges:
            await asyncio.wait(self._charges, timeout=ANSWER_SECONDS)
        self._connections.close()
