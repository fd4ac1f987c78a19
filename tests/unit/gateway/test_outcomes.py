"""What a gateway counts while a canary runs, and who stays where."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from typing import Any

import aiohttp
import pytest
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, answer, chat_answer, chat_events, status, stream_of

from tuneloop_gateway.answers import Answer
from tuneloop_gateway.contract import LATENCY_EDGE_RATIO, LATENCY_LEAST_SECONDS, REVISION_HEADER, SESSION_HEADER, Outcomes
from tuneloop_gateway.outcomes import bucket_of, faults_of
from tuneloop_gateway.routing import session_place

WINDOW = "canary:0:now"
CANARY = {"name": "new", "service": "new", "state": "Candidate"}


def divided(weight: int = 50, **more: Any) -> dict[str, Any]:
    stable = make_revision("old", "old", weight=100 - weight)
    return make_config(stable, make_revision(**CANARY, weight=weight), **({"window": WINDOW} | more))


async def start_divided(start: Start, stable: FakeEngine, canary: FakeEngine, weight: int = 50, **more: Any) -> Running:
    return await start(divided(weight, **more), endpoints={"old": (stable.address,), "new": (canary.address,)})


async def outcomes(gateway: Running, revision: str = "new") -> Outcomes:
    found = next(r.outcomes for r in (await gateway.state()).revisions if r.name == revision)
    assert found is not None
    return found


async def ask_in(gateway: Running, session: str, text: str = "hello", **more: Any) -> tuple[int, str]:
    async with gateway.chat(text, headers={SESSION_HEADER: session}, **more) as response:
        await response.read()
        return response.status, response.headers.get(REVISION_HEADER, "")


async def test_a_session_stays_on_its_revision(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gateway = await start_divided(start, engine, second_engine)
    seen = {session: {(await ask_in(gateway, session, f"{turn}"))[1] for turn in range(4)} for session in map(str, range(12))}
    assert all(len(revisions) == 1 for revisions in seen.values())
    assert len({revision for revisions in seen.values() for revision in revisions}) == 2


async def test_every_replica_puts_a_session_on_the_same_revision(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gateway, other = [await start_divided(start, engine, second_engine) for _ in range(2)]
    for session in map(str, range(12)):
        assert (await ask_in(gateway, session))[1] == (await ask_in(other, session))[1]


async def test_without_a_name_a_session_is_what_begins_alike(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gateway = await start_divided(start, engine, second_engine)
    for number in range(6):
        first = {"role": "user", "content": f"question {number}"}
        turns: list[Any] = [[first], [first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"}]]
        revisions = set()
        for messages in turns:
            async with gateway.session.post(
                f"{gateway.url}/v1/chat/completions", json={"model": "sentiment", "messages": messages}
            ) as response:
                revisions.add(response.headers[REVISION_HEADER])
        assert len(revisions) == 1


async def test_with_affinity_request_a_session_is_divided(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gateway = await start_divided(start, engine, second_engine, affinity="Request")
    assert {(await ask_in(gateway, "one"))[1] for _ in range(40)} == {"old", "new"}


def test_a_canary_keeps_its_sessions_when_its_weight_rises_and_weights_are_shares() -> None:
    places = [session_place(str(session), "new") for session in range(4000)]
    assert all(0 <= place < 1 for place in places)
    share = sum(place < 0.05 for place in places) / len(places)
    assert share == pytest.approx(0.05, abs=0.015)
    others = [session_place(str(session), "newer") for session in range(4000)]
    both = sum(a < 0.05 and b < 0.05 for a, b in zip(places, others, strict=True)) / len(places)
    assert both < 0.01, "the next canary has other sessions"


async def test_a_session_whose_revision_has_no_replica_is_answered_by_the_other(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(), endpoints={"old": (engine.address,)})
    assert Counter([await ask_in(gateway, str(n)) for n in range(8)]) == {(200, "old"): 8}


async def test_a_revision_that_fails_is_counted_also_where_another_replica_answers(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address, second_engine.address)})
    engine.replies, second_engine.replies = [status(503)], [answer(chat_answer("", "abort"))]
    assert [(await gateway.ask(f"{n}"))[0] for n in range(3)] == [200] * 3
    counted = await outcomes(gateway)
    assert counted.requests == 3
    assert counted.errors == 1, "of one request, however many replicas failed it"


@pytest.mark.parametrize(
    ("reply", "stream"),
    [
        (status(500), False),
        (answer(chat_answer("", "error")), False),
        (stream_of(*chat_events("a", "b"), break_after=2), True),
        (stream_of(*chat_events("began", finish_reason="abort")), True),
        (stream_of(*chat_events("began")[:2]), True),
        (stream_of(*chat_events("began")[:2], b'data: {"error": {"message": "out of memory"}}\n\n', b"data: [DONE]\n\n"), True),
    ],
)
async def test_every_way_of_failing_counts_as_an_error(start: Start, engine: FakeEngine, reply: Any, stream: bool) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    engine.reply = reply
    with contextlib.suppress(aiohttp.ClientError):  # a cut stream reaches the client as one
        await ask_in(gateway, "s", stream=stream)
    counted = await outcomes(gateway)
    assert (counted.requests, counted.errors) == (1, 1)


async def test_counts_and_the_time_between_tokens_are_metrics_by_revision(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    engine.replies = [status(500)]
    await ask_in(gateway, "a")
    await ask_in(gateway, "b", stream=True)
    shown = await gateway.metrics()
    own = 'deployment="tweets",namespace="team"'
    for name, count in (("requests", 2), ("errors", 1), ("answers", 1), ("empty", 0)):
        assert f'tuneloop_gateway_canary_outcomes{{{own},outcome="{name}",revision="new"}} {count}.0' in shown
    assert f'tuneloop_gateway_inter_token_seconds_count{{{own},revision="new"}} 1.0' in shown
    gateway.configure(divided(weight=100, window="", generation=2))
    assert "canary_outcomes{" not in await gateway.metrics()


async def test_what_the_client_did_wrong_is_nobodys_error(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    engine.reply = status(400)
    await ask_in(gateway, "s")
    assert await outcomes(gateway) == Outcomes()


async def test_one_session_fails_once(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    engine.reply = status(500)
    for _ in range(5):
        await ask_in(gateway, "s")
    counted = await outcomes(gateway)
    assert (counted.requests, counted.errors) == (3, 1), "the first, the second and the fourth"
    await ask_in(gateway, "another")
    assert (await outcomes(gateway)).errors == 2


async def test_the_failure_of_a_long_session_does_not_vanish_among_its_requests(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    for turn in range(64):
        engine.reply = status(500) if turn % 2 else answer(chat_answer("ok"))
        await ask_in(gateway, "long")
    counted = await outcomes(gateway)
    assert counted.errors == 1
    assert counted.errors / counted.requests > 0.1, "of a revision that fails every second request"


async def test_the_time_that_another_revisions_attempt_took_is_nobodys_latency(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    gateway = await start_divided(start, engine, second_engine)
    second_engine.reply = status(503)
    for number in range(12):
        await ask_in(gateway, f"{number}")
    failed, answered = await outcomes(gateway), await outcomes(gateway, "old")
    assert failed.errors > 0
    assert answered.requests == 12
    assert sum(answered.whole_answer) == 12 - failed.errors


async def test_latencies_of_streams_and_of_whole_answers_are_apart_and_few_of_each_session(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    for _ in range(6):
        await ask_in(gateway, "streams", stream=True)
    await ask_in(gateway, "whole")
    counted = await outcomes(gateway)
    assert (sum(counted.first_token), sum(counted.inter_token), sum(counted.whole_answer)) == (4, 4, 1)
    assert counted.answers == 4, "the first, the second and the fourth of one, the first of the other"


async def test_who_gives_up_before_the_first_token_waited_at_least_so_long(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    gate = asyncio.Event()
    engine.reply = stream_of(*chat_events("late"), gate=gate, first=0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await ask_in(gateway, "s", stream=True)
    await eventually(lambda: sum(gateway.gateway.outcomes.report("new").first_token))
    counted = await outcomes(gateway)
    assert counted.requests == 0
    assert next(i for i, count in enumerate(counted.first_token) if count) >= bucket_of(0.15)


async def test_counts_begin_afresh_with_a_window_and_end_with_it(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    await ask_in(gateway, "s")
    assert (await outcomes(gateway)).requests == 1
    gateway.configure(divided(weight=100, window="canary:1:later", generation=2))
    assert await outcomes(gateway) == Outcomes()
    assert (await gateway.state()).window == "canary:1:later"
    gateway.configure(divided(weight=100, window="", generation=3))
    await ask_in(gateway, "s")
    assert [revision.outcomes for revision in (await gateway.state()).revisions] == [None, None]


async def test_thumbs_on_answers_of_the_window_are_counted_for_their_revision(start: Start, engine: FakeEngine) -> None:
    gateway = await start(divided(weight=100), endpoints={"new": (engine.address,)})
    for thumb in ("up", "down", "down"):
        async with gateway.chat(f"what is {thumb}") as response:
            token = response.headers["x-tuneloop-feedback"]
        await gateway.captured()
        async with gateway.session.post(f"{gateway.url}/v1/feedback", json={"token": token, "thumbs": thumb}) as response:
            assert response.status == 200
    counted = await outcomes(gateway)
    assert (counted.up, counted.down) == (1, 1), "one subject's thumbs down count once"


@pytest.mark.parametrize(
    ("text", "finish_reason", "faults"),
    [
        ("A plain answer.", "stop", []),
        ("", "stop", ["empty"]),
        ("  \n", "stop", ["empty"]),
        ("I'm sorry, but I can't help with that.", "stop", ["refused"]),
        ("As an AI, I have no opinion.", "stop", ["refused"]),
        ("The sorry state of affairs is well known.", "stop", []),
        ("again and again " * 40, "stop", ["repetitive"]),
        ("no end in si", "length", ["cut_short"]),
        ("la la", "repetition", ["repetitive"]),
    ],
)
def test_faults_are_read_from_an_answers_form(text: str, finish_reason: str, faults: list[str]) -> None:
    assert faults_of(Answer(text, finish_reason)) == faults


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.001, 0.02, 0.25, 3.0, 119.0, 1e6])
def test_a_latency_is_below_its_buckets_edge_and_not_below_the_one_before(seconds: float) -> None:
    place = bucket_of(seconds)
    edge = LATENCY_LEAST_SECONDS * LATENCY_EDGE_RATIO**place
    assert place == 239 or seconds < edge
    assert place == 0 or seconds >= edge / LATENCY_EDGE_RATIO * (1 - 1e-9)
    assert math.isfinite(edge)
