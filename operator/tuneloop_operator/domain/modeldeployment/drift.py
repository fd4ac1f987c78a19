"""Whether users' inputs changed: what the detector says, in which epoch, and when it starts afresh. No data is never drift."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from tuneloop_gateway.contract import DriftReport, FeedbackReport, GatewayState, RevisionState
from tuneloop_gateway.contract import DriftStatus as GatewayDrift
from tuneloop_operator.api.conditions import DeploymentCondition, DeploymentReason
from tuneloop_operator.api.modeldeployment import DriftStatus, FeedbackStatus
from tuneloop_operator.api.types import Condition
from tuneloop_operator.domain import conditions
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout
from tuneloop_operator.domain.modeldeployment.snapshot import Evidence, Snapshot
from tuneloop_operator.render import names


@dataclass(frozen=True)
class Epoch:
    """One life of the detector: from its start to the next promotion after an alarm, or to the user's wish."""

    number: int
    seed: Literal["Fresh", "SinceAlarm"]
    rearmed: str
    """The re-arming annotation that it has followed."""
    is_new: bool = False


def current_epoch(snapshot: Snapshot) -> int:
    """As it is configured; the status remembers it where the configuration is gone."""
    observed = snapshot.config
    if observed is not None and observed.config is not None and observed.config.drift is not None:
        return int(observed.config.drift.epoch) if observed.config.drift.epoch.isdigit() else 0
    return snapshot.deployment.status.retraining.epoch


def next_epoch(snapshot: Snapshot, rollout: Rollout, *, is_alarm: bool) -> Epoch:
    """Another version taking over after an alarm starts a new epoch on the inputs since the alarm; the user's annotation, an empty one.

    Compared with the configuration in the cluster, not with the pass before: what was decided but not written is decided again.
    """
    number, observed = current_epoch(snapshot), snapshot.config
    wish = snapshot.deployment.metadata.annotations.get(names.REARM_ANNOTATION, "")
    rearmed = observed.rearmed if observed is not None else wish
    if wish and wish != rearmed:
        return Epoch(number + 1, "Fresh", wish, is_new=True)
    if is_alarm and another_version_takes_over(snapshot, rollout):
        return Epoch(number + 1, "SinceAlarm", rearmed, is_new=True)
    drift = observed.config.drift if observed is not None and observed.config is not None else None
    return Epoch(number, drift.seed if drift is not None else "Fresh", rearmed)


def another_version_takes_over(snapshot: Snapshot, rollout: Rollout) -> bool:
    config = snapshot.config.config if snapshot.config is not None else None
    served = next((r.version for r in config.revisions if r.state is RevisionState.STABLE), None) if config is not None else None
    return served is not None and rollout.stable is not None and rollout.stable.pinned.version != served


# --- evidence ----------------------------------------------------------------


def evidence_of(snapshot: Snapshot) -> Evidence | None:
    """Prometheus' where it is asked, else the gateways'; only of the current epoch."""
    if snapshot.deployment.spec.monitoring.drift is None:
        return None
    epoch = str(current_epoch(snapshot))
    of_gateways = merged(state for state in snapshot.states if state.drift is not None and state.drift.epoch == epoch)
    if not snapshot.reads_prometheus or snapshot.evidence is None:
        return None if snapshot.reads_prometheus else of_gateways
    raised = of_gateways.detected_at if of_gateways is not None and snapshot.evidence.is_alarm else None
    return replace(snapshot.evidence, detected_at=raised)  # a gauge has no time of its own


def merged(states: Iterable[GatewayState]) -> Evidence | None:
    """One detector's word for several gateways of one database: an alarm of any, else the one that has seen most. One that has not read
    the database yet has no word."""
    answered = [state for state in states if state.drift is not None]
    if not answered:
        return None
    drift = max((state.drift for state in answered if state.drift is not None), key=_weight)
    feedback = max((state.feedback for state in answered), key=lambda f: (f.labelled_train, f.labelled_gate, f.up + f.down))
    return _evidence(drift, feedback)


def _weight(report: DriftReport) -> tuple[bool, int]:
    return report.status is GatewayDrift.ALARM, report.pairs


def _evidence(drift: DriftReport, feedback: FeedbackReport) -> Evidence:
    return Evidence(
        is_alarm=drift.status is GatewayDrift.ALARM,
        is_collecting=drift.status in (GatewayDrift.COLLECTING, GatewayDrift.OFF),
        is_exhausted=drift.status is GatewayDrift.EXHAUSTED,
        log_evidence=drift.log_evidence,
        log_threshold=drift.log_threshold,
        effect=drift.effect,
        pairs=drift.pairs,
        labelled_train=feedback.labelled_train,
        labelled_gate=feedback.labelled_gate,
        up=feedback.up,
        down=feedback.down,
        corrections=feedback.corrections,
        detected_at=drift.detected_at,
    )


def is_latched(snapshot: Snapshot, evidence: Evidence | None) -> bool:
    """An alarm stands until the epoch changes, also while nobody answers."""
    if snapshot.deployment.spec.monitoring.drift is None:
        return False
    if evidence is not None:
        return evidence.is_alarm
    return conditions.is_true(snapshot.deployment.status.conditions, DeploymentCondition.DRIFT_DETECTED)


# --- what the status says ----------------------------------------------------


def drift_condition(snapshot: Snapshot, evidence: Evidence | None, epoch: Epoch) -> Condition:
    holds, reason, message = _claim(snapshot, evidence, epoch)
    return conditions.condition(DeploymentCondition.DRIFT_DETECTED, holds, reason, message, snapshot.deployment.metadata.generation)


def _claim(snapshot: Snapshot, evidence: Evidence | None, epoch: Epoch) -> tuple[bool | None, DeploymentReason, str]:
    if snapshot.deployment.spec.monitoring.drift is None:
        return None, DeploymentReason.NOT_MONITORED, "Set monitoring.drift to watch users' inputs."
    if epoch.is_new:
        return None, DeploymentReason.COLLECTING_REFERENCE, "The detector starts afresh."
    if is_latched(snapshot, evidence):
        since = evidence.detected_at if evidence is not None else detected_at(snapshot)
        when = f" at {since}" if since else ""
        message = f"Users' inputs changed (alarm{when}). It stands until another version takes over or {names.REARM_ANNOTATION} changes."
        return True, DeploymentReason.DRIFT_ALARM, message
    if evidence is None:
        source = "Prometheus has no samples of this deployment" if snapshot.reads_prometheus else "no gateway has read its database"
        return None, DeploymentReason.NO_DATA, f"Nothing is known of users' inputs: {source}."
    if evidence.is_exhausted:
        message = "The reference is used up; a new one is collected. Raise monitoring.drift.size or horizonDays."
        return None, DeploymentReason.REFERENCE_EXHAUSTED, message
    if evidence.is_collecting:
        return None, DeploymentReason.COLLECTING_REFERENCE, "A reference is collected from live traffic."
    return False, DeploymentReason.NO_DRIFT, "Users' inputs are like the reference."


def detected_at(snapshot: Snapshot) -> str | None:
    drift = snapshot.deployment.status.drift
    return drift.detected_at if drift is not None else None


def drift_status(snapshot: Snapshot, evidence: Evidence | None, epoch: Epoch) -> DriftStatus | None:
    """Rounded, so that traffic alone does not write the status at every look; the exact numbers are metrics."""
    if snapshot.deployment.spec.monitoring.drift is None or epoch.is_new:
        return None
    if evidence is None:
        return snapshot.deployment.status.drift
    return DriftStatus(
        log_evidence=f"{evidence.log_evidence:.0f}",
        log_threshold=f"{evidence.log_threshold:.1f}",
        effect=f"{evidence.effect:.2f}",
        detected_at=evidence.detected_at if evidence.is_alarm else None,
        requests=coarse(evidence.pairs),
    )


def feedback_status(snapshot: Snapshot) -> FeedbackStatus | None:
    """What people said, by the gateways; the last word where none answers."""
    said = merged(snapshot.states) or snapshot.evidence
    if said is None:
        return snapshot.deployment.status.feedback
    return FeedbackStatus(
        up=coarse(said.up), down=coarse(said.down), corrections=said.corrections, curated=said.labelled_train, gate=said.labelled_gate
    )


def coarse(number: int) -> int:
    """Rounded down to two digits: 1234 -> 1200."""
    scale = int(10 ** max(0, len(str(abs(number))) - 2))
    return number // scale * scale
