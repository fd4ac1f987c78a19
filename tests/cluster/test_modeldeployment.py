"""A ModelDeployment's life on a real API server: pods and gateway are played, everything else is real."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.gateways import FakeGateway
from tests.cluster.harness import Api, OperatorProcess, Play, wait_for

Object = dict[str, Any]
NAME = "tweets"
NOBODY = {"schedulerName": "nobody"}
SPEC: Object = {
    "model": {"name": "sentiment"},
    "engine": {"acceleratorsPerReplica": 0, "pod": NOBODY},
    "rollout": {"keepPreviousSeconds": 1},
    "gateway": {"pod": NOBODY, "capture": {"database": {"volume": {"size": "1Gi"}}}},
}


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def version(namespace: str, number: int, approval: str = "Approved", **spec: Any) -> Object:
    return {
        "apiVersion": "tuneloop.dev/v1alpha1",
        "kind": "ModelVersion",
        "metadata": {"name": f"sentiment-v{number}", "namespace": namespace},
        "spec": {
            "model": "sentiment",
            "version": number,
            "artifact": {"uri": f"pvc://models/sentiment/v{number}", "manifestDigest": digest(number), "format": "Merged", "sizeBytes": 1},
            "evaluation": {"verdict": "Pass", "artifactDigest": digest(number)},
            "probesUri": f"pvc://models/probes-{number}.json",
            "prompt": {"format": "Chat", "template": "Sentiment of: {{ text }}"},
            "approval": approval,
        }
        | spec,
    }


def deployment(namespace: str, **spec: Any) -> Object:
    metadata = {"name": NAME, "namespace": namespace}
    return {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "metadata": metadata, "spec": SPEC | spec}


@pytest.fixture
def gateway(api: Api, namespace: str) -> Iterator[FakeGateway]:
    address = f"127.88.{int(namespace[-2:], 16)}.{int(namespace[-4:-2], 16) or 1}"
    with FakeGateway(api, namespace, NAME, address) as served:
        yield served


@pytest.fixture
def stage(api: Api, namespace: str, play: Play, gateway: FakeGateway) -> Stage:
    return Stage(api, namespace, play, gateway)


class Stage:
    """What the tests do again and again."""

    def __init__(self, api: Api, namespace: str, play: Play, gateway: FakeGateway) -> None:
        self.api, self.namespace, self.play, self.gateway = api, namespace, play, gateway

    def start_gateway(self) -> None:
        pod = self.play.pod(f"{NAME}-gateway")
        self.gateway.pod_uid = pod["metadata"]["uid"]
        self.play.run(pod, self.gateway.address)

    def engine(self, number: int) -> str:
        """Name of the engine of a version, once it is made."""

        def made() -> str | None:
            revisions = self.api.list("ControllerRevision", self.namespace)
            hashed = next((r["data"]["engineHash"] for r in revisions if r["data"]["version"] == number), None)
            name = f"{NAME}-{hashed}"
            return name if hashed and self.api.get("Deployment", self.namespace, name) else None

        return wait_for(made, what=f"an engine of version {number}")

    def start_engine(self, number: int) -> None:
        self.play.run(self.play.pod(self.engine(number)))

    def wait(self, type_: str, status: str, reason: str | None = None) -> Object:
        return self.api.wait_for_condition("ModelDeployment", self.namespace, NAME, type_, status, reason)

    def status(self) -> Object:
        found = self.api.get("ModelDeployment", self.namespace, NAME)
        assert found is not None
        return found["status"]

    def serve(self, **spec: Any) -> None:
        """Version 1 takes all traffic."""
        self.api.create(version(self.namespace, 1))
        self.api.create(deployment(self.namespace, **spec))
        self.start_engine(1)
        self.start_gateway()
        self.wait("Ready", "True", "Serving")


def test_a_deployment_comes_into_service_and_moves_on_to_the_next_version(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    api.create(deployment(namespace))
    stage.wait("Ready", "False", "NoApprovedVersion")
    assert {c["type"] for c in stage.status()["conditions"]} == {
        "Available", "Ready", "DriftDetected", "RetrainingNeeded", "Degraded", "Reconciling",
    }  # fmt: skip
    api.create(version(namespace, 1))
    stage.start_engine(1)
    stage.wait("Available", "False", "Starting")
    stage.start_gateway()
    stage.wait("Ready", "True", "Serving")
    status = stage.status()
    assert status["stable"]["version"] == 1
    assert status["url"] == f"http://{NAME}.{namespace}.svc"
    assert status["replicas"] == 1
    keys = api.get("Secret", namespace, f"{NAME}-keys")
    assert keys is not None
    assert {name: len(base64.b64decode(value)) for name, value in keys["data"].items()} == {
        "engine-key": 43, "internal-token": 43, "feedback-key": 43,
    }  # fmt: skip

    first = stage.engine(1)
    api.create(version(namespace, 2))
    stage.start_engine(2)
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    wait_for(lambda: api.get("Deployment", namespace, first) is None, what="the engine of version 1 to go")
    config = stage.gateway.config()
    assert config is not None
    assert [(r.version, r.weight) for r in config.revisions] == [(2, 100)]
    outcomes = {r["data"]["version"]: r["metadata"]["annotations"]["tuneloop.dev/outcome"] for r in api.list("ControllerRevision", namespace)}
    assert outcomes == {1: "Promoted", 2: "Promoted"}
