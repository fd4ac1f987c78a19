"""Whether live inputs are unlike those that the served version was trained on. A warning: nothing is retrained for it."""

from __future__ import annotations

from tuneloop_gateway.contract import SkewReport
from tuneloop_operator.api.conditions import DeploymentCondition, DeploymentReason
from tuneloop_operator.api.types import Condition
from tuneloop_operator.domain import conditions
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot

R = DeploymentReason
C = DeploymentCondition.TRAINING_SERVING_SKEW


def skew_condition(snapshot: Snapshot, rollout: Rollout) -> Condition:
    """What was said of the same version stands while no gateway answers."""
    stable, generation = rollout.stable, snapshot.deployment.metadata.generation
    version = stable.pinned.version if stable is not None else None
    reports = [state.skew for state in snapshot.states if state.skew is not None and state.skew.version == version]
    said = _said_before(snapshot, version)
    if not reports and said is not None and _may_be_compared(snapshot, rollout):
        return said.model_copy(update={"observed_generation": generation})
    holds, reason, message = _claim(snapshot, rollout, max(reports, key=lambda report: report.pairs, default=None))
    return conditions.condition(C, holds, reason, message, generation)


def _said_before(snapshot: Snapshot, version: int | None) -> Condition | None:
    """What the status says of a comparison of this version."""
    status = snapshot.deployment.status
    before = conditions.find(status.conditions, C)
    is_of_version = status.stable is not None and status.stable.version == version
    return before if before is not None and is_of_version and before.reason in (R.INPUTS_DIFFER, R.INPUTS_ALIKE, R.COMPARING) else None


def _may_be_compared(snapshot: Snapshot, rollout: Rollout) -> bool:
    stable = rollout.stable
    return snapshot.deployment.spec.monitoring.drift is not None and stable is not None and stable.pinned.has_reference


def _claim(snapshot: Snapshot, rollout: Rollout, report: SkewReport | None) -> tuple[bool | None, DeploymentReason, str]:
    settings, stable = snapshot.deployment.spec.monitoring.drift, rollout.stable
    if settings is None:
        return None, R.NOT_MONITORED, "Set monitoring.drift to have live inputs compared with those of the training."
    if stable is None:
        return None, R.NO_DATA, "Nothing serves yet."
    version = stable.pinned.version
    if not stable.pinned.has_reference:
        return None, R.NO_REFERENCE, f"Version {version} has no sample of the inputs that it was trained on."
    if report is None:
        return None, R.NO_DATA, "No gateway has read the sample of training inputs yet."
    if report.status == "Comparing":
        return None, R.COMPARING, f"Live inputs are being compared with those that version {version} was trained on."
    if report.status == "Differ" and report.effect >= float(settings.minimum_effect):
        message = (
            f"Live inputs are unlike those that version {version} was trained on: its evaluation may say little of them. Look at captured"
            " requests (tuneloop label export --uniform), and train on rows like them."
        )
        return True, R.INPUTS_DIFFER, message
    return False, R.INPUTS_ALIKE, f"Live inputs are like those that version {version} was trained on."
