"""The baseline is pinned when the job is first seen, and the gate runs again where its deployment has moved."""

from __future__ import annotations

import json
from typing import Any

from tests.unit.finetunejob.builders import DIGEST, World, evaluated, make_job, make_spec, packaged, trained

from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_trainer.contract import Stage

OTHER = "sha256:" + "7" * 64


def make_version(number: int, digest: str = OTHER) -> ModelVersion:
    spec = {
        "model": "sentiment",
        "version": number,
        "artifact": {"uri": f"pvc://registry/sentiment/{number}", "manifestDigest": digest, "format": "Adapter", "sizeBytes": 1},
        "base": {"source": {"uri": "hf://org/base", "revision": "abc"}},
        "approval": "Approved",
    }
    return ModelVersion.model_validate({"metadata": {"name": f"sentiment-v{number}", "namespace": "team"}, "spec": spec})


def serving(number: int | None) -> ModelDeployment:
    status = {"stable": {"version": number}} if number is not None else {}
    return ModelDeployment.model_validate({"metadata": {"name": "live"}, "spec": {"model": {"name": "sentiment"}}, "status": status})


def compared_with(**baseline: Any) -> dict[str, Any]:
    spec = make_spec()
    return spec | {"evaluation": spec["evaluation"] | {"baseline": baseline}}


def world_with(deployment: ModelDeployment | None, *numbers: int, spec: dict[str, Any] | None = None) -> World:
    versions = {f"sentiment-v{number}": make_version(number) for number in numbers}
    job = make_job(spec or compared_with(type="Deployment", name="live"))
    return World(job=job, versions=versions, deployment=deployment)


def test_a_named_version_is_pinned_with_its_place_and_digest() -> None:
    world = world_with(None, 3, spec=compared_with(type="ModelVersion", name="sentiment-v3")).up_to(Stage.EVALUATE)
    baseline = world.config(world.current())["evaluation"]["baseline"]
    assert baseline["name"] == "sentiment-v3"
    assert baseline["artifact"]["path"] == "/volumes/registry/sentiment/3"
    assert baseline["artifact"]["manifestDigest"] == OTHER
    assert baseline["artifact"]["base"] == {"uri": "hf://org/base", "path": None, "repository": "org/base", "revision": "abc"}


def test_only_evaluate_mounts_the_baselines_claim() -> None:
    world = world_with(None, 3, spec=compared_with(type="ModelVersion", name="sentiment-v3")).up_to(Stage.EVALUATE)
    for run in world.runs.values():
        mounts = {mount["mountPath"]: mount for mount in run.manifest["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert ("/volumes/registry" in mounts) == (run.stage is Stage.EVALUATE)
        if run.stage is Stage.EVALUATE:
            assert mounts["/volumes/registry"]["readOnly"] is True


def test_a_baseline_that_does_not_exist_is_waited_for() -> None:
    world = world_with(None, spec=compared_with(type="ModelVersion", name="sentiment-v3"))
    decision = world.settle()
    assert world.condition("Succeeded") == ("Unknown", "ModelNotFound")
    assert "ModelVersion sentiment-v3 does not exist" in world.message()
    assert decision.requeue_after == 30
    world.versions["sentiment-v3"] = make_version(3)
    world.settle()
    assert world.current().stage is Stage.PREPARE


def test_a_deployment_that_serves_nothing_yet_is_waited_for() -> None:
    world = world_with(serving(None), 3)
    world.settle()
    assert world.runs == {}
    assert "serves no version yet" in world.message()


def test_the_version_that_a_deployment_serves_is_pinned_when_the_job_is_first_seen() -> None:
    world = world_with(serving(3), 3, 4)
    world.settle()
    world.deployment = serving(4)
    world.settle()
    pinned = world.job.status.resolved.baseline
    assert pinned is not None
    assert pinned.name == "sentiment-v3"


def test_the_gate_runs_again_where_the_deployment_moved_during_the_evaluation() -> None:
    world = world_with(serving(3), 3, 4).up_to(Stage.EVALUATE)
    world.deployment = serving(4)
    world.settle()
    assert world.current().number == 1
    world.ends(evaluated())
    world.settle()
    again = world.current()
    assert (again.stage, again.number) == (Stage.EVALUATE, 2)
    assert world.config(again)["evaluation"]["baseline"]["name"] == "sentiment-v4"
    assert world.job.status.evaluation is None
    assert world.job.status.model_version is None
    world.ends(evaluated("Fail"))
    world.settle()
    assert world.versions["sentiment-v5"].spec.approval == "Rejected"
    lineage = world.versions["sentiment-v5"].spec.lineage
    assert lineage is not None
    assert lineage.parent == "sentiment-v4"


def test_a_deployment_that_moved_back_needs_no_third_evaluation() -> None:
    world = world_with(serving(3), 3, 4).up_to(Stage.EVALUATE)
    world.deployment = serving(4)
    world.ends(evaluated())
    world.settle()
    world.deployment = serving(3)
    world.ends(evaluated())
    world.settle()
    assert world.versions["sentiment-v5"].spec.approval == "Approved"
    assert [run.number for run in world.snapshot().of(Stage.EVALUATE)] == [1, 2]


def test_a_deployment_that_moves_after_the_number_is_written_changes_nothing() -> None:
    world = world_with(serving(3), 3, 4).up_to(Stage.EVALUATE)
    world.ends(evaluated())
    world.step()
    assert world.job.status.model_version == 5
    world.deployment = serving(4)
    world.settle()
    assert world.versions["sentiment-v5"].spec.artifact.manifest_digest == DIGEST


def test_an_edited_baseline_is_pinned_anew_until_training_starts() -> None:
    world = world_with(serving(3), 3, 4)
    world.settle()
    world.edit(compared_with(type="ModelVersion", name="sentiment-v4"))
    world.settle()
    pinned = world.job.status.resolved.baseline
    assert pinned is not None
    assert pinned.name == "sentiment-v4"
    world.edit(compared_with(type="Base"))
    world.settle()
    pinned = world.job.status.resolved.baseline
    assert pinned is not None
    assert pinned.type == "Base"


def test_the_operators_upgrade_changes_no_image_of_a_job_that_trains() -> None:
    world = World().up_to(Stage.TRAIN)
    world.settings = world.settings.model_copy(update={"trainer_image": "registry.example/trainer:2"})
    world.ends(None, 75)
    world.wait(60)
    world.settle()
    assert world.current().manifest["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/trainer:1"


def test_the_operators_upgrade_changes_nothing_of_what_a_running_jobs_stages_read() -> None:
    """A later contract may have fields that the pinned trainer would refuse, and other defaults."""
    world = World().up_to(Stage.TRAIN)
    place = next(place for place in world.others if place.startswith("ConfigMap"))
    of_another_version = json.loads(world.others[place]["data"]["config.json"]) | {"aField": "of the version that it began with"}
    world.others[place] = world.others[place] | {"data": {"config.json": json.dumps(of_another_version)}}
    world.ends(None, 11)
    world.settle()
    second = world.config(world.current())
    assert second == of_another_version | {"training": of_another_version["training"] | {"microBatchSize": 8}}
    for result in (trained(), packaged()):
        world.ends(result)
        world.settle()
        assert world.config(world.current()) == of_another_version
