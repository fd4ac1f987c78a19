"""FineTuneJobs on a real API server, with a real Job controller: the test plays scheduler, kubelet and trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from tests.cluster.harness import Api, Object, OperatorProcess, Play, wait_for
from tests.unit.finetunejob.builders import RESULTS, evaluated, failed, prepared

from tuneloop_operator.render import names
from tuneloop_trainer.contract import Progress, Reason, Stage, StageResult


def make_manifest(namespace: str, name: str, **changes: Any) -> Object:
    spec = {
        "baseModel": {"uri": "pvc://models/base"},
        "data": {"train": [{"source": {"uri": "pvc://models/rows.jsonl"}}]},
        "compute": {"acceleratorsPerNode": 0, "pod": {"schedulerName": "nobody"}},
        "output": {"model": name, "store": {"uri": "pvc://models"}},
    }
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec | changes}


def make_claim(api: Api, namespace: str, name: str = "models") -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    api.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": namespace}, "spec": spec})


class Trainee:
    """One FineTuneJob, and its stages as the test plays them."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self.api, self.play, self.namespace, self.name = api, Play(api, namespace), namespace, name

    def make(self, **changes: Any) -> Trainee:
        self.api.create(make_manifest(self.namespace, self.name, **changes))
        return self

    def get(self) -> Object:
        found = self.api.get("FineTuneJob", self.namespace, self.name)
        assert found is not None
        return found

    def status(self) -> Object:
        status: Object = self.get().get("status", {})
        return status

    def jobs(self) -> list[str]:
        """Stage and number of its Jobs."""
        owned = self.api.owned("Job", self.namespace, self.get()["metadata"]["uid"])
        return sorted(job["metadata"]["name"].removeprefix(f"{self.name}-") for job in owned)

    def job(self, stage: Stage, number: int = 1) -> str:
        return names.stage_job(self.name, stage.value, number)

    def versions(self) -> list[Object]:
        return [version for version in self.api.list("ModelVersion", self.namespace) if version["spec"]["model"] == self.name]

    def pod(self, stage: Stage, number: int = 1) -> Object:
        return {"kind": "Pod", **self.play.pod(self.job(stage, number))}

    def ends(self, stage: Stage, number: int = 1, result: StageResult | None = None) -> None:
        """The stage's pod runs, and ends with its result."""
        told = result or RESULTS[stage]()
        pod = self.play.run(self.pod(stage, number))
        self.play.finish(pod, told.exit_code, told.model_dump_json(by_alias=True, exclude_none=True))

    def up_to(self, stage: Stage) -> Trainee:
        for earlier in list(Stage)[: list(Stage).index(stage)]:
            self.ends(earlier)
        self.pod(stage)
        return self

    def bound(self, stage: Stage, number: int = 1) -> Object:
        """The stage's pod on a node that is none: only then does a deletion leave it time to save."""
        pod = self.pod(stage, number)
        place = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}"
        metadata = {"name": pod["metadata"]["name"], "namespace": self.namespace}
        target = {"apiVersion": "v1", "kind": "Node", "name": "nowhere"}
        self.api.call("POST", f"{place}/binding", {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target})
        return {"kind": "Pod", **self.api.call("GET", place)}

    def is_interrupted(self, pod: Object) -> None:
        """The pod, which is being deleted, saves and ends; then it is gone."""
        said = failed(Stage.TRAIN, 75, Reason.PREEMPTED, "Saved.").model_dump_json(by_alias=True, exclude_none=True)
        self.play.finish(pod, 75, said)
        place = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}"
        self.api.call("DELETE", place, {"gracePeriodSeconds": 0})
        wait_for(lambda: self.api.get("Pod", self.namespace, pod["metadata"]["name"]) is None, what="the pod to be gone")

    def wait_for(self, status: str, reason: str, type_: str = "Succeeded") -> Object:
        return self.api.wait_for_condition("FineTuneJob", self.namespace, self.name, type_, status, reason)

    def wait_for_phase(self, phase: str) -> None:
        wait_for(lambda: self.status().get("phase") == phase, what=f"phase {phase}")

    def edit(self, **changes: Any) -> None:
        self.api.patch("FineTuneJob", self.namespace, self.name, {"spec": changes})

    def events(self) -> list[str]:
        found = self.api.list("Event", self.namespace)
        return [event["reason"] for event in found if event["involvedObject"]["name"] == self.name]


@pytest.fixture(scope="module")
def shared(api: Api, cluster_kubeconfig: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One namespace, claim and operator for all tests that keep to their own job: starting an operator takes seconds."""
    name = f"finetunejobs-{os.getpid()}"
    # Pods that are not restricted are refused here, so every test holds that ours are.
    metadata = {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
    api.call("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    make_claim(api, name)
    log = tmp_path_factory.mktemp("shared") / "operator.log"
    process = OperatorProcess(cluster_kubeconfig, name, log, TUNELOOP_PROGRESS_INTERVAL_SECONDS="0.5").start()
    yield name
    process.stop()
    print(log.read_text()[-6000:])
    api.call("DELETE", f"/api/v1/namespaces/{name}")


def name_of(request: pytest.FixtureRequest) -> str:
    return f"t-{names.short_hash(request.node.name, 8)}"


@pytest.fixture
def trainee(api: Api, shared: str, request: pytest.FixtureRequest) -> Trainee:
    return Trainee(api, shared, name_of(request))


@pytest.fixture
def alone(api: Api, namespace: str, operator: OperatorProcess) -> Trainee:
    """In a namespace of its own, with an operator of its own, and a claim."""
    make_claim(api, namespace)
    return Trainee(api, namespace, "tweets")


# --- the whole life ----------------------------------------------------------


def test_a_job_ends_in_one_approved_verified_version(api: Api, trainee: Trainee) -> None:
    trainee.make().up_to(Stage.EVALUATE).ends(Stage.EVALUATE)
    trainee.wait_for("True", "Completed")
    assert trainee.jobs() == ["evaluate-1", "package-1", "prepare-1", "train-1"]
    versions = trainee.versions()
    assert [version["metadata"]["name"] for version in versions] == [f"{trainee.name}-v1"]
    version = versions[0]
    assert version["spec"]["approval"] == "Approved"
    assert "ownerReferences" not in version["metadata"]
    assert version["spec"]["lineage"]["fineTuneJobUid"] == trainee.get()["metadata"]["uid"]
    api.wait_for_condition("ModelVersion", trainee.namespace, f"{trainee.name}-v1", "Verified", "True", "EvaluatedByDigest")
    api.wait_for_condition("ModelVersion", trainee.namespace, f"{trainee.name}-v1", "InUse", "False", "NotServed")
    status = trainee.status()
    assert (status["phase"], status["modelVersion"], status["progress"]["display"]) == ("Succeeded", 1, "12/12")
    assert {c["type"]: c["status"] for c in status["conditions"]} == dict.fromkeys(
        ("Succeeded", "DataReady", "Trained", "Packaged", "Evaluated"), "True"
    )
    assert status["observedGeneration"] == trainee.get()["metadata"]["generation"]
    assert sorted(trainee.events()) == ["Completed", "Evaluating", "Packaging", "Preparing", "Training"]


def test_a_version_outlives_its_job(api: Api, trainee: Trainee) -> None:
    trainee.make().up_to(Stage.EVALUATE).ends(Stage.EVALUATE)
    trainee.wait_for("True", "Completed")
    api.delete("FineTuneJob", trainee.namespace, trainee.name)
    wait_for(lambda: api.get("Job", trainee.namespace, trainee.job(Stage.TRAIN)) is None, what="the Jobs to be collected")
    assert api.get("ModelVersion", trainee.namespace, f"{trainee.name}-v1") is not None


def test_the_spec_can_be_edited_until_training_starts_and_not_after(trainee: Trainee) -> None:
    trainee.make()
    trainee.pod(Stage.PREPARE)
    trainee.edit(training={"maxSteps": 5})
    trainee.ends(Stage.PREPARE, 2)
    wait_for(lambda: "startedAt" in trainee.status())
    with pytest.raises(Exception, match="training cannot change once training has started"):
        trainee.edit(training={"maxSteps": 6})
    trainee.edit(approval="Manual", runPolicy={"maxRestarts": 1})


def test_a_job_made_again_from_the_same_inputs_trains_nothing(api: Api, trainee: Trainee) -> None:
    trainee.make().up_to(Stage.EVALUATE).ends(Stage.EVALUATE)
    trainee.wait_for("True", "Completed")
    api.delete("FineTuneJob", trainee.namespace, trainee.name, "Foreground")
    wait_for(lambda: api.get("FineTuneJob", trainee.namespace, trainee.name) is None)
    trainee.make().ends(Stage.PREPARE)
    trainee.wait_for("True", "AlreadyTrained")
    assert trainee.jobs() == ["prepare-1"]
    assert len(trainee.versions()) == 1


@pytest.mark.parametrize(
    ("verdict", "approval", "reason"), [("Fail", "Rejected", "GateFailed"), ("Inconclusive", "Pending", "GateInconclusive")]
)
def test_the_gates_decide_the_approval(api: Api, trainee: Trainee, verdict: str, approval: str, reason: str) -> None:
    trainee.make().up_to(Stage.EVALUATE).ends(Stage.EVALUATE, result=evaluated(verdict))
    trainee.wait_for("True", reason)
    version = api.get("ModelVersion", trainee.namespace, f"{trainee.name}-v1")
    assert version is not None
    assert version["spec"]["approval"] == approval


def test_the_sixth_promotion_by_one_set_of_items_waits_for_a_person(api: Api, trainee: Trainee) -> None:
    gate = {"suite": "tweets", "metric": "Accuracy", "rule": "Superior", "verdict": "Pass", "n": 400, "suiteDigest": "1" * 64}
    gate |= {"candidate": "0.9", "baseline": "0.6", "difference": "0.3", "interval": "[0.2, 0.4]"}
    artifact = {"uri": "pvc://models/x", "manifestDigest": "sha256:" + "0" * 64, "format": "Merged", "sizeBytes": 1}
    evaluation = {"verdict": "Pass", "artifactDigest": artifact["manifestDigest"], "gates": [gate]}
    for number in range(1, 6):
        spec = {"model": trainee.name, "version": number, "artifact": artifact, "evaluation": evaluation, "approval": "Approved"}
        metadata = {"name": f"{trainee.name}-v{number}", "namespace": trainee.namespace}
        api.create({"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelVersion", "metadata": metadata, "spec": spec})
    trainee.make().ends(Stage.PREPARE, result=prepared(suite_digests={"held-out": "1" * 64}))
    for stage in (Stage.TRAIN, Stage.PACKAGE, Stage.EVALUATE):
        trainee.ends(stage)
    ended = trainee.wait_for("True", "SuiteExhausted")
    assert "suite held-out has decided 5 promotions" in ended["message"]
    assert trainee.status()["evaluation"]["gates"][0]["uses"] == 5
    version = api.get("ModelVersion", trainee.namespace, f"{trainee.name}-v6")
    assert version is not None
    assert version["spec"]["approval"] == "Pending"
    api.patch("ModelVersion", trainee.namespace, f"{trainee.name}-v6", {"spec": {"approval": "Approved"}})


def test_a_taken_version_costs_the_next_number(api: Api, trainee: Trainee) -> None:
    artifact = {"uri": "pvc://models/x", "manifestDigest": "sha256:" + "0" * 64, "format": "Merged", "sizeBytes": 1}
    api.create(
        {
            "apiVersion": "tuneloop.dev/v1alpha1",
            "kind": "ModelVersion",
            "metadata": {"name": f"{trainee.name}-v1", "namespace": trainee.namespace},
            "spec": {"model": trainee.name, "version": 1, "artifact": artifact},
        }
    )
    trainee.make().up_to(Stage.EVALUATE).ends(Stage.EVALUATE)
    trainee.wait_for("True", "Completed")
    assert trainee.status()["modelVersion"] == 2
    api.wait_for_condition("ModelVersion", trainee.namespace, f"{trainee.name}-v1", "Verified", "False", "NotEvaluated")


# --- what stands in the way --------------------------------------------------


def test_refused_data_stalls_the_job_until_the_spec_changes(trainee: Trainee) -> None:
    sentence = "Dataset pvc://models/rows.jsonl has no column 'prompt'; it has text, label. Set data.train[0].columns."
    trainee.make().ends(Stage.PREPARE, result=failed(Stage.PREPARE, 10, Reason.DATA_INVALID, sentence))
    assert trainee.wait_for("True", "DataInvalid", "Stalled")["message"] == sentence
    assert trainee.jobs() == ["prepare-1"]
    trainee.edit(data={"train": [{"source": {"uri": "pvc://models/rows.jsonl"}, "columns": {"prompt": "text", "completion": "label"}}]})
    trainee.ends(Stage.PREPARE, 2)
    trainee.wait_for("Unknown", "Training")
    assert "Stalled" not in {condition["type"] for condition in trainee.status()["conditions"]}


def test_an_unknown_argument_is_refused_before_any_job_until_it_is_corrected(trainee: Trainee) -> None:
    trainee.make(training={"extraArguments": {"wieght_decay": "0.1"}})
    message = trainee.wait_for("True", "InvalidArgument", "Stalled")["message"]
    assert message.startswith("training.extraArguments has no 'wieght_decay' with SFT; did you mean weight_decay? It may hold adam_beta1, ")
    assert trainee.jobs() == []
    assert "InvalidArgument" in trainee.events()
    trainee.edit(training={"extraArguments": {"wieght_decay": None, "weight_decay": "0.1"}})
    trainee.ends(Stage.PREPARE)
    trainee.wait_for("Unknown", "Training")
    assert "Stalled" not in {condition["type"] for condition in trainee.status()["conditions"]}


def test_the_retry_annotation_tries_again(api: Api, trainee: Trainee) -> None:
    trainee.make().ends(Stage.PREPARE, result=failed(Stage.PREPARE, 10, Reason.MODEL_NOT_FOUND, "Model x does not exist."))
    trainee.wait_for("True", "ModelNotFound", "Stalled")
    api.patch("FineTuneJob", trainee.namespace, trainee.name, {"metadata": {"annotations": {names.RETRY_ANNOTATION: "1"}}})
    trainee.pod(Stage.PREPARE, 2)


def test_a_missing_claim_is_named_before_any_pod(trainee: Trainee) -> None:
    trainee.make(output={"model": trainee.name, "store": {"uri": "pvc://nowhere/models"}})
    assert "PersistentVolumeClaim nowhere does not exist" in trainee.wait_for("Unknown", "ClaimNotFound")["message"]
    assert trainee.jobs() == []


def test_a_missing_secret_an_image_and_a_node_are_told_apart(trainee: Trainee) -> None:
    trainee.make()
    pod = trainee.pod(Stage.PREPARE)
    trainee.play.unschedulable(pod)
    assert "Insufficient nvidia.com/gpu" in trainee.wait_for("Unknown", "Unschedulable")["message"]
    trainee.play._status(pod, conditions=[{"type": "PodScheduled", "status": "True"}])
    trainee.play.wait_in_container(pod, "CreateContainerConfigError", 'secret "hf-token" not found')
    assert "Secret hf-token does not exist" in trainee.wait_for("Unknown", "SecretNotFound")["message"]
    trainee.play.wait_in_container(pod, "ImagePullBackOff", "not found")
    trainee.wait_for("Unknown", "ImagePullFailed")
    trainee.play.run(pod)
    trainee.wait_for("Unknown", "Preparing")


def test_a_used_up_quota_is_told_and_goes_away(api: Api, namespace: str, alone: Trainee) -> None:
    trainee = alone
    hard = {"hard": {"pods": "0"}}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": namespace}, "spec": hard}
    api.create(quota)
    wait_for(lambda: (api.get("ResourceQuota", namespace, "none") or {}).get("status", {}).get("hard"))
    trainee.make()
    assert "exceeded quota" in trainee.wait_for("Unknown", "QuotaExceeded")["message"]
    api.delete("ResourceQuota", namespace, "none")
    wait_for(lambda: trainee.play.pods(trainee.job(Stage.PREPARE)), 90, "the Job controller to try again")


def test_a_taken_name_is_left_alone(api: Api, trainee: Trainee) -> None:
    spec = {"template": {"spec": {"restartPolicy": "Never", "schedulerName": "nobody", "containers": [{"name": "x", "image": "x"}]}}}
    metadata = {"name": trainee.job(Stage.PREPARE), "namespace": trainee.namespace}
    api.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})
    trainee.make()
    assert f"Job {trainee.job(Stage.PREPARE)}" in trainee.wait_for("True", "NameConflict", "Stalled")["message"]
    found = api.get("Job", trainee.namespace, trainee.job(Stage.PREPARE))
    assert found is not None
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == "x"


def test_what_the_api_server_refuses_is_told_in_its_words_until_the_spec_is_corrected(trainee: Trainee) -> None:
    trainee.make(compute={"pod": {"annotations": {"not a key": "x"}}})
    said = trainee.wait_for("True", "Refused", "Stalled")["message"]
    assert said.startswith(f"The API server refuses Job {trainee.job(Stage.PREPARE)}: ")
    assert "not a key" in said
    trainee.edit(compute={"pod": {"annotations": {"not a key": None}}})
    trainee.wait_for("Unknown", "Preparing")
    assert "Stalled" not in {condition["type"] for condition in trainee.status()["conditions"]}


# --- attempts ----------------------------------------------------------------


def test_an_interrupted_attempt_is_followed_by_the_next(trainee: Trainee) -> None:
    trainee.make().ends(Stage.PREPARE)
    saved = failed(Stage.TRAIN, 75, Reason.PREEMPTED, "Saved.").model_copy(update={"train": RESULTS[Stage.TRAIN](4).train})
    trainee.ends(Stage.TRAIN, 1, saved)
    trainee.ends(Stage.TRAIN, 2)
    trainee.wait_for("Unknown", "Packaging")
    assert trainee.status()["attempts"] == 2


def test_a_disrupted_pod_is_replaced_within_the_attempt(trainee: Trainee) -> None:
    trainee.make().ends(Stage.PREPARE)
    pod = trainee.play.run(trainee.pod(Stage.TRAIN))
    trainee.play.finish(pod, 137, disrupted=True)
    others = lambda: [p for p in trainee.play.pods(trainee.job(Stage.TRAIN)) if p["metadata"]["uid"] != pod["metadata"]["uid"]]  # noqa: E731
    replacement = wait_for(others, what="another pod of the same Job")
    assert replacement[0]["status"]["phase"] == "Pending"
    trainee.ends(Stage.TRAIN)
    trainee.wait_for("Unknown", "Packaging")
    assert trainee.status()["attempts"] == 1


def test_a_killed_training_pod_is_resumed(api: Api, trainee: Trainee) -> None:
    """Deleted by hand: what it saved is taken up, although the pod is gone."""
    trainee.make().ends(Stage.PREPARE)
    pod = trainee.play.run(trainee.bound(Stage.TRAIN))
    api.delete("Pod", trainee.namespace, pod["metadata"]["name"])
    trainee.is_interrupted(pod)
    trainee.pod(Stage.TRAIN, 2)


def test_out_of_memory_is_tried_once_more_with_half_the_micro_batch(api: Api, trainee: Trainee) -> None:
    trainee.make(training={"maxSequenceLength": 64}).ends(Stage.PREPARE)  # of 512 tokens at a time: 8 rows
    trainee.play.finish(trainee.play.run(trainee.pod(Stage.TRAIN)), 137, reason="OOMKilled")
    second = trainee.pod(Stage.TRAIN, 2)
    name = next(volume["configMap"]["name"] for volume in second["spec"]["volumes"] if "configMap" in volume)
    config = api.get("ConfigMap", trainee.namespace, name)
    assert config is not None
    assert json.loads(config["data"]["config.json"])["training"]["microBatchSize"] == 4
    trainee.play.finish(trainee.play.run(second), 137, reason="OOMKilled")
    trainee.wait_for("False", "OutOfMemory")
    trainee.wait_for_phase("Failed")


def test_suspending_stops_the_pod_and_resuming_starts_another(trainee: Trainee) -> None:
    trainee.make(runPolicy={"maxRestarts": 0}).ends(Stage.PREPARE)
    pod = trainee.play.run(trainee.bound(Stage.TRAIN))
    trainee.edit(runPolicy={"suspend": True})
    trainee.wait_for("True", "Suspended", "Suspended")
    wait_for(lambda: trainee.play.pods(trainee.job(Stage.TRAIN)) == [], what="the pod to be asked to end")
    trainee.is_interrupted(pod)
    trainee.wait_for_phase("Suspended")
    trainee.edit(runPolicy={"suspend": False})
    trainee.wait_for("Unknown", "Training")
    started = lambda: [number for number in (1, 2) if trainee.play.pods(trainee.job(Stage.TRAIN, number))]  # noqa: E731
    number = wait_for(started, what="a pod after the resumption")[0]
    trainee.ends(Stage.TRAIN, number)
    trainee.wait_for("Unknown", "Packaging")


def test_children_go_after_their_time(api: Api, trainee: Trainee) -> None:
    trainee.make(runPolicy={"ttlSecondsAfterFinished": 0}).up_to(Stage.EVALUATE).ends(Stage.EVALUATE)
    trainee.wait_for("True", "Completed")
    wait_for(lambda: trainee.jobs() == [], what="the Jobs to go")
    uid = trainee.get()["metadata"]["uid"]
    wait_for(lambda: not api.owned("ConfigMap", trainee.namespace, uid) and not api.owned("NetworkPolicy", trainee.namespace, uid))


# --- progress ----------------------------------------------------------------


def test_progress_of_the_running_pod_is_shown(trainee: Trainee) -> None:
    trainee.make().ends(Stage.PREPARE)
    pod = trainee.pod(Stage.TRAIN)
    told = Progress(
        pod_uid=pod["metadata"]["uid"], stage=Stage.TRAIN, phase="Training", step=6, max_steps=12, percent=50, loss=1.25, checkpoint_step=5
    )

    class Trainer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = told.model_dump_json(by_alias=True).encode()
            self.send_response(200 if self.path == "/progress" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    address = "127.88.0.9"
    server = HTTPServer((address, 8080), Trainer)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        trainee.play.run(pod, address)
        shown = wait_for(lambda: trainee.status().get("progress"))
        assert (shown["display"], shown["loss"], shown["percent"]) == ("6/12", "1.25", 50)
        assert trainee.status()["checkpointStep"] == 5
    finally:
        server.shutdown()
        server.server_close()
