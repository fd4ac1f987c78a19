"""A ModelDeployment's life on a real API server: pods and gateway are played, everything else is real."""

from __future__ import annotations

import base64
import time
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


def test_a_deployment_comes_into_service_and_moves_on_to_the_next_version(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    api.create(deployment(namespace))
    stage.wait("Ready", "False", "NoApprovedVersion")
    assert {c["type"] for c in stage.status()["conditions"]} == {
        "Available", "Ready", "CanaryHealthy", "DriftDetected", "TrainingServingSkew", "RetrainingNeeded", "Degraded", "Reconciling",
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
    assert [record(api, namespace, number)["tuneloop.dev/outcome"] for number in (1, 2)] == ["Promoted", "Promoted"]


def test_pods_come_from_what_was_pinned_and_pass_the_restricted_policy(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    api.call("PATCH", f"/api/v1/namespaces/{namespace}", RESTRICTED, "application/merge-patch+json")
    stage.serve()
    pods = {p["metadata"]["labels"]["app.kubernetes.io/component"]: p for p in api.list("Pod", namespace)}
    assert set(pods) == {"engine", "gateway"}
    engine = pods["engine"]["spec"]
    assert engine["initContainers"][0]["command"][1:] == [
        "/etc/tuneloop/guard/engine_guard.py",
        "verify",
        "/volumes/models/sentiment/v1",
        digest(1),
    ]
    assert all(mount["readOnly"] for mount in engine["containers"][0]["volumeMounts"] if mount["mountPath"].startswith("/volumes"))
    guard = api.get("ConfigMap", namespace, stage.engine(1))
    assert guard is not None
    assert "class Guard" in guard["data"]["engine_guard.py"]
    for pod in pods.values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False


RESTRICTED = {
    "metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/enforce-version": "latest"}}
}


def test_a_mismatch_keeps_the_new_version_out(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    stage.serve()
    stage.gateway.probe = {"status": "Done", "asked": 50, "agreed": 47}
    api.create(version(namespace, 2))
    stage.start_engine(2)
    ready = stage.wait("Ready", "True", "RolledBack")
    assert "answered 47 of 50 probe items" in ready["message"]
    wait_for(lambda: record(api, namespace, 2).get("tuneloop.dev/outcome") == "Rejected", what="the verdict on record")
    assert record(api, namespace, 2)["tuneloop.dev/probes"] == "47/50"
    wait_for(lambda: len(api.list("Deployment", namespace)) == 2, what="the engine of version 2 to go")
    events = [e["reason"] for e in api.list("Event", namespace) if e["involvedObject"]["name"] == NAME]
    assert "Rejected" in events


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (lambda play, pod: play.unschedulable(pod), "Unschedulable"),
        (lambda play, pod: play.wait_in_container(pod, "ImagePullBackOff", "no such image."), "ImagePullFailed"),
    ],
)
def test_what_stands_in_the_way_is_named_and_goes_away_by_itself(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str, trouble: Any, reason: str
) -> None:
    stage.serve()
    api.create(version(namespace, 2))
    pod = stage.play.pod(stage.engine(2))
    trouble(stage.play, pod)
    stage.wait("Stalled", "True", reason)
    stage.wait("Available", "True", "Serving")
    stage.play.run(pod)
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    assert api.condition("ModelDeployment", namespace, NAME, "Stalled") is None


def test_an_engine_that_reads_the_prompt_otherwise_than_training_serves_and_is_degraded(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    prompt = {"format": "Chat", "template": "Sentiment of: {{ text }}", "probeSha256": digest(11)}
    stage.gateway.prompt_digest = digest(12)
    api.create(version(namespace, 1, prompt=prompt))
    api.create(deployment(namespace))
    stage.start_engine(1)
    stage.start_gateway()
    degraded = stage.wait("Degraded", "True", "PromptMismatch")
    assert "Serve it with the tokenizer and the chat template that it was trained with" in degraded["message"]
    stage.wait("Ready", "True", "Serving")
    assert record(api, namespace, 1)["tuneloop.dev/prompt"] == digest(12)
    stage.gateway.prompt_digest = digest(11)
    api.create(version(namespace, 2, prompt=prompt))
    stage.start_engine(2)
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    stage.wait("Degraded", "False", "Healthy")


def test_an_engine_below_the_security_floor_serves_and_is_called_vulnerable(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    stage.gateway.engine_version = "0.19.1"
    api.create(version(namespace, 1))
    api.create(deployment(namespace))
    stage.start_engine(1)
    stage.start_gateway()
    assert "vLLM 0.19.1, below 0.22.0" in stage.wait("Degraded", "True", "RuntimeVulnerable")["message"]
    stage.wait("Ready", "True", "Serving")
    assert record(api, namespace, 1)["tuneloop.dev/engine-version"] == "0.19.1"


@pytest.mark.parametrize("template", ["Sentiment of: {{ text", "{{ text | nonsense }}", "{{ txt }}"])
def test_a_prompt_that_does_not_render_is_refused_until_it_is_corrected(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str, template: str
) -> None:
    stage.serve()
    api.patch("ModelDeployment", namespace, NAME, {"spec": {"prompt": {"template": template}}})
    stalled = stage.wait("Stalled", "True", "RolledBack")
    assert "The prompt template" in stalled["message"]
    assert "Correct spec.prompt.template" in stalled["message"]
    stage.wait("Available", "True", "Serving")
    assert stage.status()["stable"]["version"] == 1
    api.patch("ModelDeployment", namespace, NAME, {"spec": {"prompt": None}})
    stage.wait("Ready", "True", "Serving")


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (
            {"reason": "StartError", "exitCode": 128, "message": "exec: python3: not found"},
            "Set engine.image to one with python3 and vLLM.",
        ),
        ({"exitCode": 1, "message": "ValueError: Loading lora sentiment failed: No adapter found for x"}, "Loading lora sentiment failed"),
        ({"exitCode": 1, "message": "HFValidationError: Repo id must be in the form 'name'"}, "Put the model back"),
    ],
)
def test_an_engine_that_can_never_start_gives_way_while_the_old_one_serves(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str, ended: Object, says: str
) -> None:
    stage.serve()
    api.create(version(namespace, 2))
    pod = stage.play.pod(stage.engine(2))
    stage.play.crash(pod, ended)
    ready = stage.wait("Ready", "True", "RolledBack")
    assert says in ready["message"]
    assert "Version 1 serves on." in ready["message"]
    stage.wait("Available", "True", "Serving")


def adapter(namespace: str, number: int, **artifact: Any) -> Object:
    made = version(namespace, number, base={"source": {"uri": "pvc://models/base"}, "digest": digest(99)})
    made["spec"]["artifact"] |= {"format": "Adapter", "rank": 12} | artifact
    return made


def test_a_canary_between_two_adapters_needs_one_engine_and_a_load_that_fails_is_told_in_the_engines_words(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    api.create(adapter(namespace, 1))
    api.create(deployment(namespace, rollout=CANARY))
    stage.start_engine(1)
    stage.start_gateway()
    stage.wait("Ready", "True", "Serving")
    first = stage.engine(1)

    stage.gateway.unloaded = {2: ""}
    api.create(adapter(namespace, 2))
    assert stage.engine(2) == first
    wait_for(lambda: "0 of 1 engine pods have loaded" in str(stage.status().get("canary")), what="the canary to wait for its adapter")
    assert weights(stage.gateway) == {1: 100, 2: 0}
    stage.gateway.unloaded = {}
    wait_for(lambda: weights(stage.gateway) == {1: 90, 2: 10}, what="the canary's first share")
    config = stage.gateway.config()
    assert config is not None
    assert [revision.adapter.path for revision in config.revisions if revision.adapter] == [
        "/volumes/models/sentiment/v1", "/volumes/models/sentiment/v2",
    ]  # fmt: skip
    stage.gateway.outcomes = {1: USUAL, 2: {"requests": 1500, "errors": 1, "firstToken": [*FAST, 1499]}}
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    assert len([found for found in api.list("Deployment", namespace) if "gateway" not in found["metadata"]["name"]]) == 1

    stage.gateway.unloaded = {3: "Call to add_lora method failed: LoRA rank 12 is greater than max_lora_rank 8."}
    api.create(adapter(namespace, 3, rank=8))  # what is recorded is not true, and another engine is made for it
    stage.start_engine(3)
    ready = stage.wait("Ready", "True", "RolledBack")
    assert "could not load the adapter: Call to add_lora method failed: LoRA rank 12 is greater than max_lora_rank 8." in ready["message"]
    assert "Record the adapter's true rank" in ready["message"]
    assert weights(stage.gateway).get(2) == 100

    stage.gateway.unloaded = {2: "The adapter in /volumes/models/sentiment/v2 is refused: adapter_model.safetensors is missing."}
    degraded = stage.wait("Degraded", "True", "EngineFailed")  # its replica started anew, and the files are gone
    assert "adapter_model.safetensors is missing. Put its files back" in degraded["message"]
    stage.gateway.unloaded = {}
    stage.wait("Available", "True", "Serving")
    stage.wait("Degraded", "False", "Healthy")


def test_of_two_deployments_that_claim_one_name_the_first_serves_on(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    stage.serve()
    taken, second = stage.engine(1), deployment(namespace)  # a Service of that name leads to the first one's engine
    second["metadata"]["name"] = taken
    api.create(second)
    stalled = api.wait_for_condition("ModelDeployment", namespace, taken, "Stalled", "True", "NameConflict")
    assert f"Service {taken} exists and belongs to somebody else" in stalled["message"]
    assert "give this deployment another name" in stalled["message"]
    stage.wait("Ready", "True", "Serving")
    service = api.get("Service", namespace, taken)
    assert service is not None
    assert service["spec"]["selector"]["tuneloop.dev/modeldeployment"] == NAME


FAST = [0] * 100
CANARY = {"strategy": "Canary", "steps": [{"weight": 10, "minRequests": 100}, {"weight": 50, "minRequests": 100}], "keepPreviousSeconds": 1}
USUAL: Object = {"requests": 5000, "errors": 5, "firstToken": [*FAST, 4995]}


def weights(gateway: FakeGateway) -> dict[int | None, int]:
    config = gateway.config()
    return {revision.version: revision.weight for revision in config.revisions} if config else {}


def test_a_good_canary_is_promoted_step_by_step_and_a_worse_one_is_stopped(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    stage.serve(rollout=CANARY)
    api.create(version(namespace, 2))
    stage.start_engine(2)
    wait_for(lambda: weights(stage.gateway) == {1: 90, 2: 10}, what="the canary's first share")
    assert stage.status()["canary"]["weight"] == 10
    stage.wait("CanaryHealthy", "Unknown", "Analysing")
    stage.gateway.outcomes = {1: USUAL, 2: {"requests": 1500, "errors": 1, "firstToken": [*FAST, 1499]}}
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    stage.wait("CanaryHealthy", "True", "CanaryPassed")
    assert "tuneloop.dev/canary-step" not in record(api, namespace, 2)

    stage.gateway.outcomes = {}
    api.create(version(namespace, 3))
    stage.start_engine(3)
    wait_for(lambda: weights(stage.gateway).get(3) == 10, what="the share of version 3")
    stage.gateway.outcomes = {2: USUAL, 3: {"requests": 100, "errors": 20, "firstToken": [*FAST, 80]}}
    seen = time.monotonic()
    wait_for(lambda: weights(stage.gateway).get(2) == 100, what="the rollback")
    assert time.monotonic() - seen < 10
    stage.wait("CanaryHealthy", "False", "CanaryFailed")
    stage.wait("Ready", "True", "RolledBack")
    said = record(api, namespace, 3)
    assert (said["tuneloop.dev/outcome"], said["tuneloop.dev/outcome-reason"]) == ("Rejected", "CanaryFailed")
    assert "Errors 20/100 (20.0 %) against 5/5000 (0.1 %)" in said["tuneloop.dev/outcome-message"]
    assert '"verdict":"Fail"' in said["tuneloop.dev/analysis"]


def test_a_canary_that_was_replaced_begins_again_when_its_turn_comes(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    stage.serve(rollout=CANARY)
    api.create(version(namespace, 2))
    stage.start_engine(2)
    wait_for(lambda: weights(stage.gateway).get(2) == 10, what="the share of version 2")
    api.create(version(namespace, 3))
    stage.start_engine(3)
    wait_for(lambda: weights(stage.gateway).get(3) == 10, what="the share of version 3")
    assert record(api, namespace, 2)["tuneloop.dev/outcome"] == "Replaced"
    stage.gateway.outcomes = {1: USUAL, 3: {"requests": 100, "errors": 20, "firstToken": [*FAST, 80]}}
    wait_for(lambda: record(api, namespace, 3).get("tuneloop.dev/outcome") == "Rejected", what="the end of version 3")
    stage.start_engine(2)
    wait_for(lambda: weights(stage.gateway).get(2) == 10, what="the share of version 2 again")
    assert "tuneloop.dev/outcome" not in record(api, namespace, 2)
    config, asked = stage.gateway.config(), stage.gateway.asked
    wait_for(lambda: stage.gateway.asked >= asked + 3, what="the operator to look again")
    again = stage.gateway.config()
    assert config is not None
    assert again is not None
    assert again.window == config.window


def test_a_canary_goes_on_where_the_operator_before_left_it(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    stage.serve(rollout=CANARY)
    api.create(version(namespace, 2))
    stage.start_engine(2)
    wait_for(lambda: weights(stage.gateway) == {1: 90, 2: 10}, what="the canary's first share")
    config = stage.gateway.config()
    assert config is not None
    operator.kill()
    operator.start()
    stage.gateway.outcomes = {1: USUAL, 2: {"requests": 30, "firstToken": [*FAST, 30]}}
    wait_for(lambda: stage.status().get("analysis", {}).get("requests") == 30, what="the analysis by the next operator")
    again = stage.gateway.config()
    assert again is not None
    assert again.window == config.window


def record(api: Api, namespace: str, number: int) -> dict[str, str]:
    """Annotations of a version's revision."""
    revision = next(r for r in api.list("ControllerRevision", namespace) if r["data"]["version"] == number)
    annotations: dict[str, str] = revision["metadata"].get("annotations", {})
    return annotations


def test_a_taken_name_is_a_condition_and_never_overwritten(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    foreign = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": namespace}, "spec": {"ports": [{"port": 1}]}}
    api.create(foreign)
    api.create(version(namespace, 1))
    api.create(deployment(namespace))
    stalled = stage.wait("Stalled", "True", "NameConflict")
    assert f"Service {NAME}" in stalled["message"]
    stage.wait("Available", "False", "NameConflict")
    found = api.get("Service", namespace, NAME)
    assert found is not None
    assert [port["port"] for port in found["spec"]["ports"]] == [1]
    api.delete("Service", namespace, NAME)
    stage.start_engine(1)
    stage.start_gateway()
    stage.api.wait_for_condition("ModelDeployment", namespace, NAME, "Ready", "True", "Serving", timeout=60)


def operators_fields(api: Api, namespace: str) -> list[Object]:
    """What the operator owns of the spec."""
    found = api.get("ModelDeployment", namespace, NAME)
    assert found is not None
    return [entry for entry in found["metadata"]["managedFields"] if "f:spec" in entry["fieldsV1"] and "tuneloop" in entry["manager"]]


def test_scale_is_a_subresource_and_makes_no_revision(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    stage.serve()
    api.patch("ModelDeployment", namespace, NAME, {"spec": {"replicas": 3}}, "scale")
    wait_for(lambda: stage.status()["replicas"] == 3, what="three engine pods")
    scale = api.call("GET", f"/apis/tuneloop.dev/v1alpha1/namespaces/{namespace}/modeldeployments/{NAME}/scale")
    assert scale["status"]["replicas"] == 3
    assert len(api.list("Pod", namespace, scale["status"]["selector"].replace(",", "%2C"))) == 3
    assert len(api.list("ControllerRevision", namespace)) == 1


def test_an_engine_that_nobody_asks_is_stopped_and_a_request_that_waits_starts_it(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    def replicas() -> int:
        found = api.get("Deployment", namespace, stage.engine(1))
        return int(found["spec"]["replicas"]) if found else -1

    stage.serve(autoscaling={"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 1, "holdSeconds": 60})
    stage.gateway.idle = 5
    stage.wait("Ready", "True", "ScaledToZero")
    wait_for(lambda: replicas() == 0, what="no replica")
    wait_for(lambda: not stage.play.pods(stage.engine(1)), what="its pods to go")
    stage.gateway.held, stage.gateway.idle = 1, 0
    wait_for(lambda: replicas() == 1, what="a replica")
    config = stage.gateway.config()
    assert config is not None
    assert (config.asleep, config.hold_seconds) == (False, 60)
    stage.start_engine(1)
    stage.wait("Ready", "True", "Serving")
    assert not operators_fields(api, namespace)


def test_captured_data_survives_the_deployment_and_all_else_goes(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    stage.serve()
    api.delete("ModelDeployment", namespace, NAME)
    for kind in (
        "Deployment",
        "ConfigMap",
        "Service",
        "ControllerRevision",
        "NetworkPolicy",
        "Role",
        "RoleBinding",
        "ServiceAccount",
        "Secret",
    ):
        wait_for(lambda kind=kind: not _ours(api, kind, namespace), what=f"no {kind} to be left")
    claim = api.get("PersistentVolumeClaim", namespace, f"{NAME}-data")
    assert claim is not None
    assert "ownerReferences" not in claim["metadata"]
    api.create(deployment(namespace))  # takes the claim up again
    stage.start_engine(1)
    stage.start_gateway()
    stage.wait("Ready", "True", "Serving")


def _ours(api: Api, kind: str, namespace: str) -> list[Object]:
    return api.list(kind, namespace, "app.kubernetes.io/managed-by=tuneloop")


def test_a_served_deployment_is_quiet_and_a_restart_writes_nothing(
    operator: OperatorProcess, start_operator: Start, stage: Stage, api: Api, namespace: str
) -> None:
    stage.serve()
    wait_for(lambda: not _changed(api, namespace, 3.0), what="three seconds without a write")
    before = versions(api, namespace)
    operator.stop()
    start_operator(identity="operator-b")
    assert not _changed(api, namespace, 6.0)
    assert versions(api, namespace) == before


def versions(api: Api, namespace: str) -> dict[str, str]:
    """Versions of everything that the operator writes."""
    kinds = (
        "ModelDeployment",
        "ModelVersion",
        "Deployment",
        "ConfigMap",
        "Service",
        "ControllerRevision",
        "NetworkPolicy",
        "Role",
        "Secret",
    )
    return {f"{kind}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for kind in kinds for o in api.list(kind, namespace)}


def _changed(api: Api, namespace: str, seconds: float) -> bool:
    before = versions(api, namespace)
    time.sleep(seconds)
    return versions(api, namespace) != before


# --- one made-up GPU -----------------------------------------------------------

GPU = "example.com/gpu"


@pytest.fixture
def one_gpu(api: Api, namespace: str) -> Iterator[Object]:
    """Overrides that lead engines to a node with one device, where the real scheduler puts them."""
    taint = {"key": "tuneloop.test", "value": namespace, "effect": "NoSchedule"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": namespace, "labels": {"tuneloop.test": namespace}}}
    api.call("POST", "/api/v1/nodes", node | {"spec": {"taints": [taint]}})
    has = {"cpu": "8", "memory": "32Gi", "pods": "20", GPU: "1"}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now, "lastTransitionTime": now}
    status = {"status": {"capacity": has, "allocatable": has, "conditions": [ready]}}
    api.call("PATCH", f"/api/v1/nodes/{namespace}/status", status, "application/merge-patch+json")
    room = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = room | {
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/nowhere"},
        "claimRef": {"namespace": namespace, "name": "models"},
    }
    api.call("POST", "/api/v1/persistentvolumes", {"metadata": {"name": namespace}, "spec": volume})
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models", "namespace": namespace}}
    api.create(claim | {"spec": room | {"volumeName": namespace, "resources": {"requests": {"storage": "1Gi"}}}})
    wait_for(lambda: (api.get("PersistentVolumeClaim", namespace, "models") or {})["status"]["phase"] == "Bound", what="the claim's volume")
    tolerated = {key: taint[key] for key in ("key", "value", "effect")} | {"operator": "Equal"}
    yield {"nodeSelector": {"tuneloop.test": namespace}, "tolerations": [tolerated]}
    for kind in ("nodes", "persistentvolumes"):
        api.call("DELETE", f"/api/v1/{kind}/{namespace}")


def test_on_one_gpu_a_new_version_finds_no_device_and_then_the_engine_before_makes_room(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str, one_gpu: Object
) -> None:
    engine = {"acceleratorsPerReplica": 1, "acceleratorResource": GPU, "pod": one_gpu}
    stage.serve(engine=engine, rollout=CANARY | {"surgeTimeoutSeconds": 1})
    wait_for(lambda: stage.play.pod(stage.engine(1))["spec"].get("nodeName") == namespace, what="the first engine's place")
    api.create(version(namespace, 2))
    stalled = stage.wait("Stalled", "True", "NoDeviceForCanary")
    assert "rollout.allowDowntime: true" in stalled["message"]
    assert f"Insufficient {GPU}" in stalled["message"]
    stage.wait("Available", "True", "Serving")
    api.patch("ModelDeployment", namespace, NAME, {"spec": {"rollout": {"allowDowntime": True}}})
    old, new = stage.engine(1), stage.engine(2)

    def is_going() -> Object | None:
        pods = [
            p for p in api.list("Pod", namespace, f"tuneloop.dev/engine={old.rpartition('-')[2]}") if p["metadata"].get("deletionTimestamp")
        ]
        return pods[0] if pods else None

    gone = wait_for(is_going, what="the engine before to make room")
    api.call("DELETE", f"/api/v1/namespaces/{namespace}/pods/{gone['metadata']['name']}?gracePeriodSeconds=0")  # as its kubelet does
    placed = wait_for(lambda: [p for p in stage.play.pods(new) if p["spec"].get("nodeName") == namespace], what="the new engine's place")
    stage.play.run(placed[0])
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    stage.wait("Ready", "True", "Serving")
    wait_for(lambda: api.get("Deployment", namespace, old) is None, what="the old engine to go")
    assert record(api, namespace, 2)["tuneloop.dev/outcome-in-place"] == "true"
