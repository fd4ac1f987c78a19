"""Requests reach an engine with the revision's prompt, and answers come back byte for byte."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import ClientConnectionError, ClientPayloadError, web
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, chat_answer, chat_events, status, stream_of

from tuneloop_gateway.contract import FEEDBACK_HEADER, REVISION_HEADER, Metric


async def test_an_answer_comes_back_byte_for_byte_with_the_gateways_headers(gateway: Running, engine: FakeEngine) -> None:
    raw = json.dumps(chat_answer("fine"), indent=3).encode() + b"\n\n"

    async def odd_spacing(_: web.Request, __: object) -> web.Response:
        return web.Response(body=raw, content_type="application/json")

    engine.replies = [odd_spacing]
    async with gateway.chat(headers={"x-request-id": "mine-1"}) as response:
        assert response.status == 200
        assert await response.read() == raw
        assert response.headers[REVISION_HEADER] == "r1"
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers[FEEDBACK_HEADER].count(".") == 3
    assert engine.requests[0]["model"] == "id-r1"
    assert engine.headers[0]["authorization"] == "Bearer engine-secret"


async def test_the_clients_own_credentials_never_reach_the_engine(gateway: Running, engine: FakeEngine) -> None:
    await gateway.ask(headers={"Authorization": "Bearer users-key", "Cookie": "session=1", "x-request-id": "bad id\t"})
    assert "users-key" not in str(engine.headers[0])
    assert "cookie" not in engine.headers[0]
    assert engine.headers[0]["x-request-id"] != "bad id"


async def test_a_stream_is_passed_on_chunk_by_chunk_as_it_arrives(gateway: Running, engine: FakeEngine) -> None:
    events, gate = chat_events("Once ", "upon"), asyncio.Event()
    engine.replies = [stream_of(events[0] + events[1], *events[2:], gate=gate)]
    async with gateway.chat(stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert await response.content.readany() == events[0] + events[1]
        for event in events[2:]:
            gate.set()  # the engine says no more until the client has what was said before
            assert await response.content.readany() == event
        assert await response.content.read() == b""


async def test_completions_are_served_too(gateway: Running) -> None:
    async with gateway.session.post(f"{gateway.url}/v1/completions", json={"model": "sentiment", "prompt": "Once"}) as response:
        assert (await response.json())["choices"][0]["text"] == "echo: Once"


async def test_the_models_list_names_the_deployments_model(gateway: Running) -> None:
    async with gateway.session.get(f"{gateway.url}/v1/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["sentiment"]
    async with gateway.session.get(f"{gateway.url}/v1/models/other") as response:
        assert response.status == 404


async def test_the_engines_error_reaches_the_client_as_it_is(gateway: Running, engine: FakeEngine) -> None:
    engine.replies = [status(400, {"error": {"message": "max_tokens is too large", "code": 400}})]
    code, body, _ = await gateway.ask()
    assert (code, body["error"]["message"]) == (400, "max_tokens is too large")


async def test_an_engine_that_refuses_the_gateways_key_is_the_gateways_fault(start: Start, engine: FakeEngine) -> None:
    engine.key = "another"
    gateway = await start(endpoints={"svc": (engine.address,)})
    code, body, _ = await gateway.ask()
    assert (code, body["error"]["code"]) == (502, "upstream_refused")


async def test_a_client_that_goes_away_cancels_the_engines_work(gateway: Running, engine: FakeEngine) -> None:
    async def never(_: web.Request, __: object) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    engine.replies = [never]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await gateway.ask()
    await eventually(lambda: engine.cancelled)
    state = await gateway.state()
    assert (state.revisions[0].errors, state.revisions[0].in_flight) == (0, 0)


async def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_it_at_the_engine(gateway: Running, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("a", "b", "c"), gate=asyncio.Event(), first=2)]
    async with gateway.chat(stream=True) as response:
        assert b"a" in await response.content.readany()
        response.close()
    await eventually(lambda: engine.cancelled)


async def test_a_stream_that_breaks_is_not_taken_for_a_whole_one(gateway: Running, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("a", "b"), break_after=3)]
    with pytest.raises(ClientPayloadError):
        async with gateway.chat(stream=True) as response:
            await response.read()
    assert (await gateway.state()).revisions[0].errors == 1


async def test_an_engine_that_is_too_slow_gives_504(start: Start, engine: FakeEngine) -> None:
    async def never(_: web.Request, __: object) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    engine.replies = [never]
    gateway = await start(make_config(limits={"upstreamTimeoutSeconds": 0.2}), {"svc": (engine.address,)})
    code, body, _ = await gateway.ask()
    assert (code, body["error"]["code"]) == (504, "upstream_timeout")


async def test_the_revisions_prompt_is_applied_and_the_clients_settings_win(start: Start, engine: FakeEngine) -> None:
    prompt = {
        "system": "Be brief.", "template": "Sentiment of: {{ text }}", "temperature": 0, "maxTokens": 8,
        "fewShot": [{"input": "Nice", "output": "positive"}],
    }  # fmt: skip
    gateway = await start(make_config(make_revision(prompt=prompt)), {"svc": (engine.address,)})
    await gateway.ask("{{ 7*7 }}")
    assert engine.requests[0] == {
        "model": "id-r1", "temperature": 0, "max_tokens": 8,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Sentiment of: Nice"},
            {"role": "assistant", "content": "positive"},
            {"role": "user", "content": "Sentiment of: {{ 7*7 }}"},
        ],
    }  # fmt: skip
    await gateway.ask(temperature=1, max_tokens=2, messages=[{"role": "system", "content": "Mine"}, {"role": "user", "content": "x"}])
    assert (engine.requests[1]["temperature"], engine.requests[1]["max_tokens"]) == (1, 2)
    assert [m["content"] for m in engine.requests[1]["messages"] if m["role"] == "system"] == ["Mine"]


async def test_metrics_tell_what_happened_per_revision_and_nothing_about_users(gateway: Running) -> None:
    await gateway.ask("my secret text")
    text = await gateway.metrics()
    own = 'deployment="tweets",finish_reason="stop",namespace="team",revision="r1"'
    assert f'tuneloop_gateway_requests_total{{code="2xx",{own}}} 1.0' in text
    assert 'tuneloop_gateway_tokens_total{deployment="tweets",kind="completion",namespace="team",revision="r1"} 3.0' in text
    assert "secret" not in text
    known = {value for name, value in vars(Metric).items() if name.isupper()}
    assert {line.split()[2].removesuffix("_total") for line in text.splitlines() if line.startswith("# TYPE")} <= known


async def test_running_requests_end_before_the_gateway_does(start: Start, engine: FakeEngine) -> None:
    gate = asyncio.Event()
    engine.replies = [stream_of(*chat_events("a", "b"), gate=gate)]
    gateway = await start(endpoints={"svc": (engine.address,)}, drain_delay_seconds=0.2)
    request = asyncio.create_task(_whole(gateway))
    await eventually(lambda: engine.requests)
    stopping = asyncio.create_task(gateway.gateway.stop())
    await asyncio.sleep(0.05)
    async with gateway.session.get(f"{gateway.url}/readyz") as response:
        assert response.status == 503
    while not request.done():
        gate.set()
        await asyncio.sleep(0.01)
    assert (await request).endswith(b"data: [DONE]\n\n")
    await stopping


async def test_no_request_begins_once_the_gateway_stores_what_is_pending(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that began then would be cut off a second later."""
    assert (await gateway.ask())[0] == 200  # leaves a connection
    refused: list[ClientConnectionError] = []

    async def ask_again(_: float) -> None:
        try:
            await gateway.ask()
        except ClientConnectionError as error:
            refused.append(error)

    monkeypatch.setattr(gateway.gateway.capture, "flush", ask_again)
    await gateway.gateway.stop()
    assert refused


async def _whole(gateway: Running) -> bytes:
    async with gateway.chat(stream=True) as response:
        return bytes(await response.read())
