"""Training on several nodes: what its pods are made of, and which of their endings counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.finetunejob.builders import SETTINGS, World, failed, make_job, make_pod, make_spec, trained

from tuneloop_operator.api.kubernetes import Pod
from tuneloop_operator.domain import times
from tuneloop_operator.domain.finetunejob import StageRun
from tuneloop_operator.domain.finetunejob.outcomes import Outcome, outcome, result, running_seconds
from tuneloop_operator.render import training
from tuneloop_trainer.contract import ExitCode, Reason, Stage, StageResult


def world(nodes: int = 2, devices: int = 0, name: str = "tweets") -> World:
    spec = make_spec(compute={"nodes": nodes, "acceleratorsPerNode": devices})
    return World(job=make_job(spec, name=name)).up_to(Stage.TRAIN)


def env(run: StageRun) -> dict[str, str]:
    container = run.manifest["spec"]["template"]["spec"]["containers"][0]
    return {variable["name"]: variable.get("value", "") for variable in container["env"] if variable["name"].startswith("TUNELOOP_")}


def numbered(run: StageRun, index: int, said: StageResult | None = None, **metadata: Any) -> Pod:
    """A pod of the run that ended with what it said, or runs."""
    now = times.to_text(World().now)
    if said is None:
        state: dict[str, Any] = {"running": {"startedAt": now}}
    else:
        ended = {"exitCode": said.exit_code, "message": said.model_dump_json(by_alias=True, exclude_none=True)}
        state = {"terminated": ended | {"startedAt": now, "finishedAt": now}}
    pod = make_pod(run.job, state)
    labels = {"batch.kubernetes.io/job-completion-index": str(index)}
    return pod.model_copy(update={"metadata": pod.metadata.model_copy(update={"labels": labels, "name": f"p-{index}"} | metadata)})


def ended(run: StageRun, *pods: Pod) -> StageRun:
    condition = {"type": "Failed", "status": "True", "message": "x", "lastTransitionTime": times.to_text(World().now)}
    status = run.job.status.model_validate({"conditions": [condition]})
    return replace(run, job=run.job.model_copy(update={"status": status}), pods=pods)


def test_training_on_two_nodes_is_an_indexed_job_whose_pods_find_the_first() -> None:
    found = world()
    run = found.current()
    spec = run.manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["template"]["spec"]["subdomain"] == "tweets-peers"
    assert env(run) == {
        "TUNELOOP_NODES": "2",
        "TUNELOOP_PROCESSES": "1",
        "TUNELOOP_RENDEZVOUS": "tweets-train-1-0.tweets-peers:29500",
    }
    service = found.others["Service/tweets-peers"]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["selector"].items() <= spec["template"]["metadata"]["labels"].items()


def test_other_stages_have_one_pod_and_know_no_peers() -> None:
    found = world()
    prepare = found.runs["tweets-prepare-1"]
    assert "completionMode" not in prepare.manifest["spec"]
    assert env(prepare) == {}


def test_several_devices_of_one_node_get_a_process_each() -> None:
    run = world(nodes=1, devices=4).current()
    assert "completionMode" not in run.manifest["spec"]
    assert env(run) == {"TUNELOOP_NODES": "1", "TUNELOOP_PROCESSES": "4", "TUNELOOP_RENDEZVOUS": "127.0.0.1:29500"}


def test_one_process_needs_nothing_of_all_this() -> None:
    found = world(nodes=1, devices=1)
    assert env(found.current()) == {}
    assert not [place for place in found.others if place.startswith("Service/")]


def test_only_the_training_itself_may_reach_its_pods_on_all_ports() -> None:
    policy = training.progress_policy(make_job(make_spec(compute={"nodes": 2, "acceleratorsPerNode": 0})), SETTINGS)
    operator, peers = policy["spec"]["ingress"]
    assert "ports" in operator
    assert peers == {"from": [{"podSelector": {"matchLabels": {"tuneloop.dev/finetunejob": "tweets", "tuneloop.dev/stage": "train"}}}]}
    assert len(training.progress_policy(make_job(), SETTINGS)["spec"]["ingress"]) == 1


def test_names_of_hosts_of_a_job_with_a_long_name_are_no_longer_than_they_may_be() -> None:
    run = world(name="a" * 52).current()
    assert len(run.job.metadata.name + "-63") <= 63


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (ExitCode.PEER_LOST, ExitCode.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY),
        (ExitCode.OUT_OF_MEMORY, ExitCode.PEER_LOST, Outcome.OUT_OF_MEMORY),
        (ExitCode.INTERRUPTED, ExitCode.INTERRUPTED, Outcome.INTERRUPTED),
        (ExitCode.INTERRUPTED, ExitCode.PEER_LOST, Outcome.INTERRUPTED),
        (ExitCode.PEER_LOST, ExitCode.BUG, Outcome.BUG),
        (ExitCode.DONE, ExitCode.UNAVAILABLE, Outcome.UNAVAILABLE),
        (ExitCode.PEER_LOST, ExitCode.PEER_LOST, Outcome.LOST),
    ],
)
def test_the_ending_that_is_the_cause_is_that_of_the_attempt(first: ExitCode, second: ExitCode, expected: Outcome) -> None:
    run = world().current()
    said = [failed(Stage.TRAIN, code, Reason.INTERNAL_ERROR, f"pod {index}") for index, code in enumerate((first, second))]
    run = ended(run, *(numbered(run, index, one) for index, one in enumerate(said)))
    assert outcome(run) is expected


def test_pod_that_was_killed_as_it_was_deleted_is_no_cause() -> None:
    run = world().current()
    killed = numbered(run, 1, failed(Stage.TRAIN, 137), deletion_timestamp="2026-03-01T12:00:00Z")
    run = ended(run, numbered(run, 0, failed(Stage.TRAIN, 75, Reason.PREEMPTED)), killed)
    assert outcome(run) is Outcome.INTERRUPTED


def test_result_is_that_of_the_first_where_all_are_done() -> None:
    found = world()
    run = found.current()
    others = trained().model_copy(update={"message": "second"})
    run = replace(run, pods=(numbered(run, 1, others), numbered(run, 0, trained())))
    said = result(run)
    assert said is not None
    assert said.message == ""


def test_progress_and_running_time_are_those_of_the_first_pod() -> None:
    found = world()
    run = found.current()
    run = replace(run, pods=(numbered(run, 0), numbered(run, 1)))
    found.wait(100)
    assert run.pod is not None
    assert run.pod.index == 0
    assert running_seconds(run, found.now) == 100


def test_attempt_of_which_a_pod_finds_no_node_waits() -> None:
    found = world()
    run = found.current()
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}
    second = make_pod(run.job, None, conditions=[condition])
    labels = {"batch.kubernetes.io/job-completion-index": "1"}
    second = second.model_copy(update={"metadata": second.metadata.model_copy(update={"labels": labels})})
    found.replace_run(run, pods=(numbered(run, 0), second))
    found.settle()
    assert found.job.status.phase == "Pending"
    assert "0/1 nodes are available" in found.message()


def test_out_of_memory_halves_the_share_of_one_process() -> None:
    spec = make_spec(compute={"nodes": 4, "acceleratorsPerNode": 0}, training={"globalBatchSize": 32, "maxSequenceLength": 64})
    found = World(job=make_job(spec)).up_to(Stage.TRAIN)
    found.ends(None, 11)
    found.settle()
    assert found.config(found.current())["training"]["microBatchSize"] == 4
