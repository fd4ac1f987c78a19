"""Everything that the operator asks of the cluster and of the pods in it: reads, writes with preconditions, bounded GETs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from tuneloop_operator.cluster.cache import Cache, Object, Objects, controller
from tuneloop_operator.cluster.errors import Conflict, NotFound, Unreachable
from tuneloop_operator.cluster.kinds import KINDS
from tuneloop_operator.cluster.transport import APPLY, JSON_PATCH, MERGE, Transport
from tuneloop_operator.domain.decision import Key, Refusal, Target
from tuneloop_operator.render.names import MANAGER, STATUS_MANAGER
from tuneloop_operator.settings import Settings

__all__ = ["Cluster", "Unreachable"]

Series = list[tuple[dict[str, str], float]]
"""Labels and value of each."""
PAGE = 250
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
PROMETHEUS_LIMIT = 1 << 20


class Cluster:
    """Reads from `cache` cost nothing; methods go to the API server. What is written goes into the cache from the answer."""

    def __init__(
        self, transport: Transport, settings: Settings, cache: Cache | None = None, guard: Callable[[], None] = lambda: None
    ) -> None:
        self.transport = transport
        self.settings = settings
        self.unserved: set[str] = set()
        """Optional kinds that the API server did not have when the operator started."""
        self.cache = cache or Cache()
        self.guard = guard
        """Called before each write; raises NotLeader where the Lease is lost."""
        self.conflicts: dict[str, set[Key]] = {}
        """Owner's UID -> children whose names are taken by objects that are not ours. `observe` puts it into the snapshot; the decision
        says NameConflict and asks to be called again. The runtime looks at them before each pass, and forgets those that are free."""
        self.refusals: dict[str, dict[Key, Refusal]] = {}
        """Owner's UID -> children that the API server did not take. `observe` puts them into the snapshot, the decision says Refused; a
        write that goes through, and another spec, end it."""
        self.written: Callable[[str, Object], None] = lambda kind, obj: None
        """Told of each write that the cache took: its event will be no news, so whoever watches this kind hears of it here."""
        self.on_write: Callable[[str, Object], None] = lambda kind, obj: None
        """Called with what was written, once it is in the cache: its event will be no news."""
        self._public: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        await self.transport.close()
        if self._public is not None:
            await self._public.close()

    # --- reads ---

    async def serves(self, kind: str) -> bool:
        """Whether the API server has this kind, by discovery, which every account may read."""
        resource = KINDS[kind]
        try:
            found = await self.transport.request("get", "GET", f"/apis/{resource.api_version}")
        except NotFound:
            return False
        return any(item.get("name") == resource.plural for item in found.get("resources") or ())

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """A live read; None where there is no such object."""
        try:
            return await self.transport.request("get", "GET", KINDS[kind].path(namespace, name))
        except NotFound:
            return None

    async def list(
        self, kind: str, namespace: str | None = None, labels: dict[str, str] | None = None, fields: dict[str, str] | None = None
    ) -> Objects:
        """A live list, all pages."""
        return [item async for page, _ in self.pages(kind, namespace, labels, fields) for item in page]

    async def pages(
        self,
        kind: str,
        namespace: str | None = None,
        labels: dict[str, str] | None = None,
        fields: dict[str, str] | None = None,
        *,
        metadata_only: bool = False,
    ) -> AsyncIterator[tuple[Objects, int]]:
        """Pages of a consistent list, each with the list's resourceVersion."""
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
        if fields:
            query["fieldSelector"] = ",".join(f"{name}={value}" for name, value in sorted(fields.items()))
        while True:
            accept = METADATA_ONLY if metadata_only else "application/json"
            answer = await self.transport.request("list", "GET", KINDS[kind].path(namespace), query=query, accept=accept)
            yield answer.get("items") or [], int(answer["metadata"].get("resourceVersion") or 0)
            if not answer["metadata"].get("continue"):
                return
            query["continue"] = answer["metadata"]["continue"]

    # --- writes ---

    async def create(self, manifest: Object) -> Object:
        """POST. Raises AlreadyExists where the name is taken."""
        key = key_of(manifest)
        return await self._write("create", "POST", key, KINDS[key.kind].path(key.namespace), {"fieldManager": MANAGER}, manifest)

    async def apply(self, manifest: Object) -> Object:
        """Server-side apply of a child; `metadata.resourceVersion` is the precondition."""
        return await self._apply(manifest, MANAGER, None)

    async def apply_status(self, manifest: Object) -> Object:
        """Server-side apply of /status; `metadata.resourceVersion` is the precondition."""
        return await self._apply(manifest, STATUS_MANAGER, "status")

    async def _apply(self, manifest: Object, manager: str, subresource: str | None) -> Object:
        key = key_of(manifest)
        path = KINDS[key.kind].path(key.namespace, key.name, subresource)
        return await self._write("apply", "PATCH", key, path, {"fieldManager": manager, "force": "true"}, manifest, APPLY)

    async def merge(self, key: Key, body: Object) -> Object:
        """A merge patch; the body holds the resourceVersion."""
        path = KINDS[key.kind].path(key.namespace, key.name)
        return await self._write("patch", "PATCH", key, path, {"fieldManager": MANAGER}, body, MERGE)

    async def patch(self, key: Key, operations: Objects) -> Object:
        """A JSON patch; the operations hold the precondition."""
        path = KINDS[key.kind].path(key.namespace, key.name)
        return await self._write("patch", "PATCH", key, path, {"fieldManager": MANAGER}, operations, JSON_PATCH)

    async def delete(self, target: Target, version: str | None) -> None:
        """A delete of exactly this object, at this version if given; dependents go in the background. Gone is success."""
        preconditions = {"uid": target.uid, **({"resourceVersion": version} if version else {})}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions, "propagationPolicy": "Background"}
        path = KINDS[target.key.kind].path(target.key.namespace, target.key.name)
        self.guard()
        try:
            await self.transport.request("delete", "DELETE", path, body=body)
        except Conflict as error:
            error.key = target.key
            raise
        except NotFound:
            gone = self.cache.get(target.key.kind, target.key.namespace, target.key.name)
            if gone is not None and gone["metadata"].get("uid") == target.uid:
                self.cache.remove(target.key.kind, gone)

    async def record(self, event: Object) -> None:
        """POST of an event."""
        self.guard()
        path = f"/apis/events.k8s.io/v1/namespaces/{event['metadata']['namespace']}/events"
        await self.transport.request("create", "POST", path, body=event)

    async def _write(
        self, verb: str, method: str, key: Key, path: str, query: dict[str, str], body: Any, content_type: str = "application/json"
    ) -> Object:
        self.guard()
        try:
            answer = await self.transport.request(verb, method, path, query=query, body=body, content_type=content_type)
        except Conflict as error:
            error.key = key
            raise
        if self.is_cached(key.kind, answer) and self.cache.put(key.kind, answer):
            self.written(key.kind, answer)
        return answer

    def is_cached(self, kind: str, obj: Object) -> bool:
        """Whether the watches would bring this object. Secrets and events are never kept."""
        if kind in ("Secret", "Event", "Lease"):
            return False
        return KINDS[kind].is_ours or (obj["metadata"].get("labels") or {}).get("app.kubernetes.io/managed-by") == MANAGER

    async def refresh(self, key: Key) -> Object | None:
        """Reads an object anew into the cache; None, and forgotten, where it is gone."""
        fresh = await self.get(key.kind, key.namespace, key.name)
        known = self.cache.get(key.kind, key.namespace, key.name)
        if known is not None and (
            fresh is None or fresh["metadata"]["uid"] != known["metadata"]["uid"] or not self.is_cached(key.kind, fresh)
        ):
            self.cache.remove(key.kind, known)
        if fresh is not None and self.is_cached(key.kind, fresh):
            self.cache.put(key.kind, fresh)
        return fresh

    async def forget_free_names(self, owner_uid: str) -> None:
        """Takes back the conflicts of an owner whose names are free by now, or its own."""
        for key in tuple(self.conflicts.get(owner_uid, ())):
            found = await self.get(key.kind, key.namespace, key.name)
            owner = controller(found) if found is not None else None
            if found is None or (owner is not None and owner["uid"] == owner_uid):
                self.conflicts[owner_uid].discard(key)
        if not self.conflicts.get(owner_uid):
            self.conflicts.pop(owner_uid, None)

    def refused(self, owner_uid: str) -> tuple[Refusal, ...]:
        """What is known to be refused of an owner's children, in the order in which it was met."""
        return tuple(self.refusals.get(owner_uid, {}).values())

    def forget_refusals_of_another_spec(self, owner_uid: str, generation: int) -> None:
        known = self.refusals.pop(owner_uid, {})
        if still := {key: refusal for key, refusal in known.items() if refusal.generation == generation}:
            self.refusals[owner_uid] = still

    # --- pods and Prometheus: without credentials, proxies, redirects or cookies ---

    async def http_get(self, url: str, limit: int, timeout: float = 2.0) -> bytes:  # noqa: ASYNC109 - the whole request's, redirects there are none
        """At most `limit` bytes of a 200 answer. Raises Unreachable for everything else."""
        return await self._fetch(url, limit, timeout, {})

    async def prometheus(self, query: str) -> Series:
        """An instant query's vector: labels and value of each series. Raises Unreachable."""
        if not self.settings.prometheus_url:
            raise Unreachable("no Prometheus is configured")
        headers = {}
        if self.settings.prometheus_token_file:
            headers["Authorization"] = f"Bearer {_read(self.settings.prometheus_token_file)}"
        url = str(URL(self.settings.prometheus_url.rstrip("/") + "/api/v1/query").with_query(query=query))
        content = await self._fetch(url, PROMETHEUS_LIMIT, 5.0, headers)
        try:
            result = json.loads(content)["data"]["result"]
            return [(dict(series["metric"]), float(series["value"][1])) for series in result]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Unreachable(f"Prometheus gave no vector: {type(error).__name__}") from error

    async def _fetch(self, url: str, limit: int, seconds: float, headers: dict[str, str]) -> bytes:
        if self._public is None:
            self._public = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self._public.get(url, timeout=timeout, headers=headers, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise Unreachable(f"{url} answered {answer.status}")
                content = await answer.content.read(limit + 1)
                while len(content) <= limit and not answer.content.at_eof():
                    content += await answer.content.read(limit + 1 - len(content))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unreachable(f"{url}: {type(error).__name__}") from error
        if len(content) > limit:
            raise Unreachable(f"{url} answered more than {limit} bytes")
        return content


def key_of(manifest: Object) -> Key:
    return Key(manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"])


def _read(path: str) -> str:
    """A mounted file: small, local, and new after each rotation. Raises Unreachable."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unreachable(f"{path} cannot be read: {type(error).__name__}") from error
