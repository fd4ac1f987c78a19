"""The wake queue: which object's turn it is. One pass per object at a time, many wakes are one pass, a backoff outlives wakes."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable

from tuneloop_operator.domain.decision import Key

FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 60.0


class WakeQueue:
    """Not thread-safe: used in one event loop.

    A key is in at most one of these states: ready (in line for a worker), active (a worker has it), or idle. An idle key may have a time
    at which it becomes ready: `requeue_after` of its last pass, or the end of a backoff. A wake ends the first, never the second.
    """

    def __init__(self, clock: Callable[[], float] | None = None, jitter: Callable[[], float] = random.random) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._jitter = jitter
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._in_line: set[Key] = set()
        self._active: set[Key] = set()
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()
        self._woken: dict[Key, float] = {}
        self._held_until: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._due: dict[Key, float] = {}
        self._times: list[tuple[float, Key]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def depth(self) -> int:
        return self._ready.qsize()

    @property
    def scheduled(self) -> int:
        return len(self._due)

    @property
    def active(self) -> int:
        return len(self._active)

    def wake(self, key: Key, within: float = 0.0) -> None:
        """Something changed. A wake that may wait a moment is one pass with those that follow in it."""
        if key in self._active:
            self._woken[key] = min(within, self._woken.get(key, within))
        elif key not in self._in_line and self._held_until.get(key, 0.0) <= self._clock():
            self._line_up_within(key, within)

    async def take(self) -> Key:
        """The next key in line; the caller must report `done` or `failed`."""
        key = await self._ready.get()
        self._in_line.discard(key)
        self._active.add(key)
        self._is_quiet.clear()
        return key

    def done(self, key: Key, requeue_after: float | None = None) -> None:
        """The pass went through; look again after so many seconds, or at the next wake."""
        self._end(key)
        self._failures.pop(key, None)
        self._held_until.pop(key, None)
        waits = [seconds for seconds in (self._woken.pop(key, None), requeue_after) if seconds is not None]
        if waits:
            self._line_up_within(key, min(waits))

    def release(self, key: Key) -> None:
        """The pass was given up, by a worker that ends; nothing if its end was reported. A wake meanwhile is kept."""
        if key in self._active:
            self.done(key)

    def failed(self, key: Key, first: float = FIRST_BACKOFF, longest: float = LONGEST_BACKOFF) -> float:
        """The pass did not go through: again after a backoff, which doubles from `first` to `longest` with every failure in a row, less a
        jitter of up to a half. Returns it."""
        self._end(key)
        self._woken.pop(key, None)  # the coming pass sees it all
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        seconds = min(first * 2.0 ** min(failures - 1, 16), longest) * (0.5 + self._jitter() / 2)
        self._held_until[key] = self._clock() + seconds
        self._schedule(key, self._held_until[key])
        return seconds

    async def drain(self, seconds: float) -> None:
        """Forgets what is not begun, and waits for what is."""
        self.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._is_quiet.wait()
        except TimeoutError:
            return
        finally:
            self.clear()

    def clear(self) -> None:
        """Forgets everything but what is active."""
        while not self._ready.empty():
            self._ready.get_nowait()
        for state in (self._in_line, self._woken, self._held_until, self._failures, self._due, self._times):
            state.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, key: Key) -> None:
        self._active.discard(key)
        if not self._active:
            self._is_quiet.set()

    def _line_up_within(self, key: Key, seconds: float) -> None:
        """Sooner, if it is due sooner already."""
        when = self._clock() + seconds
        if seconds <= 0:
            self._line_up(key)
        elif when < self._due.get(key, float("inf")):
            self._schedule(key, when)

    def _line_up(self, key: Key) -> None:
        self._due.pop(key, None)
        self._in_line.add(key)
        self._ready.put_nowait(key)

    def _schedule(self, key: Key, when: float) -> None:
        self._due[key] = when
        heapq.heappush(self._times, (when, key))
        self._set_timer()

    def _set_timer(self) -> None:
        while self._times and self._due.get(self._times[0][1]) != self._times[0][0]:
            heapq.heappop(self._times)  # taken back since
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._times:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(self._times[0][0] - self._clock(), 0.0), self.release_due)

    def release_due(self) -> None:
        """Lines up every key whose time has come."""
        while self._times and self._times[0][0] <= self._clock() + 0.001:
            when, key = heapq.heappop(self._times)
            if self._due.get(key) != when:
                continue
            del self._due[key]
            self._held_until.pop(key, None)
            if key not in self._active and key not in self._in_line:
                self._line_up(key)
        self._set_timer()
