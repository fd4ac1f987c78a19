"""What is refused, with which status and in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
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
        (json.dumps({"model": "sentiment", "messages": ["hi"]}), 400, "'messages' must hold objects"),
        (json.dumps({"model": "sentiment", "messages": [{"content": "hi"}]}), 400, "'messages'"),
        ('{"model": "sentiment", "messages": [{"role": "user", "content": "hi", "weight": NaN}]}', 400, "not valid JSON"),
        (json.dumps({"model": "sentiment", "messages": [{"role": "user", "name": "\ud83d"}]}), 400, "half a surrogate pair"),
        (json.dumps({"model": "sentiment", "messages": MESSAGES, "stream": "yes"}), 400, "'stream'"),
    ],
)
async def test_a_bad_request_is_refused_with_a_sentence(gateway: Running, engine: FakeEngine, body: str, status: int, says: str) -> None:
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", data=body) as response:
        error = (await response.json())["error"]
        assert (response.status, set(error)) == (status, {"message", "type", "param", "code"})
        assert says in error["message"]
    assert engine.requests == []


def over(**fields: Any) -> dict[str, Any]:
    return {"model": "sentiment", "messages": MESSAGES} | fields


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return over(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def shown(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (over(n=17), "n", "less than or equal to 16"),
        (over(n=True), "n", "a valid integer"),
        (over(max_tokens=10**7), "max_tokens", "1048576"),
        (over(stop=["x"] * 17), "stop", "at most 16 items"),
        (over(stop=["x" * 257]), "stop", "256 characters"),
        (over(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "1024"),
        (over(structured_outputs={"regex": "(a{999}){999}"}), "structured_outputs", "multiply to 10000"),
        (over(structured_outputs={"regex": "a" * 2049}), "structured_outputs", "2048 characters"),
        (over(structured_outputs={"grammar": "x" * 20_000}), "structured_outputs", "16384 characters"),
        (formatted({"type": "array", "minItems": 10**6}), "response_format", "'minItems'"),
        (formatted({"type": "string", "pattern": "(a{1000}){1000}"}), "response_format", "multiply"),
        (formatted({"enum": ["x" * 70_000]}), "response_format", "65536 characters"),
        (over(chat_template="{{ 7 * 7 }}"), "chat_template", "not taken"),
        (over(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs", "not taken"),
        (over(kv_transfer_params={}), "kv_transfer_params", "not taken"),
        (over(messages=shown("http://169.254.169.254/latest")), "messages", "data: URLs alone"),
        (over(messages=shown("file:///etc/passwd")), "messages", "data: URLs alone"),
    ],
)
async def test_what_an_engine_may_not_be_asked_is_refused(
    gateway: Running, engine: FakeEngine, body: dict[str, Any], param: str, says: str
) -> None:
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, says in error["message"]) == (400, True), error
    assert error["param"] == param
    assert engine.requests == []


async def test_media_within_the_request_and_switches_of_reasoning_pass(gateway: Running, engine: FakeEngine) -> None:
    more = {"chat_template_kwargs": {"enable_thinking": False}, "structured_outputs": {"choice": ["yes", "no"]}}
    assert (await gateway.ask(messages=shown("data:image/png;base64,AAAA"), **more))[0] == 200
    assert engine.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (await gateway.ask("half \ud83d of a pair"))[0] == 400
    assert (await gateway.ask("\U0001f600"))[0] == 200


async def test_too_many_prompts_at_once_are_refused(gateway: Running) -> None:
    for prompts, n, status in ((256, 1, 200), (257, 1, 400), (128, 5, 400)):
        body = {"model": "sentiment", "prompt": ["x"] * prompts, "n": n}
        async with gateway.session.post(f"{gateway.url}/v1/completions", json=body) as response:
            assert response.status == status


async def test_a_clients_fault_is_not_counted_against_a_revision(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(make_revision(prompt={"template": "{{ text }}!"}), window="w"), {"svc": (engine.address,)})
    async with gateway.session.post(f"{gateway.url}/v1/completions", json={"model": "sentiment", "prompt": [1, 2]}) as response:
        assert response.status == 400
    (report,) = (await gateway.state()).revisions
    assert (report.requests, report.errors) == (0, 0)


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


async def test_nobody_has_an_adapter_loaded_or_unloaded_through_the_gateway(gateway: Running, engine: FakeEngine) -> None:
    body = {"lora_name": "mine", "lora_path": "/volumes/models/v1"}
    for method, path in (("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"), ("PUT", "/tuneloop/adapters")):
        for url in (gateway.url, gateway.internal_url):
            async with gateway.session.request(method, url + path, json=body) as response:
                assert response.status == 404
    assert engine.wanted == []


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
