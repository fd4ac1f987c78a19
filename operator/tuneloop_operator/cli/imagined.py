"""An API server that only remembers: `tuneloop render` lets the operator's own passes write to it.

It answers what passes ask for: create, server-side apply of whole objects and of their status, get, list, delete. No defaults, no
validation, no controllers: nothing that is made here ever runs.
"""

from __future__ import annotations

import copy
from typing import Any

from tuneloop_operator.cluster.errors import AlreadyExists, NotFound
from tuneloop_operator.cluster.kinds import KINDS, Resource
from tuneloop_operator.cluster.transport import MERGE, Transport
from tuneloop_operator.render.names import MANAGER

Object = dict[str, Any]
"""A Kubernetes object as JSON."""
ASSUMED = ("PersistentVolumeClaim", "Namespace")
"""Kinds that a manifest may refer to without bringing them along."""


class Imagined(Transport):
    """The objects, by kind, namespace and name."""

    def __init__(self, now: str) -> None:
        self.now = now
        self.objects: dict[tuple[str, str, str], Object] = {}
        self._version = 0

    async def close(self) -> None:
        """Nothing is open."""

    async def request(self, verb: str, method: str, path: str, **more: Any) -> Object:
        """As the API server would, as far as passes go. Raises NotFound and AlreadyExists."""
        kind, namespace, name, subresource = _parse(path)
        if method == "POST":
            return self._create(kind, namespace, more["body"])
        if name is None:
            return self._list(kind, namespace, more.get("query") or {})
        place = (kind, namespace, name)
        if method == "PATCH":
            return self._apply(place, more["body"], subresource, is_merge=more["content_type"] == MERGE)
        if method == "DELETE":
            return self.objects.pop(place, {})
        if place not in self.objects and kind not in ASSUMED:
            raise NotFound(404, "NotFound", f"{kind} {name} not found")
        return copy.deepcopy(self.objects.get(place) or self.completed({"kind": kind, "metadata": {"name": name, "namespace": namespace}}))

    def completed(self, obj: Object) -> Object:
        """With what an API server adds to an object's metadata."""
        self._version += 1
        metadata = {
            "uid": f"00000000-0000-0000-0000-{self._version:012d}",
            "generation": 1,
            "creationTimestamp": self.now,
            **obj["metadata"],
        }
        return {**copy.deepcopy(obj), "metadata": {**metadata, "resourceVersion": str(self._version)}}

    def put(self, obj: Object) -> Object:
        metadata = obj["metadata"]
        self.objects[(obj["kind"], metadata.get("namespace", ""), metadata["name"])] = obj
        return copy.deepcopy(obj)

    def _create(self, kind: str, namespace: str, body: Object) -> Object:
        if kind == "Event":
            return body
        if (kind, namespace, body["metadata"]["name"]) in self.objects:
            raise AlreadyExists(409, "AlreadyExists", f"{kind} {body['metadata']['name']} exists")
        ours = [{"manager": MANAGER, "operation": "Apply"}]
        return self.put(self.completed({**body, "metadata": {**body["metadata"], "namespace": namespace, "managedFields": ours}}))

    def _apply(self, place: tuple[str, str, str], body: Object, subresource: str | None, is_merge: bool) -> Object:
        known = self.objects[place]
        if is_merge:
            return self.put(self.completed({**known, "spec": {**known["spec"], **body["spec"]}}))
        if subresource == "status":
            return self.put(self.completed({**known, "status": body["status"]}))
        return self.put(self.completed({**body, "metadata": {**known["metadata"], **body["metadata"]}}))

    def _list(self, kind: str, namespace: str, query: dict[str, str]) -> Object:
        wanted = dict(pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair)
        items = [
            copy.deepcopy(obj)
            for (other, place, _), obj in self.objects.items()
            if other == kind and place == namespace and wanted.items() <= (obj["metadata"].get("labels") or {}).items()
        ]
        return {"items": items, "metadata": {"resourceVersion": str(self._version)}}


def _parse(path: str) -> tuple[str, str, str | None, str | None]:
    """Kind, namespace, name and subresource of a URL path."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if len(parts) > 2 and parts[0] == "namespaces":
        namespace, parts = parts[1], parts[2:]
    name = parts[1] if len(parts) > 1 else None
    return _kind_of(parts[0]).kind, namespace, name, parts[2] if len(parts) > 2 else None


def _kind_of(plural: str) -> Resource:
    return next(resource for resource in KINDS.values() if resource.plural == plural)
