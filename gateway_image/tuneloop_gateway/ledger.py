"""What each key uses in a day, for whoever is to pay for it: counted here, kept in the database, summed over replicas and restarts.

Each process has rows of its own and writes its totals, not increments: a write that is repeated because nobody knows whether it was
done changes nothing. What was counted since the last write is lost where a process is killed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select

from tuneloop_gateway.contract import UsageRow
from tuneloop_gateway.database import Database, Unavailable, upsert, usage
from tuneloop_gateway.errors import invalid

logger = logging.getLogger(__name__)
WRITE_SECONDS = 5.0
MAX_ROWS = 100_000
"""Of one report."""
COUNTED = ("requests", "failed", "prompt_tokens", "completion_tokens")


class Ledger:
    """`add` does not wait; `run` writes. While the database is away totals grow in memory, a row for each key and day."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock, self._writer = database, clock, secrets.token_hex(8)
        self._totals: dict[tuple[str, str], tuple[int, ...]] = {}
        self._unwritten: set[tuple[str, str]] = set()
        self._turn = asyncio.Lock()

    def _today(self) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._clock()))

    def add(self, subject: str, requests: int = 0, failed: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """One request, when it ended."""
        place = (self._today(), subject)
        before = self._totals.get(place, (0, 0, 0, 0))
        self._totals[place] = tuple(map(sum, zip(before, (requests, failed, prompt_tokens, completion_tokens), strict=True)))
        self._unwritten.add(place)

    async def run(self) -> None:
        """Writes every few seconds. Runs for ever."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            try:
                await self.write()
            except Unavailable as error:
                logger.warning("Usage could not be written now, and is kept: %s.", error)

    async def write(self) -> None:
        """One statement for all that is new. Raises Unavailable."""
        async with self._turn:  # a write that is overtaken by another would leave its older totals
            written = {place: self._totals[place] for place in sorted(self._unwritten)}
            if written:
                async with self._database.begin() as connection:
                    await connection.execute(upsert(connection, usage), [self._row(*item) for item in written.items()])
                self._unwritten -= {place for place, total in written.items() if self._totals[place] == total}
            today = self._today()
            self._totals = {place: total for place, total in self._totals.items() if place in self._unwritten or place[0] >= today}

    async def close(self) -> None:
        """The last write."""
        try:
            await self.write()
        except Unavailable as error:
            lost = [
                dict(zip(("day", "subject", *COUNTED), (*place, *self._totals[place]), strict=True)) for place in sorted(self._unwritten)
            ]
            logger.error("Usage could not be written at the end (%s). This process counted: %s.", error, lost)

    def _row(self, place: tuple[str, str], total: tuple[int, ...]) -> dict[str, Any]:
        own = {"day": place[0], "subject": place[1], "writer": self._writer}
        return own | dict(zip(COUNTED, total, strict=True))

    async def report(self, since: str, until: str, names: Callable[[str], str | None]) -> list[UsageRow]:
        """A row for each day (2026-01-31) and key. Raises Refused and Unavailable."""
        await self.write()
        asked = (
            select(usage.c.day, usage.c.subject, *(func.sum(usage.c[name]) for name in COUNTED))
            .where(usage.c.day.between(since, until))
            .group_by(usage.c.day, usage.c.subject)
            .order_by(usage.c.day, usage.c.subject)
            .limit(MAX_ROWS + 1)
        )
        async with self._database.begin() as connection:
            found = (await connection.execute(asked)).all()
        if len(found) > MAX_ROWS:
            raise invalid(f"There are more than {MAX_ROWS:,} rows; ask for fewer days at a time.", "until")
        return [
            UsageRow(day=day, key=names(subject), subject=subject, **dict(zip(COUNTED, map(int, counts), strict=True)))
            for day, subject, *counts in found
        ]
