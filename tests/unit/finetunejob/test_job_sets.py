"""Training on several nodes where the API server has JobSets: rendered as one, read back, suspended and replaced as a Job is."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import World, make_job, make_spec
from tests.unit.finetunejob.test_elastic import finds_nodes_for
from tests.unit.finetunejob.test_nodes import env

from tuneloop_operator.api.kubernetes import job_of_set
from tuneloop_operator.domain.decision import Key
from tuneloop_operator.domain.finetunejob import StageRun
from tuneloop_operator.render import together
from tuneloop_trainer.contract import Stage

FAILED = {"type": "Failed", "status": "True", "message": "Container stage for pod team/x failed with exit code 13 matching FailJob rule"}


def world(nodes: int = 2, name: str = "tweets", **compute: Any) -> World:
    spec = make_spec(compute={"nodes": nodes, "acceleratorsPerNode": 0} | compute)
    return World(job=make_job(spec, name=name), has_job_sets=True).up_to(Stage.TRAIN)


def made(run: StageRun) -> dict[str, Any]:
    """The Job that JobSet's controller makes."""
    return together.job_spec(run.manifest)


def env_of(run: StageRun) -> dict[str, str]:
    job: dict[str, Any] = {"spec": made(run)}
    return {v["name"]: v.get("value", "") for v in job["spec"]["template"]["spec"]["containers"][0]["env"] if "TUNELOOP_" in v["name"]}


def test_training_on_several_nodes_is_a_job_set_of_one_indexed_job() -> None:
    found = world()
    run = found.current()
    assert (run.manifest["apiVersion"], run.manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = made(run)
    assert (job["completionMode"], job["completions"], job["backoffLimit"], run.nodes) == ("Indexed", 2, 0, 2)
    assert run.manifest["spec"]["failurePolicy"] == {"maxRestarts": 0}, "attempts are the operator's"
    assert run.manifest["spec"]["successPolicy"] == {"operator": "All"}, "nothing rests on a webhook's defaults"
    labels = run.manifest["spec"]["replicatedJobs"][0]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/managed-by"] == "tuneloop", "or its Job would not be watched"


def test_pods_of_a_job_set_find_the_first_in_the_service_that_its_controller_makes() -> None:
    found = world()
    run = found.current()
    assert env_of(run)["TUNELOOP_RENDEZVOUS"] == "tweets-train-1-node-0-0.tweets-train-1:29500"
    assert "subdomain" not in made(run)["template"]["spec"]
    assert not [place for place in found.others if place.startswith("Service/")]


def test_names_of_pods_of_a_job_set_are_no_longer_than_they_may_be() -> None:
    run = world(name="a" * 52).current()
    assert len(run.job.metadata.name + "-node-0-63-abcde") <= 63


def test_one_node_and_the_other_stages_need_no_job_set() -> None:
    data = make_spec()["data"] | {"workers": 2}
    spec = make_spec(compute={"nodes": 1, "acceleratorsPerNode": 0}, data=data)
    found = World(job=make_job(spec), has_job_sets=True).up_to(Stage.TRAIN)
    assert {run.manifest["kind"] for run in found.runs.values()} == {"Job"}
    assert env(found.current()) == {}


def test_job_set_is_suspended_and_goes_on() -> None:
    found = world()
    for suspend in (True, False):
        found.edit(make_spec(compute={"nodes": 2, "acceleratorsPerNode": 0}, runPolicy={"suspend": suspend}))
        found.settle()
        run = found.current()
        assert (run.manifest["kind"], run.manifest["spec"]["suspend"], run.number) == ("JobSet", suspend, 1)


def test_configuration_that_training_began_with_is_found_in_a_job_set() -> None:
    found = world()
    assert found.current().config_map == found.runs["tweets-prepare-1"].config_map
    assert found.snapshot().began_with is not None


def test_job_set_for_which_nobody_makes_a_job_says_so() -> None:
    found = world()
    assert found.job.status.phase == "Training"
    found.wait(30)
    found.settle()
    assert found.job.status.phase == "Pending"
    assert found.message() == "No Job was made for JobSet tweets-train-1. See that JobSet's controller runs, or what holds the JobSet back."
    found.replace_run(found.current(), made_uid="made")
    found.settle()
    assert found.job.status.phase == "Training"


def test_elastic_training_replaces_a_job_set() -> None:
    found = world(nodes=4, minNodes=2)
    old = found.current()
    finds_nodes_for(found, 0, 1)
    found.wait(60)
    decision = found.decide()
    assert [target.key for target in decision.delete] == [Key("JobSet", "team", old.job.metadata.name)]
    found.settle()
    assert (found.current().nodes, found.current().manifest["kind"]) == (2, "JobSet")


@pytest.mark.parametrize(
    ("own", "of_job", "is_complete", "is_failed"),
    [
        (None, None, False, False),
        ([], None, False, False),
        (None, [], False, False),
        ([], [FAILED], False, True),
        ([{"type": "Failed", "status": "True", "message": "jobset failed"}], [FAILED], False, True),
        ([{"type": "Completed", "status": "True"}], [], True, False),
        ([{"type": "StartupPolicyCompleted", "status": "True"}, {"type": "Suspended", "status": "True"}], None, False, False),
    ],
)
def test_job_set_has_ended_as_its_job_has_or_says_so_itself(own: Any, of_job: Any, is_complete: bool, is_failed: bool) -> None:
    metadata = {"name": "tweets-train-1", "namespace": "team", "uid": "set"}
    raw = {"metadata": metadata, "spec": {"suspend": True}} | ({} if own is None else {"status": {"conditions": own}})
    job = job_of_set(raw, {"metadata": {"name": "x", "uid": "job"}, "status": {"active": 1, "conditions": of_job}})
    assert (job.is_complete, job.is_failed, job.spec.suspend, job.metadata.uid) == (is_complete, is_failed, True, "set")
    if of_job:
        said = job.condition("Failed")
        assert said is not None
        assert said.message == FAILED["message"], "the exit code outlives the pod in it"
