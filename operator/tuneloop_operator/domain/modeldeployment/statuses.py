"""The status of a ModelDeployment, computed from what is observed and decided. docs/status.md has it as a table, row by row tested."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuneloop_operator.api.conditions import DeploymentCondition, DeploymentReason
from tuneloop_operator.api.modeldeployment import AnalysisStatus, CheckStatus, ModelDeploymentStatus, RevisionStatus
from tuneloop_operator.api.types import Condition
from tuneloop_operator.domain import conditions
from tuneloop_operator.domain.decision import Refusal
from tuneloop_operator.domain.modeldeployment import canaries, drift, retraining, skew
from tuneloop_operator.domain.modeldeployment.canaries import Canary
from tuneloop_operator.domain.modeldeployment.drift import Epoch
from tuneloop_operator.domain.modeldeployment.failures import Failure
from tuneloop_operator.domain.modeldeployment.judgements import engine_failure, gateway_failure
from tuneloop_operator.domain.modeldeployment.retraining import Plan
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout
from tuneloop_operator.domain.modeldeployment.scaling import hold_seconds
from tuneloop_operator.domain.modeldeployment.snapshot import Evidence, Snapshot
from tuneloop_operator.domain.modeldeployment.startups import startup_status
from tuneloop_operator.render import names
from tuneloop_operator.render.engine import serving_selector
from tuneloop_operator.render.revisions import Revision

C, R = DeploymentCondition, DeploymentReason


@dataclass(frozen=True)
class Claim:
    """Whether something holds, and why."""

    holds: bool
    reason: DeploymentReason
    message: str
    is_stalled: bool = False
    """Nothing goes on until somebody acts."""


@dataclass(frozen=True)
class Findings:
    """All that the status speaks of."""

    snapshot: Snapshot
    rollout: Rollout
    evidence: Evidence | None
    epoch: Epoch
    retraining: Plan
    generation: int
    """Of the gateway's configuration."""
    flaws: str = ""
    """Of the stable revision's engine; "" where none are known."""
    refusal: Refusal | None = None
    """A child, of those that are wanted now, that the API server does not take."""


def render_status(found: Findings, now: datetime) -> dict[str, Any]:
    snapshot, stable = found.snapshot, found.rollout.stable
    before = snapshot.deployment.status
    status = ModelDeploymentStatus(
        observed_generation=snapshot.deployment.metadata.generation,
        url=names.gateway_url(snapshot.name, snapshot.deployment.metadata.namespace) if found.generation else None,
        conditions=conditions.with_times(before.conditions, _conditions(found, now), now),
        stable=_stable_status(snapshot, stable) if stable is not None else None,
        canary=_canary_status(found) if found.rollout.candidate is not None else None,
        analysis=_analysis_status(before, found.rollout.canary) if found.rollout.canary is not None else None,
        drift=drift.drift_status(snapshot, found.evidence, found.epoch),
        feedback=drift.feedback_status(snapshot),
        retraining=found.retraining.status,
        config_generation=found.generation,
        replicas=len(snapshot.engine_pods.get(stable.pinned.engine_hash, ())) if stable is not None else 0,
        selector=_selector(snapshot, stable) if stable is not None else "",
    )
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _conditions(found: Findings, now: datetime) -> list[Condition]:
    generation = found.snapshot.deployment.metadata.generation
    available = _available(found, now)
    ready = _ready(found, available)
    degraded = _degraded(found, now)
    said = [
        conditions.condition(C.AVAILABLE, available.holds, available.reason, available.message, generation),
        conditions.condition(C.READY, ready.holds, ready.reason, ready.message, generation),
        _canary_healthy(found),
        drift.drift_condition(found.snapshot, found.evidence, found.epoch),
        skew.skew_condition(found.snapshot, found.rollout),
        retraining.retraining_condition(found.snapshot, found.retraining),
        conditions.condition(C.DEGRADED, degraded.holds, degraded.reason, degraded.message, generation),
    ]
    if not ready.holds:
        type_ = C.STALLED if ready.is_stalled else C.RECONCILING
        said.append(conditions.condition(type_, True, ready.reason, ready.message, generation))
    return said


# --- Available ---------------------------------------------------------------


def _available(found: Findings, now: datetime) -> Claim:
    """The URL answers: a gateway is ready, works by a configuration with a stable revision, and that has a ready engine."""
    snapshot, rollout = found.snapshot, found.rollout
    if any((key.kind, key.name) == ("Service", snapshot.name) for key in snapshot.conflicts):
        return _conflict(snapshot)
    if rollout.stable is None:
        return _nothing_serves(found)
    if not snapshot.ready_gateways:
        return _broken(gateway_failure(snapshot, now), R.NO_ENDPOINTS, "No gateway pod is ready.")
    stable = rollout.stable
    if rollout.is_asleep:
        return Claim(
            True, R.SCALED_TO_ZERO, f"Nobody asks version {stable.pinned.version}: the next request starts its engine. {_held(found)}"
        )
    if snapshot.ready_replicas(stable.pinned.engine_hash) == 0:
        return _without_engine(found, stable, f"No engine pod of version {stable.pinned.version} is ready.", now)
    if snapshot.configured_stable is None:
        return Claim(False, R.STARTING, f"The gateway takes up version {stable.pinned.version}.")
    reports = snapshot.reports(stable.name)
    if reports and all(report.endpoints == 0 for report in reports):
        without = "The gateway sees no engine pod" if stable.pinned.adapter is None else "No engine pod has loaded the adapter"
        return _without_engine(found, stable, f"{without} of version {stable.pinned.version}.", now)
    return Claim(True, R.SERVING, f"Version {stable.pinned.version} answers.")


def _without_engine(found: Findings, stable: Revision, message: str, now: datetime) -> Claim:
    """Where it may sleep, it may just be waking."""
    snapshot, reason = found.snapshot, R.NO_ENDPOINTS
    if hold_seconds(snapshot.deployment) is not None and snapshot.engine_pods.get(stable.pinned.engine_hash):
        message, reason = f"{message} {_held(found)}", R.STARTING
    return _broken(engine_failure(snapshot, stable, now), reason, message)


def _held(found: Findings) -> str:
    return f"Requests wait for it up to {hold_seconds(found.snapshot.deployment)} s."


def _nothing_serves(found: Findings) -> Claim:
    rollout, target = found.rollout, found.rollout.target
    if found.refusal is not None:
        return _refused(found.refusal)
    if rollout.failure is not None:
        return _broken(rollout.failure, R.STARTING, "")
    if rollout.candidate is not None:
        return Claim(False, R.STARTING, f"Version {rollout.candidate.pinned.version} starts. {rollout.waits_for}".strip())
    return Claim(False, target.reason or R.STARTING, target.message, is_stalled=target.is_final)


def _broken(failure: Failure | None, reason: DeploymentReason, message: str) -> Claim:
    if failure is None:
        return Claim(False, reason, message)
    return Claim(False, failure.reason, failure.message, is_stalled=failure.reason is not R.STARTING)


# --- Ready -------------------------------------------------------------------


def _ready(found: Findings, available: Claim) -> Claim:
    """Available, and what the spec asks for is what answers."""
    snapshot, rollout, target = found.snapshot, found.rollout, found.rollout.target
    if snapshot.conflicts:
        return _conflict(snapshot)
    if found.refusal is not None:
        return _refused(found.refusal)
    if rollout.failure is not None:
        return _broken(rollout.failure, R.ROLLING_OUT, "")
    if not available.holds:
        return available
    if rollout.candidate is not None:
        return Claim(False, R.ROLLING_OUT, f"Version {rollout.candidate.pinned.version} is being rolled out. {rollout.waits_for}".strip())
    if target.version is None and not _keeps_serving(found):
        return Claim(False, target.reason or R.STARTING, target.message, is_stalled=target.is_final)
    if not _is_applied(found):
        return Claim(False, R.ROLLING_OUT, "The gateway takes up its new configuration.")
    if target.version is not None and target.reason is not None:
        return Claim(True, target.reason, target.message)
    if rollout.is_asleep:
        return available
    assert rollout.stable is not None  # it is available
    return Claim(True, R.SERVING, f"Version {rollout.stable.pinned.version} takes all traffic.")


def _conflict(snapshot: Snapshot) -> Claim:
    taken = ", ".join(f"{key.kind} {key.name}" for key in snapshot.conflicts[:4])
    message = f"{taken} exists and belongs to somebody else. Rename or delete it, or give this deployment another name."
    return Claim(False, R.NAME_CONFLICT, message, is_stalled=True)


def _refused(refusal: Refusal) -> Claim:
    return Claim(False, R.REFUSED, refusal.sentence, is_stalled=True)


def _keeps_serving(found: Findings) -> bool:
    """What the spec asks for was withdrawn while it served, and nothing else may take its place: it serves on, Degraded."""
    stable, wanted = found.rollout.stable, found.snapshot.deployment.spec.model.version
    if stable is None or found.rollout.target.reason not in (R.NO_APPROVED_VERSION, R.WITHDRAWN):
        return False
    return wanted is None or wanted == stable.pinned.version


def _is_applied(found: Findings) -> bool:
    """The stable revision takes the traffic of every ready gateway."""
    snapshot, stable = found.snapshot, found.rollout.stable
    if stable is None or snapshot.config is None or snapshot.configured_stable != stable.name:
        return False
    return snapshot.applied_everywhere(snapshot.config.stable_since)


# --- Degraded ----------------------------------------------------------------


def _degraded(found: Findings, now: datetime) -> Claim:
    """It serves, but not as it should."""
    snapshot, stable = found.snapshot, found.rollout.stable
    if stable is None:
        return Claim(False, R.HEALTHY, "Nothing serves yet.")
    version = snapshot.version(stable.pinned.version)
    if version is not None and version.spec.approval in ("Withdrawn", "Rejected"):
        what = f"ModelVersion {version.metadata.name} is {version.spec.approval.lower()}"
        message = f"{what} and serves on, since no other may take its place. Approve another one, or train a better one."
        return Claim(True, R.WITHDRAWN, message)
    if found.flaws:
        return Claim(True, R.RUNTIME_VULNERABLE, found.flaws)
    if not stable.renders_as_trained:
        return Claim(True, R.PROMPT_MISMATCH, _prompt_mismatch(stable))
    failure = engine_failure(snapshot, stable, now)
    if failure is not None and failure.reason is not R.STARTING:
        return Claim(True, failure.reason, failure.message)
    return Claim(False, R.HEALTHY, "All is well.")


def _prompt_mismatch(stable: Revision) -> str:
    version = stable.pinned.version
    if stable.pinned.inherits_prompt:
        return (
            f"The engine makes other tokens of a prompt than the training of version {version} did: its evaluation says nothing of what is"
            " served. Serve it with the tokenizer and the chat template that it was trained with (engine.image, the files of the base)."
        )
    return (
        f"The prompt is not the one that version {version} was trained with: its evaluation says nothing of it."
        " Remove spec.prompt to inherit the version's."
    )


# --- the canary --------------------------------------------------------------


def _canary_healthy(found: Findings) -> Condition:
    """Of the running canary; where none runs, of the last one."""
    rollout, generation = found.rollout, found.snapshot.deployment.metadata.generation

    def said(holds: bool | None, reason: DeploymentReason, message: str) -> Condition:
        return conditions.condition(C.CANARY_HEALTHY, holds, reason, message, generation)

    if rollout.canary is not None:
        reason = R.CANARY_INCONCLUSIVE if rollout.canary.is_overdue else R.ANALYSING
        return said(None, reason, f"Version {rollout.canary.version}: {canaries.progress_text(rollout.canary)}")
    stable = rollout.stable
    stopped = [r for r in rollout.revisions if r.is_rejected and r.progress is not None and (stable is None or r.number > stable.number)]
    if stopped and stopped[-1].verdict is not None:
        return said(False, R.CANARY_FAILED, f"Version {stopped[-1].pinned.version}: {stopped[-1].verdict.message}")
    if stable is not None and stable.verdict is not None and stable.verdict.numbers:
        return said(True, R.CANARY_PASSED, f"Version {stable.pinned.version} was no worse than the one before it, step by step.")
    return said(None, R.NO_CANARY, "No canary runs.")


def _analysis_status(before: ModelDeploymentStatus, canary: Canary) -> AnalysisStatus:
    """As it was said last, unless a verdict changed or a tenth more requests came: not a write a second."""
    analysis = canary.analysis
    checks = tuple(
        CheckStatus(name=c.check.value, canary=c.canary, stable=c.stable, verdict=c.finding.value) for c in analysis.checks
    )  # fmt: skip
    now = AnalysisStatus(step=canary.progress.step + 1, requests=analysis.requests, verdict=analysis.finding.value, checks=checks)
    old, was = before.analysis, before.canary
    if old is None or was is None or (was.revision, old.step, old.verdict) != (canary.revision, now.step, now.verdict):
        return now
    is_alike = [(c.name, c.verdict) for c in old.checks] == [(c.name, c.verdict) for c in now.checks]
    return old if is_alike and old.requests <= now.requests < max(1.1 * old.requests, old.requests + 1) else now


# --- revisions ---------------------------------------------------------------


def _stable_status(snapshot: Snapshot, stable: Revision) -> RevisionStatus:
    verdict = stable.verdict
    probes = f"{verdict.probes} probe items answered as evaluated." if verdict is not None and verdict.probes else ""
    return RevisionStatus(
        version=stable.pinned.version,
        revision=stable.name,
        ready_replicas=snapshot.ready_replicas(stable.pinned.engine_hash),
        since=verdict.at if verdict is not None else None,
        startup=startup_status(snapshot, stable),
        message=probes,
    )


def _canary_status(found: Findings) -> RevisionStatus:
    candidate, rollout = found.rollout.candidate, found.rollout
    assert candidate is not None  # asked for only then
    before = found.snapshot.deployment.status.canary
    since = before.since if before is not None and before.revision == candidate.name else candidate.created_at
    return RevisionStatus(
        version=candidate.pinned.version,
        revision=candidate.name,
        weight=rollout.canary.weight if rollout.canary is not None else None,
        ready_replicas=found.snapshot.ready_replicas(candidate.pinned.engine_hash),
        since=since,
        startup=startup_status(found.snapshot, candidate),
        message=conditions.shortened(rollout.failure.message if rollout.failure is not None else rollout.waits_for, 512),
    )


def _selector(snapshot: Snapshot, stable: Revision) -> str:
    pairs = serving_selector(snapshot.name, stable.pinned).items()
    return ",".join(f"{label}={value}" for label, value in sorted(pairs))
