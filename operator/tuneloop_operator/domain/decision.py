"""What a pass decides: the objects that should be, those that should go, the status, and when to look again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tuneloop_operator.domain.conditions import shortened

REFUSAL_LIMIT = 600
"""Characters that are quoted of the API server."""

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
class Refusal:
    """A child that the API server does not take as it was rendered; its words, and the generation of the spec that it was rendered from."""

    key: Key
    message: str
    generation: int

    @property
    def sentence(self) -> str:
        """The API server's, of a bounded length, with what to do."""
        said = shortened(self.message, REFUSAL_LIMIT).rstrip(". ")
        return f"The API server refuses {self.key.kind} {self.key.name}: {said}. Correct the spec, or what refuses it."


def refusal_of(refusals: Iterable[Refusal], manifests: Iterable[Manifest]) -> Refusal | None:
    """The first that still matters: a refused child that is wanted no longer keeps nothing."""
    wanted = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    return next((refusal for refusal in refusals if (refusal.key.kind, refusal.key.name) in wanted), None)


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
