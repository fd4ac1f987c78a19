"""The estimate in a job's life: made when prepare is done, a reason not to start, and corrected by the first steps' speed."""

from __future__ import annotations

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.domain.finetunejob import sizing
from tuneloop_operator.domain.finetunejob.attempts import Done
from tuneloop_operator.domain.finetunejob.case import Case, Standing
from tuneloop_operator.render.names import IGNORE_ESTIMATE_ANNOTATION
from tuneloop_trainer.contract import PrepareSummary, Progress, Stage

STEPS = 20
"""After so many steps the measured speed is believed instead of the table's."""


def estimate(case: Case, summary: PrepareSummary) -> None:
    """Writes the status; nothing where the model is of a shape that no formula is known for."""
    found = _sizing(case, summary)
    case.learn(estimate=found.estimate if found is not None else None)


def fits(case: Case) -> Standing | None:
    """Stalled before any training Job is made where the estimate is above what there is."""
    verdict = case.verdict(Stage.PREPARE)
    if case.status.started_at is not None or not isinstance(verdict, Done) or verdict.result.prepare is None:
        return None
    if case.job.metadata.annotations.get(IGNORE_ESTIMATE_ANNOTATION) == "true":
        return None
    found = _sizing(case, verdict.result.prepare)
    if found is None or found.problem is None:
        return None
    return Standing("Stalled", JobReason.DOES_NOT_FIT, found.problem, is_stalled=True, succeeded=False)


def measure_speed(case: Case, progress: Progress) -> None:
    """Once: hours of the whole run, extrapolated from the steps so far, and how far the table was off."""
    known = case.status.estimate
    left = progress.max_steps - progress.step
    if known is None or known.hours_basis == "Measured" or progress.step < STEPS or left <= 0 or progress.remaining_seconds is None:
        return
    hours = max(progress.remaining_seconds, 0.0) / left * progress.max_steps / 3600
    text, cost = sizing.number(hours), sizing.cost(case.job, hours)
    measured = {"hours_from": text, "hours_to": text, "hours_basis": "Measured", "cost_from": cost, "cost_to": cost}
    measured["hours_ratio"] = sizing.hours_ratio(known, hours)
    case.learn(estimate=known.model_copy(update=measured))


def _sizing(case: Case, summary: PrepareSummary) -> sizing.Sizing | None:
    facts = sizing.facts_of(summary)
    return sizing.size(case.job, case.config(), facts, case.settings) if facts is not None else None
