"""Health: a dead watch is told from a dead API server."""

from __future__ import annotations

from typing import Any

from tuneloop_operator.cluster.errors import Forbidden, Unreachable
from tuneloop_operator.runtime.probes import Health
from tuneloop_operator.settings import Settings

SILENCE_SECONDS = 180.0


class Server:
    error: Exception | None = None

    async def request(self, *_: Any, **__: Any) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {}


class Case:
    def __init__(self, **seen: float) -> None:
        self.now = 1000.0
        self.server = Server()
        self.seen = seen
        self.health = Health(self.server, lambda: self.seen, Settings().silence_seconds, lambda: self.now)  # type: ignore[arg-type]


async def test_a_watch_that_gave_a_sign_within_three_minutes_is_alive() -> None:
    case = Case(Job=1000.0 - SILENCE_SECONDS + 1)
    assert await case.health.silent_watches() == []


async def test_a_silent_watch_is_named_while_the_api_server_answers() -> None:
    case = Case(Job=1000.0 - SILENCE_SECONDS - 1, Pod=999.0)
    assert await case.health.silent_watches() == ["Job"]


async def test_an_api_server_that_is_down_makes_nobody_sick_and_the_time_begins_anew_after_it() -> None:
    case = Case(Job=0.0)
    for error in (Unreachable("down"), Forbidden(403, "Forbidden", "")):
        case.server.error = error
        assert await case.health.silent_watches() == []
    case.server.error = None
    case.now += SILENCE_SECONDS - 1
    assert await case.health.silent_watches() == [], "the watch has had no time to come back"
    case.now += 2
    assert await case.health.silent_watches() == ["Job"]


async def test_before_anything_is_watched_nothing_is_silent() -> None:
    assert await Case().health.silent_watches() == []
