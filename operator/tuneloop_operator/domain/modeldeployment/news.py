"""Events of a ModelDeployment: one for each turn of a condition and each verdict on a revision."""

from __future__ import annotations

from typing import Any, Literal

from tuneloop_operator.api.conditions import DeploymentCondition, DeploymentReason
from tuneloop_operator.api.types import Condition, ConditionStatus
from tuneloop_operator.domain import conditions
from tuneloop_operator.domain.decision import EventNote
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.revisions import Outcome

C, R = DeploymentCondition, DeploymentReason
ALARMING = {
    (C.STALLED.value, "True"),
    (C.DEGRADED.value, "True"),
    (C.AVAILABLE.value, "False"),
    (C.DRIFT_DETECTED.value, "True"),
    (C.TRAINING_SERVING_SKEW.value, "True"),
}
QUIET = (R.NOT_MONITORED, R.NOT_NEEDED, R.HEALTHY, R.NO_CANARY, R.ANALYSING, R.CANARY_PASSED)
ON_THE_WAY = (R.STARTING, R.ROLLING_OUT)
BAD_NEWS = {R.GATE_FAILED.value, R.RETRAINING_FAILED.value, R.BUDGET_EXHAUSTED.value, R.NO_TEMPLATE.value}
TOLD = (C.AVAILABLE, C.READY, C.STALLED, C.DEGRADED, C.CANARY_HEALTHY, C.DRIFT_DETECTED, C.TRAINING_SERVING_SKEW, C.RETRAINING_NEEDED)


def events(snapshot: Snapshot, rollout: Rollout, status: dict[str, Any]) -> tuple[EventNote, ...]:
    """At most one of each sentence, verdicts first."""
    after = [Condition.model_validate(item) for item in status["conditions"]]
    notes = [*_verdicts(snapshot, rollout), *_turns(snapshot.deployment.status.conditions, after)]
    told: dict[tuple[str, str], EventNote] = {}
    for note in notes:
        known = told.setdefault((note.reason, note.message), note)
        if known.type == "Normal":
            told[note.reason, note.message] = note  # of two conditions that say the same, the worse news
    return tuple(told.values())


def _verdicts(snapshot: Snapshot, rollout: Rollout) -> list[EventNote]:
    notes = []
    for revision in rollout.revisions:
        known = snapshot.revision(revision.name)
        verdict = revision.verdict
        if verdict is None or (known is not None and known.verdict == verdict):
            continue
        if verdict.outcome is Outcome.REPLACED:
            notes.append(EventNote("Normal", "Replaced", f"The canary of version {revision.pinned.version} ended: {verdict.message}"))
        elif revision.is_rejected:
            notes.append(EventNote("Warning", "Rejected", f"Version {revision.pinned.version} was rejected: {verdict.message}"))
        else:
            probes = f" {verdict.probes} probe items were answered as evaluated." if verdict.probes else ""
            notes.append(EventNote("Normal", "Promoted", f"Version {revision.pinned.version} takes all traffic.{probes}"))
    return [*notes, *_steps(snapshot, rollout)]


def _steps(snapshot: Snapshot, rollout: Rollout) -> list[EventNote]:
    """A canary's next step."""
    canary = rollout.canary
    known = snapshot.revision(canary.revision) if canary is not None else None
    if canary is None or (known is not None and known.progress == canary.progress):
        return []
    return [EventNote("Normal", "CanaryStep", f"Version {canary.version} is in {canary.place}.")]


def _turns(before: tuple[Condition, ...], after: list[Condition]) -> list[EventNote]:
    """Conditions whose status or reason is another one. What a first status says of nothing yet is no news."""
    notes = []
    for type_ in TOLD:
        old, new = conditions.find(before, type_), conditions.find(after, type_)
        if new is None or (old is not None and (old.status, old.reason) == (new.status, new.reason)):
            continue
        is_first = old is None and (new.type, new.status.value) not in ALARMING
        if not is_first and new.reason not in QUIET and not _is_no_news(old, new):
            notes.append(EventNote(_severity(new), new.reason, new.message))
    return notes


def _is_no_news(old: Condition | None, new: Condition) -> bool:
    """That it is available, Ready says too. That no alarm stands, or that data is missing, is news only after an alarm."""
    if new.type == C.AVAILABLE:
        return new.status is ConditionStatus.TRUE
    was_true = old is not None and old.status is ConditionStatus.TRUE
    return (
        new.type in (C.DRIFT_DETECTED, C.TRAINING_SERVING_SKEW, C.RETRAINING_NEEDED)
        and new.status is not ConditionStatus.TRUE
        and not was_true
    )


def _severity(condition: Condition) -> Literal["Normal", "Warning"]:
    is_alarming = (condition.type, condition.status.value) in ALARMING and condition.reason not in ON_THE_WAY
    is_bad = is_alarming or condition.reason in BAD_NEWS
    return "Warning" if is_bad else "Normal"
