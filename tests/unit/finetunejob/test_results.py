"""What pods say is not believed before it is checked."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.finetunejob.builders import RESULTS, World, evaluated, packaged, prepared, trained

from tuneloop_operator.domain.finetunejob.results import parse_progress, parse_result
from tuneloop_trainer.contract import PROGRESS_LIMIT, RESULT_LIMIT, Progress, Stage, StageResult


def text(result: StageResult) -> str:
    return result.model_dump_json(by_alias=True, exclude_none=True)


@pytest.mark.parametrize("result", [prepared(), trained(), packaged(), evaluated()])
def test_what_a_stage_says_is_understood(result: StageResult) -> None:
    assert len(text(result)) <= RESULT_LIMIT
    assert parse_result(text(result), result.stage, 0) == result


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("", "nothing"),
        ("Traceback (most recent call last):", "no JSON"),
        ("null", "no object"),
        (text(trained()), "of another stage"),
        (text(packaged()).replace('"exitCode":0', '"exitCode":10'), "of another exit"),
        (text(packaged()).replace("sha256:", "sha1:"), "no digest"),
        (text(packaged()).replace('"sizeBytes":1000', '"sizeBytes":1' + "0" * 30), "a size that no disk has"),
        (text(packaged()).replace('"version":1', '"version":2'), "of another contract"),
        (text(packaged()).replace('"stage":"package"', '"stage":"package","extra":1'), "with a field that nobody knows"),
        (text(StageResult(stage=Stage.PACKAGE, exit_code=0)), "done without a summary"),
        (text(packaged()) + " " * 5000, "too long"),
    ],
)
def test_what_cannot_be_is_no_result(message: str, why: str) -> None:
    assert parse_result(message, Stage.PACKAGE, 0) is None, why


def test_numbers_that_are_none_are_no_result() -> None:
    message = json.loads(text(evaluated()))
    message["evaluate"]["gates"][0]["difference"] = float("nan")
    assert parse_result(json.dumps(message), Stage.EVALUATE, 0) is None


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_no_message_raises(message: str) -> None:
    assert parse_result(message, Stage.TRAIN, 0) is None


def progress(**changes: object) -> bytes:
    fields: dict[str, object] = {"podUid": "a", "stage": "train", "phase": "Training", "step": 3, "maxSteps": 12}
    return json.dumps(fields | changes).encode()


def test_progress_of_the_asked_pod_is_understood() -> None:
    found = parse_progress(progress(), Stage.TRAIN, "a")
    assert found == Progress(pod_uid="a", stage=Stage.TRAIN, phase="Training", step=3, max_steps=12)


@pytest.mark.parametrize(
    "content",
    [
        progress(podUid="b"),
        progress(stage="evaluate"),
        progress(step=10**30),
        progress(phase="x" * 65),
        b"[]",
        b"\xff",
        b" " * (PROGRESS_LIMIT + 1),
    ],
)
def test_progress_of_another_pod_or_of_none_is_not_believed(content: bytes) -> None:
    assert parse_progress(content, Stage.TRAIN, "a") is None


def test_the_artifacts_place_is_where_it_was_told_to_go_whatever_the_pod_says() -> None:
    world = World().up_to(Stage.EVALUATE)
    artifact = world.job.status.artifact
    assert artifact is not None
    assert artifact.uri.startswith("pvc://models/models/sentiment/tweets-")


def test_the_times_of_the_stages_are_kept_once_their_pods_are_gone() -> None:
    world = World()
    for stage in Stage:
        world.settle()
        world.pod_runs()
        world.ends(RESULTS[stage]().model_copy(update={"phase_seconds": {"Starting": 1.25, stage.value: 60.0}}))
    world.settle()
    told = world.job.status.times
    assert [times.stage for times in told] == ["prepare", "train", "package", "evaluate"]
    assert (told[1].seconds, told[1].phases) == ("61.25", {"Starting": "1.25", "train": "60"})


def test_the_report_lies_beside_the_results() -> None:
    world = World().up_to(Stage.EVALUATE)
    result = evaluated()
    assert result.evaluate is not None
    uri = "/volumes/models/runs/x/evaluate/results.json"
    world.ends(result.model_copy(update={"uri": uri, "evaluate": result.evaluate.model_copy(update={"page": "report.html"})}))
    world.settle()
    assert world.job.status.report_uri == "pvc://models/runs/x/evaluate/report.html"


def test_a_trainer_without_a_report_has_none() -> None:
    world = World().up_to(Stage.EVALUATE)
    world.ends(evaluated().model_copy(update={"uri": "/volumes/models/runs/x/evaluate/results.json"}))
    world.settle()
    assert world.job.status.report_uri is None


@pytest.mark.parametrize("path", ["/etc/passwd", "/volumes/other/probes.json", "/volumes/models/runs/tweets-0f0e0d0c/../../x"])
def test_probes_outside_of_the_run_are_not_believed(path: str) -> None:
    world = World().up_to(Stage.EVALUATE)
    result = evaluated()
    assert result.evaluate is not None
    world.ends(result.model_copy(update={"uri": path, "evaluate": result.evaluate.model_copy(update={"probes": path})}))
    world.settle()
    assert world.versions["sentiment-v1"].spec.probes_uri is None
    assert world.versions["sentiment-v1"].spec.reference_uri is None


def test_a_sample_of_training_inputs_is_recorded_where_there_is_one() -> None:
    world = World().up_to(Stage.EVALUATE)
    result = evaluated()
    assert result.evaluate is not None
    world.ends(result.model_copy(update={"evaluate": result.evaluate.model_copy(update={"has_reference": False})}))
    world.settle()
    assert world.versions["sentiment-v1"].spec.reference_uri is None
