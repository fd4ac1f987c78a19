"""How attempts are counted, and what each exit code leads to."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import World, evaluated, failed, make_job, make_spec, packaged, trained

from tuneloop_trainer.contract import Progress, Reason, Stage, StageResult


def training(**run_policy: Any) -> World:
    return World(job=make_job(make_spec(runPolicy=run_policy))).up_to(Stage.TRAIN)


def polled(step: int, checkpoint: int | None = None) -> Progress:
    percent = 100 * step / 12
    return Progress(pod_uid="x", stage=Stage.TRAIN, phase="Training", step=step, max_steps=12, percent=percent, checkpoint_step=checkpoint)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "InternalError"), (10, "DataInvalid"), (12, "NonFiniteLoss"), (2, "InternalError"), (139, "InternalError")],
)
def test_what_another_attempt_would_not_change_ends_the_job(code: int, reason: str) -> None:
    world = training()
    world.ends(None, code)
    world.settle()
    assert world.condition("Succeeded") == ("False", reason)
    assert world.condition("Trained") == ("False", reason)
    assert world.condition("Stalled") == ("True", reason)
    assert world.condition("DataReady") == ("True", "Completed")
    assert world.job.status.phase == "Failed"
    assert world.job.status.attempts == 1


def test_a_failed_stages_own_reason_and_sentence_are_told() -> None:
    world = training()
    world.ends(failed(Stage.TRAIN, 10, Reason.MODEL_NOT_FOUND, "Model x has no lm_head."))
    world.settle()
    assert world.condition("Succeeded") == ("False", "ModelNotFound")
    assert world.message() == "Model x has no lm_head."


def test_loss_that_left_its_course_is_told_from_one_that_is_no_number() -> None:
    world = training()
    world.ends(failed(Stage.TRAIN, 12, Reason.LOSS_SPIKE, "Step 21: loss 9 is above 3 times 1."))
    world.settle()
    assert world.condition("Succeeded") == ("False", "LossSpike")
    assert world.message() == "Step 21: loss 9 is above 3 times 1."


@pytest.mark.parametrize("code", [11, 137])
def test_out_of_memory_is_tried_once_more_with_half_the_micro_batch(code: int) -> None:
    world = training()
    assert world.config(world.current())["training"].get("microBatchSize") is None
    world.ends(None, code)
    world.settle()
    assert world.current().number == 2
    assert world.config(world.current())["training"]["microBatchSize"] == 8
    world.ends(None, code)
    world.settle()
    assert world.condition("Succeeded") == ("False", "OutOfMemory")
    assert "compute.pod.resources" in world.message()


def test_half_a_micro_batch_is_half_of_what_the_trainer_would_have_taken() -> None:
    spec = make_spec(training={"globalBatchSize": 64, "maxSequenceLength": 4096}, compute={"acceleratorsPerNode": 1})
    world = World(job=make_job(spec)).up_to(Stage.TRAIN)
    world.ends(None, 11)
    world.settle()
    assert world.config(world.current())["training"]["microBatchSize"] == 2


def test_the_smaller_micro_batch_is_kept_by_later_attempts() -> None:
    world = training()
    for code in (11, 13):
        world.ends(None, code)
        world.wait(60)
        world.settle()
    assert world.current().number == 3
    assert world.config(world.current())["training"]["microBatchSize"] == 8


def test_a_killed_pod_that_was_being_deleted_did_not_run_out_of_memory() -> None:
    world = training()
    world.ends(None, 137)
    run = world.runs["tweets-train-1"]
    deleted = run.pods[0].model_copy(
        update={"metadata": run.pods[0].metadata.model_copy(update={"deletion_timestamp": "2026-03-01T12:00:00Z"})}
    )
    world.replace_run(run, pods=(deleted,))
    world.wait(60)
    world.settle()
    assert world.config(world.current())["training"].get("microBatchSize") is None


@pytest.mark.parametrize("code", [13, 143, None])
def test_a_stalled_or_lost_attempt_is_restarted_until_the_limit(code: int | None) -> None:
    world = training(maxRestarts=2)
    for _ in range(2):
        world.ends(None, code)
        world.wait(600)
        world.settle()
        assert world.job.status.phase == "Training"
    assert world.current().number == 3
    world.ends(None, code)
    world.settle()
    assert world.condition("Succeeded") == ("False", "StepStalled" if code == 13 else "RestartLimit")
    assert "maxRestarts is 2" in world.message()


def test_a_restart_waits_longer_each_time() -> None:
    world = training(maxRestarts=10)
    waits = []
    for _ in range(7):
        world.ends(None, 13)
        decision = world.settle()
        waits.append(decision.requeue_after)
        assert not [run for run in world.runs.values() if not run.job.is_finished]
        world.wait(decision.requeue_after or 0)
        world.settle()
    assert waits == [10, 20, 40, 80, 160, 300, 300]


def test_an_interruption_that_got_further_costs_no_restart() -> None:
    world = training(maxRestarts=0)
    for step in range(1, 12):
        world.pod_runs()
        world.progress = polled(step)
        world.wait(61)
        world.settle()
        world.progress = None
        world.ends(None, 75)
        world.settle()
    assert world.current().number == 12
    assert world.job.status.attempts == 12


def test_interruptions_without_headway_are_bounded() -> None:
    world = training(maxRestarts=2)
    for _ in range(3):
        world.ends(failed(Stage.TRAIN, 75, Reason.PREEMPTED, "Ended by SIGTERM."))
        world.wait(600)
        world.settle()
    assert world.condition("Succeeded") == ("False", "RestartLimit")
    assert world.job.status.attempts == 3


def test_a_step_that_was_saved_last_counts_as_headway() -> None:
    world = training(maxRestarts=0)
    saved = trained(step=4).model_copy(update={"exit_code": 75, "reason": Reason.PREEMPTED})
    world.ends(saved)
    world.settle()
    assert world.current().number == 2


def test_the_exit_code_outlives_the_pod_in_the_jobs_condition() -> None:
    world = training()
    world.ends(None, 12, keep_pod=False)
    world.settle()
    assert world.condition("Succeeded") == ("False", "NonFiniteLoss")


@pytest.mark.parametrize("stage", list(Stage))
def test_a_result_that_was_lost_with_its_pod_is_read_again_once(stage: Stage) -> None:
    world = World().up_to(stage)
    world.ends(None, 0, keep_pod=False)
    world.settle()
    again = world.current()
    assert (again.stage, again.number) == (stage, 2)
    limits = again.manifest["spec"]["template"]["spec"]["containers"][0]["resources"].get("limits", {})
    assert "nvidia.com/gpu" not in limits
    world.ends(None, 0, keep_pod=False)
    world.settle()
    assert world.condition("Succeeded") == ("False", "InternalError")


def test_a_settled_stage_is_not_run_again_when_its_pod_is_gone() -> None:
    world = World().up_to(Stage.EVALUATE)
    for name in ("tweets-prepare-1", "tweets-train-1", "tweets-package-1"):
        world.replace_run(world.runs[name], pods=())
    world.settle()
    assert world.current().stage is Stage.EVALUATE
    world.ends(evaluated())
    world.settle()
    assert world.versions["sentiment-v1"].spec.approval == "Approved"


def test_jobs_deleted_by_hand_are_made_again() -> None:
    world = World().up_to(Stage.TRAIN)
    del world.runs["tweets-train-1"]
    world.settle()
    assert world.current().stage is Stage.TRAIN
    world.ends(trained())
    world.settle()
    world.ends(packaged())
    world.settle()
    assert world.current().stage is Stage.EVALUATE


def stopped(step: int, code: int = 75, steps_lost: int = 0) -> StageResult:
    done = trained(step)
    assert done.train is not None
    summary = done.train.model_copy(update={"steps_lost": steps_lost})
    return done.model_copy(update={"exit_code": code, "reason": Reason.PREEMPTED, "train": summary})


def test_lost_steps_are_those_of_the_whole_run() -> None:
    world = training()
    world.ends(stopped(4, steps_lost=2))
    world.settle()
    assert world.job.status.steps_lost == 2
    world.pod_runs()
    world.progress = polled(6).model_copy(update={"steps_lost": 5})
    world.settle()
    assert world.job.status.steps_lost == 5, "while it runs, too"
    world.progress = None
    world.ends(trained())
    world.settle()
    assert world.job.status.steps_lost == 5, "an attempt that knows of fewer takes none back"


def test_where_an_interrupted_attempt_stopped_is_told() -> None:
    world = training()
    world.pod_runs()
    world.progress = polled(3, checkpoint=2)
    world.settle()
    world.progress = None
    world.ends(stopped(7))
    world.settle()
    status = world.job.status
    assert status.progress is not None
    assert (status.progress.display, status.progress.percent, status.checkpoint_step) == ("7/12", 58, 7)
    assert world.current().from_step == 7
    assert status.progress.loss == "0.5"


def test_an_attempt_that_lost_its_store_saved_nothing() -> None:
    world = training()
    world.ends(stopped(7, code=69).model_copy(update={"reason": Reason.STORE_UNAVAILABLE}))
    world.settle()
    assert world.job.status.checkpoint_step is None


def test_what_does_not_answer_is_tried_again_within_bounds_and_named() -> None:
    world = training(maxRestarts=2)
    for attempt in range(1, 4):
        assert world.current().number == attempt
        world.ends(failed(Stage.TRAIN, 69, Reason.STORE_UNAVAILABLE, "The store cannot be written."))
        world.settle()
        world.wait(600)
        world.settle()
    assert world.condition("Succeeded") == ("False", "StoreUnavailable")
    assert world.message().startswith("The store cannot be written. Stage train could not reach")


def test_a_hub_that_stays_down_stalls_the_job_until_it_answers() -> None:
    world = World()
    world.settle()
    for _ in range(4):
        world.ends(failed(Stage.PREPARE, 69, Reason.SOURCE_UNAVAILABLE, "The hub does not answer for hf://org/x."))
        world.settle()
        world.wait(90)
        world.settle()
    assert world.condition("Stalled") == ("True", "SourceUnavailable")
    assert world.job.status.phase == "Stalled"
    world.wait(300)
    world.settle()
    assert world.current().number == 5
