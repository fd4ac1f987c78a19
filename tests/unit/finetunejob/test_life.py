"""A FineTuneJob's whole life, pass by pass."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import DIGEST, RESULTS, UID, World, evaluated, make_job, make_spec, packaged, prepared, trained

from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.render.names import pvc_uri
from tuneloop_trainer.bases import base_folder
from tuneloop_trainer.contract import Base, Paths, Stage


def test_first_pass_writes_all_conditions_and_starts_prepare() -> None:
    world = World()
    world.step()
    assert world.condition("Succeeded") == ("Unknown", "Preparing")
    assert world.condition("DataReady") == ("Unknown", "Preparing")
    assert [world.condition(name) for name in ("Trained", "Packaged", "Evaluated")] == [("Unknown", "Pending")] * 3
    assert world.condition("Reconciling") == ("True", "Preparing")
    assert world.condition("Stalled") is None
    assert world.condition("Suspended") is None
    assert world.current().job.metadata.name == "tweets-prepare-1"
    assert world.job.status.resolved.image == "registry.example/trainer:1"


def test_stages_follow_one_another_and_end_in_an_approved_version() -> None:
    world = World()
    for result in (prepared(), trained(), packaged(), evaluated()):
        world.settle()
        world.pod_runs()
        world.settle()
        world.ends(result)
    world.settle()
    assert [name for name in world.made if name.startswith(("Job", "ModelVersion"))] == [
        "Job/tweets-prepare-1",
        "Job/tweets-train-1",
        "Job/tweets-package-1",
        "Job/tweets-evaluate-1",
        "ModelVersion/sentiment-v1",
    ]
    status = world.job.status
    assert (status.phase, status.model_version) == ("Succeeded", 1)
    assert world.condition("Succeeded") == ("True", "Completed")
    assert world.condition("Evaluated") == ("True", "GatePassed")
    assert world.condition("Reconciling") is None
    version = world.versions["sentiment-v1"].spec
    assert version.approval == "Approved"
    assert version.artifact.uri == f"pvc://models/models/sentiment/tweets-{UID[:8]}"
    assert version.artifact.manifest_digest == DIGEST
    assert version.probes_uri == f"pvc://models/runs/tweets-{UID[:8]}/evaluate/probes.json"
    assert version.reference_uri == f"pvc://models/runs/tweets-{UID[:8]}/evaluate/reference.json"
    assert version.lineage is not None
    assert version.lineage.fine_tune_job_uid == UID
    assert version.lineage.dataset_digests == status.resolved.dataset_digests


ARCHITECTURE = {"layers": 2, "hiddenSize": 64, "heads": 4}
FROM_SCRATCH = {"objective": {"type": "Pretraining"}, "method": {"type": "Full"}, "evaluation": {}}


@pytest.mark.parametrize(
    ("tokenizer", "revision"),
    [({"train": {}}, None), ({"source": {"uri": "hf://org/tokens"}}, "abc")],
    ids=["trained tokenizer", "given tokenizer"],
)
def test_a_version_from_scratch_has_no_base_but_the_digest_of_what_it_was_drawn_for(
    tokenizer: dict[str, Any], revision: str | None
) -> None:
    starting = {"architecture": ARCHITECTURE, "tokenizer": tokenizer}
    world = World(job=make_job(make_spec(baseModel=starting, **FROM_SCRATCH)))
    for result in (prepared(base_revision=revision), trained(), packaged(), evaluated()):
        world.settle()
        world.ends(result)
    world.settle()

    version = world.versions["sentiment-v1"].spec
    assert version.base is None
    assert version.lineage is not None
    assert version.lineage.base_digest == world.job.status.resolved.base_digest is not None
    assert version.lineage.spec["baseModel"]["tokenizer"].get("source", {}).get("revision") == revision
    assert version.prompt.format == "Text"


def test_a_finished_job_is_left_alone() -> None:
    world = World().up_to(Stage.EVALUATE)
    world.ends(evaluated())
    world.settle()
    writes = world.writes
    world.wait(3600)
    decision = world.step()
    assert world.writes == writes
    assert decision.requeue_after is None
    assert decision.events == ()


@pytest.mark.parametrize(
    ("verdict", "approval", "expected", "reason"),
    [
        ("Pass", "Automatic", "Approved", "Completed"),
        ("Pass", "Manual", "Pending", "Completed"),
        ("Fail", "Automatic", "Rejected", "GateFailed"),
        ("Inconclusive", "Automatic", "Pending", "GateInconclusive"),
        ("NoGates", "Automatic", "Pending", "NoGates"),
    ],
)
def test_the_gates_verdict_decides_the_approval_and_never_fails_the_job(verdict: str, approval: str, expected: str, reason: str) -> None:
    world = World(job=make_job(make_spec(approval=approval))).up_to(Stage.EVALUATE)
    world.ends(evaluated(verdict))
    world.settle()
    assert world.versions["sentiment-v1"].spec.approval == expected
    assert world.condition("Succeeded") == ("True", reason)


@pytest.mark.parametrize("verdict", ["Inconclusive", "NoGates"])
def test_what_the_evaluation_adds_to_its_gates_is_told(verdict: str) -> None:
    world = World(job=make_job()).up_to(Stage.EVALUATE)
    said = "held-out: Accuracy of the best and the worst dialect differ by 0.4, the baseline's by 0.1."
    told = evaluated(verdict)
    assert told.evaluate is not None
    world.ends(told.model_copy(update={"evaluate": told.evaluate.model_copy(update={"message": said})}))
    world.settle()
    assert world.versions["sentiment-v1"].spec.evaluation.message == said
    assert world.job.status.message.endswith(said)


def version_of(spec: dict[str, object], **told: object) -> ModelVersion:
    world = World(job=make_job(spec))
    world.settle()
    world.ends(prepared(**told))
    world.settle()
    for stage in (Stage.TRAIN, Stage.PACKAGE, Stage.EVALUATE):
        world.ends(RESULTS[stage]())
        world.settle()
    return world.versions["sentiment-v1"]


def test_an_adapter_names_its_rank_for_the_engine() -> None:
    assert version_of(make_spec()).spec.artifact.rank == 32
    assert version_of(make_spec(method={"type": "LoRA", "lora": {"rank": 12}})).spec.artifact.rank == 12


def test_a_base_of_the_hub_is_recorded_where_the_trainer_keeps_it() -> None:
    spec = make_spec(baseModel={"uri": "hf://org/base"}, output={"model": "sentiment", "store": {"uri": "pvc://models/store"}})
    base = version_of(spec, base_revision="f" * 40).spec.base
    assert base is not None
    assert base.source.revision == "f" * 40
    told = Base(uri="hf://org/base", repository="org/base", revision="f" * 40)
    kept = base_folder(told, Paths(work="", artifact="", cache="/volumes/models/store/cache"))
    assert base.snapshot_uri == pvc_uri(str(kept))
    on_claim = version_of(make_spec()).spec.base
    assert on_claim is not None
    assert on_claim.snapshot_uri is None


def test_the_versions_number_is_written_a_pass_before_the_version_is_made() -> None:
    world = World().up_to(Stage.EVALUATE)
    world.ends(evaluated())
    counted = world.step()
    assert counted.status["modelVersion"] == 1
    assert counted.create == ()
    made = world.step()
    assert [manifest["metadata"]["name"] for manifest in made.create] == ["sentiment-v1"]
    assert made.create[0]["metadata"]["ownerReferences"] == []


def test_a_version_that_somebody_else_made_meanwhile_costs_the_next_number() -> None:
    world = World().up_to(Stage.EVALUATE)
    world.ends(evaluated())
    world.step()
    other = World(job=make_job(uid="9" * 36)).up_to(Stage.EVALUATE)
    other.ends(evaluated())
    other.settle()
    world.versions = dict(other.versions)
    world.settle()
    assert world.job.status.model_version == 2
    assert sorted(world.versions) == ["sentiment-v1", "sentiment-v2"]


@pytest.mark.parametrize("crash_at", range(1, 30))
def test_a_crash_between_status_and_objects_leads_to_the_same_end(crash_at: int) -> None:
    world, passes = World(), 0
    results = {Stage.PREPARE: prepared(), Stage.TRAIN: trained(), Stage.PACKAGE: packaged(), Stage.EVALUATE: evaluated()}
    while world.job.status.finished_at is None:
        passes += 1
        decision = world.decide()
        world.write_status(decision)
        if passes == crash_at:
            continue  # the operator dies here, and starts again
        world.write_objects(decision)
        active = [run for run in world.runs.values() if not run.job.is_finished]
        if active:
            world.ends(results[active[0].stage])
        assert passes < 40
    expected = ["tweets-prepare-1", "tweets-train-1", "tweets-package-1", "tweets-evaluate-1", "sentiment-v1"]
    assert [name.partition("/")[2] for name in world.made if name.startswith(("Job", "ModelVersion"))] == expected


def test_an_evaluation_of_another_artifact_ends_the_job_without_a_version() -> None:
    world = World().up_to(Stage.EVALUATE)
    world.ends(evaluated(digest="sha256:" + "f" * 64))
    world.settle()
    assert world.condition("Succeeded") == ("False", "InternalError")
    assert world.versions == {}


def test_events_are_told_once_per_change_of_state() -> None:
    world = World()
    world.settle()
    world.settle()
    for result in (prepared(), trained(), packaged(), evaluated()):
        world.ends(result)
        world.settle()
    assert [event.reason for event in world.events] == ["Preparing", "Training", "Packaging", "Evaluating", "Completed"]
