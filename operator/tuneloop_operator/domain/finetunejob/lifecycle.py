"""What lies above the stages: suspension, the deadline, names that somebody else has taken, and cleaning up after the end."""

from __future__ import annotations

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.api.finetunejob import FineTuneJob, FineTuneJobStatus
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Decision, refusal_of
from tuneloop_operator.domain.finetunejob.case import Case, Standing
from tuneloop_operator.domain.finetunejob.outcomes import outcome
from tuneloop_operator.domain.finetunejob.resolve import config_digest
from tuneloop_operator.domain.finetunejob.snapshot import FineTuneJobSnapshot
from tuneloop_operator.render import training
from tuneloop_trainer.contract import Stage

CONFLICT_SECONDS = 30.0


def name_conflict(case: Case) -> Standing | None:
    if not case.snapshot.conflicts:
        return None
    listed = ", ".join(f"{key.kind} {key.name}" for key in case.snapshot.conflicts)
    message = f"{listed} exists and belongs to somebody else; it is left alone. Remove it, or rename this job."
    return Standing("Stalled", JobReason.NAME_CONFLICT, message, is_stalled=True, succeeded=False, requeue_after=CONFLICT_SECONDS)


def unless_refused(case: Case, standing: Standing) -> Standing:
    """What goes on does not go on where the API server refuses what it needs; it is tried again all the same."""
    refusal = refusal_of(case.snapshot.refusals, (*case.create, *case.apply))
    if refusal is None or standing.ended:
        return standing
    return Standing("Stalled", JobReason.REFUSED, refusal.sentence, is_stalled=True, succeeded=False, requeue_after=CONFLICT_SECONDS)


def suspension(case: Case) -> Standing | None:
    """Every Job that has not ended is suspended: Kubernetes sends SIGTERM, the trainer saves, the devices are free."""
    wanted = case.job.spec.run_policy.suspend
    _set_suspended(case, wanted)
    if not wanted:
        return None
    step = case.status.progress.display if case.status.progress is not None else ""
    at = f" at step {step}" if step else ""
    return Standing("Suspended", JobReason.SUSPENDED, f"Suspended{at}. Set runPolicy.suspend to false to go on.")


def deadline(case: Case) -> Standing | None:
    limit = case.job.spec.run_policy.active_deadline_seconds
    if limit is None or case.is_done(Stage.TRAIN) or case.status.running_seconds < limit:
        return None
    message = f"Training ran for {case.status.running_seconds} s; runPolicy.activeDeadlineSeconds is {limit}."
    return Standing("Failed", JobReason.DEADLINE_EXCEEDED, message, is_stalled=True, succeeded=False, ended=True)


def stop_jobs(case: Case) -> None:
    """A job that has ended leaves nothing running."""
    _set_suspended(case, True)


def after_the_end(snapshot: FineTuneJobSnapshot, case: Case) -> Decision:
    """Nothing changes any more, but that children go when their time is over."""
    status = _with_generation(case)
    stop_jobs(case)
    ttl = snapshot.job.spec.run_policy.ttl_seconds_after_finished
    if ttl is None or not snapshot.children:
        return Decision(status=status, apply=tuple(case.apply))
    left = ttl - times.seconds_between(snapshot.job.status.finished_at, case.now)
    if left > 0:
        return Decision(status=status, apply=tuple(case.apply), requeue_after=left)
    return Decision(status=status, delete=snapshot.children)


def is_another_job(job: FineTuneJob) -> bool:
    """Whether a job that ended without training has been edited since: then it is to be done."""
    return job.status.started_at is None and config_digest(job.spec) != job.status.resolved.config_digest


def started_over(job: FineTuneJob) -> FineTuneJobStatus:
    return FineTuneJobStatus(conditions=job.status.conditions, prepare_runs=job.status.prepare_runs)


def _with_generation(case: Case) -> dict[str, object]:
    generation = case.job.metadata.generation
    conditions = tuple(old.model_copy(update={"observed_generation": generation}) for old in case.status.conditions)
    case.learn(observed_generation=generation, conditions=conditions)
    return case.status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _set_suspended(case: Case, wanted: bool) -> None:
    """Only Jobs that have not ended can be suspended, and only a changed one is written."""
    active = [run for run in case.snapshot.runs if outcome(run).is_active]
    ours = {run.job.metadata.name for run in active}
    case.apply = [manifest for manifest in case.apply if manifest["metadata"]["name"] not in ours]
    case.apply += [training.suspended(run.manifest, wanted) for run in active if run.job.spec.suspend != wanted]
