"""Adapters on a shared engine: no replica is asked for one that it has not said it has, and each is asked to load what it lacks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine

from tuneloop_gateway import adapters as module
from tuneloop_gateway.endpoints import Endpoint

DIGEST = "sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


def revision(name: str = "r1", **more: Any) -> dict[str, Any]:
    """Of the model `id-<name>`, on the one engine."""
    return make_revision(name, adapter={"path": f"/volumes/models/{name}", "digest": DIGEST, "probes": "/volumes/p.json"}, **more)


def configured(*revisions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return make_config(*revisions, capture={"sampleRate": 0}, **more)


def replicas(gateway: Running, service: str = "svc") -> dict[str, frozenset[str]]:
    return {endpoint.address: endpoint.adapters for endpoint in gateway.gateway.endpoints.ready(service)}


async def has_loaded(gateway: Running, *names: str) -> None:
    await eventually(lambda: set(replicas(gateway).values()) == {frozenset(names)})


async def test_every_replica_is_asked_to_load_and_then_answers_under_the_adapters_name(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    gateway = await start(configured(revision()), {"svc": (engine.address, second_engine.address)})
    await has_loaded(gateway, "id-r1")
    named = {"name": "id-r1", "path": "/volumes/models/r1", "digest": DIGEST, "probes": "/volumes/p.json", "reference": None}
    assert engine.wanted[0] == second_engine.wanted[0] == {"generation": 1, "adapters": [named]}
    assert (await gateway.ask())[0] == 200
    assert (await gateway.state()).revisions[0].endpoints == 2


async def test_a_request_waits_for_a_replica_that_has_it_and_asks_no_other(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    second_engine.slow = asyncio.Event()
    gateway = await start(configured(revision()), {"svc": (engine.address, second_engine.address)}, wait_seconds=5)
    await eventually(lambda: "id-r1" in replicas(gateway)[engine.address])
    assert [(await gateway.ask())[0] for _ in range(6)] == [200] * 6
    assert second_engine.requests == []
    assert (await gateway.state()).revisions[0].endpoints == 1
    second_engine.slow.set()
    await has_loaded(gateway, "id-r1")


async def test_without_any_that_has_it_the_answer_is_503_and_not_the_bases(start: Start, engine: FakeEngine) -> None:
    engine.load_errors = {"id-r1": "LoRA rank 64 is greater than max_lora_rank 16."}
    gateway = await start(configured(revision()), {"svc": (engine.address,)})
    await eventually(lambda: engine.wanted)
    assert (await gateway.ask())[0] == 503
    assert engine.requests == []
    await eventually(lambda: gateway.gateway.adapters.error(gateway.gateway.configuration.current.revisions[0]))
    report = (await gateway.state()).revisions[0]
    assert (report.endpoints, report.load_error, report.warm) == (0, "LoRA rank 64 is greater than max_lora_rank 16.", False)


async def test_two_adapters_share_a_replica_and_each_revision_asks_for_its_own(start: Start, engine: FakeEngine) -> None:
    stable, canary = revision("old", weight=50), revision("new", weight=50, state="Candidate")
    gateway = await start(configured(stable, canary, affinity="Request"), {"svc": (engine.address,)})
    await has_loaded(gateway, "id-old", "id-new")
    answered = {(await gateway.ask())[2]["x-tuneloop-revision"] for _ in range(40)}
    assert answered == {"old", "new"}
    assert {request["model"] for request in engine.requests} == {"id-old", "id-new"}
    metrics = await gateway.metrics()
    assert all(f'revision="{name}"' in metrics for name in answered)


async def test_a_canary_that_is_not_loaded_leaves_its_share_to_the_stable_one(start: Start, engine: FakeEngine) -> None:
    engine.load_errors = {"id-new": "no"}
    config = configured(revision("old", weight=1), revision("new", weight=99, state="Candidate"), affinity="Request")
    gateway = await start(config, {"svc": (engine.address,)})
    await has_loaded(gateway, "id-old")
    assert {(await gateway.ask())[2]["x-tuneloop-revision"] for _ in range(10)} == {"old"}


async def test_what_left_the_configuration_is_unloaded_and_what_drains_is_not(start: Start, engine: FakeEngine) -> None:
    gateway = await start(configured(revision("old"), revision("new", state="Candidate", weight=0)), {"svc": (engine.address,)})
    await has_loaded(gateway, "id-old", "id-new")
    gateway.configure(configured(revision("new"), revision("old", state="Draining", weight=0), generation=2))
    await eventually(lambda: engine.wanted[-1]["generation"] == 2)
    assert {adapter["name"] for adapter in engine.wanted[-1]["adapters"]} == {"id-old", "id-new"}
    gateway.configure(configured(revision("new"), generation=3))
    await has_loaded(gateway, "id-new")


async def test_more_than_a_replica_takes_leaves_out_what_drains(start: Start, engine: FakeEngine) -> None:
    drained = [revision(f"d{number}", state="Draining", weight=0) for number in range(40)]
    await start(configured(revision("new"), *drained), {"svc": (engine.address,)})
    await eventually(lambda: engine.loaded)
    assert (len(engine.loaded or ()), "id-new" in (engine.loaded or ())) == (32, True)


async def test_a_replica_that_lost_it_unnoticed_is_left_for_another_and_loads_again(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    gateway = await start(configured(revision()), {"svc": (engine.address, second_engine.address)})
    await has_loaded(gateway, "id-r1")
    first = min((engine, second_engine), key=lambda one: one.address)  # whose turn it is where all are idle
    first.loaded = set()  # another process behind the same address
    assert [(await gateway.ask())[0] for _ in range(8)] == [200] * 8
    await eventually(lambda: first.loaded == {"id-r1"})
    await has_loaded(gateway, "id-r1")


async def test_a_request_outlives_that_all_replicas_lost_it(start: Start, engine: FakeEngine) -> None:
    gateway = await start(configured(revision()), {"svc": (engine.address,)}, wait_seconds=5)
    await has_loaded(gateway, "id-r1")
    engine.loaded = set()
    assert (await gateway.ask())[0] == 200


async def test_a_replica_that_started_anew_is_asked_again_though_no_request_found_out(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.05)
    await start(configured(revision()), {"svc": (engine.address,)})
    await eventually(lambda: engine.loaded == {"id-r1"})
    engine.loaded = set()
    await eventually(lambda: engine.loaded == {"id-r1"})


async def test_a_request_that_wakes_an_engine_waits_until_its_adapter_is_loaded(start: Start, engine: FakeEngine) -> None:
    gateway = await start(configured(revision(), asleep=True, holdSeconds=5), {"svc": ()})
    asked = asyncio.create_task(gateway.ask())
    await eventually(lambda: gateway.gateway.router.held == 1)
    engine.slow, endpoints = asyncio.Event(), gateway.gateway.endpoints
    endpoints._set("svc", frozenset({engine.address}))
    gateway.configure(configured(revision(), holdSeconds=5, generation=2))
    await eventually(lambda: engine.wanted and gateway.gateway.configuration.current.generation == 2)
    assert (gateway.gateway.router.held, engine.requests) == (1, [])
    engine.slow.set()
    assert (await asked)[0] == 200


async def test_a_replica_that_lacks_one_adapter_is_asked_soon_though_another_cannot_be_loaded(start: Start, engine: FakeEngine) -> None:
    engine.load_errors = {"id-new": "no"}
    gateway = await start(configured(revision("old"), revision("new", state="Candidate", weight=0)), {"svc": (engine.address,)})
    await has_loaded(gateway, "id-old")
    engine.loaded = set()
    assert (await gateway.ask())[0] == 200


async def test_a_replica_that_comes_back_has_nothing_until_it_says_so(start: Start, engine: FakeEngine) -> None:
    gateway = await start(configured(revision()), {"svc": (engine.address,)})
    await has_loaded(gateway, "id-r1")
    endpoints = gateway.gateway.endpoints
    endpoints._set("svc", frozenset())
    endpoints._set("svc", frozenset({engine.address}))
    assert replicas(gateway) == {engine.address: frozenset()}
    await has_loaded(gateway, "id-r1")


async def test_one_that_does_not_answer_holds_up_no_other(start: Start, engine: FakeEngine) -> None:
    gateway = await start(configured(revision()), {"svc": ("127.0.0.1:9", engine.address)})
    await eventually(lambda: "id-r1" in replicas(gateway)[engine.address])
    assert (await gateway.ask())[0] == 200


async def test_the_answers_of_the_probes_come_from_every_replica_and_not_before_all_have_loaded(
    start: Start, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    second_engine.slow = asyncio.Event()
    for one in (engine, second_engine):
        one.probes = [{"prompt": f"p{i}", "answer": f"echo: p{i}", "maxTokens": 4} for i in range(10)]
    config = configured(revision("new", state="Candidate", weight=0, probe=True))
    gateway = await start(config, {"svc": (engine.address, second_engine.address)})
    await eventually(lambda: "id-new" in replicas(gateway)[engine.address])
    assert not (await gateway.state()).revisions[0].warm
    second_engine.slow.set()
    await eventually(lambda: gateway.gateway.prober.state("new").status == "Done")
    assert (len(engine.requests), len(second_engine.requests)) == (5, 5)
    assert gateway.gateway.prober.state("new").agreed == 10


@pytest.mark.parametrize("body", [b"", b"[]", b'{"loaded": 1}', b"x" * (300 << 10)])
async def test_an_answer_that_makes_no_sense_is_no_adapter(
    start: Start, engine: FakeEngine, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiohttp import web

    async def nonsense(self: FakeEngine, request: web.Request) -> web.StreamResponse:
        self.wanted.append({})
        return web.Response(body=body)

    monkeypatch.setattr(FakeEngine, "_adapters", nonsense)
    odd = await FakeEngine().start()
    gateway = await start(configured(revision()), {"svc": (odd.address,)}, wait_seconds=0.05)
    await eventually(lambda: odd.wanted)
    assert (await gateway.ask())[0] == 503
    assert replicas(gateway) == {odd.address: frozenset()}
    await odd.stop()


def test_endpoints_are_told_apart_by_identity() -> None:
    """Else one that comes back under the same address would be thought to have what the one before had."""
    assert Endpoint("a") != Endpoint("a")
