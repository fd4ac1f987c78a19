"""Stores what was asked and answered, off the request path: bounded queues, batches, and counts of what was lost."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tuneloop_gateway.answers import read_answer
from tuneloop_gateway.canonical import MAX_CHARS, canonical, redact_personal_data, storable
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import CaptureReport
from tuneloop_gateway.database import Database, Unavailable, captured, insert_unless_there
from tuneloop_gateway.inbound import Inbound
from tuneloop_gateway.metrics import Metrics
from tuneloop_gateway.proxy import Exchange

logger = logging.getLogger(__name__)
BATCH = 200
BATCH_SECONDS = 0.25
TRIES = 3
LARGE_ANSWER_BYTES = 32 << 10
MAX_QUEUED_BYTES = 64 << 20

Row = dict[str, Any]  # column -> value, as SQLAlchemy wants it


class Capture:
    """Two bounded queues: exchanges as they end, and rows ready to be stored. `inputs` is told every canonical input."""

    def __init__(self, configuration: Configuration, database: Database, metrics: Metrics, inputs: Callable[[str, float], None]) -> None:
        self._configuration, self._database, self._metrics, self._inputs = configuration, database, metrics, inputs
        self._ended: deque[Exchange] = deque()
        self._rows: deque[Row] = deque()
        self._wake, self._rows_wake = asyncio.Event(), asyncio.Event()
        self._captured = self._dropped = self._busy = self._bytes = 0
        self.new_rows = 0
        """Grows with every stored row."""

    def wants_answer(self) -> bool:
        """Decided before the answer comes, so that what is not captured need not be kept."""
        rate = self._configuration.current.capture.sample_rate
        return rate >= 1 or random.random() < rate

    @property
    def pending(self) -> int:
        return len(self._ended) + len(self._rows) + self._busy

    def report(self) -> CaptureReport:
        return CaptureReport(captured=self._captured, dropped=self._dropped, pending=self.pending)

    def offer(self, exchange: Exchange) -> None:
        """Never blocks: a full queue drops and counts."""
        if exchange.status != 200 or not exchange.inbound.text:
            return
        inbound = exchange.inbound
        exchange.inbound = Inbound(inbound.path, {}, inbound.text[:MAX_CHARS], inbound.stream)  # a queue of whole bodies would be gigabytes
        size = exchange.kept_bytes + len(exchange.inbound.text)
        if self.pending >= self._configuration.current.capture.queue_size or self._bytes + size > MAX_QUEUED_BYTES:
            if exchange.keep:
                self._drop("queue_full", 1)
            return
        self._bytes += size
        self._ended.append(exchange)
        self._wake.set()

    def _drop(self, reason: str, rows: int) -> None:
        self._dropped += rows
        self._metrics.dropped(reason, rows)

    async def prepare(self) -> None:
        """Turns exchanges into rows, one at a time. Runs for ever; goes on while the database is away."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ended:
                exchange = self._ended.popleft()
                self._bytes -= exchange.kept_bytes + len(exchange.inbound.text)
                await self._prepare_one(exchange)
                await asyncio.sleep(0)  # requests come first

    async def _prepare_one(self, exchange: Exchange) -> None:
        redact = self._configuration.current.capture.personal_data == "Redact"
        text = canonical(exchange.inbound.text, redact=redact)
        self._inputs(text, exchange.received_at)
        if not exchange.keep:
            return
        if exchange.kept_bytes > LARGE_ANSWER_BYTES:
            self._busy += 1
            try:
                self._rows.append(await asyncio.to_thread(_row, exchange, text, redact))
            finally:
                self._busy -= 1
        else:
            self._rows.append(_row(exchange, text, redact))
        self._rows_wake.set()

    async def write(self) -> None:
        """Stores rows in batches. Runs for ever."""
        while True:
            await self._rows_wake.wait()
            self._rows_wake.clear()
            if len(self._rows) < BATCH:
                await asyncio.sleep(BATCH_SECONDS)
            while self._rows:
                await self._write_batch()

    async def _write_batch(self) -> None:
        batch = [self._rows.popleft() for _ in range(min(BATCH, len(self._rows)))]
        self._busy += len(batch)
        try:
            for attempt in range(TRIES):
                try:
                    await self._store(batch)
                    return
                except Unavailable as error:
                    logger.warning("Captured rows could not be stored (%s), attempt %d of %d.", error, attempt + 1, TRIES)
                    await asyncio.sleep(random.uniform(0.5, 1.0) * 2**attempt)
                except Exception:
                    logger.exception("Captured rows cannot be stored.")
                    break
            self._drop("database", len(batch))
        finally:
            self._busy -= len(batch)

    async def _store(self, batch: list[Row]) -> None:
        async with self._database.begin() as connection:
            # An attempt that timed out may have been stored all the same.
            await connection.execute(insert_unless_there(connection, captured), batch)
        self._captured += len(batch)
        self.new_rows += len(batch)
        self._metrics.captured(len(batch))

    def forget(self, subject: str) -> None:
        """What waits to be stored of this subject is not stored. It was not lost, so it does not count as dropped."""
        self._rows = deque(row for row in self._rows if row["subject"] != subject)
        for exchange in self._ended:
            if exchange.subject == subject:
                exchange.keep = False

    async def flush(self, seconds: float) -> None:
        """Before the end: stores what is pending, once, and counts what could not be stored."""
        deadline = time.monotonic() + seconds
        while self.pending and time.monotonic() < deadline:
            self._wake.set()
            self._rows_wake.set()
            await asyncio.sleep(0.05)
        if lost := self.pending:
            logger.error("%d captured rows were lost at the end.", lost)


def _row(exchange: Exchange, text: str, redact: bool) -> Row:
    answer = read_answer(b"".join(exchange.kept), stream=exchange.inbound.stream)
    return {
        "id": exchange.response_id,
        "captured_at": exchange.received_at,
        "revision": exchange.revision,
        "version": exchange.version,
        "text": text,
        "answer": storable(redact_personal_data(answer.text[:MAX_CHARS]) if redact else answer.text[:MAX_CHARS]),
        "finish_reason": answer.finish_reason[:32],
        "subject": exchange.subject,
    }
