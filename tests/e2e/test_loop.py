"""What a user sees of the loop, from `kubectl apply` to the better model."""

from __future__ import annotations

import json

from dev.demo import story as tale
from dev.demo.kubectl import condition
from dev.demo.story import DEPLOYMENT, JOB, MODEL, Story


def test_a_job_trains_and_its_gate_approves_version_one(trained: Story) -> None:
    version = trained.space.get("modelversion", f"{MODEL}-v1")
    assert version is not None
    assert version["spec"]["approval"] == "Approved"
    assert version["spec"]["evaluation"]["artifactDigest"] == version["spec"]["artifact"]["manifestDigest"]
    assert version["spec"]["lineage"]["fineTuneJob"] == JOB
    assert condition(version, "Verified")["status"] == "True"


def test_kubectl_wait_sees_the_success_of_a_job(trained: Story) -> None:
    trained.space.kubectl("wait", "--for=condition=Succeeded", f"finetunejob/{JOB}", "--timeout=10s")


def test_a_finished_job_tells_its_steps_data_and_gate(trained: Story) -> None:
    status = trained.figures["first"]
    assert status["progress"]["step"] == status["progress"]["maxSteps"] == trained.scale.first_steps
    assert status["data"]["rowsKept"] > 0
    assert status["evaluation"]["gates"][0]["verdict"] == "Pass"


def test_the_deployment_serves_the_version_that_it_names(serving: Story) -> None:
    found = serving.space.get("modeldeployment", DEPLOYMENT)
    assert found is not None
    assert found["status"]["stable"]["version"] == 1
    assert found["status"]["stable"]["startup"]["loadSeconds"] > 0
    serving.space.kubectl("wait", "--for=condition=Ready", f"modeldeployment/{DEPLOYMENT}", "--timeout=10s")


def test_traffic_of_the_training_domain_raises_no_alarm(watched: Story) -> None:
    assert watched.figures["tweets accuracy"] > 0.8


def test_a_new_domain_raises_the_alarm(drifted: Story) -> None:
    detected = drifted.figures["detected at"]
    assert float(detected["logEvidence"]) >= float(detected["logThreshold"])


def test_the_retraining_is_gated_on_the_old_and_on_the_new_domain(retrained: Story) -> None:
    gates = {(gate["suite"], gate["rule"]): gate["verdict"] for gate in retrained.figures["retraining"]["evaluation"]["gates"]}
    assert sorted(rule for _, rule in gates) == ["NonInferior", "Superior"]
    assert set(gates.values()) == {"Pass"}


def test_the_better_model_rolls_out_without_a_failed_request(closed: Story) -> None:
    assert closed.figures["roll-out"].failed == 0
    assert closed.figures["roll-out"].asked > 0
    assert closed.figures["new domain after"].accuracy > closed.figures["new domain before"].accuracy


def test_no_secret_stands_in_any_object_or_log(closed: Story) -> None:
    secret = json.loads(closed.space.kubectl("get", "secret", f"{DEPLOYMENT}-keys", "-o", "json"))
    values = [tale.decode(value) for value in secret["data"].values()]
    said = closed.space.kubectl("get", "ftj,mv,mdep,cm,pods,deploy,jobs,events,controllerrevisions", "-o", "json")
    said += tale.run("kubectl", "-n", tale.SYSTEM, "logs", tale.OPERATOR, "--tail=-1")
    said += closed.space.kubectl("logs", "-l", "app.kubernetes.io/managed-by=tuneloop", "--tail=-1", "--all-containers", "--ignore-errors")
    assert not [value for value in values if value in said]
