"""From an alarm to a better model, on a real API server: gateway and training are played."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.gateways import FakeGateway
from tests.cluster.harness import Api, OperatorProcess, Play, wait_for
from tests.cluster.test_modeldeployment import NAME, Stage, deployment, digest, version

Object = dict[str, Any]
TEMPLATE = {"prompt": "Sentiment of: {{ text }}", "completion": "{{ label }}"}
LINEAGE: Object = {
    "baseModel": {"uri": "pvc://models/base"},
    "data": {"train": [{"source": {"uri": "pvc://datasets/tweets.jsonl"}, "template": TEMPLATE}]},
    "evaluation": {
        "suites": [
            {"name": "held-out", "type": "Dataset", "dataset": {"source": {"uri": "pvc://datasets/gate.jsonl"}, "template": TEMPLATE}}
        ],
        "gates": [{"suite": "held-out", "metric": "Accuracy", "rule": "Superior", "minItems": 300}],
    },
    "output": {"model": "sentiment", "store": {"uri": "pvc://models/store"}, "format": "Merged"},
}
SPEC: Object = {
    "monitoring": {"drift": {"size": 500}},
    "retraining": {"triggers": [{"type": "Drift"}], "minNewExamples": 200, "cooldownSeconds": 3600},
}
ALARM = {"status": "Alarm", "logEvidence": 14.2, "effect": 0.31, "pairs": 400, "detectedAt": "2026-01-01T00:10:00Z"}


@pytest.fixture
def gateway(api: Api, namespace: str) -> Iterator[FakeGateway]:
    with FakeGateway(api, namespace, NAME, f"127.88.{int(namespace[-2:], 16)}.{int(namespace[-4:-2], 16) or 1}") as served:
        yield served


@pytest.fixture
def stage(api: Api, namespace: str, play: Play, gateway: FakeGateway) -> Stage:
    return Stage(api, namespace, play, gateway)


def serve(stage: Stage, **spec: Any) -> None:
    lineage = {"fineTuneJob": "tune", "fineTuneJobUid": "1", "spec": LINEAGE, "configDigest": digest(7)}
    stage.api.create(version(stage.namespace, 1, lineage=lineage))
    stage.api.create(deployment(stage.namespace, **{**SPEC, **spec}))
    stage.start_engine(1)
    stage.start_gateway()
    stage.wait("Ready", "True", "Serving")


def alarm(stage: Stage) -> None:
    stage.gateway.drift = dict(ALARM)
    stage.wait("DriftDetected", "True", "DriftAlarm")


def label(stage: Stage, train: int = 250, gate: int = 320) -> None:
    stage.gateway.feedback = {"labelledTrain": train, "labelledGate": gate}


def epoch(stage: Stage) -> tuple[str, str] | None:
    config = stage.gateway.config()
    return (config.drift.epoch, config.drift.seed) if config and config.drift else None


def jobs(stage: Stage) -> list[Object]:
    return stage.api.list("FineTuneJob", stage.namespace)


def test_the_loop_closes(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    serve(stage)
    stage.wait("DriftDetected", "False", "NoDrift")
    alarm(stage)
    stage.wait("RetrainingNeeded", "True", "CollectingData")
    label(stage, gate=10)
    stage.wait("RetrainingNeeded", "True", "NeedsLabels")
    label(stage)
    stage.wait("RetrainingNeeded", "True", "Retraining")
    job = wait_for(lambda: jobs(stage), what="the retraining job")[0]
    name = job["metadata"]["name"]
    assert name == stage.status()["retraining"]["lastJob"]
    assert "ownerReferences" not in job["metadata"]
    assert job["spec"]["evaluation"]["baseline"] == {"type": "ModelVersion", "name": "sentiment-v1"}
    assert [source["weight"] for source in job["spec"]["data"]["train"]] == ["0.5", "0.5"]
    assert {gate["suite"]: gate["rule"] for gate in job["spec"]["evaluation"]["gates"]} == {"old": "NonInferior", "new": "Superior"}
    assert stage.status()["retraining"]["runsThisMonth"] == 1

    api.create(version(namespace, 2))  # as if trained by that job
    stage.start_engine(2)
    wait_for(lambda: stage.status()["stable"]["version"] == 2, what="version 2 to take over")
    wait_for(lambda: epoch(stage) == ("1", "SinceAlarm"), what="the detector to start afresh")
    stage.gateway.drift = {}
    stage.wait("DriftDetected", "False", "NoDrift")
    assert stage.status()["retraining"]["epoch"] == 1
    assert len(jobs(stage)) == 1


def test_live_inputs_unlike_those_of_the_training_are_told_and_retrain_nothing(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str
) -> None:
    lineage = {"fineTuneJob": "tune", "fineTuneJobUid": "1", "spec": LINEAGE, "configDigest": digest(7)}
    api.create(version(namespace, 1, lineage=lineage, referenceUri="pvc://models/runs/1/reference.json"))
    api.create(deployment(namespace, **SPEC))
    stage.start_engine(1)
    stage.start_gateway()
    label(stage)
    stage.wait("Ready", "True", "Serving")
    report = {
        "version": 1,
        "status": "Comparing",
        "logEvidence": 14.0,
        "logThreshold": 11.5,
        "effect": 0.3,
        "pairs": 350,
        "referenceRows": 1000,
    }
    stage.gateway.skew = report
    stage.wait("TrainingServingSkew", "Unknown", "Comparing")
    stage.gateway.skew = report | {"status": "Differ"}
    found = stage.wait("TrainingServingSkew", "True", "InputsDiffer")
    assert "Live inputs are unlike those that version 1 was trained on" in found["message"]
    wait_for(lambda: "InputsDiffer" in [e["reason"] for e in api.list("Event", namespace) if e["involvedObject"]["name"] == NAME])
    stage.wait("RetrainingNeeded", "False", "NotNeeded")
    assert not jobs(stage)


def test_manual_approval_makes_the_job_suspended(operator: OperatorProcess, stage: Stage) -> None:
    serve(stage, retraining={**SPEC["retraining"], "approval": "Manual"})
    label(stage)
    alarm(stage)
    job = wait_for(lambda: jobs(stage), what="the retraining job")[0]
    assert job["spec"]["runPolicy"]["suspend"] is True
    stage.wait("RetrainingNeeded", "True", "AwaitingApproval")


def test_an_operator_that_is_killed_makes_one_job(operator: OperatorProcess, start_operator: Start, stage: Stage) -> None:
    serve(stage)
    label(stage)
    stage.gateway.drift = dict(ALARM)
    wait_for(lambda: stage.status()["retraining"]["episode"] == 1, what="the episode")
    operator.kill()
    start_operator(identity="operator-b")
    wait_for(lambda: jobs(stage), what="the retraining job")
    stage.wait("RetrainingNeeded", "True", "Retraining")
    wait_for(lambda: stage.status()["retraining"].get("lastJobUid"), what="the job to be seen")
    assert len(jobs(stage)) == 1
    assert stage.status()["retraining"]["runsThisMonth"] == 1


def test_a_deleted_deployment_leaves_its_jobs(operator: OperatorProcess, stage: Stage, api: Api, namespace: str) -> None:
    serve(stage)
    label(stage)
    alarm(stage)
    wait_for(lambda: jobs(stage), what="the retraining job")
    api.delete("ModelDeployment", namespace, NAME)
    wait_for(lambda: not api.list("Deployment", namespace), what="the engine to go")
    assert len(jobs(stage)) == 1
