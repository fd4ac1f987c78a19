"""Folds what the stages said so far into the status."""

from __future__ import annotations

from tuneloop_operator.domain.finetunejob import findings, fits
from tuneloop_operator.domain.finetunejob.attempts import Active, Done
from tuneloop_operator.domain.finetunejob.case import Case
from tuneloop_operator.domain.finetunejob.outcomes import outcome, result, running_seconds
from tuneloop_operator.domain.finetunejob.snapshot import StageRun
from tuneloop_operator.domain.finetunejob.suites import with_uses
from tuneloop_operator.render.run_config import artifact_uri
from tuneloop_trainer.contract import ExitCode, Progress, Stage

WHOLE_SECONDS = 60
"""Running time is written in steps of so much, while something runs."""


def fold(case: Case) -> None:
    """In the order of the stages, as far as they are done."""
    _count(case)
    for stage, step in ((Stage.PREPARE, _prepared), (Stage.TRAIN, _trained), (Stage.PACKAGE, _packaged)):
        if not case.is_done(stage):
            return
        if not case.is_settled(stage):
            _timed(case, stage)
            step(case)
    _timed(case, Stage.EVALUATE)
    _evaluated(case)


def _timed(case: Case, stage: Stage) -> None:
    verdict = case.verdict(stage)
    if isinstance(verdict, Done):
        case.learn(times=findings.stage_times(case.status.times, verdict.result))


def _count(case: Case) -> None:
    """Attempts, running time, progress, lost steps: of training, whatever its verdict."""
    runs = case.snapshot.of(Stage.TRAIN)
    prepares = case.snapshot.of(Stage.PREPARE)
    case.learn(
        attempts=max([case.status.attempts, *(run.number for run in runs)]),
        prepare_runs=max([case.status.prepare_runs, *(run.number for run in prepares)]),
        running_seconds=_running_seconds(case),
    )
    said = [found.train for run in runs if (found := result(run)) is not None and found.train is not None]
    case.learn(steps_lost=max([case.status.steps_lost, *(summary.steps_lost for summary in said)]))
    progress = case.snapshot.progress
    if progress is not None and progress.stage is Stage.TRAIN:
        _progressed(case, progress)
    elif runs and not outcome(runs[-1]).is_active:
        _stopped(case, runs[-1])


def _stopped(case: Case, run: StageRun) -> None:
    """How far the newest attempt came, where it ended before the run did: what was polled last may be a minute old."""
    said = result(run)
    if said is None or said.train is None or said.exit_code == ExitCode.DONE:
        return
    case.learn(progress=findings.stopped_progress(said.train, case.status.progress))
    if said.exit_code == ExitCode.INTERRUPTED:
        case.learn(checkpoint_step=max(case.status.checkpoint_step or 0, said.train.step))


def _running_seconds(case: Case) -> int:
    """Never less than what was written: pods may be gone that were counted then."""
    runs = case.snapshot.of(Stage.TRAIN)
    seconds = int(sum(running_seconds(run, case.now) for run in runs))
    if any(outcome(run).is_active for run in runs):
        seconds -= seconds % WHOLE_SECONDS
    return max(case.status.running_seconds, seconds)


def _progressed(case: Case, progress: Progress) -> None:
    case.learn(progress=findings.progress_status(progress, case.status.progress, case.now))
    fits.measure_speed(case, progress)
    case.learn(steps_lost=max(case.status.steps_lost, progress.steps_lost))
    if progress.checkpoint_step is not None:
        case.learn(checkpoint_step=max(case.status.checkpoint_step or 0, progress.checkpoint_step))


def _prepared(case: Case) -> None:
    verdict = case.verdict(Stage.PREPARE)
    if isinstance(verdict, Done) and verdict.result.prepare is not None:
        summary = verdict.result.prepare
        case.learn(data=findings.data_status(summary, verdict.result), resolved=findings.with_digests(case.resolved, summary))
        fits.estimate(case, summary)


def _trained(case: Case) -> None:
    verdict = case.verdict(Stage.TRAIN)
    if isinstance(verdict, Done) and verdict.result.train is not None:
        case.learn(progress=findings.finished_progress(verdict.result.train, case.status.progress))
        if case.status.estimate is not None:
            case.learn(estimate=findings.measured_estimate(case.status.estimate, verdict.result.train))


def _packaged(case: Case) -> None:
    verdict = case.verdict(Stage.PACKAGE)
    if isinstance(verdict, Done) and verdict.result.package is not None:
        case.learn(artifact=findings.artifact_status(verdict.result.package, artifact_uri(case.job)))


def _evaluated(case: Case) -> None:
    verdict = case.verdict(Stage.EVALUATE)
    if isinstance(verdict, Done) and verdict.result.evaluate is not None:
        evaluation = findings.evaluation_status(verdict.result.evaluate, verdict.result)
        of_model = [version for version in case.snapshot.versions if version.spec.model == case.job.spec.output.model]
        case.learn(evaluation=with_uses(evaluation, case.resolved.suite_digests, of_model, case.job.metadata.uid))
        case.learn(report_uri=findings.page_uri(verdict.result.evaluate, verdict.result))
        case.learn(pushed=findings.push_statuses(verdict.result.evaluate, case.job.spec.output.push))
    elif isinstance(verdict, Active):
        case.learn(evaluation=None, report_uri=None)  # of another baseline
