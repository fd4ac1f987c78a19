"""Keeps the comparison of live inputs with those of the training: fetches the sample from the engine, follows the served version, saves."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from tuneloop_gateway.canonical import canonical
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import GatewayConfig, Revision, RevisionState, SkewReport
from tuneloop_gateway.drift.features import Features, features
from tuneloop_gateway.drift.process import unpack
from tuneloop_gateway.drift.skew import Skew, restored

logger = logging.getLogger(__name__)
PART = "skew"
"""Its row of the table of the detector's parts."""
AGAIN_SECONDS = 30.0
SAVE_SECONDS = 20.0

FAILURES = (aiohttp.ClientError, OSError, ValueError, LookupError)

Fetch = Callable[[Revision], Awaitable[list[str] | None]]
"""Texts that the engine of a revision has recorded; None where it has none. Raises one of FAILURES."""


@dataclass(frozen=True)
class _Subject:
    """What is compared: another version, or texts that are redacted otherwise, is another comparison."""

    revision: Revision
    redact: bool

    @property
    def key(self) -> str:
        return f"{self.revision.model_id}@{self.revision.version}{'' if self.redact else ' unredacted'}"


class Comparing:
    """At most one comparison: of the version that has all traffic. Nothing of it happens while a request waits."""

    def __init__(self, configuration: Configuration, fetch: Fetch) -> None:
        self._configuration, self._fetch = configuration, fetch
        self._skew: Skew | None = None
        self._fetching: tuple[str, asyncio.Task[list[Features] | None]] | None = None
        self._has_none: set[str] = set()
        self._not_before = -math.inf
        self._saved_pairs, self._saved_at = -1, -math.inf
        self._rng = random.Random()

    @property
    def _wanted(self) -> _Subject | None:
        config: GatewayConfig = self._configuration.current
        stable = next((r for r in config.revisions if r.state is RevisionState.STABLE and r.reference), None)
        return _Subject(stable, config.capture.personal_data == "Redact") if stable is not None and config.drift is not None else None

    def take(self, text: str, now: float) -> None:
        skew = self._skew
        if skew is None or skew.is_over:
            return
        wanted = self._wanted
        if wanted is not None and skew.key == wanted.key:
            skew.take(text, now)

    def report(self) -> SkewReport | None:
        wanted, skew = self._wanted, self._skew
        return skew.report() if skew is not None and wanted is not None and skew.key == wanted.key else None

    def load(self, saved: bytes | None) -> None:
        """What another process of this deployment has saved; it goes on where it is of the version that serves."""
        self.stop()
        wanted, drift = self._wanted, self._configuration.current.drift
        if saved is None or wanted is None or drift is None:
            return
        try:
            self._skew = restored(unpack(saved), wanted.key, wanted.revision.version, drift, time.time(), self._rng)
        except (KeyError, ValueError, TypeError, zlib.error, OSError, EOFError) as error:
            logger.error("The saved comparison with the training cannot be read (%s); it starts afresh.", type(error).__name__)

    def stop(self) -> None:
        self._skew = None
        self._saved_pairs = -1
        if self._fetching is not None:
            self._fetching[1].cancel()
            self._fetching = None

    def step(self) -> None:
        """One look: starts what the served version asks for. The sample comes from the engine beside everything else."""
        wanted = self._wanted
        if wanted is None or (self._skew is not None and self._skew.key == wanted.key) or wanted.key in self._has_none:
            return
        if self._fetching is not None and self._fetching[0] != wanted.key:
            self.stop()
        if self._fetching is None:
            if time.monotonic() >= self._not_before:
                self._fetching = (wanted.key, asyncio.create_task(self._read(wanted)))
        elif self._fetching[1].done():
            task, self._fetching = self._fetching[1], None
            self._begin(wanted, task)

    async def _read(self, subject: _Subject) -> list[Features] | None:
        texts = await self._fetch(subject.revision)
        if texts is None:
            return None
        rows = await asyncio.to_thread(lambda: [features(canonical(text, redact=subject.redact)) for text in texts])
        self._rng.shuffle(rows)
        return rows

    def _begin(self, wanted: _Subject, task: asyncio.Task[list[Features] | None]) -> None:
        drift = self._configuration.current.drift
        try:
            rows = task.result()
        except FAILURES as error:
            self._not_before = time.monotonic() + AGAIN_SECONDS
            logger.warning("The sample of training inputs could not be read: %s %s", type(error).__name__, error)
            return
        if not rows or drift is None:
            self._has_none = {wanted.key}
            return
        self._skew, self._saved_pairs = Skew(wanted.key, wanted.revision.version, rows, drift, time.time(), self._rng), -1
        logger.info("Live inputs are compared with %d of the training of version %s.", len(rows), wanted.revision.version)

    def due(self, now: float, *, everything: bool) -> Skew | None:
        """The comparison, where it has to be saved now."""
        skew = self._skew
        if skew is None or skew.detector.pairs == self._saved_pairs or not (everything or now - self._saved_at > SAVE_SECONDS):
            return None
        return skew

    def saved(self, pairs: int, now: float) -> None:
        self._saved_pairs, self._saved_at = pairs, now
