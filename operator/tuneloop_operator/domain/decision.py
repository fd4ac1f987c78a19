"""What a pass decides: the objects that should be, those that should go, the status, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Manifest = dict[str, Any]
"""A Kubernetes object as JSON; typed by its renderer, opaque to everybody else."""


@dataclass(frozen=True)
class Key:
    """Names one object."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True)
class Target:
    """An observed object that should go; the delete carries its UID as a precondition."""

    key: Key
    uid: str


@dataclass(frozen=True)
class EventNote:
    """An event for the object itself; written only if the status write of the pass succeeded."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """The outcome of `decide`. Applied in this order: status and events, create, apply, delete.

    The status goes first, with a resourceVersion precondition: if it does not get through, nothing else of the pass happens.
    So what must be counted before it is done is written by one pass (status only) and done by the next one.
    """

    status: dict[str, Any]
    """The whole status, camelCase, as it should be; written only if it differs from what was observed."""
    create: tuple[Manifest, ...] = ()
    """Made once by POST under a deterministic name; 409 counts as made; never applied again (ModelVersions, retraining jobs, Secrets)."""
    apply: tuple[Manifest, ...] = ()
    """Owned children as they should be; made if absent, updated where their spec-hash differs, with the owner reference set by `apply`."""
    delete: tuple[Target, ...] = ()
    events: tuple[EventNote, ...] = ()
    requeue_after: float | None = None
    """Seconds until the next pass without a wake; None = wait for a wake."""


class Invalid(Exception):
    """The user must change the spec: Stalled, no retry until something changes."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass
class WaitingFor(Exception):
    """Something else must happen first: named in the condition, looked at again after `seconds`."""

    reason: str
    message: str
    seconds: float = 10.0
