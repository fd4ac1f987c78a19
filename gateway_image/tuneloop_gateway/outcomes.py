"""Counts what became of each revision's requests while a canary runs: what the operator's analysis compares.

Requests of one session are alike, so one session must not decide. Of each kind of failure one is counted for a session (their sum is then
dominated by that of independent requests, so the analysis' level holds), and latencies of its first few requests. Of a session's requests
the first, second, fourth, eighth and so on are looked at: if all counted, the one failure of a long session would vanish among them, and a
revision that fails every second request would pass.
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from tuneloop_gateway.answers import ABORT, Answer, read_answer
from tuneloop_gateway.configuration import Configuration
from tuneloop_gateway.contract import LATENCY_BUCKETS, LATENCY_EDGE_RATIO, LATENCY_LEAST_SECONDS
from tuneloop_gateway.contract import Outcomes as Report
from tuneloop_gateway.proxy import Exchange

FAILED = frozenset((ABORT, "error", "broken"))
LATENCIES_OF_A_SESSION = 4
MAX_SESSIONS = 20_000
"""Remembered of each revision; the oldest is forgotten."""
MAX_READ_BYTES = 64 << 10
"""Longer answers are not looked into."""
REPETITIVE_CHARS, REPETITIVE_RATIO = 2000, 4.0
"""The end of an answer is repetitive where zlib makes it so many times smaller; prose is at 1.5 to 2.5."""
LEAST_REPETITIVE_CHARS = 200
_REFUSAL = re.compile(
    r"\W*(i['’]?m sorry|i am sorry|sorry, (but )?i|i can(['’]t|not| not) |i['’]?m (unable|not able)|i (won['’]t|will not) |as an ai\b"
    r"|i must decline)",
    re.IGNORECASE,
)
_PER_EDGE = 1 / math.log(LATENCY_EDGE_RATIO)


@dataclass
class _Session:
    seen: set[str] = field(default_factory=set)
    latencies: int = 0
    requests: int = 0

    def is_next_counted(self) -> bool:
        """Of its first, second, fourth, eighth request and so on."""
        self.requests += 1
        return self.requests & (self.requests - 1) == 0


@dataclass
class _Tally:
    """Of one revision."""

    counts: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, list[int]] = field(default_factory=dict)
    sessions: dict[str, _Session] = field(default_factory=dict)

    def session(self, key: str) -> _Session:
        """An empty key is a session of its own each time."""
        if not key:
            return _Session()
        found = self.sessions.pop(key, None) or _Session()
        self.sessions[key] = found  # the youngest again
        if len(self.sessions) > MAX_SESSIONS:
            del self.sessions[next(iter(self.sessions))]
        return found

    def add(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def add_once(self, name: str, session: _Session) -> None:
        if name not in session.seen:
            session.seen.add(name)
            self.add(name)

    def observe(self, name: str, seconds: float) -> None:
        buckets = self.buckets.setdefault(name, [0] * LATENCY_BUCKETS)
        buckets[bucket_of(seconds)] += 1


def bucket_of(seconds: float) -> int:
    if seconds < LATENCY_LEAST_SECONDS:
        return 0
    return min(LATENCY_BUCKETS - 1, 1 + int(math.log(seconds / LATENCY_LEAST_SECONDS) * _PER_EDGE))


class Outcomes:
    """Starts from nothing with each window; counts nothing where there is none."""

    def __init__(self, configuration: Configuration, clock: Callable[[], float] = time.time) -> None:
        self._configuration, self._clock = configuration, clock
        self._tallies: dict[str, _Tally] = {}
        self.window = ""
        self.since = 0.0
        configuration.on_change(self._follow)
        self._follow()

    def _follow(self) -> None:
        if self._configuration.current.window != self.window:
            self.window, self.since, self._tallies = self._configuration.current.window, self._clock(), {}

    def _tally(self, revision: str) -> _Tally:
        return self._tallies.setdefault(revision, _Tally())

    def failed(self, exchange: Exchange) -> None:
        """An attempt gave nothing, and the request goes to another replica: it counts against the revision, once."""
        if self.window and exchange.revision and exchange.revision not in exchange.failed_on:
            exchange.failed_on.add(exchange.revision)
            tally = self._tally(exchange.revision)
            self._error(tally, tally.session(exchange.session))

    def ended(self, exchange: Exchange) -> None:
        """After the last byte, or the last attempt."""
        if not self.window or not exchange.revision or exchange.revision in exchange.failed_on:
            return
        tally = self._tally(exchange.revision)
        session = tally.session(exchange.session)
        if exchange.status == 499:
            # Who gave up before the first token waited at least so long for it.
            if exchange.sent is None and exchange.inbound.stream and not exchange.failed_on:
                self._latency(tally, session, first_token=time.perf_counter() - exchange.started)
        elif exchange.status >= 500 or (exchange.status < 400 and exchange.finish_reason in FAILED):
            self._error(tally, session)
        elif exchange.status < 400:
            if not exchange.failed_on:  # else the other revision's attempt is in its time
                self._latencies(tally, session, exchange)
            if session.is_next_counted():
                tally.add("requests")
                self._answer(tally, session, exchange)

    def _error(self, tally: _Tally, session: _Session) -> None:
        if session.is_next_counted():
            tally.add("requests")
            tally.add_once("errors", session)

    def _latencies(self, tally: _Tally, session: _Session, exchange: Exchange) -> None:
        end = time.perf_counter()
        if not exchange.inbound.stream:
            self._latency(tally, session, whole_answer=(end - exchange.started) / max(1, exchange.tokens[1]))
            return
        between = (end - exchange.first_at) / (exchange.events - 1) if exchange.events > 1 else None
        self._latency(tally, session, first_token=exchange.first_at - exchange.started, inter_token=between)

    def _latency(self, tally: _Tally, session: _Session, **seconds: float | None) -> None:
        if session.latencies < LATENCIES_OF_A_SESSION:
            session.latencies += 1
            for name, value in seconds.items():
                if value is not None:
                    tally.observe(name, value)

    def _answer(self, tally: _Tally, session: _Session, exchange: Exchange) -> None:
        is_whole = exchange.keep or not exchange.inbound.stream
        if not is_whole or exchange.kept_bytes > MAX_READ_BYTES:
            return
        answer = read_answer(b"".join(exchange.kept), stream=exchange.inbound.stream)
        if answer.finish_reason == "tool_calls":
            return
        tally.add("answers")
        for name in faults_of(answer):
            tally.add_once(name, session)

    def voted(self, revision: str, asked_at: float, subject: str, *, is_up: bool) -> None:
        """A thumb on an answer of this window. One subject's thumbs down count once, as failures do."""
        if not self.window or asked_at < self.since or revision not in self._tallies:
            return
        tally = self._tallies[revision]
        if is_up:
            tally.add("up")
        else:
            tally.add_once("down", tally.session(f"subject {subject}"))

    def report(self, revision: str) -> Report:
        tally = self._tallies.get(revision)
        if tally is None:
            return Report()
        buckets = {name: _trimmed(counts) for name, counts in tally.buckets.items()}
        return Report.model_validate(tally.counts | buckets)


def faults_of(answer: Answer) -> list[str]:
    """What is wrong with an answer, by its form alone."""
    found = []
    if not answer.text.strip() and answer.finish_reason == "stop":
        found.append("empty")
    if _REFUSAL.match(answer.text[:200]):
        found.append("refused")
    if answer.finish_reason == "repetition" or _is_repetitive(answer.text[-REPETITIVE_CHARS:]):
        found.append("repetitive")
    if answer.finish_reason == "length":
        found.append("cut_short")
    return found


def _is_repetitive(text: str) -> bool:
    raw = text.encode("utf-8", "replace")
    return len(text) >= LEAST_REPETITIVE_CHARS and len(raw) > REPETITIVE_RATIO * len(zlib.compress(raw, 1))


def _trimmed(buckets: list[int]) -> tuple[int, ...]:
    last = max((place for place, count in enumerate(buckets) if count), default=-1)
    return tuple(buckets[: last + 1])
