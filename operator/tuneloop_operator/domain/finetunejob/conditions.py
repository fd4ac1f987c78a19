"""A FineTuneJob's conditions: five that are always there, three that are there only when they hold."""

from __future__ import annotations

from tuneloop_operator.api.conditions import JobCondition, JobReason
from tuneloop_operator.api.types import Condition
from tuneloop_operator.domain.conditions import condition
from tuneloop_operator.domain.finetunejob.case import STAGES, Case, Standing
from tuneloop_operator.domain.finetunejob.endings import VERDICT_REASONS
from tuneloop_operator.domain.finetunejob.findings import verdict_sentence
from tuneloop_trainer.contract import Stage

STAGE_CONDITIONS = {
    Stage.PREPARE: JobCondition.DATA_READY,
    Stage.TRAIN: JobCondition.TRAINED,
    Stage.PACKAGE: JobCondition.PACKAGED,
    Stage.EVALUATE: JobCondition.EVALUATED,
}


def conditions(case: Case, standing: Standing) -> tuple[Condition, ...]:
    """In a fixed order, without times."""
    generation = case.job.metadata.generation
    found = [condition(JobCondition.SUCCEEDED, standing.succeeded, standing.reason, standing.message, generation)]
    current = case.stage
    reached = STAGES.index(current) if current is not None else len(STAGES)
    found += [_of_stage(case, standing, stage, index - reached) for index, stage in enumerate(STAGES)]
    return (*found, *_only_when_true(standing, generation))


def _of_stage(case: Case, standing: Standing, stage: Stage, ahead: int) -> Condition:
    """`ahead`: 0 is the stage where the job stands, below it what is done, above it what is still to come."""
    type_, generation = STAGE_CONDITIONS[stage], case.job.metadata.generation
    if standing.reason is JobReason.ALREADY_TRAINED:
        return condition(type_, True, JobReason.ALREADY_TRAINED, "", generation)
    if ahead == 0:
        # False only where it failed or is refused; while it goes on nobody knows.
        return condition(type_, False if standing.is_stalled else None, standing.reason, standing.message, generation)
    if ahead > 0:
        return condition(type_, None, JobReason.PENDING, "", generation)
    if stage is Stage.EVALUATE and case.status.evaluation is not None:
        reason = VERDICT_REASONS.get(case.status.evaluation.verdict, JobReason.COMPLETED)
        return condition(type_, True, reason, verdict_sentence(case.status.evaluation), generation)
    return condition(type_, True, JobReason.COMPLETED, "", generation)


def _only_when_true(standing: Standing, generation: int) -> list[Condition]:
    if standing.is_stalled:
        return [condition(JobCondition.STALLED, True, standing.reason, standing.message, generation)]
    if standing.ended:
        return []
    found = [condition(JobCondition.RECONCILING, True, standing.reason, standing.message, generation)]
    if standing.reason is JobReason.SUSPENDED:
        found.insert(0, condition(JobCondition.SUSPENDED, True, standing.reason, standing.message, generation))
    return found
