"""What is made of the cluster's objects and of the answers of pods and Prometheus; none of them is trusted."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.unit.modeldeployment.world import NOW, World, make_version

from tuneloop_gateway.contract import DriftReport, DriftStatus, GatewayState
from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Unreachable
from tuneloop_operator.cluster.observe_modeldeployment import REGISTRATION, guard_source, observe
from tuneloop_operator.domain.decision import Key, Refusal
from tuneloop_operator.domain.modeldeployment import Snapshot
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
KEY = Key("ModelDeployment", "shop", "tweets")
SERIES = {
    "tuneloop_gateway_config_generation": 2.0,
    "tuneloop_drift_alarm": 1.0,
    "tuneloop_drift_log_evidence": 12.5,
    "tuneloop_drift_log_threshold": 11.5,
    "tuneloop_drift_effect": 0.3,
    "tuneloop_drift_pairs": 400.0,
    "tuneloop_drift_reference_remaining_rows": 100.0,
    "tuneloop_feedback_labelled_rows": 250.0,
}


class FakeCluster:
    """Cache, pods by address, events and Prometheus; everything that is asked is written down."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.conflicts: dict[str, set[Key]] = {}
        self.refusals: tuple[Refusal, ...] = ()
        self.answers: dict[str, bytes] = {}
        self.events: list[Json] = []
        self.series: dict[str, float] = dict(SERIES)
        self.queries: list[str] = []
        self.unserved: set[str] = {"LeaderWorkerSet"}

    def refused(self, owner_uid: str) -> tuple[Refusal, ...]:
        return self.refusals if owner_uid == "mdep-uid" else ()

    async def http_get(self, url: str, limit: int, timeout: float = 2.0) -> bytes:  # noqa: ASYNC109
        if url not in self.answers or len(self.answers[url]) > limit:
            raise Unreachable(url)
        return self.answers[url]

    async def list(self, kind: str, namespace: str, labels: Json | None = None, fields: Json | None = None) -> list[Json]:
        assert kind == "Event"
        assert fields is not None
        return [event for event in self.events if event["involvedObject"]["uid"] == fields["involvedObject.uid"]]

    async def prometheus(self, query: str) -> list[tuple[dict[str, str], float]]:
        self.queries.append(query)
        metric = query.partition("(")[2].partition("(")[2].partition("{")[0]
        if "down" in self.series:
            raise Unreachable("no answer")
        return [({"namespace": "shop"}, self.series[metric])] if metric in self.series else []


def cluster_of(world: World) -> FakeCluster:
    """The world's objects as the API server would hold them."""
    cluster = FakeCluster()
    mdep = {"apiVersion": "tuneloop.dev/v1alpha1", "spec": {"model": {"name": "sentiment"}} | world.spec, "status": world.status}
    put(cluster, "ModelDeployment", "tweets", mdep, uid="mdep-uid")
    for version in world.versions:
        put(cluster, "ModelVersion", version.metadata.name, {"spec": version.spec.model_dump(mode="json", by_alias=True)})
    for (kind, name), manifest in world.objects.items():
        put(cluster, kind, name, manifest, owner="mdep-uid")
    return cluster


def put(cluster: FakeCluster, kind: str, name: str, obj: Json, uid: str = "", owner: str | None = None) -> None:
    metadata = obj.get("metadata", {}) | {"name": name, "namespace": "shop", "uid": uid or f"{kind}/{name}", "resourceVersion": "5"}
    metadata["ownerReferences"] = [{"uid": owner, "controller": True, "kind": "ModelDeployment", "name": "tweets"}] if owner else []
    cluster.cache.put(kind, {**obj, "metadata": metadata})


def gateway_pod(cluster: FakeCluster, address: str = "10.0.0.9", **status: Any) -> None:
    labels = {"tuneloop.dev/modeldeployment": "tweets", "app.kubernetes.io/component": "gateway"}
    fields = {
        "phase": "Running",
        "podIP": address,
        "conditions": [{"type": "Ready", "status": "True"}],
        "startTime": "2026-01-15T11:00:00Z",
    }
    put(cluster, "Pod", "gateway-0", {"metadata": {"labels": labels}, "spec": {"nodeName": "n"}, "status": fields | status}, uid="pod-uid")


def state(pod_uid: str = "pod-uid") -> bytes:
    report = DriftReport(status=DriftStatus.MONITORING, epoch="0")
    said = GatewayState(pod_uid=pod_uid, started_at="2026-01-15T12:00:00Z", generation=2, drift=report)
    return said.model_dump_json(by_alias=True).encode()


async def look(cluster: FakeCluster, settings: Settings | None = None, now: datetime = NOW) -> Snapshot:
    snapshot = await observe(KEY, cluster, settings or Settings(), now)  # type: ignore[arg-type]
    assert snapshot is not None
    return snapshot


async def test_what_the_api_server_refused_is_observed() -> None:
    cluster = cluster_of(World())
    cluster.refusals = (Refusal(Key("Deployment", "shop", "tweets"), "no.", 1),)
    assert (await look(cluster)).refusals == cluster.refusals


async def test_what_was_written_is_observed_as_it_is() -> None:
    world = World()
    world.settle()
    snapshot = await look(cluster_of(world))
    expected = world.snapshot()
    assert {r.name: r.pinned for r in snapshot.revisions} == {r.name: r.pinned for r in expected.revisions}
    assert snapshot.revisions[0].verdict == expected.revisions[0].verdict
    assert snapshot.config == expected.config
    assert set(snapshot.engines) == set(expected.engines)
    assert snapshot.guards == expected.guards
    assert {target.key for target in snapshot.owned} == {target.key for target in expected.owned}
    assert snapshot.keys is None


async def test_a_leader_worker_set_is_taken_for_a_deployment_of_its_leaders() -> None:
    world = World(spec={"engine": {"nodesPerReplica": 2, "replicas": 3}}, has_groups=True)
    world.settle()
    cluster = cluster_of(world)
    (hashed,) = world.engines()
    for part in ("engine", "engine-worker"):
        labels = {"tuneloop.dev/modeldeployment": "tweets", "tuneloop.dev/engine": hashed, "app.kubernetes.io/component": part}
        put(cluster, "Pod", part, {"metadata": {"labels": labels}, "spec": {}})
    snapshot = await look(cluster)
    assert (set(snapshot.engines), snapshot.engines[hashed].spec.replicas, snapshot.has_groups) == ({hashed}, 3, False)
    pods = (snapshot.engine_pods, snapshot.engine_workers)
    assert [[pod.metadata.name for pod in found[hashed]] for found in pods] == [["engine"], ["engine-worker"]]
    assert snapshot.revisions[0].pinned == world.snapshot().revisions[0].pinned
    cluster.unserved = set()
    assert (await look(cluster)).has_groups


async def test_an_object_that_is_gone_or_going_is_none() -> None:
    cluster = FakeCluster()
    assert await observe(KEY, cluster, Settings(), NOW) is None  # type: ignore[arg-type]
    put(cluster, "ModelDeployment", "tweets", {"metadata": {"deletionTimestamp": "x"}, "spec": {}})
    assert await observe(KEY, cluster, Settings(), NOW) is None  # type: ignore[arg-type]


async def test_only_versions_of_the_model_count() -> None:
    world = World(versions=[make_version(1), make_version(2, model="other")])
    assert [version.spec.version for version in (await look(cluster_of(world))).versions] == [1]


@pytest.mark.parametrize(
    ("address", "url"),
    [("10.0.0.9", "http://10.0.0.9:8081/internal/state"), ("fd00::9", "http://[fd00::9]:8081/internal/state")],
)
async def test_a_gateways_state_is_read_from_its_pod(address: str, url: str) -> None:
    cluster = cluster_of(World())
    gateway_pod(cluster, address)
    cluster.answers[url] = state()
    (gateway,) = (await look(cluster)).gateway_pods
    assert gateway.state is not None
    assert gateway.state.generation == 2


@pytest.mark.parametrize(
    "answer",
    [b"", b"no json", b"{}", state("another-pod"), json.dumps(json.loads(state()) | {"generation": "x"}).encode(), b" " * 70_000 + state()],
)
async def test_an_answer_that_is_nonsense_too_long_or_anothers_is_none(answer: bytes) -> None:
    cluster = cluster_of(World())
    gateway_pod(cluster)
    cluster.answers["http://10.0.0.9:8081/internal/state"] = answer
    assert (await look(cluster)).gateway_pods[0].state is None


async def test_a_pod_without_an_address_is_not_asked() -> None:
    cluster = cluster_of(World())
    gateway_pod(cluster, podIP=None, phase="Pending")
    assert (await look(cluster)).gateway_pods[0].state is None


async def test_a_record_or_configuration_of_another_shape_does_no_harm() -> None:
    world = World()
    world.settle()
    for key, manifest in list(world.objects.items()):
        if key[0] == "ControllerRevision":
            world.objects[key] = manifest | {"data": {"pinned": "!"}}
    gateway = world.objects["ConfigMap", "tweets-gateway"]
    world.objects["ConfigMap", "tweets-gateway"] = gateway | {"data": {"config.json": '{"generation": 41, "unknown": 1}'}}
    snapshot = await look(cluster_of(world))
    assert snapshot.revisions == ()
    assert snapshot.config is not None
    assert (snapshot.config.generation, snapshot.config.config) == (41, None)


async def test_a_missing_secret_is_found_in_the_events_and_made_again() -> None:
    world = World()
    world.settle()
    cluster = cluster_of(world)
    gateway_pod(cluster, phase="Pending", conditions=[])
    cluster.events = [
        {
            "involvedObject": {"uid": "pod-uid"},
            "lastTimestamp": "2026-01-15T12:00:01Z",
            "message": 'MountVolume failed: secret "tweets-keys" not found',
        },
        {"involvedObject": {"uid": "pod-uid"}, "lastTimestamp": "2026-01-15T12:00:00Z", "message": "older"},
    ]
    snapshot = await look(cluster)
    assert snapshot.warnings == {"pod-uid": 'MountVolume failed: secret "tweets-keys" not found'}
    assert snapshot.keys is not None


async def test_keys_are_random_long_and_not_shown() -> None:
    first, second = (await look(cluster_of(World()))).keys, (await look(cluster_of(World()))).keys
    assert first is not None
    assert second is not None
    values = {first.engine_key, first.internal_token, first.feedback_key, second.engine_key}
    assert len(values) == 4
    assert all(len(value) >= 43 for value in values)
    assert not any(value in repr(first) for value in values)


def test_the_guard_is_the_installed_source() -> None:
    assert "class Guard" in guard_source()


# --- Prometheus --------------------------------------------------------------

PROMETHEUS = Settings(prometheus_url="http://prometheus:9090")


def watched() -> FakeCluster:
    world = World(spec={"monitoring": {"source": "Prometheus", "drift": {}}})
    world.settle()
    return cluster_of(world)


async def test_evidence_is_read_by_promql_of_this_deployment_alone() -> None:
    cluster = watched()
    snapshot = await look(cluster, PROMETHEUS)
    assert snapshot.reads_prometheus
    assert snapshot.evidence is not None
    assert (snapshot.evidence.is_alarm, snapshot.evidence.effect, snapshot.evidence.pairs) == (True, 0.3, 400)
    assert (snapshot.evidence.labelled_train, snapshot.evidence.labelled_gate) == (250, 250)
    assert cluster.queries[0] == (
        'min by (namespace, deployment) (tuneloop_gateway_config_generation{namespace="shop",deployment="tweets"})'
    )
    assert 'max by (namespace, deployment) (tuneloop_drift_alarm{namespace="shop",deployment="tweets"})' in cluster.queries
    assert all('{namespace="shop",deployment="tweets"' in query for query in cluster.queries)
    assert any(',split="gate"})' in query for query in cluster.queries)


@pytest.mark.parametrize("missing", ["tuneloop_drift_alarm", "tuneloop_drift_effect", "tuneloop_gateway_config_generation"])
async def test_a_missing_series_is_no_data_and_never_drift(missing: str) -> None:
    cluster = watched()
    del cluster.series[missing]
    snapshot = await look(cluster, PROMETHEUS)
    assert snapshot.evidence is None
    status = REGISTRATION.decide(snapshot, PROMETHEUS, datetime(2026, 1, 15, 13, tzinfo=UTC)).status
    drift = next(c for c in status["conditions"] if c["type"] == "DriftDetected")
    assert (drift["status"], drift["reason"]) == ("Unknown", "NoData")


async def test_samples_from_before_the_epoch_are_not_believed() -> None:
    world = World(spec={"monitoring": {"source": "Prometheus", "drift": {}}})
    world.settle()
    world.annotations = {"tuneloop.dev/rearm": "now"}
    world.settle()
    cluster = cluster_of(world)
    cluster.series["tuneloop_gateway_config_generation"] = world.config.generation - 1
    assert (await look(cluster, PROMETHEUS)).evidence is None
    cluster.series["tuneloop_gateway_config_generation"] = world.config.generation
    assert (await look(cluster, PROMETHEUS)).evidence is not None


async def test_samples_of_the_epoch_are_believed_while_another_configuration_spreads() -> None:
    cluster = watched()
    cluster.series["tuneloop_gateway_config_generation"] = 1.0
    assert (await look(cluster, PROMETHEUS)).evidence is not None


async def test_a_prometheus_that_is_down_is_no_data() -> None:
    cluster = watched()
    cluster.series["down"] = 1
    assert (await look(cluster, PROMETHEUS)).evidence is None


async def test_without_a_prometheus_the_gateways_are_asked() -> None:
    snapshot = await look(watched(), Settings())
    assert not snapshot.reads_prometheus


# --- who is woken ------------------------------------------------------------


def test_a_version_wakes_who_serves_its_model_and_a_job_who_had_it_made() -> None:
    cluster = cluster_of(World())
    version = {"metadata": {"namespace": "shop", "name": "sentiment-v1"}, "spec": {"model": "sentiment"}}
    assert list(REGISTRATION.watches["ModelVersion"](version, cluster.cache)) == [KEY]
    assert list(REGISTRATION.watches["ModelVersion"](version | {"spec": {"model": "x"}}, cluster.cache)) == []
    job = {"metadata": {"namespace": "shop", "name": "j", "labels": {"tuneloop.dev/modeldeployment": "tweets"}}}
    assert list(REGISTRATION.watches["FineTuneJob"](job, cluster.cache)) == [KEY]
    assert list(REGISTRATION.watches["FineTuneJob"]({"metadata": {"namespace": "shop", "name": "j"}}, cluster.cache)) == []
