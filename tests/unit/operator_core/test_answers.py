"""What is taken out of lists and watches, and what is left of them to kopf."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from kopf._cogs.clients.api import iter_jsonlines
from yarl import URL

from tuneloop_operator.runtime.answers import Answers, Event, Listing

JOBS = "/apis/batch/v1/jobs"
GONE = {"type": "ERROR", "object": {"kind": "Status", "code": 410}}


class Told:
    """What came of answers about Jobs."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.batches = 0
        self.listings: list[Listing] = []
        self.answers = Answers(("Job", "FineTuneJob"), self._came, self.listings.append)

    def _came(self, events: list[Event]) -> None:
        self.batches += 1
        self.events += events


def job(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "n", "resourceVersion": str(version)}}


def event(type_: str, name: str, version: int) -> dict[str, Any]:
    return {"type": type_, "object": job(name, version)}


def bookmark(version: int) -> dict[str, Any]:
    return {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}


def lines(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(e).encode() + b"\n" for e in events)


async def left_of(told: Told, *chunks: bytes, path: str = JOBS) -> list[dict[str, Any]]:
    """What kopf sees of a watch whose body arrives in these chunks, from a server of the test."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.01)
        return response

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}{path}?watch=true"
        async with aiohttp.ClientSession(response_class=told.answers.response_class()) as session, session.get(url) as response:
            return [json.loads(line) async for line in iter_jsonlines(response.content)]
    finally:
        await runner.cleanup()


@pytest.fixture
def told() -> Told:
    return Told()


async def test_events_are_told_in_order_and_kopf_sees_the_version_to_go_on_from(told: Told) -> None:
    left = await left_of(told, lines(event("ADDED", "a", 3), event("MODIFIED", "a", 5), event("DELETED", "b", 7)))
    assert told.events == [("Job", "ADDED", job("a", 3)), ("Job", "MODIFIED", job("a", 5)), ("Job", "DELETED", job("b", 7))]
    assert told.batches == 1
    assert left == [bookmark(7)]


async def test_an_event_that_arrives_in_pieces_is_told_when_it_is_whole(told: Told) -> None:
    whole = lines(event("ADDED", "a", 3), event("ADDED", "b", 4))
    left = await left_of(told, whole[:40], whole[40:-10], whole[-10:])
    assert [e[2]["metadata"]["name"] for e in told.events] == ["a", "b"]
    assert left[-1] == bookmark(4)


async def test_half_an_event_at_the_end_is_neither_told_nor_an_error(told: Told) -> None:
    left = await left_of(told, lines(event("ADDED", "a", 3)) + lines(event("ADDED", "b", 4))[:30])
    assert [e[2]["metadata"]["name"] for e in told.events] == ["a"]
    assert left == [bookmark(3)]


async def test_bookmarks_and_errors_reach_kopf(told: Told) -> None:
    assert await left_of(told, lines(bookmark(9))) == [bookmark(9)]
    assert await left_of(told, lines(event("ADDED", "a", 3), GONE)) == [bookmark(3), GONE]
    assert [e[1] for e in told.events] == ["ADDED"]


async def test_answers_about_other_things_are_left_alone(told: Told) -> None:
    pods = event("ADDED", "a", 3)
    assert await left_of(told, lines(pods), path="/api/v1/pods") == [pods]
    assert told.events == []


def page(*items: dict[str, Any], version: int = 10, more: str = "") -> dict[str, Any]:
    return {"metadata": {"resourceVersion": str(version), "continue": more}, "items": list(items) or None}


def test_a_list_is_told_when_its_last_page_is_there_and_kopf_sees_no_item(told: Told) -> None:
    first, last = page(job("a", 3), more="x"), page(job("b", 4))
    told.answers.take_page("Job", URL(JOBS), first)
    assert told.listings == []
    told.answers.take_page("Job", URL(f"{JOBS}?continue=x"), last)
    assert told.listings == [Listing("Job", None, 10, {("n", "a"): 3, ("n", "b"): 4})]
    assert first["items"] == last["items"] == []


def test_a_list_that_was_given_up_half_way_is_forgotten(told: Told) -> None:
    told.answers.take_page("Job", URL(JOBS), page(job("gone", 3), more="x"))
    told.answers.take_page("Job", URL(JOBS), page())
    assert told.listings == [Listing("Job", None, 10, {})]


def test_lists_of_different_namespaces_are_told_apart(told: Told) -> None:
    told.answers.take_page("Job", URL("/apis/batch/v1/namespaces/n/jobs"), page(job("a", 3), more="x"))
    told.answers.take_page("Job", URL("/apis/batch/v1/namespaces/m/jobs"), page())
    assert told.listings == [Listing("Job", "m", 10, {})]
