"""Which objects of ours an event wakes: the object itself, who controls it, whom its label names, and who watches its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tuneloop_operator.cluster.cache import Cache, Object, controller
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain.decision import Key

DEPTH = 3
"""Controllers of controllers: a pod is a Job's, the Job is a FineTuneJob's."""


class Routes:
    """The registrations, read from the events' side."""

    def __init__(self, registrations: Sequence[Registration[Any]], cache: Cache) -> None:
        self.registrations = {registration.kind: registration for registration in registrations}
        self.cache = cache
        self._labels = {f"tuneloop.dev/{kind.lower()}": kind for kind in self.registrations}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind to be watched: ours first."""
        kinds = dict.fromkeys(self.registrations)
        for registration in self.registrations.values():
            kinds.update(dict.fromkeys((*registration.children, *registration.watches)))
        return tuple(kinds)

    def targets(self, kind: str, obj: Object) -> set[Key]:
        """Keys to wake for an event of this object."""
        metadata = obj["metadata"]
        namespace = metadata.get("namespace", "")
        keys = set(self.watchers(kind, obj))
        if kind in self.registrations:
            keys.add(Key(kind, namespace, metadata["name"]))
        owner = self._owner(obj, DEPTH)
        if owner is not None:
            keys.add(owner)
        elif kind not in self.registrations:
            labels = metadata.get("labels") or {}
            keys.update(Key(owner_kind, namespace, labels[label]) for label, owner_kind in self._labels.items() if label in labels)
        return keys

    def _owner(self, obj: Object, depth: int) -> Key | None:
        reference = controller(obj)
        if reference is None or depth == 0:
            return None
        namespace = obj["metadata"].get("namespace", "")
        if reference["kind"] in self.registrations:
            return Key(reference["kind"], namespace, reference["name"])
        parent = self.cache.get(reference["kind"], namespace, reference["name"])
        return self._owner(parent, depth - 1) if parent is not None else None

    def watchers(self, kind: str, obj: Object) -> Iterator[Key]:
        """Other objects, whose kinds watch this one."""
        for registration in self.registrations.values():
            if kind in registration.watches:
                yield from registration.watches[kind](obj, self.cache)
