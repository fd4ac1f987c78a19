"""Suspension, the deadline, clean-up, deletion."""

from __future__ import annotations

import pytest
from tests.unit.finetunejob.builders import World, evaluated, failed, make_job, make_spec, trained

from tuneloop_operator.api.conditions import JobCondition
from tuneloop_trainer.contract import Progress, Reason, Stage


def suspended(value: bool = True) -> dict[str, object]:
    return make_spec(runPolicy={"suspend": value})


def test_a_job_made_suspended_takes_nothing_until_it_is_released() -> None:
    world = World(job=make_job(suspended()))
    world.settle()
    assert world.runs == {}
    assert world.condition("Suspended") == ("True", "Suspended")
    assert world.condition("Reconciling") == ("True", "Suspended")
    assert world.job.status.phase == "Suspended"
    world.edit(suspended(False))
    world.settle()
    assert world.current().stage is Stage.PREPARE
    assert world.condition("Suspended") is None


@pytest.mark.parametrize("stage", list(Stage))
def test_suspension_suspends_the_running_job_and_resuming_resumes_it(stage: Stage) -> None:
    world = World().up_to(stage)
    world.pod_runs()
    template = world.current().manifest["spec"]["template"]
    world.edit(suspended())
    world.settle()
    assert world.current().job.spec.suspend
    assert world.job.status.phase == "Suspended"
    world.edit(suspended(False))
    world.settle()
    assert not world.current().job.spec.suspend
    assert world.current().manifest["spec"]["template"] == template
    assert world.current().number == 1


def test_an_attempt_that_ended_because_it_was_suspended_is_no_failure() -> None:
    world = World(job=make_job(make_spec(runPolicy={"maxRestarts": 0}))).up_to(Stage.TRAIN)
    world.edit(make_spec(runPolicy={"maxRestarts": 0, "suspend": True}))
    world.settle()
    world.ends(failed(Stage.TRAIN, 75, Reason.PREEMPTED, "Saved."))
    world.settle()
    assert world.job.status.phase == "Suspended"
    assert world.condition("Trained") == ("Unknown", "Suspended")
    world.edit(make_spec(runPolicy={"maxRestarts": 0}))
    world.settle()
    assert world.current().number == 2
    assert world.job.status.phase == "Training"


def test_the_deadline_counts_running_time_and_not_queueing() -> None:
    spec = make_spec(runPolicy={"activeDeadlineSeconds": 600})
    world = World(job=make_job(spec)).up_to(Stage.TRAIN)
    world.pod_is(None)
    world.wait(3600)
    world.settle()
    assert world.job.status.phase == "Training"
    world.pod_runs()
    world.wait(300)
    world.settle()
    assert world.job.status.running_seconds == 300
    world.wait(300)
    world.settle()
    assert world.condition("Succeeded") == ("False", "DeadlineExceeded")
    assert "activeDeadlineSeconds is 600" in world.message()
    assert world.current().job.spec.suspend


def test_running_time_is_summed_over_attempts_and_never_falls() -> None:
    world = World().up_to(Stage.TRAIN)
    begun = world.now
    world.wait(130)
    world.ends(None, 13, started=begun)
    world.wait(60)
    world.settle()
    assert world.job.status.running_seconds == 130
    world.pod_runs()
    world.wait(125)
    world.settle()
    assert world.job.status.running_seconds == 240
    world.replace_run(world.runs["tweets-train-1"], pods=())
    world.settle()
    assert world.job.status.running_seconds == 240


def test_evaluation_is_not_bound_by_the_deadline() -> None:
    world = World(job=make_job(make_spec(runPolicy={"activeDeadlineSeconds": 60}))).up_to(Stage.TRAIN)
    begun = world.now
    world.wait(3600)
    world.ends(trained(), started=begun)
    world.settle()
    assert world.current().stage is Stage.PACKAGE


def test_children_go_when_their_time_is_over() -> None:
    world = World(job=make_job(make_spec(runPolicy={"ttlSecondsAfterFinished": 100}))).up_to(Stage.EVALUATE)
    world.ends(evaluated())
    decision = world.settle()
    assert decision.requeue_after == 100
    world.wait(100)
    world.settle()
    assert world.runs == {}
    assert world.others == {}
    assert world.job.status.phase == "Succeeded"
    assert list(world.versions) == ["sentiment-v1"]


def test_without_a_ttl_the_children_stay() -> None:
    world = World().up_to(Stage.EVALUATE)
    world.ends(evaluated())
    world.settle()
    world.wait(10**6)
    world.settle()
    assert len(world.runs) == 4


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    world = World(job=make_job(deletionTimestamp="2026-03-01T12:00:00Z"))
    decision = world.step()
    assert (decision.apply, decision.create, decision.delete, decision.events) == ((), (), (), ())


def test_progress_is_written_at_a_percent_or_a_minute() -> None:
    world = World().up_to(Stage.TRAIN)
    world.pod_runs()
    writes = []
    for step in (0, 1, 2, 9, 10, 11):
        world.progress = Progress(
            pod_uid="x", stage=Stage.TRAIN, phase="Training", step=step, max_steps=1000, percent=step / 10, loss=2.0, remaining_seconds=100
        )
        world.wait(5)
        before = world.writes
        world.step()
        writes.append(world.writes - before)
    assert writes == [1, 0, 0, 0, 1, 0]
    progress = world.job.status.progress
    assert progress is not None
    assert (progress.display, progress.loss, progress.percent) == ("10/1000", "2", 1)
    world.wait(70)
    world.step()
    assert world.job.status.progress is not None
    assert world.job.status.progress.display == "11/1000"


def test_progress_of_a_fast_training_is_written_every_ten_seconds_at_most() -> None:
    world = World().up_to(Stage.TRAIN)
    world.pod_runs()
    writes = []
    for step in range(6):
        world.progress = Progress(pod_uid="x", stage=Stage.TRAIN, phase="Training", step=step, max_steps=100, percent=step)
        world.wait(4)
        before = world.writes
        world.step()
        writes.append(world.writes - before)
    assert writes == [1, 0, 0, 1, 0, 0]


def test_progress_has_what_the_last_step_was_like() -> None:
    world = World().up_to(Stage.TRAIN)
    world.pod_runs()
    last = {"learning_rate": 1.5e-4, "gradient_norm": 0.731, "utilisation": 38.21, "peak_memory_bytes": 2**31, "first_step_seconds": 14.2}
    world.progress = Progress(pod_uid="x", stage=Stage.TRAIN, phase="Training", step=7, max_steps=100, percent=7, **last)
    world.step()
    told = world.job.status.progress
    assert told is not None
    assert (told.learning_rate, told.gradient_norm, told.utilisation) == ("0.00015", "0.731", "38.21")
    assert (told.memory_bytes, told.first_step_seconds) == (2**31, "14.2")


def test_a_condition_keeps_its_time_until_it_turns() -> None:
    world = World()
    world.settle()
    first = {c.type: c.last_transition_time for c in world.job.status.conditions}
    world.wait(60)
    world.up_to(Stage.TRAIN)
    later = {c.type: c.last_transition_time for c in world.job.status.conditions}
    assert later["Succeeded"] == first["Succeeded"]
    assert later["Trained"] == first["Trained"]
    assert later[JobCondition.DATA_READY.value] > first[JobCondition.DATA_READY.value]
