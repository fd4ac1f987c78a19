"""When a better model is trained: an alarm with evidence, effect, data and a gate set of the new domain, within cooldown and budget.

Two passes make one job. The first writes episode, name and counters into the status, under a precondition; the second makes the job, by
POST under that name. So a job is never made twice, nor made without being counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from tuneloop_operator.api.conditions import DeploymentCondition, DeploymentReason, JobCondition, JobReason
from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.api.modeldeployment import Retraining, RetrainingStatus
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.api.types import Condition, ConditionStatus
from tuneloop_operator.domain import conditions, times
from tuneloop_operator.domain.decision import Manifest, refusal_of
from tuneloop_operator.domain.modeldeployment.drift import Epoch, another_version_takes_over, is_latched
from tuneloop_operator.domain.modeldeployment.rollouts import Rollout
from tuneloop_operator.domain.modeldeployment.snapshot import Evidence, Snapshot
from tuneloop_operator.domain.modeldeployment.targets import rejection
from tuneloop_operator.render import names
from tuneloop_operator.render.retraining import NoTemplate, new_domain_items, render_retraining, retraining_spec

R = DeploymentReason
GATES_FAILED = (JobReason.GATE_FAILED, JobReason.GATE_INCONCLUSIVE)


@dataclass(frozen=True)
class Plan:
    """What is said and done about retraining in this pass."""

    needed: bool | None
    reason: DeploymentReason
    message: str
    status: RetrainingStatus
    create: tuple[Manifest, ...] = ()
    again_in: float | None = None
    """Seconds until something changes by itself."""


@dataclass(frozen=True)
class _Case:
    """The parts that every rule looks at."""

    snapshot: Snapshot
    retraining: Retraining
    status: RetrainingStatus
    stable: ModelVersion | None
    evidence: Evidence | None
    now: datetime

    def says(self, reason: DeploymentReason, message: str, again_in: float | None = None) -> Plan:
        """RetrainingNeeded=True, and why nothing trains."""
        return Plan(True, reason, message, self.status.model_copy(update={"blocked_by": reason.value}), (), again_in)


def plan_retraining(snapshot: Snapshot, rollout: Rollout, evidence: Evidence | None, epoch: Epoch, now: datetime) -> Plan:
    """The last job first, then whether another one is due."""
    status = _counted_rows(snapshot, rollout, evidence, epoch).model_copy(update={"epoch": epoch.number, "blocked_by": None})
    retraining = snapshot.deployment.spec.retraining
    if retraining is None:
        return Plan(False, R.NOT_NEEDED, "Nothing is retrained: spec.retraining is not set.", status)
    stable = snapshot.version(rollout.stable.pinned.version) if rollout.stable is not None else None
    case = _Case(snapshot, retraining, status, stable, evidence, now)
    said = _last_job(case, epoch)
    if said is not None:
        return said
    if epoch.is_new or not is_latched(snapshot, evidence):
        return _not_needed(case)
    return _due(case)


def _counted_rows(snapshot: Snapshot, rollout: Rollout, evidence: Evidence | None, epoch: Epoch) -> RetrainingStatus:
    """What is no longer new: an epoch begins without rows, and a version that takes over within one leaves those that are there behind."""
    before = snapshot.deployment.status.retraining
    if epoch.is_new or before.epoch != epoch.number:
        return before.model_copy(update={"last_rows": 0, "promoted_rows": 0})
    if evidence is None or not another_version_takes_over(snapshot, rollout):
        return before
    return before.model_copy(update={"promoted_rows": evidence.labelled_train})


def _not_needed(case: _Case) -> Plan:
    drift = case.snapshot.deployment.spec.monitoring.drift
    if drift is not None and case.evidence is None:
        return Plan(None, R.NO_DATA, "Whether a retraining is needed is not known without drift evidence.", case.status)
    return Plan(False, R.NOT_NEEDED, "No drift alarm stands.", case.status)


# --- the last job ------------------------------------------------------------


def _last_job(case: _Case, epoch: Epoch) -> Plan | None:
    """What there is to say and do about the job of the last episode; None where it is over and another may follow."""
    name = case.status.last_job
    if name is None:
        return None
    job = next((job for job in case.snapshot.jobs if job.metadata.name == name), None)
    if job is None and case.status.last_job_uid is None:
        return _make_job(case, name)
    if job is not None:
        case = replace(case, status=case.status.model_copy(update={"last_job_uid": job.metadata.uid}))
        if not _is_over(job):
            return _running_job(case, job)
    if epoch.is_new or not is_latched(case.snapshot, case.evidence):
        return replace(_not_needed(case), status=case.status)
    if job is None:
        return _after_failure(case, R.RETRAINING_FAILED, f"FineTuneJob {name} was deleted.")
    return _ended_job(case, job)


def _make_job(case: _Case, name: str) -> Plan:
    """The second pass: counted already, so it is made, whatever the evidence says by now."""
    if case.stable is None:
        return case.says(R.NO_TEMPLATE, "The ModelVersion that is served was deleted: nothing says how it was trained.")
    try:
        manifest = render_retraining(case.snapshot.deployment, case.stable, name, case.status)
    except NoTemplate as error:
        return case.says(R.NO_TEMPLATE, str(error))
    refusal = refusal_of(case.snapshot.refusals, (manifest,))
    if refusal is not None:
        return replace(case.says(R.REFUSED, refusal.sentence), create=(manifest,))
    return replace(case.says(R.RETRAINING, f"FineTuneJob {name} is being made."), create=(manifest,), again_in=1.0)


def _is_over(job: FineTuneJob) -> bool:
    return conditions.is_true(job.status.conditions, JobCondition.SUCCEEDED) or job.status.phase == "Failed"


def _running_job(case: _Case, job: FineTuneJob) -> Plan:
    name = job.metadata.name
    stalled = conditions.find(job.status.conditions, JobCondition.STALLED)
    if stalled is not None and stalled.status is ConditionStatus.TRUE:
        return case.says(R.RETRAINING_FAILED, f"FineTuneJob {name} is stalled ({stalled.reason}): {stalled.message}")
    if job.spec.run_policy.suspend and job.status.started_at is None and case.retraining.approval == "Manual":
        return case.says(R.AWAITING_APPROVAL, f"FineTuneJob {name} waits: set its spec.runPolicy.suspend to false to approve it.")
    return case.says(R.RETRAINING, f"FineTuneJob {name} trains a new version.")


def _ended_job(case: _Case, job: FineTuneJob) -> Plan | None:
    """Over, while the alarm still stands."""
    name, succeeded = job.metadata.name, conditions.find(job.status.conditions, JobCondition.SUCCEEDED)
    if succeeded is None or succeeded.status is not ConditionStatus.TRUE:
        why = succeeded.message if succeeded is not None else ""
        return _after_failure(case, R.RETRAINING_FAILED, f"FineTuneJob {name} failed: {why}")
    if succeeded.reason in GATES_FAILED:
        return _after_failure(case, R.GATE_FAILED, f"FineTuneJob {name} did not pass its gates ({succeeded.reason}): {succeeded.message}")
    return _new_version(case, job)


def _new_version(case: _Case, job: FineTuneJob) -> Plan | None:
    """The job made a version: on its way into service, or held up."""
    name, number = job.metadata.name, job.status.model_version
    version = case.snapshot.version(number) if number is not None else None
    if version is None:
        return case.says(R.RETRAINING, f"FineTuneJob {name} is done; its version is awaited.")
    if case.stable is not None and case.stable.spec.version == version.spec.version:
        return None  # it serves already: this alarm is a later one
    if version.spec.approval == "Pending":
        message = f"ModelVersion {version.metadata.name} of FineTuneJob {name} waits for spec.approval: Approved."
        succeeded = conditions.find(job.status.conditions, JobCondition.SUCCEEDED)
        if succeeded is not None and succeeded.reason == JobReason.SUITE_EXHAUSTED:
            message = f"FineTuneJob {name} ended {succeeded.reason}: {succeeded.message}"
        return case.says(R.AWAITING_APPROVAL, message)
    if version.spec.approval != "Approved":
        message = f"ModelVersion {version.metadata.name} of FineTuneJob {name} is {version.spec.approval.lower()}."
        return _after_failure(case, R.RETRAINING_FAILED, message)
    rejected = rejection(case.snapshot, version)
    if rejected is not None and rejected.verdict is not None:
        message = f"Version {number} of FineTuneJob {name} was rejected here ({rejected.verdict.reason}): {rejected.verdict.message}"
        return _after_failure(case, R.RETRAINING_FAILED, message)
    pin = case.snapshot.deployment.spec.model.version
    if pin is not None and pin != number:
        return case.says(R.AWAITING_APPROVAL, f"Version {number} passed its gates, but spec.model.version is {pin}: change or remove it.")
    return case.says(R.RETRAINING, f"Version {number} of FineTuneJob {name} passed its gates and is being rolled out.")


def _after_failure(case: _Case, reason: DeploymentReason, message: str) -> Plan | None:
    """Says so until the cooldown is over; then another episode may be tried."""
    left = _cooldown_left(case)
    if left <= 0:
        return None
    return case.says(reason, f"{message} Another attempt is possible after {_until(case)}.", left)


# --- whether another is due --------------------------------------------------


def _due(case: _Case) -> Plan:
    """An alarm stands and no job is under way: every rule in turn, the first that is not met is named."""
    if case.stable is None:
        return case.says(R.NO_TEMPLATE, "The ModelVersion that is served was deleted: nothing says how it was trained.")
    if case.evidence is None:
        return case.says(R.NO_DATA, "An alarm stands, but nobody answers for evidence and labelled rows.")
    try:
        spec = retraining_spec(case.snapshot.deployment, case.stable, str(case.status.epoch))
    except NoTemplate as error:
        return case.says(R.NO_TEMPLATE, str(error))
    return _blocked_by_data(case, case.evidence, new_domain_items(spec, case.snapshot.name)) or _blocked_by_budget(case) or _trigger(case)


def _blocked_by_data(case: _Case, evidence: Evidence, gate_items: int) -> Plan | None:
    drift = case.snapshot.deployment.spec.monitoring.drift
    minimum, wanted = float(drift.minimum_effect) if drift is not None else 0.0, case.retraining.min_new_examples
    if evidence.effect < minimum:
        message = f"The inputs changed, but by too little (effect below monitoring.drift.minimumEffect {minimum:g}) to train for."
        return case.says(R.EFFECT_TOO_SMALL, message)
    new = max(evidence.labelled_train - case.status.promoted_rows, 0)
    if new < wanted:
        return case.says(R.COLLECTING_DATA, f"{new} of {wanted} curated rows to train on. {_HOW_TO_LABEL}")
    if _failed_its_gates(case) and evidence.labelled_train <= case.status.last_rows:
        message = f"FineTuneJob {case.status.last_job} did not pass its gates with the same {case.status.last_rows} curated rows."
        return case.says(R.COLLECTING_DATA, f"{message} {_HOW_TO_LABEL}")
    if evidence.labelled_gate < gate_items:
        message = f"{evidence.labelled_gate} of {gate_items} labelled items to gate on. {_HOW_TO_LABEL}"
        return case.says(R.NEEDS_LABELS, message)
    return None


def _failed_its_gates(case: _Case) -> bool:
    """The last job: the same rows and seed would make the same model again."""
    job = next((job for job in case.snapshot.jobs if job.metadata.name == case.status.last_job), None)
    succeeded = conditions.find(job.status.conditions, JobCondition.SUCCEEDED) if job is not None else None
    return succeeded is not None and succeeded.reason in GATES_FAILED


_HOW_TO_LABEL = "Label captured traffic: tuneloop label export --uniform, then tuneloop label import."


def _blocked_by_budget(case: _Case) -> Plan | None:
    if _runs_this_month(case) >= case.retraining.max_runs_per_month:
        message = f"retraining.maxRunsPerMonth is {case.retraining.max_runs_per_month}, and so many were made in {_month(case.now)} (UTC)."
        return case.says(R.BUDGET_EXHAUSTED, message, (_next_month(case.now) - case.now).total_seconds())
    left = _cooldown_left(case)
    if left > 0:
        return case.says(R.COOLDOWN, f"retraining.cooldownSeconds is not over before {_until(case)}.", left)
    return None


def _trigger(case: _Case) -> Plan:
    """The first pass: written before the job is made."""
    episode = case.status.episode + 1
    name = names.retraining_job(case.snapshot.name, case.snapshot.deployment.metadata.uid, episode)
    counted = case.status.model_copy(
        update={
            "episode": episode,
            "last_trigger": "Drift",
            "last_triggered_at": times.to_text(case.now),
            "last_job": name,
            "last_job_uid": None,
            "last_rows": case.evidence.labelled_train if case.evidence is not None else 0,
            "runs_this_month": _runs_this_month(case) + 1,
            "month": _month(case.now),
            "blocked_by": R.RETRAINING.value,
        }
    )
    return Plan(True, R.RETRAINING, f"FineTuneJob {name} is being made.", counted, (), 0.0)


def _runs_this_month(case: _Case) -> int:
    return case.status.runs_this_month if case.status.month == _month(case.now) else 0


def _month(now: datetime) -> str:
    return now.strftime("%Y-%m")


def _next_month(now: datetime) -> datetime:
    return (now.replace(day=1, hour=0, minute=0, second=0, microsecond=0) + timedelta(days=32)).replace(day=1)


def _cooldown_end(case: _Case) -> datetime | None:
    last = times.parse(case.status.last_triggered_at)
    return None if last is None else last + timedelta(seconds=case.retraining.cooldown_seconds)


def _cooldown_left(case: _Case) -> float:
    end = _cooldown_end(case)
    return 0.0 if end is None else (end - case.now).total_seconds()


def _until(case: _Case) -> str:
    end = _cooldown_end(case)
    return times.to_text(end) if end is not None else ""


# --- what the status says ----------------------------------------------------


def retraining_condition(snapshot: Snapshot, plan: Plan) -> Condition:
    generation = snapshot.deployment.metadata.generation
    return conditions.condition(DeploymentCondition.RETRAINING_NEEDED, plan.needed, plan.reason, plan.message, generation)
