"""What is refused before training, and when it is looked at again."""

from __future__ import annotations

import pytest
from tests.unit.finetunejob.builders import BASE_DIGEST, World, evaluated, failed, make_job, make_spec, prepared

from tuneloop_operator.render.names import RETRY_ANNOTATION
from tuneloop_trainer.contract import Reason, Stage

NO_COLUMN = "Dataset pvc://datasets/tweets.jsonl has no column 'label'; it has text. Set data.train[0].columns."


def refused(reason: Reason = Reason.DATA_INVALID, message: str = NO_COLUMN) -> World:
    world = World()
    world.settle()
    world.ends(failed(Stage.PREPARE, 10, reason, message))
    world.settle()
    return world


@pytest.mark.parametrize("reason", [Reason.DATA_INVALID, Reason.DATA_EMPTY, Reason.MODEL_NOT_FOUND, Reason.ACCESS_DENIED])
def test_refused_input_stalls_the_job_and_starts_no_training(reason: Reason) -> None:
    world = refused(reason)
    assert world.condition("Stalled") == ("True", reason.value)
    assert world.condition("DataReady") == ("False", reason.value)
    assert world.condition("Succeeded") == ("False", reason.value)
    assert world.condition("Reconciling") is None
    assert world.job.status.phase == "Stalled"
    assert world.message() == NO_COLUMN
    assert world.job.status.finished_at is None
    assert [run.stage for run in world.runs.values()] == [Stage.PREPARE]


def test_refused_input_is_looked_at_again_every_five_minutes_and_stays_stalled_meanwhile() -> None:
    world = refused()
    decision = world.settle()
    assert decision.requeue_after == 300
    events = len(world.events)
    for number in range(2, 9):
        world.wait(300)
        world.settle()
        assert world.current().number == number
        assert world.job.status.phase == "Stalled"
        assert world.message() == NO_COLUMN
        world.ends(failed(Stage.PREPARE, 10, Reason.DATA_INVALID, NO_COLUMN))
        world.settle()
    assert len(world.events) == events
    assert [run.number for run in world.snapshot().of(Stage.PREPARE)] == [4, 5, 6, 7, 8]


def test_a_source_that_was_mended_goes_on_by_itself() -> None:
    world = refused()
    world.wait(300)
    world.settle()
    world.ends(prepared())
    world.settle()
    assert world.current().stage is Stage.TRAIN
    assert world.condition("Stalled") is None
    assert world.condition("DataReady") == ("True", "Completed")


def test_an_edited_spec_is_tried_at_once() -> None:
    world = refused()
    spec = make_spec(data={"train": [{"source": {"uri": "pvc://datasets/tweets.jsonl"}, "columns": {"label": "sentiment"}}]})
    world.edit(spec)
    world.settle()
    assert (world.current().stage, world.current().number) == (Stage.PREPARE, 2)
    assert world.condition("Stalled") is None
    assert world.job.status.phase == "Preparing"
    assert world.config(world.current())["train"][0]["columns"] == {"label": "sentiment"}


def test_the_retry_annotation_tries_again_at_once() -> None:
    world = refused()
    world.edit(annotations={RETRY_ANNOTATION: "now, please"})
    world.settle()
    assert world.current().number == 2
    assert world.job.status.phase == "Preparing"


def test_an_edit_while_prepare_runs_replaces_it() -> None:
    world = World()
    world.settle()
    world.edit(make_spec(training={"maxSteps": 5}))
    world.settle()
    assert list(world.runs) == ["tweets-prepare-2"]


def test_an_edit_of_the_run_policy_replaces_nothing() -> None:
    world = World()
    world.settle()
    world.edit(make_spec(runPolicy={"maxRestarts": 7}))
    world.settle()
    assert list(world.runs) == ["tweets-prepare-1"]


@pytest.mark.parametrize("code", [1, 137, None])
def test_whatever_else_prepare_fails_of_is_looked_at_again_at_the_same_pace(code: int | None) -> None:
    """A gateway that is away for a while must not end a retraining."""
    world = World(job=make_job(make_spec(runPolicy={"maxRestarts": 0})))
    world.settle()
    while world.job.status.phase != "Stalled":
        world.ends(None, code)
        world.settle()
    assert world.condition("Stalled") is not None
    made = len(world.made)
    world.wait(299)
    world.settle()
    assert len(world.made) == made
    world.wait(1)
    world.settle()
    assert world.job.status.phase == "Stalled"
    world.ends(prepared())
    world.settle()
    assert world.current().stage is Stage.TRAIN


def test_a_prepare_that_is_lost_again_and_again_is_not_restarted_for_ever() -> None:
    world = World()
    world.settle()
    for _ in range(3):
        world.ends(None, None)
        world.wait(300)
        world.settle()
        assert world.job.status.phase == "Preparing"
    world.ends(None, None)
    world.settle()
    assert world.condition("Stalled") == ("True", "RestartLimit")


def test_training_pins_what_prepare_found_and_the_spec_from_then_on() -> None:
    world = World().up_to(Stage.TRAIN)
    status = world.job.status
    assert status.started_at == "2026-03-01T12:00:00Z"
    assert status.resolved.base_digest == BASE_DIGEST
    assert status.data is not None
    assert (status.data.rows_kept, status.data.dropped) == (1100, {"Duplicate": 100})
    assert status.data.report_uri == "pvc://models/runs/x/prepare/card.json"
    assert status.data.warnings == ("The run has 12 steps only.",)
    assert (status.data.rows_per_second, status.data.peak_memory_bytes) == ("35120.0", 1 << 30)


def test_rows_of_elsewhere_are_refused_whatever_the_schema_let_through() -> None:
    world = World(job=make_job(make_spec(data={"train": [{"source": {"uri": "https://host/rows.csv"}}]})))
    world.settle()
    assert world.condition("Stalled") == ("True", "DataInvalid")
    assert world.message() == "Rows are read from pvc://, s3://, hf:// only, not from https://host/rows.csv."
    assert world.runs == {}


# --- jobs that were made again -----------------------------------------------


def trained_before(spec: dict[str, object] | None = None) -> World:
    """A job whose predecessor of the same name was deleted after it had made version 1."""
    before = World(job=make_job(spec, uid="11111111-0000")).up_to(Stage.EVALUATE)
    before.ends(evaluated())
    before.settle()
    return World(job=make_job(spec), versions=before.versions)


def test_a_job_made_again_from_the_same_inputs_trains_nothing() -> None:
    world = trained_before()
    world.settle()
    world.ends(prepared())
    world.settle()
    assert world.condition("Succeeded") == ("True", "AlreadyTrained")
    assert world.job.status.model_version == 1
    assert world.job.status.started_at is None
    assert [run.stage for run in world.runs.values()] == [Stage.PREPARE]


@pytest.mark.parametrize("change", [{"dataset_digests": {"pvc://datasets/tweets.jsonl": "0" * 64}}, {"base_digest": "sha256:" + "0" * 64}])
def test_a_job_made_again_on_other_data_or_another_base_trains(change: dict[str, object]) -> None:
    world = trained_before()
    world.settle()
    world.ends(prepared(**change))
    world.settle()
    assert world.current().stage is Stage.TRAIN


def test_a_job_made_again_with_other_settings_trains() -> None:
    world = trained_before()
    world.edit(make_spec(training={"seed": 1}))
    world.settle()
    world.ends(prepared())
    world.settle()
    assert world.current().stage is Stage.TRAIN


def test_who_runs_it_and_who_approves_it_makes_no_other_model() -> None:
    world = trained_before()
    world.edit(make_spec(approval="Manual", runPolicy={"maxRestarts": 9}, compute={"pod": {"nodeSelector": {"disk": "fast"}}}))
    world.settle()
    world.ends(prepared())
    world.settle()
    assert world.condition("Succeeded") == ("True", "AlreadyTrained")


def test_an_edit_after_already_trained_is_another_job() -> None:
    world = trained_before()
    world.settle()
    world.ends(prepared())
    world.settle()
    world.edit(make_spec(training={"seed": 1}))
    world.settle()
    assert world.job.status.finished_at is None
    world.ends(prepared())
    world.settle()
    assert world.current().stage is Stage.TRAIN
