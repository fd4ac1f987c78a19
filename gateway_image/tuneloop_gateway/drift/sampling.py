"""Which requests are looked at: a uniform reference, live rows mixed over a window, at a pace that makes the reference last."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from tuneloop_gateway.drift.features import Features


class Reservoir:
    """A uniform sample of fixed size of all rows offered (algorithm R)."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size, self.seen = size, 0
        self.rows: list[Features] = []
        self._rng = rng

    def place(self) -> int | None:
        """Counts one row; the place it shall take, or None. Asked before the row's features are computed."""
        self.seen += 1
        if len(self.rows) < self.size:
            return len(self.rows)
        place = self._rng.randrange(self.seen)
        return place if place < self.size else None

    def put(self, place: int, row: Features) -> None:
        if place == len(self.rows):
            self.rows.append(row)
        else:
            self.rows[place] = row


@dataclass(frozen=True)
class Waiting:
    """A live row in the buffer. `share` is the probability with which rows were admitted when it came."""

    row: Features
    at: float
    share: float


class MixingBuffer:
    """Live rows of the last `window` seconds, of which one at a time is drawn uniformly and used once.

    Bounded by admitting a smaller share of rows when it is full; rows admitted at different shares are drawn with
    inverse weight, so a draw stays uniform over the window.
    """

    def __init__(self, window: float, capacity: int, rng: random.Random) -> None:
        self.window, self.capacity = window, capacity
        self.rows: deque[Waiting] = deque()
        self.share = 1.0
        self._raised_at = float("-inf")
        self._rng = rng

    def admits(self, now: float) -> bool:
        """Whether the row that came now shall be added. Asked for every row, before its features are computed."""
        self._expire(now)
        if len(self.rows) < self.capacity // 4 and self.share < 1:
            self.share = min(1.0, self.share * 2)
            self._raised_at = now
        return self.share >= 1 or self._rng.random() < self.share

    def add(self, row: Features, now: float) -> None:
        self.rows.append(Waiting(row, now, self.share))
        if len(self.rows) > self.capacity:
            self._thin()

    def _thin(self) -> None:
        """Halves the share of new rows, and of old ones above it."""
        self.share /= 2
        kept = (w for w in self.rows if w.share <= self.share or self._rng.random() < self.share / w.share)
        self.rows = deque(Waiting(w.row, w.at, min(w.share, self.share)) for w in kept)

    def _expire(self, now: float) -> None:
        while self.rows and self.rows[0].at < now - self.window:
            self.rows.popleft()

    def draw(self) -> Features | None:
        """Takes one row out."""
        if not self.rows:
            return None
        if self.rows[0].at > self._raised_at:
            at = self._rng.randrange(len(self.rows))
        else:
            at = self._rng.choices(range(len(self.rows)), [1 / w.share for w in self.rows])[0]
        waiting = self.rows[at]
        del self.rows[at]
        return waiting.row


class Pace:
    """Allows `per_second` draws, saved up for at most `burst`."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self.per_second, self.burst = per_second, burst
        self._saved, self._at = 0.0, now

    def due(self, now: float) -> bool:
        """True where a draw may be made now (and counts it)."""
        self._saved = min(self.burst, self._saved + max(0.0, now - self._at) * self.per_second)
        self._at = max(now, self._at)
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
