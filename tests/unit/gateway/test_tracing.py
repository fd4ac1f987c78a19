"""Traces reach an OTLP receiver in OpenTelemetry's own form, say nothing of texts, and cost no request where nobody receives them."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.unit.gateway.conftest import Running, Start, eventually, make_config
from tests.unit.gateway.engines import FakeEngine, chat_events, status, stream_of

from tuneloop_gateway import spans, tracing

pytestmark = pytest.mark.process
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{}"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Receiver:
    """`POST /v1/traces`, protobuf, gzip."""

    def __init__(self) -> None:
        self.port, self.resources, self.spans = unused_port(), list[dict[str, Any]](), list[Span]()
        self._runner: web.AppRunner | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> Receiver:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        body = await request.read()
        told = ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        for of_resource in told.resource_spans:
            self.resources.append(values(of_resource.resource))
            self.spans += [span for of_scope in of_resource.scope_spans for span in of_scope.spans]
        return web.Response(body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf")


def values(holder: Any) -> dict[str, Any]:
    """The attributes of a span or resource."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {item.key: plain(item.value) for item in holder.attributes}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    one = await Receiver().start()
    yield one
    await one.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "LOOK_SECONDS", 0.02)


async def traced(start: Start, engine: FakeEngine, endpoint: str, rate: float = 1, **more: Any) -> Running:
    config = make_config(tracing={"endpoint": endpoint, "sampleRate": rate})
    gateway = await start(config, {"svc": (engine.address,)}, {"app": "key-app"}, **more)
    await eventually(lambda: gateway.gateway.tracing.spans is not None)
    return gateway


async def test_a_request_is_a_span_by_the_conventions_and_the_engine_goes_on_below_it(
    start: Start, engine: FakeEngine, receiver: Receiver
) -> None:
    gateway = await traced(start, engine, receiver.endpoint)
    headers = {"Authorization": "Bearer key-app", "traceparent": PARENT.format("01"), "tracestate": "a=b", "x-request-id": "mine-1"}
    await gateway.ask("a secret question", headers=headers)
    await gateway.gateway.stop()
    (span,) = receiver.spans
    assert (span.name, span.kind) == ("chat sentiment", Span.SPAN_KIND_CLIENT)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, "00f067aa0ba902b7")
    assert values(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "sentiment",
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "id-r1",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "tuneloop.key": "app",
        "tuneloop.request.id": "mine-1",
        "tuneloop.revision": "r1",
    }
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert (
        receiver.resources[0] | {"service.name": "tweets", "service.namespace": "team", "service.instance.id": "uid-1"}
        == (receiver.resources[0])
    )
    assert engine.headers[0]["traceparent"] == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    assert engine.headers[0]["tracestate"] == "a=b"
    assert b"secret" not in span.SerializeToString()


async def test_streams_failures_and_clients_that_go_are_spans_too(
    start: Start, engine: FakeEngine, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    gateway = await traced(start, engine, receiver.endpoint)
    async with gateway.chat(stream=True) as response:
        await response.read()
    engine.replies = [status(500), stream_of(*chat_events("a", "b"), gate=asyncio.Event(), first=2)]
    await gateway.ask()
    (await gateway.chat(stream=True)).close()
    await eventually(lambda: gateway.gateway.public.in_flight == 0)
    async with gateway.session.post(gateway.url + "/v1/completions", json={"model": "sentiment", "prompt": "a"}) as response:
        await response.read()
    assert (await gateway.ask(n=99))[0] == 400, "which is none of a model's"
    await gateway.gateway.stop()
    streamed, failed, cut, whole = sorted(receiver.spans, key=lambda span: span.start_time_unix_nano)
    assert values(streamed)["gen_ai.request.stream"] is True
    assert values(streamed)["gen_ai.usage.output_tokens"] == 3
    assert 0 < values(streamed)["gen_ai.response.time_to_first_chunk"] < 60
    assert (failed.status.code, values(failed)["error.type"]) == (Status.STATUS_CODE_ERROR, "error")
    assert (cut.status.code, values(cut)["error.type"]) == (Status.STATUS_CODE_UNSET, "cancelled")
    assert whole.name == "text_completion sentiment"
    logged = {line["traceId"] for line in map(json.loads, capfd.readouterr().out.splitlines()) if "traceId" in line}
    assert logged == {span.trace_id.hex() for span in receiver.spans}


async def test_the_sender_decides_and_where_it_does_not_the_rate_does(start: Start, engine: FakeEngine, receiver: Receiver) -> None:
    gateway = await traced(start, engine, receiver.endpoint, rate=0)
    for header in ({"traceparent": PARENT.format("01")}, {"traceparent": PARENT.format("00")}, {"traceparent": "00-nonsense"}, {}):
        await gateway.ask(headers=header)
    await gateway.gateway.stop()
    assert [span.trace_id.hex() for span in receiver.spans] == [TRACE_ID]
    assert [int(headers["traceparent"][-2:], 16) & 1 for headers in engine.headers] == [1, 0, 0, 0]


@pytest.mark.parametrize("stands_still", [False, True])
async def test_a_receiver_that_is_away_or_stands_still_costs_no_request(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, stands_still: bool
) -> None:
    held: list[asyncio.StreamWriter] = []

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(spans, "EXPORT_SECONDS", 3600)
    monkeypatch.setattr(spans, "BATCH", 2)
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1] if stands_still else unused_port()
    gateway = await traced(start, engine, f"http://127.0.0.1:{port}")
    assert [(await gateway.ask())[0] for _ in range(5)] == [200] * 5
    if stands_still:
        await eventually(lambda: held)
    assert [(await gateway.ask())[0] for _ in range(5)] == [200] * 5
    await gateway.gateway.stop()
    for writer in held:
        writer.close()
    silent.close()


async def test_traces_begin_and_end_with_the_configuration(start: Start, engine: FakeEngine, receiver: Receiver) -> None:
    gateway = await start(make_config(), {"svc": (engine.address,)})
    await gateway.ask(headers={"traceparent": PARENT.format("01")})
    assert "traceparent" not in engine.headers[0]
    gateway.configure(make_config(generation=2, tracing={"endpoint": receiver.endpoint + "/", "sampleRate": 1}))
    await eventually(lambda: gateway.gateway.tracing.spans is not None)
    await gateway.ask()
    gateway.configure(make_config(generation=3))
    await eventually(lambda: gateway.gateway.tracing.spans is None)
    await eventually(lambda: len(receiver.spans) == 1)


def test_opentelemetry_is_loaded_where_it_is_asked_for_alone() -> None:
    seen = "import tuneloop_gateway.app, sys; print([name for name in sys.modules if name.startswith(('opentelemetry', 'requests'))])"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout == "[]\n"
