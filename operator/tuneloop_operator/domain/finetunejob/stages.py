"""The stages in their order: each policy says where the job stands, or None where nothing keeps the next one back."""

from __future__ import annotations

from datetime import datetime

from tuneloop_operator.api.conditions import JobReason
from tuneloop_operator.domain import times
from tuneloop_operator.domain.finetunejob import elastic
from tuneloop_operator.domain.finetunejob.attempts import Active, Done, Due, Over, judge
from tuneloop_operator.domain.finetunejob.blockers import blocker, claim_missing
from tuneloop_operator.domain.finetunejob.case import Case, Standing
from tuneloop_operator.domain.finetunejob.outcomes import ended_at, outcome
from tuneloop_operator.domain.finetunejob.snapshot import StageRun
from tuneloop_trainer.contract import Stage

LOOK_AGAIN = 300.0
"""Seconds between looks at data that was refused, and at most between looks at a Job that does not run."""
CLAIM_SECONDS = 15.0
PHASES = {Stage.PREPARE: "Preparing", Stage.TRAIN: "Training", Stage.PACKAGE: "Packaging", Stage.EVALUATE: "Evaluating"}
REASONS = {
    Stage.PREPARE: JobReason.PREPARING,
    Stage.TRAIN: JobReason.TRAINING,
    Stage.PACKAGE: JobReason.PACKAGING,
    Stage.EVALUATE: JobReason.EVALUATING,
}
DOING = {
    Stage.PREPARE: "Data and base model are being read.",
    Stage.TRAIN: "The model is being trained.",
    Stage.PACKAGE: "The model is being packaged.",
    Stage.EVALUATE: "The packaged model is being compared with its baseline.",
}


def prepare(case: Case) -> Standing | None:
    """Data and base model, before any device is taken. What it refuses is looked at again every few minutes."""
    if case.is_settled(Stage.PREPARE):
        return None
    _replace_outdated(case)
    refused = _refusal(case)
    verdict = case.verdict(Stage.PREPARE)
    if isinstance(verdict, Done):
        return None
    if isinstance(verdict, Over):
        return _refused(case, verdict)
    if isinstance(verdict, Due) and case.snapshot.missing_claims:
        missing = claim_missing(case.snapshot.missing_claims)
        return Standing("Pending", missing.reason, missing.message, is_problem=True, requeue_after=CLAIM_SECONDS)
    standing = advance(case, Stage.PREPARE, verdict)
    return standing if refused is None else refused  # it stays refused until a new look says otherwise


def train(case: Case) -> Standing | None:
    if case.is_settled(Stage.TRAIN):
        return None
    verdict = case.verdict(Stage.TRAIN)
    if isinstance(verdict, Done):
        return None
    if case.status.started_at is None:
        case.learn(started_at=times.to_text(case.now))  # from here on the spec is immutable
    # Where the pass that made the newest ended before it removed the one before, two would write the same checkpoints.
    case.delete += [run.target for run in case.runs(Stage.TRAIN)[:-1] if outcome(run).is_active]
    return advance(case, Stage.TRAIN, verdict)


def package(case: Case) -> Standing | None:
    return None if case.is_done(Stage.PACKAGE) else advance(case, Stage.PACKAGE, case.verdict(Stage.PACKAGE))


def evaluate(case: Case) -> Standing | None:
    return None if case.is_done(Stage.EVALUATE) else advance(case, Stage.EVALUATE, case.verdict(Stage.EVALUATE))


def advance(case: Case, stage: Stage, verdict: Active | Due | Over | Done) -> Standing | None:
    """One step on in a stage: start an attempt that is due, tell what an attempt does or waits for, or end the job."""
    match verdict:
        case Done():
            return None
        case Over():
            return Standing("Failed", verdict.reason, verdict.message, is_stalled=True, succeeded=False, ended=True)
        case Due():
            return _start(case, stage, verdict)
        case Active():
            return _going(case, stage, verdict)


def _start(case: Case, stage: Stage, due: Due) -> Standing:
    if due.not_before is not None and due.not_before > case.now:
        wait = (due.not_before - case.now).total_seconds()
        return Standing(PHASES[stage], REASONS[stage], due.because, requeue_after=wait)
    case.start(stage, with_devices=due.with_devices)
    return Standing(PHASES[stage], REASONS[stage], due.because or DOING[stage], requeue_after=5.0)


def _going(case: Case, stage: Stage, active: Active) -> Standing:
    if active.is_running:
        interval = case.settings.progress_interval_seconds if stage is Stage.TRAIN else 60.0
        return Standing(
            PHASES[stage], REASONS[stage], _doing(case, stage, active.run.nodes, active.run.job.status.succeeded), requeue_after=interval
        )
    look_again = _look_again(active.run, case.now)
    if stage is Stage.TRAIN and (fewer := elastic.fewer(case.job, active.run, case.now, is_sharded=case.is_sharded())) is not None:
        if fewer.seconds_left <= 0:
            return _go_on_with_fewer(case, active.run, fewer.nodes)
        look_again = min(look_again, fewer.seconds_left)
    found = blocker(active.run, case.now)
    if found is None:
        return Standing(PHASES[stage], REASONS[stage], _doing(case, stage, active.run.nodes), requeue_after=look_again)
    return Standing("Pending", found.reason, found.message, is_problem=found.reason is not JobReason.PENDING, requeue_after=look_again)


def _go_on_with_fewer(case: Case, run: StageRun, nodes: int) -> Standing:
    """Another attempt takes the place of one that has not begun, which uses up no restart."""
    case.delete.append(run.target)
    case.start(Stage.TRAIN, nodes=nodes)
    return Standing(PHASES[Stage.TRAIN], REASONS[Stage.TRAIN], _doing(case, Stage.TRAIN, nodes), requeue_after=5.0)


def _doing(case: Case, stage: Stage, nodes: int, done: int = 0) -> str:
    wanted = case.job.spec.compute.nodes
    if stage is Stage.PREPARE and nodes > 1:
        return f"{DOING[stage]} {done} of {nodes} pods are done."
    if stage is not Stage.TRAIN or nodes == wanted:
        return DOING[stage]
    return f"The model is being trained on {nodes} of {wanted} nodes, with the same global batch: no node took the others."


def _look_again(run: StageRun, now: datetime) -> float:
    """What a pod says wakes us, what events say does not: of a Job without a pod, of a pod that its node does not start. Young Jobs are
    looked at soon, old ones rarely."""
    if run.pod is not None and run.pod.spec.node_name is None:
        return LOOK_AGAIN
    age = times.seconds_between(run.job.metadata.creation_timestamp, now)
    return min(max(age / 2, 5.0), LOOK_AGAIN)


def _replace_outdated(case: Case) -> None:
    """Attempts that were asked for something else go; of the others, those that no count of failures needs any more."""
    current = case.runs(Stage.PREPARE)
    outdated = [run for run in case.snapshot.of(Stage.PREPARE) if run not in current]
    ended = [run for run in current if not outcome(run).is_active]
    needed = case.job.spec.run_policy.max_restarts + 2
    case.delete += [run.target for run in (*outdated, *ended[:-needed])]


def _refusal(case: Case) -> Standing | None:
    """What the finished looks at the same input came to, if that was no good."""
    finished = tuple(run for run in case.runs(Stage.PREPARE) if not outcome(run).is_active)
    verdict = judge(Stage.PREPARE, finished, case.job.spec.run_policy.max_restarts)
    return _stalled(verdict, LOOK_AGAIN) if isinstance(verdict, Over) else None


def _refused(case: Case, over: Over) -> Standing:
    """Stalled until the spec or the retry annotation changes. Data, models and gateways may change where they are, so the stage, which
    takes no device, looks again every few minutes."""
    left = LOOK_AGAIN - times.seconds_between(ended_at(over.run), case.now)
    if left <= 0:
        case.start(Stage.PREPARE)
    return _stalled(over, left if left > 0 else LOOK_AGAIN)


def _stalled(over: Over, requeue_after: float) -> Standing:
    return Standing("Stalled", over.reason, over.message, is_stalled=True, succeeded=False, requeue_after=requeue_after)
