"""A set of evaluation items decides five promotions of a model, and no sixth."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.builders import DIGEST, RESULTS, World, evaluated, make_job, make_spec, prepared

from tuneloop_operator.api.finetunejob import EvaluationStatus
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain.finetunejob.suites import MAX_USES, exhausted, with_uses
from tuneloop_trainer.contract import Evaluation, Stage

ITEMS, OTHERS = "1" * 64, "2" * 64


def make_version(
    number: int, digest: str | None = ITEMS, *, approval: str = "Approved", model: str = "sentiment", job: str = ""
) -> ModelVersion:
    gate = {"suite": "whatever", "metric": "Accuracy", "rule": "Superior", "verdict": "Pass", "n": 400}
    gate |= {"candidate": "0.9", "baseline": "0.6", "difference": "0.3", "interval": "[0.2, 0.4]"}
    gate |= {"suiteDigest": digest} if digest is not None else {}
    lineage = {"fineTuneJob": "x", "fineTuneJobUid": job or f"uid-{number}", "spec": {}, "configDigest": "c"}
    spec: dict[str, Any] = {
        "model": model,
        "version": number,
        "artifact": {"uri": "pvc://models/x", "manifestDigest": DIGEST, "format": "Merged", "sizeBytes": 1},
        "lineage": lineage,
        "evaluation": {"verdict": "Pass", "artifactDigest": DIGEST, "gates": [gate]},
        "approval": approval,
    }
    return ModelVersion.model_validate({"metadata": {"name": f"{model}-v{number}", "namespace": "team"}, "spec": spec})


def finished(versions: list[ModelVersion], verdict: str = "Pass", **spec: Any) -> World:
    """A job whose suite has the items ITEMS, beside these versions."""
    world = World(job=make_job(make_spec(**spec)), versions={version.metadata.name: version for version in versions})
    world.settle()
    world.ends(prepared(suite_digests={"held-out": ITEMS}))
    world.settle()
    for stage in (Stage.TRAIN, Stage.PACKAGE):
        world.ends(RESULTS[stage]())
        world.settle()
    world.ends(evaluated(verdict))
    world.settle()
    return world


def own(world: World) -> ModelVersion:
    number = world.job.status.model_version
    return world.versions[f"sentiment-v{number}"]


@pytest.mark.parametrize("before", [0, 4])
def test_the_first_five_promotions_are_decided_by_the_suite(before: int) -> None:
    world = finished([make_version(number) for number in range(1, before + 1)])
    assert own(world).spec.approval == "Approved"
    assert world.condition("Succeeded") == ("True", "Completed")
    assert world.job.status.evaluation is not None
    assert [(gate.uses, gate.suite_digest) for gate in world.job.status.evaluation.gates] == [(before, ITEMS)]
    assert own(world).spec.evaluation == world.job.status.evaluation


def test_the_sixth_waits_for_a_person_and_says_what_to_do() -> None:
    world = finished([make_version(number) for number in range(1, 6)])
    assert own(world).spec.approval == "Pending"
    assert world.condition("Succeeded") == ("True", "SuiteExhausted")
    assert world.condition("Evaluated") == ("True", "GatePassed")
    for words in (
        "sentiment-v6 is Pending",
        "suite held-out has decided 5 promotions",
        "new items",
        "spec.approval of ModelVersion sentiment-v6",
    ):
        assert words in world.message()


@pytest.mark.parametrize(
    ("verdict", "approval", "reason"), [("Fail", "Rejected", "GateFailed"), ("Inconclusive", "Pending", "GateInconclusive")]
)
def test_an_exhausted_suite_changes_no_verdict_that_promotes_nothing(verdict: str, approval: str, reason: str) -> None:
    world = finished([make_version(number) for number in range(1, 6)], verdict)
    assert own(world).spec.approval == approval
    assert world.condition("Succeeded") == ("True", reason)


def test_only_promotions_of_this_model_by_these_items_count() -> None:
    versions = [
        make_version(1, OTHERS),
        make_version(2, None),
        make_version(3, approval="Rejected"),
        make_version(4, approval="Pending"),
        make_version(5, approval="Withdrawn"),
        make_version(6),
        make_version(7, model="another"),
    ]
    world = finished(versions)
    assert world.job.status.evaluation is not None
    assert world.job.status.evaluation.gates[0].uses == 2


def test_a_version_counts_once_whatever_its_number_of_gates_and_not_for_its_own_job() -> None:
    version = make_version(1)
    assert version.spec.evaluation is not None
    twice = version.spec.evaluation.model_copy(update={"gates": version.spec.evaluation.gates * 2})
    version = version.model_copy(update={"spec": version.spec.model_copy(update={"evaluation": twice})})
    evaluation = EvaluationStatus(verdict="Pass", gates=twice.gates)
    digests = {"whatever": ITEMS}
    assert [gate.uses for gate in with_uses(evaluation, digests, [version], "me").gates] == [1, 1]
    assert [gate.uses for gate in with_uses(evaluation, digests, [version], "uid-1").gates] == [0, 0]
    assert not exhausted(with_uses(evaluation, {}, [make_version(number) for number in range(1, 9)], "me"))


def test_the_limit_is_the_number_by_which_the_trainer_divides_the_level() -> None:
    assert Evaluation().promotions_per_suite == MAX_USES
