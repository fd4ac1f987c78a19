"""Rows that several pods prepare: their Job, which of their endings counts, and what an edit of their number changes."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import World, failed, make_job, make_spec, prepared
from tests.unit.finetunejob.test_nodes import ended, env, numbered

from tuneloop_operator.api.finetunejob import FineTuneJobSpec
from tuneloop_operator.domain.finetunejob.outcomes import Outcome, outcome
from tuneloop_operator.domain.finetunejob.resolve import config_digest
from tuneloop_trainer.contract import ExitCode, Reason, Stage, StageResult

PART = StageResult(stage=Stage.PREPARE, exit_code=0, message="Part 2 is made.")


def spec_with(workers: int | None, **changes: Any) -> dict[str, Any]:
    spec = make_spec(**changes)
    return spec if workers is None else spec | {"data": spec["data"] | {"workers": workers}}


def world(workers: int | None = 3, **changes: Any) -> World:
    found = World(job=make_job(spec_with(workers, **changes)))
    found.settle()
    return found


def test_several_workers_are_an_indexed_job_whose_pods_know_how_many_they_are() -> None:
    found = world()
    run = found.current()
    spec = run.manifest["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert env(run) == {"TUNELOOP_NODES": "3"}
    assert "subdomain" not in spec["template"]["spec"]
    assert not [place for place in found.others if place.startswith("Service/")]
    found.ends(prepared())
    found.settle()
    assert "completionMode" not in found.current().manifest["spec"], "training is not shared by that"


def test_one_worker_is_what_there_was_before() -> None:
    silent, one = world(None).current(), world(1).current()
    assert silent.manifest == one.manifest
    assert silent.manifest["spec"]["completions"] == 1
    assert "completionMode" not in silent.manifest["spec"]


def test_result_is_that_of_the_pod_that_joined_the_parts() -> None:
    found = world()
    run = found.current()
    found.ends(prepared())
    done = found.runs[run.job.metadata.name]
    found.replace_run(done, pods=(numbered(run, 2, PART), numbered(run, 1, PART), numbered(run, 0, prepared())))
    found.settle()
    assert found.current().stage is Stage.TRAIN
    assert found.job.status.data is not None


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (ExitCode.INVALID, Reason.DATA_INVALID, "DataInvalid"),
        (ExitCode.INVALID, Reason.DATA_EMPTY, "DataEmpty"),
        (ExitCode.INVALID, Reason.ACCESS_DENIED, "AccessDenied"),
    ],
)
def test_what_one_pod_refuses_stalls_the_job_with_its_reason(code: ExitCode, reason: Reason, expected: str) -> None:
    found = world()
    run = found.current()
    others = [failed(Stage.PREPARE, ExitCode.INTERRUPTED, Reason.PREEMPTED, "Ended by SIGTERM."), PART]
    pods = [numbered(run, 0, others[0]), numbered(run, 1, others[1]), numbered(run, 2, failed(Stage.PREPARE, code, reason, "row 7 is bad"))]
    found.runs[run.job.metadata.name] = ended(run, *pods)
    found.settle()
    assert found.condition("Stalled") == ("True", expected)
    assert found.message() == "row 7 is bad"


@pytest.mark.parametrize(("code", "expected"), [(69, Outcome.UNAVAILABLE), (137, Outcome.OUT_OF_MEMORY), (143, Outcome.LOST)])
def test_what_befell_one_pod_is_tried_again_by_all(code: int, expected: Outcome) -> None:
    found = world()
    run = found.current()
    run = ended(run, numbered(run, 0, failed(Stage.PREPARE, 75, Reason.PREEMPTED)), numbered(run, 1, failed(Stage.PREPARE, code)))
    if expected is not Outcome.LOST:
        assert outcome(run) is expected
    found.runs[run.job.metadata.name] = run
    found.settle()
    found.wait(60)
    found.settle()
    again = found.current()
    assert (again.number, again.manifest["spec"]["completions"]) == (2, 3)


def test_progress_says_how_many_pods_are_done() -> None:
    found = world()
    run = found.current()
    status = run.job.status.model_copy(update={"active": 1, "succeeded": 2})
    found.replace_run(run, job=run.job.model_copy(update={"status": status}), pods=(numbered(run, 0),))
    found.settle()
    assert found.message() == "Data and base model are being read. 2 of 3 pods are done."


def test_a_pod_that_finds_no_node_is_told() -> None:
    found = world()
    run = found.current()
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}
    waiting = numbered(run, 1).model_copy(update={"status": numbered(run, 1).status.model_validate({"conditions": [condition]})})
    found.replace_run(run, pods=(numbered(run, 0), waiting))
    found.settle()
    assert found.job.status.phase == "Pending"
    assert "0/1 nodes are available" in found.message()


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.TRAIN])
def test_a_pod_that_does_not_start_while_the_first_waits_for_it_is_told(stage: Stage) -> None:
    found = world(compute={"nodes": 3, "acceleratorsPerNode": 0}).up_to(stage)
    run = found.current()
    state = {"name": "stage", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    waiting = numbered(run, 1).model_copy(update={"status": numbered(run, 1).status.model_validate({"containerStatuses": [state]})})
    found.replace_run(run, pods=(numbered(run, 0), waiting, numbered(run, 2)))
    found.settle()
    assert found.condition("Succeeded") == ("Unknown", "ImagePullFailed")
    assert "no such image" in found.message()
    evicted = waiting.model_copy(update={"status": waiting.status.model_copy(update={"phase": "Failed"})})
    found.replace_run(run, pods=(evicted, numbered(run, 0), numbered(run, 1), numbered(run, 2)))
    found.settle()
    assert "no such image" not in found.message()


def test_suspension_stops_all_of_them_and_goes_on_with_as_many() -> None:
    found = world()
    found.edit(spec_with(3, runPolicy={"suspend": True}))
    found.settle()
    assert found.job.status.phase == "Suspended"
    assert found.current().job.spec.suspend
    found.edit(spec_with(3))
    found.settle()
    run = found.current()
    assert (run.number, run.job.spec.suspend, run.nodes) == (1, False, 3)


def test_an_edited_number_of_workers_replaces_the_pods_and_nothing_that_was_resolved() -> None:
    found = world()
    digest = found.job.status.resolved.config_digest
    found.edit(spec_with(2))
    found.settle()
    assert list(found.runs) == ["tweets-prepare-2"]
    assert found.current().manifest["spec"]["completions"] == 2
    assert found.job.status.resolved.config_digest == digest
    assert digest == config_digest(FineTuneJobSpec.model_validate(make_spec()))


def test_a_result_that_was_lost_is_read_again_by_one_pod() -> None:
    found = world()
    found.ends(prepared(), keep_pod=False)
    run = found.runs["tweets-prepare-1"]
    found.replace_run(run, job=run.job.model_copy(update={"status": run.job.status.model_validate(COMPLETE)}))
    found.settle()
    assert found.current().manifest["spec"]["completions"] == 1


COMPLETE = {"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": "2026-03-01T12:00:00Z"}]}


def test_children_go_when_their_time_is_over() -> None:
    found = world(3, runPolicy={"ttlSecondsAfterFinished": 60, "maxRestarts": 0, "suspend": False}).up_to(Stage.TRAIN)
    found.ends(failed(Stage.TRAIN, ExitCode.INVALID, Reason.DATA_INVALID, "x"))
    found.settle()
    found.wait(61)
    found.settle()
    assert (found.runs, found.others) == ({}, {})
