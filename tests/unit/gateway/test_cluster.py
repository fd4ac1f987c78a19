"""The watch of ConfigMap and EndpointSlices, against an API server that comes and goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from tests.unit.gateway.conftest import Running, Start, eventually, make_config, make_revision
from tests.unit.gateway.engines import FakeEngine

from tuneloop_gateway import app as app_module
from tuneloop_gateway import cluster as cluster_module


class FakeApiServer:
    """LIST and WATCH of two kinds; `emit` sends an event to the open watches."""

    def __init__(self) -> None:
        self.port = unused_port()
        self.token = "token-1"
        self.items: dict[str, dict[str, dict[str, Any]]] = {"configmaps": {}, "endpointslices": {}}
        self.queries: list[tuple[str, dict[str, str]]] = []
        self.refused = 0
        self._watches: dict[str, list[asyncio.Queue[bytes | None]]] = {"configmaps": [], "endpointslices": []}
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/team/{kind}", self._get)
        app.router.add_get("/apis/discovery.k8s.io/v1/namespaces/team/{kind}", self._get)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        for kind in self._watches:
            self.end_watches(kind)
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            self.refused += 1
            return web.Response(status=401)
        kind = request.match_info["kind"]
        self.queries.append((kind, dict(request.query)))
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "7"}, "items": list(self.items[kind].values())})
        response = web.StreamResponse()
        await response.prepare(request)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._watches[kind].append(queue)
        while (line := await queue.get()) is not None:
            for half in (line[: len(line) // 2], line[len(line) // 2 :]):  # events do not arrive in one piece
                await response.write(half)
                await asyncio.sleep(0)
        return response

    def put(self, kind: str, item: dict[str, Any], event: str = "MODIFIED") -> None:
        if event == "DELETED":
            del self.items[kind][item["metadata"]["name"]]
        else:
            self.items[kind][item["metadata"]["name"]] = item
        self.emit(kind, {"type": event, "object": item})

    def emit(self, kind: str, event: dict[str, Any]) -> None:
        for queue in self._watches[kind]:
            queue.put_nowait(json.dumps(event).encode() + b"\n")

    def end_watches(self, kind: str) -> None:
        for queue in self._watches[kind]:
            queue.put_nowait(None)
        self._watches[kind].clear()

    def watched(self, kind: str) -> int:
        return len(self._watches[kind])


def config_map(config: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "tweets"}, "data": {"config.json": json.dumps(config)}}


def slice_of(service: str, port: int, name: str = "") -> dict[str, Any]:
    metadata = {"name": name or f"{service}-abc", "labels": {"kubernetes.io/service-name": service}}
    endpoints = [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}}]
    return {"metadata": metadata, "ports": [{"name": "http", "port": port}], "endpoints": endpoints}


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApiServer]:
    monkeypatch.setattr(cluster_module, "BACKOFF_SECONDS", (0.05, 0.1))
    server = FakeApiServer()
    await server.start()
    yield server
    await server.stop()


async def started(start: Start, api: FakeApiServer, tmp_path: Any, **settings: Any) -> Running:
    (tmp_path / "token").write_text("token-1")
    return await start(api_server=f"http://127.0.0.1:{api.port}", config_map="tweets", namespace="team", token_path=tmp_path, **settings)


async def test_a_new_configuration_takes_effect_by_the_watch(start: Start, api: FakeApiServer, tmp_path: Any) -> None:
    api.put("configmaps", config_map(make_config(generation=2)))
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: gateway.gateway.configuration.current.generation == 2)
    await eventually(lambda: api.watched("configmaps"))
    api.put("configmaps", config_map(make_config(make_revision("r2"), generation=3)))
    await eventually(lambda: gateway.gateway.configuration.current.generation == 3)
    assert ("configmaps", "metadata.name=tweets") in [(kind, q.get("fieldSelector")) for kind, q in api.queries]


async def test_replicas_come_and_go_by_the_watch(start: Start, api: FakeApiServer, tmp_path: Any, engine: FakeEngine) -> None:
    api.put("endpointslices", slice_of("svc", engine.port))
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: api.watched("endpointslices"))
    assert (await gateway.ask())[0] == 200
    api.put("endpointslices", slice_of("svc", engine.port), "DELETED")
    await eventually(lambda: not gateway.gateway.endpoints.ready("svc"))
    assert (await gateway.ask())[0] == 503


async def test_a_watch_that_ends_or_fails_is_opened_again(start: Start, api: FakeApiServer, tmp_path: Any, engine: FakeEngine) -> None:
    gateway = await started(start, api, tmp_path)
    for round_, breaks in enumerate((api.end_watches, lambda kind: api.emit(kind, {"type": "ERROR", "object": {"code": 410}})), 2):
        await eventually(lambda: api.watched("configmaps"))
        breaks("configmaps")
        api.items["configmaps"]["tweets"] = config_map(make_config(generation=round_))
        await eventually(lambda expected=round_: gateway.gateway.configuration.current.generation == expected)  # type: ignore[misc]


async def test_the_token_is_read_again_when_it_rotates(start: Start, api: FakeApiServer, tmp_path: Any) -> None:
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: api.watched("configmaps"))
    api.token = "token-2"
    api.end_watches("configmaps")
    await eventually(lambda: api.refused)
    api.items["configmaps"]["tweets"] = config_map(make_config(generation=5))
    (tmp_path / "token").write_text("token-2")
    await eventually(lambda: gateway.gateway.configuration.current.generation == 5)


async def test_replicas_stay_known_while_the_api_server_is_away(
    start: Start, api: FakeApiServer, tmp_path: Any, engine: FakeEngine
) -> None:
    api.put("endpointslices", slice_of("svc", engine.port))
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: api.watched("endpointslices"))
    await api.stop()
    assert [(await gateway.ask())[0] for _ in range(3)] == [200] * 3


async def test_a_gateway_that_never_heard_the_api_server_asks_the_services_name(start: Start, tmp_path: Any) -> None:
    (tmp_path / "token").write_text("token-1")
    gateway = await start(api_server=f"http://127.0.0.1:{unused_port()}", config_map="tweets", token_path=tmp_path)
    assert [e.address for e in gateway.gateway.endpoints.ready("svc")] == ["svc.team.svc:8000"]


async def test_another_service_is_watched_as_soon_as_it_is_configured(
    start: Start, api: FakeApiServer, tmp_path: Any, engine: FakeEngine
) -> None:
    api.put("endpointslices", slice_of("svc", engine.port))
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: api.watched("endpointslices"))
    api.put("configmaps", config_map(make_config(make_revision(), make_revision("r2", "green"), generation=2)))
    selector = "kubernetes.io/service-name in (green,svc)"
    await eventually(lambda: selector in [q.get("labelSelector") for _, q in api.queries])
    assert (await gateway.ask())[0] == 200


async def test_a_watch_that_fails_by_a_bug_does_not_keep_the_gateway_from_stopping(
    start: Start, api: FakeApiServer, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: api.watched("configmaps"))

    def broken(_: object) -> None:
        gateway.gateway._tasks[-1].cancel()  # at this very moment
        raise RuntimeError("a bug")

    monkeypatch.setattr(cluster_module.ClusterWatch, "_take_config", lambda self, item: broken(item))
    monkeypatch.setattr(app_module, "RESTART_SECONDS", 60)
    api.put("configmaps", config_map(make_config(generation=4)))
    await eventually(lambda: gateway.gateway._tasks[-1].done(), 3)


async def test_a_configuration_that_is_none_leaves_the_one_in_force(start: Start, api: FakeApiServer, tmp_path: Any) -> None:
    gateway = await started(start, api, tmp_path)
    await eventually(lambda: api.watched("configmaps"))
    api.put("configmaps", {"metadata": {"name": "tweets"}, "data": {"config.json": '{"generation": "x"}'}})
    api.put("configmaps", {"metadata": {"name": "tweets"}})
    api.put("configmaps", config_map(make_config(generation=4)))
    await eventually(lambda: gateway.gateway.configuration.current.generation == 4)
