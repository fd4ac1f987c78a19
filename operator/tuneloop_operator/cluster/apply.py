"""Carries out a decision: status and its events, create, apply, delete, in this order, each write with a precondition.

The status goes first, under the observed resourceVersion: whoever decided on stale grounds (a leader of yesterday, a cache behind its
watch) gets 409 there, and nothing else of the pass happens. A child is made by POST, so that an existing name is never overwritten, and
changed by server-side apply under the resourceVersion that was observed. Nothing is read back: answers go into the cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tuneloop_operator.cluster.cache import Object, controller
from tuneloop_operator.cluster.client import Cluster, key_of
from tuneloop_operator.cluster.differences import is_drifted, owned_status, without_empty
from tuneloop_operator.cluster.errors import AlreadyExists, ApiError, ChildRefused, Forbidden, NameConflict, Refused, Unreachable
from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.domain.decision import Decision, EventNote, Key, Manifest, Refusal, Target
from tuneloop_operator.render.names import HASH_LABEL, MANAGER, short_hash

MADE_SECONDS = 600.0
"""How long it is believed that a Secret, which the operator cannot read, is still there."""
WRITE_ONCE = ("Job", "JobSet")
"""Kinds whose spec the API server holds fast. A later release may render them differently; what runs is left alone then."""


@dataclass
class Outcome:
    """What a pass wrote."""

    status: bool = False
    created: list[Key] = field(default_factory=list)
    applied: list[Key] = field(default_factory=list)
    deleted: list[Key] = field(default_factory=list)
    event_errors: int = 0

    @property
    def is_changed(self) -> bool:
        return self.status or bool(self.created or self.applied or self.deleted)


class Applier:
    """Carries out decisions; remembers which children were found as they should be, so that they are compared once per version."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._settled: dict[str, tuple[str, str]] = {}
        self._made: dict[Key, float] = {}

    async def carry_out(self, owner: Object, decision: Decision, now: datetime) -> Outcome:
        """`owner` is the object as it was before it was observed. Raises Conflict, NameConflict, ChildRefused and other ApiErrors."""
        outcome = Outcome()
        outcome.status = await self._status(owner, decision.status)
        if outcome.status:  # at once: the change of state is told even if a child meets an error, and is no change to the next pass
            for note in decision.events:
                outcome.event_errors += not await self._event(owner, note, now)
        problems = await self._children(owner, decision, outcome)
        for target in decision.delete:
            await self._delete(target)
            outcome.deleted.append(target.key)
        if problems:
            raise problems[0]
        return outcome

    # --- status ---

    async def _status(self, owner: Object, desired: dict[str, Any]) -> bool:
        desired = without_empty(desired)
        if owned_status(owner) == desired:
            return False
        metadata = owner["metadata"]
        identity = {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")}
        manifest = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "metadata": identity, "status": desired}
        written = await self.cluster.apply_status(manifest)
        # A CRD of another release drops fields that it does not know: what it keeps may be what was there. No pass follows then.
        return bool(written["metadata"]["resourceVersion"] != metadata["resourceVersion"])

    # --- children ---

    async def _children(self, owner: Object, decision: Decision, outcome: Outcome) -> list[NameConflict | ChildRefused]:
        """Makes and changes them; what somebody else holds or the API server refuses does not keep the others from going on."""
        problems: list[NameConflict | ChildRefused] = []
        made = [_completed(manifest, owner, is_owned=not KINDS[manifest["kind"]].is_ours) for manifest in decision.create]
        for manifest in made:
            try:
                if await self._make(manifest):
                    outcome.created.append(key_of(manifest))
                self._taken_well(manifest, owner)
            except (Refused, Forbidden) as error:
                problems.append(self._refusal(manifest, owner, error))
        for manifest in (_completed(manifest, owner, is_owned=True) for manifest in decision.apply):
            try:
                await self._apply(manifest, owner, outcome)
                self._taken_well(manifest, owner)
            except NameConflict as error:
                problems.append(error)
            except (Refused, Forbidden) as error:
                problems.append(self._refusal(manifest, owner, error))
        return problems

    def _refusal(self, manifest: Manifest, owner: Object, error: Refused | Forbidden) -> ChildRefused:
        """Remembered for the next pass; raises the error where it says nothing of the object."""
        if isinstance(error, Forbidden) and not error.is_of_admission:
            raise error
        key, metadata = key_of(manifest), owner["metadata"]
        refusal = Refusal(key, error.message, metadata.get("generation", 0))
        self.cluster.refusals.setdefault(metadata["uid"], {})[key] = refusal
        return ChildRefused(key, error)

    def _taken_well(self, manifest: Manifest, owner: Object) -> None:
        known = self.cluster.refusals.get(owner["metadata"]["uid"])
        if known is not None and known.pop(key_of(manifest), None) is not None and not known:
            del self.cluster.refusals[owner["metadata"]["uid"]]

    async def _make(self, manifest: Manifest) -> bool:
        """Once: by POST, or found to be there. Never changed again."""
        key = key_of(manifest)
        if self.cluster.cache.get(key.kind, key.namespace, key.name) is not None:
            return False
        if time.monotonic() - self._made.get(key, float("-inf")) < MADE_SECONDS:
            return False
        try:
            await self.cluster.create(manifest)
            is_new = True
        except AlreadyExists:
            is_new = False
            if key.kind != "Secret":
                await self.cluster.refresh(key)
        except Refused as error:
            if key.kind == "Secret":  # the API server's text may quote the value
                raise Refused(error.status, error.reason, f"Secret {key.name} was refused") from None
            raise
        if key.kind == "Secret":
            self._made[key] = time.monotonic()
        return is_new

    async def _apply(self, manifest: Manifest, owner: Object, outcome: Outcome) -> None:
        key = key_of(manifest)
        observed = self.cluster.cache.get(key.kind, key.namespace, key.name)
        if observed is None:
            await self._create(manifest, owner, outcome)
        elif not _is_ours(observed, manifest, owner):
            self._conflict(key, owner)
        elif not self._is_settled(observed, manifest):
            changed = await (self._update_job if key.kind in WRITE_ONCE else self._update)(observed, manifest)
            self._settle(changed, manifest)
            outcome.applied.append(key)

    async def _create(self, manifest: Manifest, owner: Object, outcome: Outcome) -> None:
        key = key_of(manifest)
        try:
            made = await self.cluster.create(manifest)
        except AlreadyExists:
            found = await self.cluster.refresh(key)
            if found is None:
                raise  # it went meanwhile: the next pass makes it
            if not _is_ours(found, manifest, owner):
                self._conflict(key, owner)
            if self.cluster.is_cached(key.kind, found):
                raise  # ours, and in the cache by now: the next pass looks at it
            restored = await self.cluster.apply(_at_version(manifest, found))  # ours, without our labels
            self._settle(restored, manifest)
            outcome.applied.append(key)
            return
        self._settle(made, manifest)
        outcome.created.append(key)

    def _conflict(self, key: Key, owner: Object) -> None:
        self.cluster.conflicts.setdefault(owner["metadata"]["uid"], set()).add(key)
        raise NameConflict(key)

    async def _update(self, observed: Object, manifest: Manifest) -> Object:
        """Server-side apply. What a POST made belongs to an `Update` of ours, whose fields an apply could never remove: that entry
        becomes an `Apply` first, once in a child's life."""
        entry = next((i for i, e in enumerate(observed["metadata"].get("managedFields") or ()) if _is_of_post(e)), None)
        if entry is not None:
            path = f"/metadata/managedFields/{entry}"
            operations = [
                {"op": "replace", "path": "/metadata/resourceVersion", "value": observed["metadata"]["resourceVersion"]},
                {"op": "test", "path": f"{path}/manager", "value": MANAGER},
                {"op": "replace", "path": f"{path}/operation", "value": "Apply"},
            ]
            observed = await self.cluster.patch(key_of(manifest), operations)
        return await self.cluster.apply(_at_version(manifest, observed))

    async def _update_job(self, observed: Object, manifest: Manifest) -> Object:
        """Of a Job that exists, only `suspend` follows the manifest."""
        suspend = bool(manifest["spec"].get("suspend"))
        if bool(observed["spec"].get("suspend")) == suspend:
            return observed
        body = {"metadata": {"resourceVersion": observed["metadata"]["resourceVersion"]}, "spec": {"suspend": suspend}}
        return await self.cluster.merge(key_of(manifest), body)

    def _is_settled(self, observed: Object, manifest: Manifest) -> bool:
        metadata, wanted = observed["metadata"], manifest["metadata"]["labels"][HASH_LABEL]
        if self._settled.get(metadata["uid"]) == (metadata["resourceVersion"], wanted):
            return True
        if manifest["kind"] in WRITE_ONCE:
            is_same = bool(observed["spec"].get("suspend")) == bool(manifest["spec"].get("suspend"))
        else:
            is_same = (metadata.get("labels") or {}).get(HASH_LABEL) == wanted and not is_drifted(observed, manifest)
        if is_same:
            self._settle(observed, manifest)
        return is_same

    def _settle(self, observed: Object, manifest: Manifest) -> None:
        self._settled[observed["metadata"]["uid"]] = (observed["metadata"]["resourceVersion"], manifest["metadata"]["labels"][HASH_LABEL])

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._settled.pop(uid, None)
        self.cluster.conflicts.pop(uid, None)
        self.cluster.refusals.pop(uid, None)

    async def _delete(self, target: Target) -> None:
        key = target.key
        observed = self.cluster.cache.get(key.kind, key.namespace, key.name)
        if observed is not None and observed["metadata"]["uid"] != target.uid:
            return  # that one is gone; another has its name
        if observed is not None and observed["metadata"].get("deletionTimestamp"):
            return  # on its way
        await self.cluster.delete(target, observed["metadata"]["resourceVersion"] if observed else None)

    # --- events ---

    async def _event(self, owner: Object, note: EventNote, now: datetime) -> bool:
        """One event per pass and message: its name holds the version that was observed, so that a repeated pass repeats no event."""
        metadata = owner["metadata"]
        time_stamp = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        digest = short_hash([metadata["uid"], metadata["resourceVersion"], note.reason, note.message])
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{digest}", "namespace": metadata["namespace"]},
            "eventTime": time_stamp,
            "reportingController": "tuneloop.dev/operator",
            "reportingInstance": self.cluster.settings.identity[:128],
            "action": "Reconcile",
            "type": note.type,
            "reason": note.reason,
            "note": note.message[:1024],
            "regarding": {
                "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": metadata["name"],
                "namespace": metadata["namespace"], "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"],
            },
        }  # fmt: skip
        try:
            await self.cluster.record(event)
        except AlreadyExists:
            return True
        except (ApiError, Unreachable):
            return False  # news, not state: the pass stands without it
        return True


def _completed(manifest: Manifest, owner: Object, *, is_owned: bool) -> Manifest:
    """With namespace, hash label and, unless it opts out by an empty list, the owner as controller. The hash is of what was rendered."""
    metadata = dict(manifest["metadata"])
    metadata.setdefault("namespace", owner["metadata"]["namespace"])
    metadata["labels"] = {**(metadata.get("labels") or {}), HASH_LABEL: short_hash(manifest)}
    references = metadata.pop("ownerReferences", None)
    if references:
        metadata["ownerReferences"] = references
    elif references is None and is_owned:
        metadata["ownerReferences"] = [_owner_reference(owner)]
    return {**manifest, "metadata": metadata}


def _owner_reference(owner: Object) -> dict[str, Any]:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _is_ours(observed: Object, manifest: Manifest, owner: Object) -> bool:
    """Controlled by the owner; or by nobody (kept beyond its owner, or orphaned), but written by us and labelled as the manifest is."""
    holder = controller(observed)
    if holder is not None or not _is_of_us(observed):
        return holder is not None and holder["uid"] == owner["metadata"]["uid"]
    own, wanted = observed["metadata"].get("labels") or {}, manifest["metadata"]["labels"]
    names = ("managed-by", "component", "instance")
    return all(own.get(f"app.kubernetes.io/{name}") == wanted.get(f"app.kubernetes.io/{name}") for name in names)


def _is_of_us(observed: Object) -> bool:
    return any(entry.get("manager") == MANAGER for entry in observed["metadata"].get("managedFields") or ())


def _is_of_post(entry: dict[str, Any]) -> bool:
    return entry.get("manager") == MANAGER and entry.get("operation") == "Update" and not entry.get("subresource")


def _at_version(manifest: Manifest, observed: Object) -> Manifest:
    """The precondition: this very object, as it was observed."""
    metadata = {**manifest["metadata"], "uid": observed["metadata"]["uid"], "resourceVersion": observed["metadata"]["resourceVersion"]}
    return {**manifest, "metadata": metadata}
