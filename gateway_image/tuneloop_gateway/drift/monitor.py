"""Runs the drift process in one replica of the gateway, and keeps its state in the database."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
import zlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import Drift, DriftReport, DriftStatus, SkewReport
from tuneloop_gateway.database import Database, Unavailable, captured, drift_parts, drift_state, upsert
from tuneloop_gateway.drift.comparing import PART, Comparing
from tuneloop_gateway.drift.features import Features, features
from tuneloop_gateway.drift.process import Process, Progress, pack, parse_progress

logger = logging.getLogger(__name__)
ROW = 1
LEASE_SECONDS = 15.0
TICK_SECONDS = 2.0
DETECTOR_SECONDS = 5.0
REFERENCE_SECONDS = 20.0
BUFFER_SECONDS = 60.0


@dataclass
class _Saved:
    """What the database has already."""

    state: str = ""
    status: DriftStatus | None = None
    detector_at: float = -math.inf
    reference_changes: int = -1
    reference_at: float = -math.inf
    buffer_at: float = -math.inf


class Monitor:
    """Owner: feeds the process and saves it. Follower: reports what the owner saved."""

    def __init__(self, configuration: Configuration, database: Database, name: str, comparing: Comparing) -> None:
        self._configuration, self._database, self._name, self._comparing = configuration, database, name, comparing
        self._process: Process | None = None
        self._saved = _Saved()
        self._followed: DriftReport | None = None
        self._followed_at: float | None = None
        self._followed_skew: SkewReport | None = None
        self._wake = asyncio.Event()
        self._rng = random.Random()
        configuration.on_change(self._wake.set)

    # --- what others see ---

    @property
    def settings(self) -> Drift | None:
        return self._configuration.current.drift

    @property
    def epoch(self) -> str:
        return self.settings.epoch if self.settings else "0"

    def take(self, text: str, now: float) -> None:
        """One canonical input. Cheap: most of its work is done for sampled rows only."""
        process = self._process
        if process is not None:
            self._comparing.take(text, time.time())
        if process is not None and self.settings is not None and process.progress.epoch == self.settings.epoch:
            was = process.status
            process.take(text, time.time())
            if process.status is not was:
                logger.info("Drift detection: %s (epoch %s).", process.status.value, process.progress.epoch)
                self._wake.set()

    def report(self) -> DriftReport | None:
        """None until the saved state of this epoch has been read: to say that nothing was found would take an alarm back."""
        settings = self.settings
        if settings is None:
            return DriftReport(status=DriftStatus.OFF, epoch="0")
        if self._process is not None and self._process.progress.epoch == settings.epoch:
            return self._process.report()
        if self._followed is not None and self._followed.epoch == settings.epoch:
            return self._followed
        if self._process is None:
            return None
        return DriftReport(status=DriftStatus.COLLECTING, epoch=settings.epoch, log_threshold=math.log(settings.false_alarm_every_requests))

    def skew(self) -> SkewReport | None:
        """None where nothing is compared, or before the saved state has been read."""
        if self.settings is None:
            return None
        return self._comparing.report() if self._process is not None else self._followed_skew

    @property
    def alarmed_since(self) -> float | None:
        """When the latched alarm was raised; while the next epoch waits for labels of none, None."""
        if self._process is not None and self._process.progress.epoch == self.epoch:
            return self._process.progress.detected_at
        if self._followed is not None and self._followed.epoch == self.epoch and self._followed.detected_at:
            return self._followed_at
        return None

    # --- the loop ---

    async def run(self) -> None:
        """Holds the lease, follows the epoch, saves. Runs for ever; the database may come and go."""
        while True:
            try:
                await self.step()
            except Unavailable as error:
                logger.warning("Drift state could not be kept now: %s.", error)
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def step(self) -> None:
        """One round."""
        settings = self.settings
        if settings is None:
            self._process = None
            return
        if not await self._hold():
            self._process = None
            await self._follow()
            return
        if self._process is None:
            self._process = await self._load(settings)
        await self._enter_epoch(settings)
        self._comparing.step()
        await self.save()

    async def _hold(self) -> bool:
        """Takes or renews the lease of the one detector."""
        now = time.time()
        async with self._database.begin() as connection:
            mine = or_(drift_state.c.owner == self._name, drift_state.c.owner.is_(None), drift_state.c.lease_until < now)
            change = update(drift_state).where(drift_state.c.id == ROW, mine).values(owner=self._name, lease_until=now + LEASE_SECONDS)
            if (await connection.execute(change)).rowcount:
                return True
            if (await connection.execute(select(drift_state.c.id).where(drift_state.c.id == ROW))).first() is not None:
                return False
            await connection.execute(insert(drift_state).values(id=ROW, owner=self._name, lease_until=now + LEASE_SECONDS))
            return True

    async def _follow(self) -> None:
        async with self._database.begin() as connection:
            raw = (await connection.execute(select(drift_state.c.meta).where(drift_state.c.id == ROW))).scalar()
        if raw:
            meta = json.loads(raw)
            self._followed, self._followed_at = DriftReport.model_validate(meta["report"]), meta.get("detected_at")
            self._followed_skew = SkewReport.model_validate(meta["skew"]) if meta.get("skew") else None

    async def _load(self, settings: Drift) -> Process:
        """The process as it was saved, or a new one."""
        async with self._database.begin() as connection:
            raw = (await connection.execute(select(drift_state.c.meta).where(drift_state.c.id == ROW))).scalar()
            rows = (await connection.execute(select(drift_parts.c.name, drift_parts.c.data))).all()
        self._saved = _Saved()
        self._comparing.load(next((bytes(data) for name, data in rows if name == PART), None))
        if raw:
            try:
                meta = json.loads(raw)
                process = Process(settings, parse_progress(meta), time.time(), self._rng)
                await asyncio.to_thread(process.restore, meta, {name: bytes(data) for name, data in rows})
            except (KeyError, ValueError, TypeError, zlib.error, OSError, EOFError) as error:
                logger.error("The saved drift state cannot be read (%s); detection starts afresh.", type(error).__name__)
            else:
                logger.info("Drift detection goes on: %s, %d pairs.", process.status.value, process.detector.pairs)
                return process
        return self._fresh(settings, None)

    def _fresh(self, settings: Drift, previous_alarm: float | None) -> Process:
        seeded = settings.seed == "Fresh" or previous_alarm is None
        progress = Progress(epoch=settings.epoch, redact=self._redact, seeded=seeded, previous_alarm=previous_alarm)
        return Process(settings, progress, time.time(), self._rng)

    @property
    def _redact(self) -> bool:
        return self._configuration.current.capture.personal_data == "Redact"

    async def _enter_epoch(self, settings: Drift) -> None:
        """Starts afresh where the epoch changed, and seeds what is not seeded."""
        process = self._process
        assert process is not None
        if process.progress.epoch != settings.epoch:
            logger.info("Drift detection starts afresh: epoch %s, %s.", settings.epoch, settings.seed)
            process = self._process = self._fresh(settings, process.progress.detected_at)
        elif process.progress.redact != self._redact and process.progress.detected_at is None:
            process = self._process = self._fresh(settings, None)
        elif process.settings != settings:
            process.configure(settings, time.time())
        if not process.progress.seeded:
            rows = await self._since_alarm(process.progress.previous_alarm or 0.0, settings.size)
            process.seed(rows, time.time())
            logger.info("The reference starts with %d inputs captured since the alarm: %s.", len(rows), process.status.value)

    async def _since_alarm(self, alarm: float, size: int) -> list[Features]:
        """A uniform sample of the inputs captured since the alarm, each once."""
        async with self._database.begin() as connection:
            chosen = select(captured.c.text).where(captured.c.captured_at >= alarm).order_by(func.random()).limit(size)
            texts = [row.text for row in await connection.execute(chosen)]
        return await asyncio.to_thread(lambda: [features(text) for text in texts])

    # --- saving ---

    async def save(self, *, everything: bool = False) -> None:
        """Writes what changed: the detector each round, the reference and the buffer less often."""
        process, saved = self._process, self._saved
        if process is None:
            return
        skew = self._comparing.report()
        meta = {**process.save(), "report": process.report().model_dump(mode="json"), "skew": skew and skew.model_dump(mode="json")}
        state = json.dumps(meta, separators=(",", ":"))
        now = time.monotonic()
        changes, urgent = process.reference_changes, everything or process.status is not saved.status
        compared = self._comparing.due(now, everything=everything)
        if (state == saved.state and compared is None) or not (urgent or now - saved.detector_at > DETECTOR_SECONDS):
            return
        parts: dict[str, Any] = {"detector": process.copy_detector()}
        if changes != saved.reference_changes and (urgent or now - saved.reference_at > REFERENCE_SECONDS):
            parts["reference"] = process.copy_reference()
        if process.settings.mix_over_seconds > BUFFER_SECONDS and (everything or now - saved.buffer_at > BUFFER_SECONDS):
            parts["buffer"] = process.copy_buffer()
        if compared is not None:
            parts[PART], pairs = compared.save(), compared.detector.pairs
        packed = {name: await asyncio.to_thread(pack, arrays) for name, arrays in parts.items()}
        async with self._database.begin() as connection:
            await self._write(connection, state, packed)
        saved.state, saved.status, saved.detector_at = state, process.status, now
        if "reference" in parts:
            saved.reference_changes, saved.reference_at = changes, now
        if "buffer" in parts:
            saved.buffer_at = now
        if compared is not None:
            self._comparing.saved(pairs, now)

    async def _write(self, connection: AsyncConnection, state: str, parts: dict[str, bytes]) -> None:
        """Only while the lease is ours: another owner's state is not overwritten."""
        mine = update(drift_state).where(drift_state.c.id == ROW, drift_state.c.owner == self._name).values(meta=state)
        if not (await connection.execute(mine)).rowcount:
            self._process = None
            return
        for name, data in parts.items():
            await connection.execute(upsert(connection, drift_parts), {"name": name, "data": data})

    async def stop(self) -> None:
        """Saves everything and gives the lease away."""
        try:
            await self.save(everything=True)
            self._comparing.stop()
            async with self._database.begin() as connection:
                mine = (drift_state.c.id == ROW, drift_state.c.owner == self._name)
                await connection.execute(update(drift_state).where(*mine).values(owner=None, lease_until=0.0))
        except Unavailable as error:
            logger.error("The drift state could not be saved at the end: %s.", error)
