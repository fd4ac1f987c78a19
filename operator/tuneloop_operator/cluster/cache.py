"""What the operator knows of the cluster: raw objects from lists, watches and its own writes, the newest of each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from sys import intern
from typing import Any

from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.domain.decision import Key
from tuneloop_operator.render.names import DEPLOYMENT_LABEL, MANAGER, STATUS_MANAGER

Object = dict[str, Any]
"""A Kubernetes object as JSON."""
Objects = list[Object]
INDEXED_LABELS = frozenset({DEPLOYMENT_LABEL})
"""Labels that `list` is asked for: it need not look at every object of a kind. An index of all of them took 3 KiB a job."""
SHARED_LENGTH = 64
"""Of strings that are looked up to be shared."""
SHARED_PARTS = 10_000
"""Parts of objects that are remembered to be shared."""
REMEMBERED_DELETIONS = 10_000


class Cache:
    """Objects by kind, namespace and name. Objects that it hands out belong to the cache: readers must not change them."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[tuple[str, str], Object]] = {}
        self._owned: dict[tuple[str, str], set[tuple[str, str]]] = {}
        self._labelled: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
        self._deleted: OrderedDict[str, int] = OrderedDict()
        self._sharing = Sharing()

    # --- reading ---

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._objects.get(kind, {}).get((namespace, name))

    def list(self, kind: str, namespace: str | None = None, labels: dict[str, str] | None = None) -> Objects:
        """Objects of a kind, of one namespace or of all, with all of these labels; ordered by name."""
        objects = self._objects.get(kind, {})
        places = self._places(kind, labels or {})
        found = (objects[place] for place in (objects if places is None else places) if namespace is None or place[0] == namespace)
        return sorted((obj for obj in found if _has_labels(obj, labels)), key=_by_name)

    def owned(self, kind: str, namespace: str, owner_uid: str) -> Objects:
        """Objects of a kind whose controller has this UID; ordered by name."""
        objects = self._objects.get(kind, {})
        places = self._owned.get((kind, owner_uid), ())
        return sorted((objects[place] for place in places if place[0] == namespace), key=_by_name)

    def keys(self, kind: str) -> Iterator[Key]:
        return iter([Key(kind, namespace, name) for namespace, name in self._objects.get(kind, {})])

    def count(self, kind: str) -> int:
        return len(self._objects.get(kind, {}))

    def kinds(self) -> tuple[str, ...]:
        return tuple(self._objects)

    def is_older(self, kind: str, place: tuple[str, str], version: int) -> bool:
        """Whether this version of the object at (namespace, name) is not known yet."""
        known = self._objects.get(kind, {}).get(place)
        return known is None or _version(known["metadata"]) < version

    # --- writing ---

    def put(self, kind: str, obj: Object) -> bool:
        """Takes an object if it is newer than what is known of it. Says whether it was."""
        metadata = obj["metadata"]
        version = _version(metadata)
        if version <= self._deleted.get(metadata.get("uid", ""), -1):
            return False
        place = (metadata.get("namespace", ""), metadata["name"])
        known = self._objects.setdefault(kind, {}).get(place)
        if known is not None and version <= _version(known["metadata"]):
            return False
        if known is not None:
            self._forget_indices(kind, place, known)
        self._objects[kind][place] = obj = self._sharing.of(trimmed(kind, obj))
        self._remember_indices(kind, place, obj)
        return True

    def remove(self, kind: str, obj: Object) -> bool:
        """Takes note of a deletion, which holds against late news of the same object. Says whether it was known."""
        metadata = obj["metadata"]
        place = (metadata.get("namespace", ""), metadata["name"])
        known = self._objects.get(kind, {}).get(place)
        if known is not None and known["metadata"].get("uid") != metadata.get("uid") and _version(known["metadata"]) > _version(metadata):
            return False  # made again under the same name since
        self._deleted[metadata.get("uid", "")] = _version(metadata)
        while len(self._deleted) > REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)
        if known is None:
            return False
        self._forget_indices(kind, place, known)
        del self._objects[kind][place]
        return True

    def sweep(self, kind: str, listed: Iterable[tuple[str, str]], version: int, namespaces: tuple[str, ...] = ()) -> Objects:
        """Removes what a list of this resourceVersion lacks, and returns it: a re-list brings no DELETED for what went in the gap."""
        present = set(listed)
        gone = [
            obj
            for place, obj in self._objects.get(kind, {}).items()
            if place not in present and _version(obj["metadata"]) <= version and (not namespaces or place[0] in namespaces)
        ]
        for obj in gone:
            self.remove(kind, obj)
        return gone

    # --- indices ---

    def _places(self, kind: str, labels: dict[str, str]) -> Iterable[tuple[str, str]] | None:
        """The smallest indexed set that holds all answers; None where no label is indexed."""
        sets = [self._labelled.get((kind, *pair), set()) for pair in labels.items() if pair[0] in INDEXED_LABELS]
        return min(sets, key=len) if sets else None

    def _remember_indices(self, kind: str, place: tuple[str, str], obj: Object) -> None:
        for index, key in self._index_keys(kind, obj):
            index.setdefault(key, set()).add(place)

    def _forget_indices(self, kind: str, place: tuple[str, str], obj: Object) -> None:
        for index, key in self._index_keys(kind, obj):
            places = index[key]
            places.discard(place)
            if not places:
                del index[key]

    def _index_keys(self, kind: str, obj: Object) -> Iterator[tuple[dict[Any, set[tuple[str, str]]], Any]]:
        owner = controller(obj)
        if owner is not None:
            yield self._owned, (kind, owner["uid"])
        for name, value in (obj["metadata"].get("labels") or {}).items():
            if name in INDEXED_LABELS:
                yield self._labelled, (kind, name, value)


def controller(obj: Object) -> dict[str, Any] | None:
    """The owner reference of the object's controller."""
    references = obj["metadata"].get("ownerReferences") or ()
    return next((reference for reference in references if reference.get("controller")), None)


def trimmed(kind: str, obj: Object) -> Object:
    """The object without what nobody reads: half of it.

    Of managedFields, which are half of an object, there stay, at their places in the list: who manages; which fields others than us set
    beside subresources (hand edits); and what our status manager owns. Of a pod's spec, its node.
    """
    if obj["metadata"].get("managedFields"):
        entries = [_trimmed_entry(kind, entry) for entry in obj["metadata"]["managedFields"]] if kind != "Pod" else []
        obj = {**obj, "metadata": {**obj["metadata"], "managedFields": entries}}
    if kind == "Pod":
        obj = {**obj, "spec": {"nodeName": obj["spec"].get("nodeName")}}
    return obj


class Sharing:
    """Lets equal parts of objects be one: who owns which fields, security contexts, tolerations, rules. It halves the memory.

    Works from the leaves up, so that a part is known by its names and the identities of its members. What is remembered keeps those alive;
    when it is too much, all of it is forgotten, and sharing begins anew.
    """

    def __init__(self, limit: int = SHARED_PARTS) -> None:
        self._limit = limit
        self._parts: dict[tuple[Any, ...], Any] = {}

    def of(self, obj: Object) -> Object:
        if len(self._parts) > self._limit:
            self._parts.clear()
        return {intern(name): self._part(member) for name, member in obj.items()}

    def _part(self, value: Any) -> Any:
        if isinstance(value, dict):
            members = {intern(name): self._part(member) for name, member in value.items()}
            return self._parts.setdefault((*members, *map(id, members.values())), members)
        if isinstance(value, list):
            items = [self._part(item) for item in value]
            return self._parts.setdefault((len(items), *map(id, items)), items)
        return intern(value) if isinstance(value, str) and len(value) <= SHARED_LENGTH else value


def _trimmed_entry(kind: str, entry: dict[str, Any]) -> dict[str, Any]:
    manager, subresource = entry.get("manager"), entry.get("subresource")
    kept = {"manager": manager, "operation": entry.get("operation")}
    if subresource:
        kept["subresource"] = subresource
    is_foreign = manager != MANAGER and not subresource and not KINDS[kind].is_ours  # nobody looks at who edited a spec
    if is_foreign or manager == STATUS_MANAGER:
        kept["fieldsV1"] = entry.get("fieldsV1")
    return kept


def _version(metadata: dict[str, Any]) -> int:
    """Versions of one kind are ordered: the API server promises what etcd does (KEP-5504)."""
    return int(metadata.get("resourceVersion") or 0)


def _has_labels(obj: Object, labels: dict[str, str] | None) -> bool:
    own = obj["metadata"].get("labels") or {}
    return all(own.get(name) == value for name, value in (labels or {}).items())


def _by_name(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]
