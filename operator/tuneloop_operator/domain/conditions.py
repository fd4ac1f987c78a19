"""Conditions as every kind's status holds them: their time changes only when what they say turns over."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

from tuneloop_operator.api.types import Condition, ConditionStatus
from tuneloop_operator.domain import times

MESSAGE_LIMIT = 1024


def condition(type_: StrEnum, holds: bool | None, reason: StrEnum, message: str, generation: int) -> Condition:
    """A condition that holds, does not hold, or is not known yet (None)."""
    status = ConditionStatus.UNKNOWN if holds is None else ConditionStatus.TRUE if holds else ConditionStatus.FALSE
    return Condition(type=type_.value, status=status, reason=reason.value, message=shortened(message), observed_generation=generation)


def with_times(before: Iterable[Condition], after: Iterable[Condition], now: datetime) -> tuple[Condition, ...]:
    """`after`, each with the time of its last turn: the old one where the status is the same, now where it is not."""
    known = {old.type: old for old in before}

    def since(new: Condition) -> str:
        old = known.get(new.type)
        return old.last_transition_time if old is not None and old.status == new.status and old.last_transition_time else times.to_text(now)

    return tuple(new.model_copy(update={"last_transition_time": since(new)}) for new in after)


def find(conditions: Iterable[Condition], type_: StrEnum) -> Condition | None:
    return next((found for found in conditions if found.type == type_.value), None)


def is_true(conditions: Iterable[Condition], type_: StrEnum) -> bool:
    found = find(conditions, type_)
    return found is not None and found.status is ConditionStatus.TRUE


def shortened(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
