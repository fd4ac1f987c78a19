"""What is refused, with which status and in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from tests.unit.gateway.conftest import Running, Start, eventually, make_config
from tests.unit.gateway.engines import FakeEngine, chat_answer

from tuneloop_gateway.allowances import OwnAllowances
from tuneloop_gateway.contract import Limits

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("{", 400, "not valid JSON"),
        ("[]", 400, "JSON object"),
        ('{"a":' * 70 + "1" + "}" * 70, 400, "nested deeper"),
        (json.dumps({"messages": MESSAGES}), 400, "name a model"),
        (json.dumps({"model": "gpt-4", "messages": MESSAGES}), 404, "use 'sentiment'"),
        (json.dumps({"model": "sentiment"}), 400, "'messages'"),
        (json.dumps({"model": "sentiment", "messages": ["hi"]}), 400, "'role'"),
        (json.dumps({"model": "sentiment", "messages": MESSAGES, "n": 17}), 400, "from 1 to 16"),
        (json.dumps({"model": "sentiment", "messages": MESSAGES, "n": True}), 400, "from 1 to 16"),
        (json.dumps({"model": "sentiment", "messages": MESSAGES, "stream": "yes"}), 400, "'stream'"),
    ],
)
async def test_a_bad_request_is_refused_with_a_sentence(gateway: Running, engine: FakeEngine, body: str, status: int, says: str) -> None:
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", data=body) as response:
        error = (await response.json())["error"]
        assert (response.status, set(error)) == (status, {"message", "type", "param", "code"})
        assert says in error["message"]
    assert engine.requests == []


async def test_brackets_inside_strings_are_no_depth(gateway: Running) -> None:
    assert (await gateway.ask('"[' * 100))[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_refused_however_it_is_sent(start: Start, engine: FakeEngine, chunked: bool) -> None:
    gateway = await start(make_config(limits={"maxBodyBytes": 1000}), {"svc": (engine.address,)})
    raw = json.dumps({"model": "sentiment", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()

    async def pieces() -> Any:
        for i in range(0, len(raw), 500):
            yield raw[i : i + 500]

    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", data=pieces() if chunked else raw) as response:
        assert response.status == 413
    assert (await gateway.ask("short"))[0] == 200


async def test_unknown_paths_and_methods_answer_in_the_same_shape(gateway: Running) -> None:
    for method, path, status in (("GET", "/v1/embeddings", 404), ("POST", "/metrics", 404), ("GET", "/v1/chat/completions", 405)):
        async with gateway.session.request(method, gateway.url + path) as response:
            assert response.status == status
            assert "message" in (await response.json())["error"]


async def test_internal_paths_are_not_on_the_public_port(gateway: Running) -> None:
    for path in ("/internal/state", "/internal/export", "/metrics"):
        async with gateway.session.get(gateway.url + path) as response:
            assert response.status == 404


async def test_a_required_key_must_be_a_known_one(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(requireKey=True), {"svc": (engine.address,)}, keys={"app": "good-key\n"})
    for headers, status in (({}, 401), ({"Authorization": "Bearer bad"}, 401), ({"Authorization": "Basic good-key"}, 401)):
        assert (await gateway.ask(headers=headers))[0] == status
    assert (await gateway.ask(headers={"Authorization": "Bearer good-key"}))[0] == 200
    assert len(engine.requests) == 1


async def test_a_key_that_was_removed_is_a_key_no_longer(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(requireKey=True), {"svc": (engine.address,)}, keys={"app": "good-key"})
    (gateway.folder / "keys" / "app").unlink()
    gateway.gateway.keys.reload()
    assert (await gateway.ask(headers={"Authorization": "Bearer good-key"}))[0] == 401


async def test_each_key_has_its_own_rate(start: Start, engine: FakeEngine) -> None:
    config = make_config(requireKey=True, limits={"requestsPerMinute": 3})
    gateway = await start(config, {"svc": (engine.address,)}, keys={"a": "key-a", "b": "key-b"})
    statuses = [(await gateway.ask(headers={"Authorization": "Bearer key-a"}))[0] for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    code, body, headers = await gateway.ask(headers={"Authorization": "Bearer key-a"})
    assert (code, body["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(headers["Retry-After"]) <= 21
    assert (await gateway.ask(headers={"Authorization": "Bearer key-b"}))[0] == 200


def test_a_rate_fills_again_evenly() -> None:
    own, limits = OwnAllowances(), Limits(requests_per_minute=60)
    assert [own.take_at("s", limits, 100.0) for _ in range(60)] == [None] * 60
    wait = own.take_at("s", limits, 100.0)
    assert wait is not None
    assert (wait.seconds, wait.what) == (pytest.approx(1.0), "requests")
    assert own.take_at("s", limits, 101.0) is None
    assert own.take_at("s", limits, 101.0) is not None
    assert own.take_at("s", limits, 300.0) is None


async def test_more_running_requests_than_the_limit_are_shed_at_once(start: Start, engine: FakeEngine) -> None:
    release = asyncio.Event()

    async def wait(_: web.Request, __: object) -> web.Response:
        await release.wait()
        return web.json_response(chat_answer("late"))

    engine.reply = wait
    gateway = await start(make_config(limits={"maxInFlight": 2}), {"svc": (engine.address,)})
    running = [asyncio.create_task(gateway.ask()) for _ in range(2)]
    await eventually(lambda: len(engine.requests) == 2)
    code, body, headers = await gateway.ask()
    assert (code, body["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "1")
    release.set()
    assert [code for code, _, _ in await asyncio.gather(*running)] == [200, 200]


async def test_no_secret_is_in_what_the_gateway_shows(gateway: Running) -> None:
    async with gateway.session.get(f"{gateway.internal_url}/internal/state") as response:
        shown = await response.text() + await gateway.metrics()
    assert "secret" not in shown
