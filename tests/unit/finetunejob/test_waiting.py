"""Why a stage does not run: each cause has its reason, and a sentence that says what to do."""

from __future__ import annotations

import pytest
from tests.unit.finetunejob.builders import SETTINGS, World

from tuneloop_operator.domain.decision import Key, Refusal
from tuneloop_trainer.contract import Stage


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"])
def test_an_image_that_cannot_be_pulled_is_named(reason: str) -> None:
    world = World()
    world.settle()
    world.pod_is({"waiting": {"reason": reason, "message": f"failed to pull {SETTINGS.trainer_image}: not found"}})
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "ImagePullFailed")
    assert world.condition("Reconciling") == ("True", "ImagePullFailed")
    assert SETTINGS.trainer_image in world.message()
    assert world.events[-1].type == "Warning"


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ('secret "hf-token" not found', "Secret hf-token does not exist in this namespace."),
        ("couldn't find key token in Secret team/hf-token", "Secret hf-token has no key token."),
    ],
)
def test_a_missing_secret_is_named(message: str, sentence: str) -> None:
    world = World()
    world.settle()
    world.pod_is({"waiting": {"reason": "CreateContainerConfigError", "message": message}})
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "SecretNotFound")
    assert world.message().startswith(sentence)
    world.pod_runs()
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "Preparing")


def test_a_missing_secret_of_a_volume_is_told_by_events() -> None:
    world = World()
    world.settle()
    world.pod_is({"waiting": {"reason": "ContainerCreating", "message": ""}})
    world.warn("FailedMount", 'MountVolume.SetUp failed for volume "feedback-x" : secret "tweets-keys" not found')
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "SecretNotFound")
    assert "tweets-keys" in world.message()


def test_an_unschedulable_pod_is_told_with_the_schedulers_words() -> None:
    world = World().up_to(Stage.TRAIN)
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: Insufficient nvidia.com/gpu."}
    world.pod_is(None, conditions=[condition])
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "Unschedulable")
    assert world.condition("Trained") == ("Unknown", "Unschedulable")
    assert world.job.status.phase == "Pending"
    assert "Insufficient nvidia.com/gpu" in world.message()


def test_a_claim_that_vanished_is_told_apart_from_a_lack_of_nodes() -> None:
    world = World()
    world.settle()
    text = '0/1 nodes are available: persistentvolumeclaim "datasets" not found.'
    world.pod_is(None, conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}])
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "ClaimNotFound")


def test_a_claim_of_another_node_is_told_with_the_remedy() -> None:
    world = World()
    world.settle()
    text = "0/2 nodes are available: 2 node(s) had volume node affinity conflict."
    world.pod_is(None, conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}])
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "VolumeNotShared")
    assert "ReadWriteMany" in world.message()
    world.pod_is({"waiting": {"reason": "ContainerCreating", "message": ""}})
    world.warn("FailedAttachVolume", 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other')
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "VolumeNotShared")


def test_a_used_up_quota_is_told_from_the_jobs_events() -> None:
    world = World()
    world.settle()
    world.warn("FailedCreate", 'Error creating: pods "x" is forbidden: exceeded quota: compute, requested: requests.nvidia.com/gpu=1')
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "QuotaExceeded")
    assert "Free or raise the quota" in world.message()


def test_any_other_refusal_of_the_pod_is_quoted() -> None:
    world = World()
    world.settle()
    world.warn("FailedCreate", 'Error creating: pods "x" is forbidden: no PriorityClass with name high was found')
    world.settle()
    assert world.condition("Succeeded") == ("Unknown", "Pending")
    assert "PriorityClass" in world.message()


def test_a_missing_claim_is_named_before_any_pod_is_made() -> None:
    world = World(missing_claims=("datasets", "models"))
    decision = world.settle()
    assert world.runs == {}
    assert world.condition("Succeeded") == ("Unknown", "ClaimNotFound")
    assert "datasets, models" in world.message()
    assert decision.requeue_after == 15
    world.missing_claims = ()
    world.settle()
    assert world.current().stage is Stage.PREPARE


def test_a_quoted_message_is_bounded_and_on_one_line() -> None:
    world = World()
    world.settle()
    world.pod_is({"waiting": {"reason": "ErrImagePull", "message": "x\n" * 5000}})
    world.settle()
    assert len(world.message()) < 700
    assert "\n" not in world.message()


def test_a_pending_pod_is_looked_at_less_and_less_often() -> None:
    world = World()
    world.settle()
    waits = []
    for seconds in (4, 60, 3600):
        world.wait(seconds)
        waits.append(world.step().requeue_after)
    assert waits == [5, 32, 300]


def test_a_pod_without_a_node_is_waited_for_and_one_that_its_node_does_not_start_is_looked_at() -> None:
    world = World()
    world.settle()
    world.pod_is()
    assert world.step().requeue_after == 300
    run = world.current()
    placed = run.pods[0].model_copy(update={"spec": run.pods[0].spec.model_copy(update={"node_name": "node-1"})})
    world.replace_run(run, pods=(placed,))
    assert world.step().requeue_after == 5


def test_a_name_that_somebody_else_has_taken_stalls_the_job_and_overwrites_nothing() -> None:
    world = World(conflicts=(Key("Job", "team", "tweets-prepare-1"),))
    world.settle()
    assert world.condition("Stalled") == ("True", "NameConflict")
    assert "Job tweets-prepare-1" in world.message()
    assert world.runs == {}
    world.conflicts = ()
    world.settle()
    assert world.current().stage is Stage.PREPARE
    assert world.condition("Stalled") is None


REFUSAL = 'Job.batch "tweets-prepare-1" is invalid: spec.template.labels: Invalid value: "a b": a valid label must be alphanumeric'


def test_what_the_api_server_refuses_stalls_the_job_with_its_words_and_is_tried_again() -> None:
    world = World(refusals=(Refusal(Key("Job", "team", "tweets-prepare-1"), REFUSAL, 1),))
    decision = world.decide()
    world.write_status(decision)
    assert world.condition("Stalled") == ("True", "Refused")
    assert world.message() == f"The API server refuses Job tweets-prepare-1: {REFUSAL}. Correct the spec, or what refuses it."
    assert "tweets-prepare-1" in [manifest["metadata"]["name"] for manifest in decision.apply]
    assert world.decide().status == decision.status
    world.refusals = ()
    world.settle()
    assert world.condition("Stalled") is None
    assert world.current().stage is Stage.PREPARE


def test_a_refusal_of_what_is_wanted_no_longer_keeps_nothing() -> None:
    world = World(refusals=(Refusal(Key("Job", "team", "another"), REFUSAL, 1),))
    world.settle()
    assert world.condition("Stalled") is None


def test_a_refusal_is_quoted_to_a_bounded_length() -> None:
    world = World(refusals=(Refusal(Key("Job", "team", "tweets-prepare-1"), "x\n" * 2000, 1),))
    world.write_status(world.decide())
    assert len(world.message()) < 800
    assert "\n" not in world.message()
