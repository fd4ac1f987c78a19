"""Decides about ModelVersions: whether one was evaluated as it is, and who serves it. The spec is never written again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tuneloop_operator.api.conditions import VersionCondition, VersionReason
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion, ModelVersionStatus
from tuneloop_operator.api.types import Condition
from tuneloop_operator.domain.conditions import condition, with_times
from tuneloop_operator.domain.decision import Decision
from tuneloop_operator.settings import Settings

MAX_SERVED_BY = 64


@dataclass(frozen=True)
class ModelVersionSnapshot:
    """A version, and the deployments of its namespace."""

    version: ModelVersion
    deployments: tuple[ModelDeployment, ...] = ()


def decide(snapshot: ModelVersionSnapshot, settings: Settings, now: datetime) -> Decision:
    version = snapshot.version
    if version.metadata.deletion_timestamp is not None:
        return Decision(status=version.status.model_dump(mode="json", by_alias=True, exclude_none=True))
    served_by = sorted(deployment.metadata.name for deployment in snapshot.deployments if serves(deployment, version))
    conditions = (_verified(version), _in_use(version, served_by))
    status = ModelVersionStatus(
        observed_generation=version.metadata.generation,
        conditions=with_times(version.status.conditions, conditions, now),
        served_by=tuple(served_by[:MAX_SERVED_BY]),
    )
    return Decision(status=status.model_dump(mode="json", by_alias=True, exclude_none=True))


def serves(deployment: ModelDeployment, version: ModelVersion) -> bool:
    """Whether the deployment has an engine with it: as what takes the traffic, or as what is being rolled out."""
    in_use = [revision.version for revision in (deployment.status.stable, deployment.status.canary) if revision is not None]
    return deployment.spec.model.name == version.spec.model and version.spec.version in in_use


def _verified(version: ModelVersion) -> Condition:
    generation, evaluation = version.metadata.generation, version.spec.evaluation
    if evaluation is not None and evaluation.artifact_digest == version.spec.artifact.manifest_digest:
        message = f"Its evaluation ({evaluation.verdict}) speaks of the artifact {version.spec.artifact.manifest_digest}."
        return condition(VersionCondition.VERIFIED, True, VersionReason.EVALUATED_BY_DIGEST, message, generation)
    message = "It has no evaluation of its artifact, so it is not taken as the latest; a ModelDeployment may name it by its number."
    return condition(VersionCondition.VERIFIED, False, VersionReason.NOT_EVALUATED, message, generation)


def _in_use(version: ModelVersion, served_by: list[str]) -> Condition:
    generation = version.metadata.generation
    if served_by:
        message = f"Served by {', '.join(served_by)}."
        return condition(VersionCondition.IN_USE, True, VersionReason.SERVED, message, generation)
    return condition(VersionCondition.IN_USE, False, VersionReason.NOT_SERVED, "No ModelDeployment serves it.", generation)
