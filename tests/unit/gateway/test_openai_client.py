"""The gateway as the real `openai` client sees it, in front of an engine that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, answer, chat_answer, chat_events, status, stream_of

KEYS = {"app": "sk-app"}
ASK: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.fixture
async def gateway(start: Start, engine: FakeEngine) -> Running:
    return await start(make_config(make_revision(), requireKey=True), {"svc": (engine.address,)}, KEYS)


@pytest.fixture
async def client(gateway: Running) -> AsyncIterator[AsyncOpenAI]:
    async with open_client(gateway) as opened:
        yield opened


def open_client(gateway: Running, key: str = "sk-app") -> AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)  # no proxy of the machine between the two
    return AsyncOpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0, timeout=10, http_client=http)


# --- answers ---------------------------------------------------------------------


async def test_chat(client: AsyncOpenAI, engine: FakeEngine) -> None:
    completion = await client.chat.completions.create(model="sentiment", messages=ASK, temperature=0.5, seed=7, stop=["."], user="u1")
    assert completion.choices[0].message.content == "echo: What is the weather in Oslo?"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (7, 3)
    sent = engine.requests[0]
    assert (sent["model"], sent["temperature"], sent["seed"], sent["stop"], sent["user"]) == ("id-r1", 0.5, 7, ["."], "u1")


async def test_completions(client: AsyncOpenAI, engine: FakeEngine) -> None:
    completion = await client.completions.create(model="sentiment", prompt="Once upon", max_tokens=8, echo=False)
    assert completion.choices[0].text == "echo: Once upon"
    assert engine.requests[0]["max_tokens"] == 8


async def test_chat_as_a_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="sentiment", messages=ASK, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "echo: What is the weather in Oslo?"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_completions_as_a_stream(client: AsyncOpenAI, engine: FakeEngine) -> None:
    events = [
        {"object": "text_completion", "choices": [{"index": 0, "text": t, "finish_reason": r}]} for t, r in (("a", None), ("b", "stop"))
    ]
    engine.replies = [stream_of(*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n")]
    stream = await client.completions.create(model="sentiment", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "ab"


async def test_the_usage_of_a_stream(client: AsyncOpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(model="sentiment", messages=ASK, stream=True, stream_options=options)
    usages = [chunk.usage async for chunk in stream if chunk.usage]
    assert [usage.completion_tokens for usage in usages] == [3]


async def test_without_asking_a_stream_has_no_usage_though_its_tokens_are_limited(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(limits={"tokensPerMinute": 10_000}), {"svc": (engine.address,)}, KEYS)
    async with open_client(gateway) as client:
        chunks = [c async for c in await client.chat.completions.create(model="sentiment", messages=ASK, stream=True)]
    assert engine.requests[0]["stream_options"] == {"include_usage": True}
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "echo: What is the weather in Oslo?"


async def test_tools_go_to_the_engine_and_calls_come_back(client: AsyncOpenAI, engine: FakeEngine) -> None:
    body = chat_answer("", "tool_calls")
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    engine.replies = [answer(body)]
    completion = await client.chat.completions.create(model="sentiment", messages=ASK, tools=[TOOL], tool_choice="auto")
    assert engine.requests[0]["tools"] == [TOOL]
    assert engine.requests[0]["tool_choice"] == "auto"
    (call,) = completion.choices[0].message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert completion.choices[0].finish_reason == "tool_calls"
    turns: Any = [
        *ASK,
        completion.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    await client.chat.completions.create(model="sentiment", messages=turns, tools=[TOOL])
    assert [message["role"] for message in engine.requests[1]["messages"]] == ["user", "assistant", "tool"]
    assert engine.requests[1]["messages"][1]["tool_calls"] == [CALL]


async def test_a_streamed_tool_call_arrives_piece_by_piece(client: AsyncOpenAI, engine: FakeEngine) -> None:
    def event(delta: dict[str, Any], reason: str | None = None) -> bytes:
        chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    pieces = [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}]
    pieces += [{"index": 0, "function": {"arguments": text}} for text in ('{"city":', ' "Oslo"}')]
    engine.replies = [stream_of(*(event({"tool_calls": [piece]}) for piece in pieces), event({}, "tool_calls"), b"data: [DONE]\n\n")]
    arguments = ""
    async for chunk in await client.chat.completions.create(model="sentiment", messages=ASK, tools=[TOOL], stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            arguments += (call.function.arguments if call.function else None) or ""
    assert json.loads(arguments) == {"city": "Oslo"}


async def test_logprobs(client: AsyncOpenAI, engine: FakeEngine) -> None:
    body = chat_answer("yes")
    token = {"token": "yes", "logprob": -0.1, "bytes": [121, 101, 115]}
    body["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}
    engine.replies = [answer(body)]
    completion = await client.chat.completions.create(model="sentiment", messages=ASK, logprobs=True, top_logprobs=1)
    assert (engine.requests[0]["logprobs"], engine.requests[0]["top_logprobs"]) == (True, 1)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert [(t.token, t.logprob) for t in logprobs.content or ()] == [("yes", -0.1)]


async def test_several_choices(client: AsyncOpenAI, engine: FakeEngine) -> None:
    body = chat_answer("one")
    body["choices"].append({**body["choices"][0], "index": 1, "message": {"role": "assistant", "content": "two"}})
    engine.replies = [answer(body)]
    completion = await client.chat.completions.create(model="sentiment", messages=ASK, n=2)
    assert engine.requests[0]["n"] == 2
    assert [choice.message.content for choice in completion.choices] == ["one", "two"]


async def test_several_choices_as_a_stream(client: AsyncOpenAI, engine: FakeEngine) -> None:
    def event(index: int, text: str, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
        return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"

    engine.replies = [stream_of(event(0, "a"), event(1, "x"), event(1, "y", "stop"), event(0, "b", "stop"), b"data: [DONE]\n\n")]
    texts = {0: "", 1: ""}
    async for chunk in await client.chat.completions.create(model="sentiment", messages=ASK, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "ab", 1: "xy"}


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["sentiment"]
    assert (await client.models.retrieve("sentiment")).owned_by == "tuneloop"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("another")


async def test_the_feedback_token_is_found_in_the_raw_response(client: AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="sentiment", messages=ASK)
    assert raw.headers["x-tuneloop-feedback"].count(".") == 3
    assert raw.parse().choices[0].message.content == "echo: What is the weather in Oslo?"


# --- errors ----------------------------------------------------------------------


async def test_a_wrong_key(gateway: Running) -> None:
    async with open_client(gateway, "sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            await client.chat.completions.create(model="sentiment", messages=ASK)
    assert (raised.value.code, raised.value.type) == ("invalid_api_key", "authentication_error")


async def test_a_model_that_is_not_here(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model="gpt-9", messages=ASK)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    assert "use 'sentiment'" in raised.value.message


@pytest.mark.parametrize(("field", "value"), [("n", 1000), ("messages", []), ("stream", "yes")])
async def test_a_request_that_is_refused_names_the_field(client: AsyncOpenAI, field: str, value: Any) -> None:
    body = {"model": "sentiment", "messages": ASK, field: value}
    with pytest.raises(openai.BadRequestError) as raised:
        await client.post("/chat/completions", body=body, cast_to=object)
    assert (raised.value.param, raised.value.type) == (field, "invalid_request_error")


async def test_an_engines_own_refusal_comes_through(client: AsyncOpenAI, engine: FakeEngine) -> None:
    error = {
        "message": "This model's maximum context length is 512 tokens.",
        "type": "BadRequestError",
        "param": "input_tokens",
        "code": 400,
    }
    engine.replies = [status(400, {"error": error})]
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="sentiment", messages=ASK)
    assert "maximum context length is 512" in raised.value.message
    assert raised.value.param == "input_tokens"


async def test_a_key_over_its_limit_is_told_when_to_come_back(start: Start, engine: FakeEngine) -> None:
    gateway = await start(make_config(limits={"requestsPerMinute": 1}), {"svc": (engine.address,)}, KEYS)
    async with open_client(gateway) as client:
        await client.chat.completions.create(model="sentiment", messages=ASK)
        with pytest.raises(openai.RateLimitError) as raised:
            await client.chat.completions.create(model="sentiment", messages=ASK)
    assert (raised.value.code, raised.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    assert 50 <= int(raised.value.response.headers["retry-after"]) <= 60


async def test_no_replica_is_an_error_that_the_client_tries_again(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": ()})
    async with open_client(gateway) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(model="sentiment", messages=ASK)
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) > 0


async def _read(client: AsyncOpenAI, into: list[str]) -> None:
    async for chunk in await client.chat.completions.create(model="sentiment", messages=ASK, stream=True):
        into.append(chunk.choices[0].delta.content or "")


async def test_a_stream_that_breaks_is_an_error_and_never_a_short_answer(client: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("a", "b", "c"), break_after=3)]
    got: list[str] = []
    with pytest.raises(Exception, match=r"incomplete|closed|disconnected|Connection error"):
        await _read(client, got)
    assert "".join(got) == "ab"


# --- cancellation ----------------------------------------------------------------


async def test_a_client_that_closes_its_stream_frees_the_engine(client: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events("a", "b"), gate=asyncio.Event(), first=2)]
    stream = await client.chat.completions.create(model="sentiment", messages=ASK, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content == "a":
            break
    await stream.close()
    await eventually(lambda: engine.cancelled == 1)


async def test_a_client_that_gives_up_waiting_frees_the_engine(client: AsyncOpenAI, engine: FakeEngine) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    engine.replies = [never]
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).chat.completions.create(model="sentiment", messages=ASK)
    await eventually(lambda: engine.cancelled == 1)
    assert len(engine.requests) == 1  # and it was not asked again elsewhere
