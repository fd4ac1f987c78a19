"""Deletes what is past its retention, and what one subject asked or said: in small steps, off the request path, counted."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Literal

from sqlalchemy import ColumnElement, Table, delete, or_, select, tuple_

from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import ForgetReceipt
from tuneloop_gateway.database import Database, Unavailable, allowances, captured, corrections, feedback, labels, usage
from tuneloop_gateway.metrics import Metrics

logger = logging.getLogger(__name__)
CURATED_DAYS = 180
USAGE_DAYS = 400
"""Of what keys used: a year and the month in which it is accounted for."""
SWEEP_SECONDS = 3600.0
STEP_ROWS = 500
DAY = 86400.0

Reason = Literal["retention", "subject"]


class Retention:
    """Every method but `run` raises Unavailable where the database is away; what was deleted until then stays deleted."""

    def __init__(self, configuration: Configuration, database: Database, metrics: Metrics) -> None:
        self._configuration, self._database, self._metrics = configuration, database, metrics

    async def run(self) -> None:
        """Sweeps at start and every hour. Several replicas do no harm to each other. Runs for ever."""
        while True:
            try:
                if gone := await self.sweep(time.time()):
                    logger.info("Retention: %d rows deleted.", gone)
            except Unavailable as error:
                logger.warning("Retention could not be enforced now: %s.", error)
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self, now: float) -> int:
        """Raw rows and votes after the configured days, curated rows (which hold their own copy of a text) after 180, usage after 400."""
        raw = now - self._configuration.current.capture.retention_days * DAY
        gone = await self._delete(captured, captured.c.captured_at < raw, "retention")
        gone += await self._delete(feedback, feedback.c.updated_at < raw, "retention")
        for table in (labels, corrections):
            gone += await self._delete(table, table.c.updated_at < now - CURATED_DAYS * DAY, "retention")
        await self._delete(usage, usage.c.day < time.strftime("%Y-%m-%d", time.gmtime(now - USAGE_DAYS * DAY)), None)
        await self._delete(allowances, (allowances.c.requests_until < now - DAY) & (allowances.c.tokens_until < now - DAY), None)
        return gone

    async def forget(self, subject: str) -> ForgetReceipt:
        """What the subject asked, and what was learnt from it; what it said about answers, its own or others'."""
        receipt = ForgetReceipt(
            subject=subject,
            captured=await self._delete(captured, captured.c.subject == subject, "subject"),
            feedback=await self._delete(feedback, feedback.c.subject == subject, "subject"),
            labels=await self._delete(labels, labels.c.asked_by == subject, "subject"),
            corrections=await self._delete(
                corrections, or_(corrections.c.subject == subject, corrections.c.asked_by == subject), "subject"
            ),
        )
        await self._delete(allowances, allowances.c.subject == subject, None)
        logger.info("A subject's rows were deleted: %s.", receipt.model_dump(exclude={"subject"}))
        return receipt

    async def _delete(self, table: Table, which: ColumnElement[bool], reason: Reason | None) -> int:
        """Step by step, each a transaction of its own: nobody waits long for any of them."""
        keys = list(table.primary_key)
        key: Any = tuple_(*keys) if len(keys) > 1 else keys[0]
        gone = 0
        while True:
            async with self._database.begin() as connection:
                step = select(*keys).where(which).limit(STEP_ROWS)
                deleted = (await connection.execute(delete(table).where(key.in_(step)))).rowcount
            gone += deleted
            if reason is not None:
                self._metrics.deleted(table.name, reason, deleted)
            if deleted < STEP_ROWS:
                return gone
