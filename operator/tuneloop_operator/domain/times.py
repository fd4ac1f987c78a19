"""Times as they stand in objects: RFC 3339 in UTC, with a Z."""

from __future__ import annotations

from datetime import UTC, datetime


def to_text(moment: datetime) -> str:
    """`2026-01-31T12:00:00Z`; fractions of a second are dropped."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_minute(moment: datetime) -> str:
    """The same with the seconds cut off, for estimates that would otherwise change at every look."""
    return to_text(moment.replace(second=0, microsecond=0))


def parse(text: str | None) -> datetime | None:
    """The moment; None for none, and for what is no time (another writer's status is not to be trusted)."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def seconds_between(start: str | None, end: datetime) -> float:
    """Seconds from a written time until `end`, never negative; 0 where nothing is written."""
    begin = parse(start)
    return 0.0 if begin is None else max(0.0, (end - begin).total_seconds())
