"""Decides about FineTuneJobs: prepare, train, package, evaluate, and the version at the end."""

from __future__ import annotations

from datetime import datetime

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.domain import times
from tuneloop_operator.domain.conditions import shortened, with_times
from tuneloop_operator.domain.decision import Decision, EventNote, Invalid, WaitingFor
from tuneloop_operator.domain.finetunejob import endings, fits, lifecycle, stages
from tuneloop_operator.domain.finetunejob.case import Case, Standing
from tuneloop_operator.domain.finetunejob.conditions import conditions
from tuneloop_operator.domain.finetunejob.folding import fold
from tuneloop_operator.domain.finetunejob.resolve import resolve
from tuneloop_operator.domain.finetunejob.snapshot import FineTuneJobSnapshot, StageRun
from tuneloop_operator.settings import Settings

__all__ = ["FineTuneJobSnapshot", "StageRun", "decide"]

POLICIES = (
    lifecycle.name_conflict,
    lifecycle.suspension,
    lifecycle.deadline,
    stages.prepare,
    endings.already_trained,
    fits.fits,
    stages.train,
    stages.package,
    endings.baseline_moved,
    stages.evaluate,
    endings.version,
)
"""Asked in this order; the first that says where the job stands ends the pass."""


def decide(snapshot: FineTuneJobSnapshot, settings: Settings, now: datetime) -> Decision:
    """The next pass's outcome: the same for the same snapshot, and nothing new for its own."""
    case = Case(snapshot, settings, now, snapshot.job.status)
    if snapshot.job.metadata.deletion_timestamp is not None:
        return Decision(status=_dump(case))
    if snapshot.job.status.finished_at is not None:
        if not lifecycle.is_another_job(snapshot.job):
            return lifecycle.after_the_end(snapshot, case)
        case.status = lifecycle.started_over(snapshot.job)
    return _conclude(case, lifecycle.unless_refused(case, _standing(case)))


def _standing(case: Case) -> Standing:
    try:
        case.learn(resolved=resolve(case.snapshot, case.settings))
    except Invalid as problem:
        return Standing("Stalled", JobReason(problem.reason), problem.message, is_stalled=True, succeeded=False)
    except WaitingFor as wait:
        return Standing("Pending", JobReason(wait.reason), wait.message, is_problem=True, requeue_after=wait.seconds)
    fold(case)
    for policy in POLICIES:
        if (standing := policy(case)) is not None:
            return standing
    raise AssertionError("the last policy always says where the job stands")


def _conclude(case: Case, standing: Standing) -> Decision:
    """Status and events of where the job stands."""
    if standing.ended:
        lifecycle.stop_jobs(case)
        case.learn(finished_at=times.to_text(case.now))
    before = case.job.status
    case.learn(
        observed_generation=case.job.metadata.generation,
        phase=standing.phase,
        message=shortened(standing.message),
        conditions=with_times(before.conditions, conditions(case, standing), case.now),
    )
    return Decision(
        status=_dump(case),
        create=tuple(case.create),
        apply=tuple(case.apply),
        delete=tuple(case.delete),
        events=_events(case, standing),
        requeue_after=standing.requeue_after,
    )


def _events(case: Case, standing: Standing) -> tuple[EventNote, ...]:
    """One where the phase or the reason is another than before."""
    before = next((old for old in case.job.status.conditions if old.type == "Succeeded"), None)
    if before is not None and before.reason == standing.reason.value and case.job.status.phase == standing.phase:
        return ()
    is_warning = standing.is_stalled or standing.is_problem
    return (EventNote("Warning" if is_warning else "Normal", standing.reason.value, shortened(standing.message)),)


def _dump(case: Case) -> dict[str, object]:
    return case.status.model_dump(mode="json", by_alias=True, exclude_none=True)
