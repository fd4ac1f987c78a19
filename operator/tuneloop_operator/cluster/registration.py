"""What a kind must say of itself to be reconciled: how it is observed, how it is decided, and what wakes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.domain.decision import Decision, Key
from tuneloop_operator.settings import Settings

Snapshot = TypeVar("Snapshot")


@dataclass(frozen=True)
class Registration(Generic[Snapshot]):
    """One kind. Each observe module defines one as REGISTRATION; `registrations` collects them."""

    kind: str
    observe: Callable[[Key, Cluster, Settings, datetime], Awaitable[Snapshot | None]]
    """All that the decision rests on; None where the object is gone."""
    decide: Callable[[Snapshot, Settings, datetime], Decision]
    children: tuple[str, ...] = ()
    """Kinds of the children. An event of one wakes the object that controls it, directly or through another child, or that its
    label `tuneloop.dev/<kind>` names. They are watched where they carry our `app.kubernetes.io/managed-by`."""
    watches: Mapping[str, Callable[[dict[str, Any], Cache], Iterable[Key]]] = field(default_factory=dict)
    """Other kinds -> which objects of ours an event of such an object wakes."""
