"""One deployment's drift detection from epoch to epoch: collect a reference, monitor, alarm. No I/O and no clock of its own."""

from __future__ import annotations

import math
import random
import zlib
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tuneloop_gateway.contract import Drift, DriftReport, DriftStatus
from tuneloop_gateway.drift.detector import Detector
from tuneloop_gateway.drift.features import Features, features
from tuneloop_gateway.drift.sampling import MixingBuffer, Pace, Reservoir, Waiting

Arrays: TypeAlias = dict[str, NDArray[Any]]
EXHAUSTED_BELOW = 500
PAIRS_AT_ONCE = 8
"""Bounds the time that one request's arrival may take."""
BURST = 32


def exhausted_below(size: int) -> int:
    """Unused rows below which a reference is spent; less for references too small for that."""
    return EXHAUSTED_BELOW if size >= 1000 else min(EXHAUSTED_BELOW, size // 4)


@dataclass
class Progress:
    """What is small and changes with every pair."""

    epoch: str
    redact: bool
    """A reference that was redacted otherwise is another reference."""
    collecting: bool = True
    exhausted: bool = False
    """A reference was spent without an alarm, and another is being collected."""
    used: int = 0
    collecting_until: float | None = None
    """End of the window in which the reference is being collected."""
    monitoring_since: float | None = None
    detected_at: float | None = None
    seeded: bool = True
    """False until the inputs since the last alarm were read."""
    previous_alarm: float | None = None
    """When the epoch before was alarmed: where SinceAlarm starts."""


class Process:
    """The e-process of one epoch. `take` is told every canonical input."""

    def __init__(self, settings: Drift, progress: Progress, now: float, rng: random.Random) -> None:
        self._rng = rng
        self.progress = progress
        self.detector = Detector()
        self.reference: list[Features] = []
        self.reservoir = Reservoir(settings.size, rng)
        self.buffer = MixingBuffer(0.0, 1, rng)
        self.reference_changes = 0
        """Grows with every change of the reference or the reservoir."""
        self.configure(settings, now)

    def configure(self, settings: Drift, now: float) -> None:
        """Takes settings that may change within an epoch."""
        self.settings = settings
        interval = max(settings.horizon_days * 86400 / max(settings.size, 1), 1e-6)
        per_window = settings.mix_over_seconds / interval
        window = max(settings.mix_over_seconds, 0.0)
        capacity = int(min(max(4 * per_window, 256), 4096))
        buffer = MixingBuffer(window, capacity, self._rng)
        buffer.rows = self.buffer.rows
        self.buffer = buffer
        self.pace = Pace(1 / interval, max(BURST, per_window), now)

    @property
    def remaining(self) -> int:
        return len(self.reference) - self.progress.used

    @property
    def status(self) -> DriftStatus:
        if self.progress.detected_at is not None:
            return DriftStatus.ALARM
        if self.progress.collecting:
            return DriftStatus.EXHAUSTED if self.progress.exhausted else DriftStatus.COLLECTING
        return DriftStatus.MONITORING

    def take(self, text: str, now: float) -> None:
        """One request, in the order of arrival."""
        if not self.progress.seeded:
            return
        if self.progress.collecting:
            self._collect(text, now)
        elif self.remaining > 0 and self.buffer.admits(now):
            self.buffer.add(features(text), now)
            self._test(now)

    def _collect(self, text: str, now: float) -> None:
        """Samples until there are enough rows of whole windows: half a day more would be a reference of another mix."""
        if not self.settings.collect:
            return
        if self._is_whole(now):
            self.start(self.reservoir.rows, now)
            return
        place = self.reservoir.place()
        if place is not None:
            self.reservoir.put(place, features(text))
            self.reference_changes += 1
        if self.settings.mix_over_seconds <= 0 and self._is_whole(now):
            self.start(self.reservoir.rows, now)

    def _is_whole(self, now: float) -> bool:
        window, p = max(self.settings.mix_over_seconds, 0.0), self.progress
        if p.collecting_until is None:
            p.collecting_until = now + window
            return False
        if now < p.collecting_until:
            return False
        if len(self.reservoir.rows) >= self.settings.size:
            return True
        if window:
            p.collecting_until += window * math.ceil((now - p.collecting_until) / window + 1e-9)
        return False

    def start(self, reference: list[Features], now: float) -> None:
        """Starts a fresh e-process over a complete reference, in random order."""
        self._rng.shuffle(reference)
        self.reference, self.reservoir = reference, Reservoir(self.settings.size, self._rng)
        self.reference_changes += 1
        self.detector = Detector()
        self.buffer.rows.clear()
        self.pace = Pace(self.pace.per_second, self.pace.burst, now)
        p = self.progress
        p.collecting, p.exhausted, p.used, p.collecting_until, p.monitoring_since = False, False, 0, None, now

    def seed(self, texts: list[Features], now: float) -> None:
        """The inputs since the alarm as reference: enough to start with, or the first rows of one that live rows complete."""
        self.progress.seeded = True
        if len(texts) > exhausted_below(self.settings.size):
            self.start(texts[: self.settings.size], now)
            return
        for row in texts:
            place = self.reservoir.place()
            if place is not None:
                self.reservoir.put(place, row)
        self.reference_changes += 1

    def _test(self, now: float) -> None:
        """Draws live rows that are due and pairs each with an unused row of the reference."""
        since = self.progress.monitoring_since or 0.0
        if now - since < self.settings.mix_over_seconds:
            return  # the buffer does not hold a whole window yet
        for _ in range(PAIRS_AT_ONCE):
            if self.remaining == 0 or not self.buffer.rows or not self.pace.due(now):
                return
            live = self.buffer.draw()
            if live is None:
                return
            self.detector.pair(live, self.reference[self.progress.used])
            self.progress.used += 1
            self._judge(now)
            if self.progress.collecting:
                return

    def _judge(self, now: float) -> None:
        """The alarm latches; pairs after it sharpen the effect. Without one, a spent reference is replaced."""
        if self.progress.detected_at is not None:
            return
        if self.detector.log_evidence >= math.log(self.settings.false_alarm_every_requests):
            self.progress.detected_at = now
        elif self.remaining < exhausted_below(self.settings.size):
            self._renew()

    def _renew(self) -> None:
        self.reference, self.reservoir, self.detector = [], Reservoir(self.settings.size, self._rng), Detector()
        self.buffer.rows.clear()
        self.reference_changes += 1
        p = self.progress
        p.collecting, p.exhausted, p.used, p.collecting_until, p.monitoring_since = True, True, 0, None, None

    def report(self) -> DriftReport:
        collecting = self.progress.collecting
        return DriftReport(
            status=self.status,
            epoch=self.progress.epoch,
            log_evidence=self.detector.log_evidence,
            log_threshold=math.log(self.settings.false_alarm_every_requests),
            effect=self.detector.effect(),
            pairs=self.detector.pairs,
            reference_rows=len(self.reservoir.rows) if collecting else len(self.reference),
            reference_remaining=len(self.reservoir.rows) if collecting else self.remaining,
            detected_at=None if self.progress.detected_at is None else rfc3339(self.progress.detected_at),
        )

    # --- what survives a restart ---

    def save(self) -> dict[str, Any]:
        """What is small. A crash goes back to the last save as if the pairs after it had never been drawn."""
        log_m = [None if m == -math.inf else m for m in self.detector.log_m]
        return {**self.progress.__dict__, "log_m": log_m, "pairs": self.detector.pairs}

    def copy_detector(self) -> Arrays:
        detector = self.detector
        scores = np.array(detector.scores or np.zeros((0, 2)))
        return {"weights": detector.weights.copy(), "squares": detector.squares.copy(), "scores": scores}

    def copy_reference(self) -> Arrays:
        """Hashed rows only, no text."""
        rows = self.reservoir.rows if self.progress.collecting else self.reference
        return {**rows_to_arrays(rows), "seen": np.array(self.reservoir.seen)}

    def copy_buffer(self) -> Arrays:
        waiting = list(self.buffer.rows)
        return {**rows_to_arrays([w.row for w in waiting]), "at": np.array([(w.at, w.share) for w in waiting] or np.zeros((0, 2)))}

    def restore(self, meta: dict[str, Any], parts: dict[str, bytes]) -> None:
        """Raises KeyError, ValueError or TypeError where the parts are not what was saved."""
        detector = self.detector
        detector.log_m = [-math.inf if m is None else float(m) for m in meta["log_m"]]
        detector.pairs = int(meta["pairs"])
        arrays = unpack(parts["detector"])
        detector.weights, detector.squares = arrays["weights"].copy(), arrays["squares"].copy()
        detector.scores.extend((float(a), float(b)) for a, b in arrays["scores"])
        if "reference" in parts:
            arrays = unpack(parts["reference"])
            rows = rows_of(arrays)
            if self.progress.collecting:
                self.reservoir.rows, self.reservoir.seen = rows[: self.settings.size], int(arrays["seen"])
            else:
                self.reference = rows
        if "buffer" in parts:
            arrays = unpack(parts["buffer"])
            self.buffer.rows = deque(
                Waiting(row, float(at), float(share)) for row, (at, share) in zip(rows_of(arrays), arrays["at"], strict=True)
            )


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_progress(meta: dict[str, Any]) -> Progress:
    """Raises KeyError where it is of another version."""
    return Progress(**{name: meta[name] for name in Progress.__dataclass_fields__})


def rows_to_arrays(rows: list[Features]) -> Arrays:
    lengths = np.array([len(r) for r in rows], np.uint32)
    return {"buckets": np.concatenate(rows) if rows else np.zeros(0, np.uint16), "lengths": lengths}


def rows_of(arrays: Arrays) -> list[Features]:
    ends = np.cumsum(arrays["lengths"], dtype=np.int64)
    if (ends[-1] if len(ends) else 0) != len(arrays["buckets"]):
        raise ValueError("the saved rows are of another length than their index")
    return [row.copy() for row in np.split(arrays["buckets"], ends[:-1])] if len(ends) else []


def pack(arrays: Arrays) -> bytes:
    """Compressed; may run in a thread."""
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return zlib.compress(buffer.getvalue(), 1)


def unpack(data: bytes) -> Arrays:
    with np.load(BytesIO(zlib.decompress(data)), allow_pickle=False) as loaded:
        return dict(loaded)
