"""What the informer takes out of the API server's answers to kopf: the items of lists and the events of watches. kopf keeps the versions.

It would hold a task, a memory and some copies of every object, and run each event through a dozen layers for handlers that are not there:
a third of the operator's CPU time. The cache was filled before kopf's lists, so their items are asked for as metadata alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from yarl import URL

from tuneloop_operator.cluster.kinds import KINDS

CHANGES = ("ADDED", "MODIFIED", "DELETED")
Event = tuple[str, str, dict[str, Any]]
"""Kind, one of CHANGES, object."""


@dataclass(frozen=True)
class Listing:
    """What a whole list said: who was there, in which version."""

    kind: str
    namespace: str | None
    version: int
    found: dict[tuple[str, str], int]


class Answers:
    """Of lists and watches of these kinds: tells of events as they come, and of lists when they are whole."""

    def __init__(self, kinds: tuple[str, ...], came: Callable[[list[Event]], None], listed: Callable[[Listing], None]) -> None:
        self.came = came
        self.listed = listed
        self._by_path = {KINDS[kind].path().rpartition("/")[2]: kind for kind in kinds}
        self._pages: dict[tuple[str, str | None], dict[tuple[str, str], int]] = {}

    def kind(self, url: URL) -> str | None:
        """What is listed or watched there."""
        return self._by_path.get(url.path.rpartition("/")[2])

    def response_class(self) -> type[aiohttp.ClientResponse]:
        answers = self

        class Response(aiohttp.ClientResponse):
            async def start(self, connection: Any) -> aiohttp.ClientResponse:
                await super().start(connection)
                kind = answers.kind(self.url)
                if kind is not None and is_watch(self.url) and self.status == 200:
                    self.content = cast(aiohttp.StreamReader, Watch(kind, self.content, answers.came))
                return self

            async def json(self, **options: Any) -> Any:
                content = await super().json(**options)
                kind = answers.kind(self.url)
                if kind is not None and isinstance(content, dict) and "items" in content:
                    answers.take_page(kind, self.url, content)
                return content

        return Response

    def take_page(self, kind: str, url: URL, content: dict[str, Any]) -> None:
        """Takes the items out of a page, and tells of the list when it is whole."""
        namespace = url.path.split("/")[-2] if "/namespaces/" in url.path else None
        if "continue" not in url.query:
            self._pages.pop((kind, namespace), None)  # of a list that was given up half-way
        found = self._pages.setdefault((kind, namespace), {})
        for item in content["items"] or ():  # an empty list of metadata is written as null
            metadata = item["metadata"]
            found[metadata.get("namespace", ""), metadata["name"]] = int(metadata["resourceVersion"])
        content["items"] = []
        if not content["metadata"].get("continue"):
            version = int(content["metadata"].get("resourceVersion") or 0)
            self.listed(Listing(kind, namespace, version, self._pages.pop((kind, namespace))))


class Watch:
    """Stands for the body of a watch's answer: one bookmark for the events of each chunk, so that kopf knows where to go on from. Errors
    are passed on as they are; half a line at the end is of a connection that broke."""

    def __init__(self, kind: str, content: aiohttp.StreamReader, came: Callable[[list[Event]], None]) -> None:
        self._kind = kind
        self._content = content
        self._came = came

    def __getattr__(self, name: str) -> Any:  # what aiohttp itself does with it
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        rest = b""
        async for chunk in self._content.iter_chunked(size):
            *lines, rest = (rest + chunk).split(b"\n")
            if lines:
                yield self._left_of(lines)

    def _left_of(self, lines: list[bytes]) -> bytes:
        """What kopf is to see of whole lines."""
        events: list[Event] = []
        version, others = "", []
        for line in filter(None, lines):
            event = json.loads(line)
            if event["type"] in CHANGES:
                events.append((self._kind, event["type"], event["object"]))
            elif event["type"] != "BOOKMARK":
                others.append(line)
                continue
            version = event["object"]["metadata"]["resourceVersion"]
        if events:
            self._came(events)
        if version:
            others.insert(0, json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version}}}).encode())
        return b"".join(line + b"\n" for line in others)


def is_watch(url: URL) -> bool:
    return "watch" in url.query
