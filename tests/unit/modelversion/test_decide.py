"""What a ModelVersion's status says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain.modelversion import ModelVersionSnapshot, decide
from tuneloop_operator.settings import Settings

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


def make_version(evaluated: str | None = DIGEST, status: dict[str, Any] | None = None, number: int = 3, **metadata: Any) -> ModelVersion:
    spec: dict[str, Any] = {
        "model": "sentiment",
        "version": number,
        "artifact": {"uri": "pvc://models/x", "manifestDigest": DIGEST, "format": "Adapter", "sizeBytes": 1},
    }
    if evaluated is not None:
        spec["evaluation"] = {"verdict": "Pass", "artifactDigest": evaluated}
    name = {"name": f"sentiment-v{number}", "generation": 2}
    return ModelVersion.model_validate({"metadata": name | metadata, "spec": spec, "status": status or {}})


def make_deployment(name: str, stable: int | None = None, canary: int | None = None, model: str = "sentiment") -> ModelDeployment:
    status = {role: {"version": number} for role, number in (("stable", stable), ("canary", canary)) if number is not None}
    return ModelDeployment.model_validate({"metadata": {"name": name}, "spec": {"model": {"name": model}}, "status": status})


def conditions(version: ModelVersion, *deployments: ModelDeployment) -> dict[str, tuple[str, str]]:
    status = decide(ModelVersionSnapshot(version, deployments), Settings(), NOW).status
    return {condition["type"]: (condition["status"], condition["reason"]) for condition in status["conditions"]}


@pytest.mark.parametrize(
    ("evaluated", "expected"),
    [(DIGEST, ("True", "EvaluatedByDigest")), (OTHER, ("False", "NotEvaluated")), (None, ("False", "NotEvaluated"))],
)
def test_a_version_is_verified_if_its_evaluation_speaks_of_its_artifact(evaluated: str | None, expected: tuple[str, str]) -> None:
    assert conditions(make_version(evaluated))["Verified"] == expected


def test_a_version_is_in_use_where_a_deployment_serves_it_or_rolls_it_out() -> None:
    deployments = (
        make_deployment("b-stable", stable=3),
        make_deployment("a-canary", stable=2, canary=3),
        make_deployment("older", stable=2),
        make_deployment("another-model", stable=3, model="topics"),
        make_deployment("new"),
    )
    status = decide(ModelVersionSnapshot(make_version(), deployments), Settings(), NOW).status
    assert status["servedBy"] == ["a-canary", "b-stable"]
    assert conditions(make_version(), *deployments)["InUse"] == ("True", "Served")
    assert conditions(make_version(), *deployments[2:])["InUse"] == ("False", "NotServed")


def test_deciding_again_on_its_own_output_changes_nothing() -> None:
    first = decide(ModelVersionSnapshot(make_version()), Settings(), NOW)
    later = make_version(status=first.status)
    again = decide(ModelVersionSnapshot(later), Settings(), NOW + timedelta(hours=1))
    assert again == first
    assert (again.create, again.apply, again.delete) == ((), (), ())


def test_a_conditions_time_changes_only_when_it_turns() -> None:
    served = decide(ModelVersionSnapshot(make_version(), (make_deployment("d", stable=3),)), Settings(), NOW)
    later = NOW + timedelta(hours=1)
    left = decide(ModelVersionSnapshot(make_version(status=served.status)), Settings(), later)
    times = {condition["type"]: condition["lastTransitionTime"] for condition in left.status["conditions"]}
    assert times == {"Verified": "2026-03-01T00:00:00Z", "InUse": "2026-03-01T01:00:00Z"}


def test_a_version_that_is_being_deleted_is_left_alone() -> None:
    version = make_version(deletion_timestamp="2026-03-01T00:00:00Z")
    assert decide(ModelVersionSnapshot(version), Settings(), NOW).status == version.status.model_dump(mode="json", by_alias=True)
