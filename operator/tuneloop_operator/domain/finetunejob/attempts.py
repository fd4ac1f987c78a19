"""What follows from a stage's attempts so far: it is done, it goes on, another attempt is due, or it is over.

Attempts are counted from the Jobs, each time anew. What the user must change is never tried again; what nobody is to blame for is,
within bounds: a failed node and a stalled step up to `maxRestarts`, too little memory once, an interruption (by SIGTERM, or by a store or
hub that does not answer) as long as it got further.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.domain import times
from tuneloop_operator.domain.finetunejob.outcomes import Outcome, ended_at, outcome, result
from tuneloop_operator.domain.finetunejob.snapshot import StageRun
from tuneloop_trainer.contract import Stage, StageResult

READS = 2
"""Times that a stage that is done is asked for its result."""
FIRST_DELAY = 10.0
LONGEST_DELAY = 300.0
"""Seconds before a counted restart: doubled with each, so that a broken node is not hammered."""

FAILURES = {
    Outcome.STALLED: "made no step for too long",
    Outcome.LOST: "lost its pod",
    Outcome.INTERRUPTED: "was interrupted before it got further",
    Outcome.UNAVAILABLE: "could not reach what it reads or writes",
}


@dataclass(frozen=True)
class Done:
    run: StageRun
    result: StageResult


@dataclass(frozen=True)
class Active:
    run: StageRun
    is_running: bool


@dataclass(frozen=True)
class Due:
    """Another attempt."""

    not_before: datetime | None = None
    with_devices: bool = True
    because: str = ""


@dataclass(frozen=True)
class Over:
    """No further attempt."""

    run: StageRun
    outcome: Outcome
    reason: JobReason
    message: str


Verdict = Done | Active | Due | Over


def judge(stage: Stage, runs: tuple[StageRun, ...], max_restarts: int, reached: int = 0) -> Verdict:
    """The verdict over attempts of one stage, ordered by number; `reached` is the step that training has reached by now."""
    if not runs:
        return Due()
    last = runs[-1]
    said = result(last)
    how = outcome(last)
    if how is Outcome.DONE and said is not None:
        return Done(last, said)
    if how.is_active:
        return Active(last, how is Outcome.RUNNING)
    return _after(stage, runs, how, said, max_restarts, reached)


def out_of_memory_attempts(runs: tuple[StageRun, ...]) -> int:
    return sum(outcome(run) is Outcome.OUT_OF_MEMORY for run in runs)


def _after(stage: Stage, runs: tuple[StageRun, ...], how: Outcome, said: StageResult | None, max_restarts: int, reached: int) -> Verdict:
    """After an attempt that ended without a result."""
    last, told = runs[-1], said.message if said is not None else ""
    match how:
        case Outcome.UNREADABLE:
            if sum(outcome(run) is Outcome.UNREADABLE for run in runs) < READS:
                return Due(with_devices=False, because="The result was lost with its pod, and is read again.")
            return Over(last, how, JobReason.INTERNAL_ERROR, f"Stage {stage.value} ended twice without a result. Look at the pods' logs.")
        case Outcome.INVALID:
            return Over(last, how, _told_reason(said, JobReason.DATA_INVALID), told or f"Stage {stage.value} refused its input.")
        case Outcome.OUT_OF_MEMORY:
            return _after_out_of_memory(stage, runs, told)
        case Outcome.NON_FINITE:
            fallback = "The loss is no longer finite. Lower training.learningRate, or look for broken rows."
            return Over(last, how, _told_reason(said, JobReason.NON_FINITE_LOSS), told or fallback)
        case Outcome.STALLED | Outcome.LOST | Outcome.INTERRUPTED | Outcome.UNAVAILABLE:
            return _after_failure(stage, runs, how, max_restarts, reached)
    return Over(last, how, JobReason.INTERNAL_ERROR, told or f"Stage {stage.value} failed without a reason. Look at the pod's log.")


def _after_out_of_memory(stage: Stage, runs: tuple[StageRun, ...], told: str) -> Verdict:
    if out_of_memory_attempts(runs) < 2:
        return Due(because="The attempt ran out of memory; once more, with half the micro-batch." if stage is Stage.TRAIN else "")
    remedy = "Raise memory in compute.pod.resources, or lower training.maxSequenceLength."
    if stage is Stage.PREPARE:
        remedy = "Give the prepare stage less data, or nodes with more memory."
    how = ", the second time with half the micro-batch" if stage is Stage.TRAIN else ""
    sentence = f"Stage {stage.value} ran out of memory twice{how}."
    return Over(runs[-1], Outcome.OUT_OF_MEMORY, JobReason.OUT_OF_MEMORY, f"{sentence} {remedy} {told}".strip())


def _after_failure(stage: Stage, runs: tuple[StageRun, ...], how: Outcome, max_restarts: int, reached: int) -> Verdict:
    last = runs[-1]
    steps = [*(run.from_step for run in runs[1:]), reached]
    counted = [run for run, step in zip(runs, steps, strict=True) if _counts(run, step)]
    if last not in counted:
        return Due(because=f"Stage {stage.value} was interrupted, and goes on where it was saved.")
    if len(counted) > max_restarts:
        sentence = f"Stage {stage.value} {FAILURES[how]}; that makes {len(counted)} failures, and runPolicy.maxRestarts is {max_restarts}."
        if how is Outcome.UNAVAILABLE and (said := result(last)) is not None:
            sentence = f"{said.message} {sentence}"
        return Over(last, how, _final_reason(last, how), sentence)
    delay = min(FIRST_DELAY * 2 ** (len(counted) - 1), LONGEST_DELAY)
    ended = times.parse(ended_at(last))
    because = f"Attempt {last.number} of stage {stage.value} failed ({how.value}); restart {len(counted)} of {max_restarts}."
    return Due(not_before=ended + timedelta(seconds=delay) if ended is not None else None, because=because)


def _counts(run: StageRun, step_after: int) -> bool:
    """Whether an attempt uses up a restart: not if it was suspended, nor if it was interrupted after having got further."""
    how = outcome(run)
    if how in (Outcome.INTERRUPTED, Outcome.UNAVAILABLE):
        said = result(run)
        saved = said.train.step if said is not None and said.train is not None else 0
        return not run.job.spec.suspend and max(saved, step_after) <= run.from_step
    return how in (Outcome.LOST, Outcome.STALLED) and not run.job.spec.suspend


def _final_reason(run: StageRun, how: Outcome) -> JobReason:
    if how is Outcome.UNAVAILABLE:
        return _told_reason(result(run), JobReason.RESTART_LIMIT)
    return JobReason.STEP_STALLED if how is Outcome.STALLED else JobReason.RESTART_LIMIT


def _told_reason(said: StageResult | None, otherwise: JobReason) -> JobReason:
    return JobReason(said.reason.value) if said is not None and said.reason is not None else otherwise
