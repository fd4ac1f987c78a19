"""Live inputs beside those that the served version was trained on: detector B, once over a fixed sample. No I/O and no clock of its own."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np

from tuneloop_gateway.contract import Drift, SkewReport
from tuneloop_gateway.drift.detector import Detector
from tuneloop_gateway.drift.features import Features, features
from tuneloop_gateway.drift.process import Arrays, rows_of, rows_to_arrays
from tuneloop_gateway.drift.sampling import MixingBuffer, Pace

PAIRS_AT_ONCE = 8
PAIRS_AFTER = 200
"""Pairs after the difference was seen, which tell how large it is."""
BUFFER = 1024
"""Live rows that wait to be drawn: few, since no more than the sample's are needed."""
CHANCE = 100
"""The evidence must reach so many times the number of pairs. Within n pairs it reaches c by chance at most n times in c, so one version in
a hundred is said to be unlike its training for nothing."""


class Skew:
    """One comparison of one version. `take` is told every canonical input; after the last pair it does nothing any more. The reference is
    in random order."""

    def __init__(self, key: str, version: int | None, reference: list[Features], settings: Drift, now: float, rng: random.Random) -> None:
        self.key, self.version, self.reference, self.since = key, version, reference, now
        self.used = 0
        self.detected_at: int | None = None
        """Pairs that it took."""
        self.detector = Detector()
        self.threshold = math.log(max(settings.false_alarm_every_requests, float(CHANCE * max(len(reference), 1))))
        self._rng = rng
        self.configure(settings, now)

    def configure(self, settings: Drift, now: float) -> None:
        """As many pairs as the sample has within one window, drawn from a whole one, so that the time of day is no difference."""
        self.window = max(settings.mix_over_seconds, 0.0)
        interval = max(self.window / max(len(self.reference), 1), 1e-6)
        self.buffer = MixingBuffer(self.window, BUFFER, self._rng)
        self.pace = Pace(1 / interval, max(32.0, len(self.reference)), now)

    @property
    def is_over(self) -> bool:
        """The sample is used up, or the difference has been seen and its size is known."""
        enough = len(self.reference) if self.detected_at is None else min(self.detected_at + PAIRS_AFTER, len(self.reference))
        return self.used >= enough

    def take(self, text: str, now: float) -> None:
        if self.is_over or not self.buffer.admits(now):
            return
        self.buffer.add(features(text), now)
        if now - self.since < self.window:
            return
        for _ in range(PAIRS_AT_ONCE):
            if self.is_over or not self.buffer.rows or not self.pace.due(now):
                return
            live = self.buffer.draw()
            if live is not None:
                self._pair(live)

    def _pair(self, live: Features) -> None:
        self.detector.pair(live, self.reference[self.used])
        self.used += 1
        if self.detected_at is None and self.detector.log_evidence >= self.threshold:
            self.detected_at = self.used
        if self.is_over:
            self.buffer.rows.clear()

    def report(self) -> SkewReport:
        return SkewReport(
            version=self.version,
            status="Comparing" if not self.is_over else "Alike" if self.detected_at is None else "Differ",
            log_evidence=self.detector.log_evidence,
            log_threshold=self.threshold,
            effect=self.detector.effect(),
            pairs=self.detector.pairs,
            reference_rows=len(self.reference),
        )

    # --- what survives a restart ---

    def save(self) -> Arrays:
        """Hashed rows only, no text. Live rows that wait are not saved: others come."""
        detector = self.detector
        meta = {
            "key": self.key, "used": self.used, "detected_at": self.detected_at, "pairs": detector.pairs, "since": self.since,
            "log_m": [None if m == -math.inf else m for m in detector.log_m],
        }  # fmt: skip
        return {
            **rows_to_arrays(self.reference),
            "weights": detector.weights.copy(),
            "squares": detector.squares.copy(),
            "scores": np.array(detector.scores or np.zeros((0, 2))),
            "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        }


def restored(arrays: Arrays, key: str, version: int | None, settings: Drift, now: float, rng: random.Random) -> Skew | None:
    """None where what was saved is of another version. Raises KeyError, ValueError or TypeError where it is not what was saved."""
    meta: dict[str, Any] = json.loads(arrays["meta"].tobytes())
    if meta["key"] != key:
        return None
    skew = Skew(key, version, rows_of(arrays), settings, now, rng)
    skew.since = float(meta["since"])
    skew.used, skew.detected_at = int(meta["used"]), None if meta["detected_at"] is None else int(meta["detected_at"])
    detector = skew.detector
    detector.log_m = [-math.inf if m is None else float(m) for m in meta["log_m"]]
    detector.pairs = int(meta["pairs"])
    detector.weights, detector.squares = arrays["weights"].copy(), arrays["squares"].copy()
    detector.scores.extend((float(a), float(b)) for a, b in arrays["scores"])
    return skew
