"""Requests that wait for an engine: bounded in number, bytes and time, forwarded when it is there, and told to the operator."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, answer, chat_answer, chat_events, stream_of

from tuneloop_gateway.contract import Metric


def config(generation: int = 1, **fields: Any) -> dict[str, Any]:
    return make_config(make_revision()) | {"generation": generation, "holdSeconds": 30} | fields


async def held(gateway: Running, number: int) -> None:
    await eventually(lambda: gateway.gateway.router.held == number)
    assert (await gateway.state()).held == number


async def test_while_it_sleeps_requests_wait_and_none_reaches_an_engine_that_still_runs(start: Start, engine: FakeEngine) -> None:
    gateway = await start(config(asleep=True), {"svc": (engine.address,)})
    whole, parts = answer(chat_answer("hi")), stream_of(*chat_events("hi"))
    engine.reply = lambda request, body: (parts if body.get("stream") else whole)(request, body)

    async def streamed() -> bytes:
        async with gateway.chat(stream=True) as response:
            return await response.read()

    asked = [asyncio.create_task(streamed()), asyncio.create_task(gateway.ask("b"))]
    await held(gateway, 2)
    assert f'{Metric.HELD}{{deployment="tweets",namespace="team"}} 2.0' in await gateway.metrics()
    async with gateway.session.get(f"{gateway.url}/readyz") as response:
        assert response.status == 200
    assert engine.requests == []
    state = await gateway.state()
    assert state.idle_seconds == 0
    gateway.configure(config(2))
    answers = await asyncio.gather(*asked)
    assert answers[0] == b"".join(chat_events("hi"))
    assert answers[1][0] == 200
    assert len(engine.requests) == 2
    await held(gateway, 0)
    assert (await gateway.state()).idle_seconds > 0
    assert (await gateway.state()).revisions[0].requests == 2
    await gateway.captured()


async def test_past_its_deadline_a_request_gets_503_and_retry_after(start: Start, engine: FakeEngine) -> None:
    gateway = await start(config(asleep=True, holdSeconds=0.05), {"svc": (engine.address,)}, wait_seconds=60)
    code, body, headers = await gateway.ask()
    assert (code, body["error"]["code"], headers["Retry-After"]) == (503, "no_replica_ready", "5")
    await held(gateway, 0)


async def test_the_time_of_an_answer_does_not_count_while_it_waits(start: Start, engine: FakeEngine) -> None:
    gateway = await start(config(asleep=True, limits={"upstreamTimeoutSeconds": 0.2}), {"svc": (engine.address,)})
    request = asyncio.create_task(gateway.ask())
    await asyncio.sleep(0.3)
    gateway.configure(config(2))
    assert (await request)[0] == 200


async def test_what_waits_is_bounded_in_bytes_and_in_number(start: Start, engine: FakeEngine) -> None:
    gateway = await start(config(asleep=True, limits={"maxHeldBytes": 1000, "maxInFlight": 2}), {"svc": (engine.address,)})
    code, body, headers = await gateway.ask("x" * 1000)
    assert (code, body["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "5")
    waiting = [asyncio.create_task(gateway.ask()) for _ in range(2)]
    await held(gateway, 2)
    assert (await gateway.ask())[1]["error"]["code"] == "overloaded"
    gateway.configure(config(2))
    assert [answer[0] for answer in await asyncio.gather(*waiting)] == [200, 200]


async def test_a_client_that_goes_away_frees_its_place(start: Start, engine: FakeEngine) -> None:
    gateway = await start(config(asleep=True), {"svc": (engine.address,)})
    request = asyncio.create_task(gateway.ask("x" * 500))
    await held(gateway, 1)
    request.cancel()
    await held(gateway, 0)
    assert gateway.gateway.router._held_bytes == 0
    assert (await gateway.state()).idle_seconds > 0


async def test_who_may_not_ask_wakes_nobody(start: Start, engine: FakeEngine) -> None:
    gateway = await start(config(asleep=True, requireKey=True), {"svc": (engine.address,)}, {"a": "secret"})
    before = (await gateway.state()).idle_seconds
    assert (await gateway.ask())[0] == 401
    state = await gateway.state()
    assert (state.held, state.idle_seconds > before) == (0, True)


@pytest.mark.parametrize("drain_seconds", [0.5])
async def test_a_gateway_that_ends_tells_who_still_waits_to_come_again(start: Start, engine: FakeEngine, drain_seconds: float) -> None:
    gateway = await start(config(asleep=True), {"svc": (engine.address,)}, drain_seconds=drain_seconds)
    request = asyncio.create_task(gateway.ask())
    await held(gateway, 1)
    stopping = asyncio.create_task(gateway.gateway.stop())
    code, _, headers = await request
    assert (code, headers["Retry-After"]) == (503, "5")
    await stopping
