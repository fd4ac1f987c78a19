"""Which replica answers: weights, readiness, retries before the first byte."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from aiohttp import web
from aiohttp.test_utils import unused_port
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine, answer, chat_answer, chat_events, status, stream_of

from tuneloop_gateway.contract import REVISION_HEADER

DONE = b"data: [DONE]\n\n"


async def test_an_overloaded_or_aborting_replica_is_left_for_another(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (engine.address, second_engine.address)})
    for first_reply in (status(503), answer(chat_answer("", "abort")), answer(chat_answer("half an ans", "abort"))):
        engine.replies, second_engine.replies = [first_reply], [first_reply]
        code, body, _ = await gateway.ask("again")
        assert (code, body["choices"][0]["message"]["content"]) == (200, "echo: again")
        engine.replies, second_engine.replies = [], []
    assert (await gateway.state()).revisions[0].errors == 0
    assert "tuneloop_gateway_retries_total{" in await gateway.metrics()


async def test_a_stream_that_aborts_before_it_says_anything_is_tried_elsewhere(gateway: Running, engine: FakeEngine) -> None:
    engine.replies = [stream_of(*chat_events(finish_reason="abort")), stream_of(*chat_events("whole"))]
    async with gateway.chat(stream=True) as response:
        assert await response.read() == b"".join(chat_events("whole"))
    assert len(engine.requests) == 2


async def test_a_stream_that_aborts_after_it_began_is_passed_on(gateway: Running, engine: FakeEngine) -> None:
    events = chat_events("be", "gan", finish_reason="abort")
    engine.replies = [stream_of(*events)]
    async with gateway.chat(stream=True) as response:
        assert await response.read() == b"".join(events)
    assert len(engine.requests) == 1


DEATH = {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "code": 500}}
"""What vLLM's server says, for a moment, of all requests of an engine process that was killed."""


async def test_an_engine_whose_process_died_is_left_for_another(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (engine.address, second_engine.address)})
    first = min(engine, second_engine, key=lambda e: e.address)  # of two that are idle it is asked
    role = chat_events()[0]
    for stream, reply in ((False, status(500, DEATH)), (True, stream_of(role, b"data: " + json.dumps(DEATH).encode() + b"\n\n", DONE))):
        first.reply, first.requests = reply, []
        async with gateway.chat("again", stream=stream) as response:
            said = await response.read()
        assert (response.status, b"echo: " in said, b"EngineCore" in said, len(first.requests)) == (200, True, False, 1)
        for endpoint in gateway.gateway.endpoints.ready("svc"):
            assert (endpoint.down_until > 0) == (endpoint.address == first.address), "for a moment it is left alone"
            endpoint.down_until = 0


async def test_a_request_that_engines_die_of_does_not_go_to_all_of_them(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    third = await FakeEngine().start()
    engines = (engine, second_engine, third)
    gateway = await start(endpoints={"svc": tuple(e.address for e in engines)})
    for one in engines:
        one.reply = status(500, DEATH)
    assert (await gateway.ask())[0] == 503
    assert sum(len(e.requests) for e in engines) == 2
    await third.stop()


async def test_a_stream_whose_engine_died_after_it_began_ends_with_the_engines_error(gateway: Running, engine: FakeEngine) -> None:
    event = b"data: " + json.dumps(DEATH).encode() + b"\n\n"
    engine.replies = [stream_of(*chat_events("be", "gan")[:2], event, DONE)]
    async with gateway.chat(stream=True) as response:
        assert event in await response.read()
    assert len(engine.requests) == 1


async def test_an_error_of_the_request_itself_is_not_tried_elsewhere(gateway: Running, engine: FakeEngine) -> None:
    engine.reply = status(500, {"error": {"message": "It said: EngineCore encountered an issue"}})
    assert (await gateway.ask())[0] == 500
    assert len(engine.requests) == 1


async def test_a_replica_that_refuses_connections_costs_no_request(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (f"127.0.0.1:{unused_port()}", engine.address)})
    assert [(await gateway.ask())[0] for _ in range(6)] == [200] * 6


async def test_a_connection_that_the_engine_closed_while_idle_costs_no_request(gateway: Running, engine: FakeEngine) -> None:
    await gateway.ask()
    await engine.stop()
    await engine.start()
    assert (await gateway.ask())[0] == 200


async def test_replicas_that_all_shed_load_give_503_with_retry_after(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={"svc": (engine.address,)}, wait_seconds=10)
    engine.reply = status(503)
    code, body, headers = await gateway.ask()
    assert (code, body["error"]["code"], headers["Retry-After"]) == (503, "upstream_unavailable", "5")
    assert len(engine.requests) == 3  # load is not multiplied without end


async def test_without_a_ready_replica_a_request_waits_and_then_gets_503(start: Start) -> None:
    gateway = await start(endpoints={})
    code, body, headers = await gateway.ask()
    assert (code, body["error"]["code"], headers["Retry-After"]) == (503, "no_replica_ready", "5")


async def test_a_request_that_waits_is_answered_once_a_replica_is_ready(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={}, wait_seconds=5)
    request = asyncio.create_task(gateway.ask())
    await asyncio.sleep(0.05)
    gateway.gateway.endpoints.replace([_slice("svc", engine.port)])
    assert (await request)[0] == 200


def _slice(service: str, port: int, **conditions: bool) -> dict[str, object]:
    endpoint = {"addresses": ["127.0.0.1"], "conditions": conditions}
    metadata = {"name": f"{service}-x", "labels": {"kubernetes.io/service-name": service}}
    return {"metadata": metadata, "ports": [{"port": port}], "endpoints": [endpoint]}


async def test_only_ready_replicas_that_are_not_terminating_get_requests(start: Start, engine: FakeEngine) -> None:
    gateway = await start(endpoints={})
    for conditions in ({"ready": False}, {"ready": True, "terminating": True}):
        gateway.gateway.endpoints.replace([_slice("svc", engine.port, **conditions)])
        assert (await gateway.state()).revisions[0].endpoints == 0
    gateway.gateway.endpoints.replace([_slice("svc", engine.port, ready=True)])
    assert (await gateway.state()).revisions[0].endpoints == 1


async def test_requests_are_split_by_weight(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    revisions = (make_revision("old", weight=75), make_revision("new", "canary", weight=25, state="Candidate"))
    gateway = await start(make_config(*revisions), {"svc": (engine.address,), "canary": (second_engine.address,)})
    served = Counter([(await gateway.ask())[2][REVISION_HEADER] for _ in range(200)])
    assert 25 <= served["new"] <= 80  # 50 expected; five standard deviations
    state = await gateway.state()
    assert {r.name: r.requests for r in state.revisions} == dict(served)


async def test_draining_and_weightless_revisions_get_no_new_requests(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    endpoints = {"svc": (engine.address,), "other": (second_engine.address,)}
    idle = make_revision("idle", "other", weight=0, state="Candidate")
    draining = make_revision("gone", "other", weight=100, state="Draining")
    gateway = await start(make_config(make_revision(), idle, draining), endpoints)
    assert {(await gateway.ask())[2][REVISION_HEADER] for _ in range(20)} == {"r1"}
    assert second_engine.requests == []


async def test_a_running_request_outlives_its_revisions_draining(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    gate = asyncio.Event()
    engine.replies = [stream_of(*chat_events("a", "b"), gate=gate)]
    endpoints = {"svc": (engine.address,), "next": (second_engine.address,)}
    gateway = await start(endpoints=endpoints)
    running = asyncio.create_task(_read(gateway))
    await eventually(lambda: engine.requests)
    gateway.configure(make_config(make_revision(state="Draining"), make_revision("r2", "next"), generation=2))
    assert (await gateway.ask())[2][REVISION_HEADER] == "r2"
    assert {r.name: r.in_flight for r in (await gateway.state()).revisions} == {"r1": 1, "r2": 0}
    while not running.done():
        gate.set()
        await asyncio.sleep(0.01)
    assert b"[DONE]" in await running


async def _read(gateway: Running) -> bytes:
    async with gateway.chat(stream=True) as response:
        return bytes(await response.read())


async def test_the_less_busy_replica_is_asked(start: Start, engine: FakeEngine, second_engine: FakeEngine) -> None:
    release = asyncio.Event()

    async def wait(_: web.Request, body: object) -> web.Response:
        await release.wait()
        return web.json_response(chat_answer("late"))

    engine.reply = second_engine.reply = wait
    gateway = await start(endpoints={"svc": (engine.address, second_engine.address)})
    requests = [asyncio.create_task(gateway.ask()) for _ in range(6)]
    await eventually(lambda: len(engine.requests) + len(second_engine.requests) == 6)
    assert (len(engine.requests), len(second_engine.requests)) == (3, 3)
    release.set()
    await asyncio.gather(*requests)


async def test_an_older_configuration_never_replaces_a_newer_one(gateway: Running) -> None:
    gateway.configure(make_config(make_revision("r9"), generation=9))
    (gateway.folder / "config.json").write_text("not json")
    gateway.gateway.configuration.load()
    (gateway.folder / "config.json").write_text('{"generation": 8, "namespace": "team", "deployment": "tweets", "model": "sentiment"}')
    gateway.gateway.configuration.load()
    state = await gateway.state()
    assert (state.generation, [r.name for r in state.revisions]) == (9, ["r9"])


async def test_a_revision_with_a_broken_template_takes_no_traffic_and_says_why(start: Start, engine: FakeEngine) -> None:
    broken = make_revision("broken", prompt={"template": "{{ text"}, weight=50)
    gateway = await start(make_config(make_revision(weight=50), broken), {"svc": (engine.address,)})
    assert {(await gateway.ask())[2][REVISION_HEADER] for _ in range(12)} == {"r1"}
    probe = (await gateway.state()).revisions[1].probe
    assert probe.status == "Failed"
    assert "template" in probe.message
