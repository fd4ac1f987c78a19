"""Engines of several nodes, by the definition of LeaderWorkerSet itself; the tests play its controller, which makes the pods."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.cluster.conftest import Start, install
from tests.cluster.harness import Api, Object, wait_for
from tests.cluster.test_modeldeployment import NAME, NOBODY, Stage, deployment, gateway, stage, version  # noqa: F401 - fixtures
from tests.unit.modeldeployment.test_groups import the_set, world

MODULE = "sigs.k8s.io/lws@v0.8.0"
DEFINITION = "config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml"
ENGINE = {"acceleratorsPerReplica": 1, "nodesPerReplica": 2, "pod": NOBODY}


@pytest.fixture(scope="module")
def definition(api: Api) -> None:
    """Of the Go module. It stays installed: an operator that watches LeaderWorkerSets would miss it."""
    fetched = subprocess.run(["go", "mod", "download", "-json", MODULE], check=True, capture_output=True, text=True, timeout=300)
    install(api, yaml.safe_load((Path(json.loads(fetched.stdout)["Dir"]) / DEFINITION).read_text()))


@pytest.fixture
def group(api: Api, namespace: str, definition: None, start_operator: Start, stage: Stage) -> Object:  # noqa: F811
    """The LeaderWorkerSet of version 1, made by an operator that found the kind when it started."""
    start_operator()
    api.create(version(namespace, 1))
    api.create(deployment(namespace, engine=ENGINE))
    return wait_for(lambda: next(iter(sets(api, namespace)), None), what="a LeaderWorkerSet")


def sets(api: Api, namespace: str) -> list[Object]:
    return api.list("LeaderWorkerSet", namespace)


def make_pod(api: Api, made: Object, part: str, index: int) -> Object:
    """As LeaderWorkerSet's controller does it, by way of a StatefulSet."""
    metadata, template = made["metadata"], made["spec"]["leaderWorkerTemplate"][f"{part}Template"]
    owner = {
        "apiVersion": made["apiVersion"],
        "kind": "LeaderWorkerSet",
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
    }
    name = f"{metadata['name']}-0" + (f"-{index}" if index else "")
    about = {"name": name, "namespace": metadata["namespace"], "labels": template["metadata"]["labels"], "ownerReferences": [owner]}
    return api.create({"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": template["spec"]})


def serve(api: Api, stage: Stage, made: Object) -> None:  # noqa: F811
    stage.play.run(make_pod(api, made, "worker", 1))
    stage.play.run(make_pod(api, made, "leader", 0))
    stage.start_gateway()
    stage.wait("Ready", "True", "Serving")


def test_a_group_has_no_field_that_its_definition_does_not_know(api: Api, namespace: str, definition: None) -> None:
    found = world()
    found.settle()
    manifest = the_set(found)
    path = f"/apis/leaderworkerset.x-k8s.io/v1/namespaces/{namespace}/leaderworkersets"
    asked = {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}
    answer = api.call("POST", f"{path}?fieldValidation=Strict&dryRun=All", asked)
    assert answer["spec"]["leaderWorkerTemplate"]["size"] == 2


def test_an_engine_of_two_nodes_serves_when_its_leader_is_ready(
    group: Object, stage: Stage, api: Api, namespace: str  # noqa: F811
) -> None:  # fmt: skip
    assert group["metadata"]["ownerReferences"][0]["kind"] == "ModelDeployment"
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert api.get("Deployment", namespace, group["metadata"]["name"]) is None
    stage.play.unschedulable(make_pod(api, group, "worker", 1))
    stage.wait("Ready", "False", "Unschedulable")
    api.delete("Pod", namespace, f"{group['metadata']['name']}-0-1")
    wait_for(lambda: api.get("Pod", namespace, f"{group['metadata']['name']}-0-1") is None, what="the worker to go")
    serve(api, stage, group)
    assert stage.status()["replicas"] == 1
    service = api.get("Service", namespace, group["metadata"]["name"])
    assert service is not None
    for selector in (service["spec"]["selector"], dict(pair.split("=") for pair in stage.status()["selector"].split(","))):
        asked = api.list("Pod", namespace, "%2C".join(f"{label}={value}" for label, value in selector.items()))
        assert [pod["metadata"]["name"] for pod in asked] == [f"{group['metadata']['name']}-0"]


def test_a_group_is_scaled_and_goes_with_its_deployment(group: Object, stage: Stage, api: Api, namespace: str) -> None:  # noqa: F811
    serve(api, stage, group)
    api.patch("ModelDeployment", namespace, NAME, {"spec": {"replicas": 3}}, "scale")
    wait_for(lambda: sets(api, namespace)[0]["spec"]["replicas"] == 3, what="three groups")
    assert len(api.list("ControllerRevision", namespace)) == 1
    api.delete("ModelDeployment", namespace, NAME)
    wait_for(lambda: not sets(api, namespace), what="the group to be collected")


def test_a_new_version_is_another_group_and_the_one_before_goes(
    group: Object, stage: Stage, api: Api, namespace: str  # noqa: F811
) -> None:  # fmt: skip
    serve(api, stage, group)
    api.create(version(namespace, 2))
    second = wait_for(
        lambda: next((s for s in sets(api, namespace) if s["metadata"]["name"] != group["metadata"]["name"]), None), what="a set"
    )
    for part, index in (("worker", 1), ("leader", 0)):
        stage.play.run(make_pod(api, second, part, index))
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    wait_for(lambda: [s["metadata"]["name"] for s in sets(api, namespace)] == [second["metadata"]["name"]], what="the one before to go")
