"""What KEDA hears from our external scaler, by a gRPC client of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from tests.unit.modeldeployment.world import make_pod

from tuneloop_gateway.contract import GatewayState
from tuneloop_operator.api.kubernetes import Pod
from tuneloop_operator.cluster import activity
from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.domain.modeldeployment import GatewayPod
from tuneloop_operator.render import names
from tuneloop_operator.runtime import scaler
from tuneloop_operator.runtime.scaler import METRIC, M, Scaler

Object = dict[str, Any]
REFERENCE = M["ScaledObjectRef"](name="tweets", namespace="shop")


@dataclass
class Place:
    """A cluster of one deployment; gateways say `states`, None where one does not answer."""

    states: list[GatewayState | None] = field(default_factory=list)
    cache: Cache = field(default_factory=Cache)
    port: int = 0
    versions: int = 0

    def deployment(self, replicas: int, **autoscaling: Any) -> None:
        scaled = {"autoscaling": {"minReplicas": 0, "maxReplicas": 4, "idleSeconds": 60} | autoscaling}
        spec = {"model": {"name": "m"}, "engine": {"replicas": replicas}} | scaled
        metadata = {"name": "tweets", "namespace": "shop", "uid": "u", "resourceVersion": str(self.version())}
        self.cache.put("ModelDeployment", {"kind": "ModelDeployment", "metadata": metadata, "spec": spec})

    def engine(self, name: str, *, ready: bool, created: str = "2200-01-01T00:00:00Z") -> None:
        pod = make_pod(name, ready=ready).model_dump(by_alias=True, mode="json")
        labels = {names.DEPLOYMENT_LABEL: "tweets", "app.kubernetes.io/component": "engine"}
        metadata = {"name": name, "namespace": "shop", "uid": name, "labels": labels, "creationTimestamp": created}
        self.cache.put("Pod", pod | {"metadata": metadata | {"resourceVersion": str(self.version())}})

    def version(self) -> int:
        self.versions += 1
        return self.versions

    def gateway(self, held: int = 0, idle: float = 0.0) -> None:
        self.states = [GatewayState(pod_uid="g", started_at="", generation=1, held=held, idle_seconds=idle)]

    async def call(self, method: str, request: Any, response: str) -> Any:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            ask = channel.unary_unary(f"/externalscaler.ExternalScaler/{method}", type(request).SerializeToString, M[response].FromString)
            return await ask(request, timeout=10)

    async def is_active(self) -> bool:
        return bool((await self.call("IsActive", REFERENCE, "IsActiveResponse")).result)

    async def least(self) -> float:
        asked = M["GetMetricsRequest"](scaledObjectRef=REFERENCE, metricName=METRIC)
        return float((await self.call("GetMetrics", asked, "GetMetricsResponse")).metricValues[0].metricValue)


@pytest.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    found = Place()

    async def ask(_pods: list[Pod], _cluster: Cluster) -> tuple[GatewayPod, ...]:
        return tuple(GatewayPod(make_pod("g", ready=True), state) for state in found.states)

    monkeypatch.setattr(activity, "ask_gateways", ask)
    monkeypatch.setattr(scaler, "LOOK_SECONDS", 0.01)
    served = Scaler(cast(Cluster, found))
    found.port = await served.start("127.0.0.1:0")
    yield found
    await served.stop()


async def test_it_is_active_for_idle_seconds_after_the_last_request_and_while_an_engine_loads(place: Place) -> None:
    place.deployment(1)
    place.gateway(idle=59)
    assert await place.is_active()
    place.gateway(idle=61)
    assert not await place.is_active()
    place.engine("a", ready=False)
    assert await place.is_active()


async def test_while_one_replica_loads_none_may_go(place: Place) -> None:
    place.deployment(3)
    place.gateway(idle=100)
    place.engine("a", ready=True)
    assert await place.least() == 0
    place.engine("b", ready=False, created="2020-01-01T00:00:00Z")  # for longer than it may take
    assert await place.least() == 0
    place.engine("c", ready=False)
    assert await place.least() == 3
    spec = (await place.call("GetMetricSpec", REFERENCE, "GetMetricSpecResponse")).metricSpecs[0]
    assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == (METRIC, 1, 1.0)


@pytest.mark.parametrize(("states", "code"), [([None], "UNAVAILABLE"), ([], "UNAVAILABLE")])
async def test_silence_of_the_gateways_is_an_error_and_no_sleep(place: Place, states: list[None], code: str) -> None:
    place.deployment(1)
    place.states = list(states)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await place.is_active()
    assert failed.value.code().name == code


async def test_what_is_not_there_is_not_found(place: Place) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await place.is_active()
    assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_request_that_waits_at_zero_is_pushed_and_nothing_else_is(place: Place) -> None:
    place.deployment(0)
    place.gateway(idle=5)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{place.port}") as channel:
        ask: Callable[..., Any] = channel.unary_stream(
            "/externalscaler.ExternalScaler/StreamIsActive", M["ScaledObjectRef"].SerializeToString, M["IsActiveResponse"].FromString
        )
        stream = ask(REFERENCE)
        pushed = asyncio.create_task(stream.read())
        await asyncio.sleep(0.1)
        place.deployment(1)
        place.gateway(held=1)
        await asyncio.sleep(0.1)
        assert not pushed.done()
        place.deployment(0)
        assert (await asyncio.wait_for(pushed, 10)).result
        stream.cancel()
