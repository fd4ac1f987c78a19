"""What stages said, as the status shows it: numbers as strings, bounded in size."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from tuneloop_operator.api.finetunejob import (
    ArtifactStatus,
    DataStatus,
    Estimate,
    EvaluationStatus,
    GateStatus,
    ProgressStatus,
    PushStatus,
    PushTarget,
    Resolved,
    ScoreStatus,
    StageTimes,
)
from tuneloop_operator.domain import times
from tuneloop_operator.domain.finetunejob import sizing
from tuneloop_operator.render import names
from tuneloop_trainer.contract import (
    MAX_PHASES,
    Estimated,
    EvaluateSummary,
    GateResult,
    PackageSummary,
    PrepareSummary,
    Progress,
    Stage,
    StageResult,
    SuiteScore,
    TrainSummary,
)

PERCENT_SECONDS = 10
"""A percent is written at most so often, however many passes there are."""
PROGRESS_SECONDS = 60
"""Progress that is worth less than a percent is written so often."""
MAX_DROPPED = 16
MAX_SUITES = 8


def number(value: float) -> str:
    """At most 16 characters, four significant digits."""
    return f"{value:.4g}"[:16]


def optional(value: float | None) -> str | None:
    return None if value is None else number(value)


def data_status(summary: PrepareSummary, result: StageResult) -> DataStatus:
    return DataStatus(
        rows_in=summary.rows_in,
        rows_kept=summary.rows_kept,
        dropped={reason[:64]: count for reason, count in sorted(summary.dropped.items())[:MAX_DROPPED]},
        tokens=summary.tokens,
        truncated=summary.truncated,
        validation_rows=summary.validation_rows,
        supervised_share=f"{min(max(summary.supervised_share, 0.0), 1.0):.4f}",
        warnings=tuple(warning[:160] for warning in summary.warnings[:8]),
        **_vocabulary(summary),
        rows_per_second=f"{min(max(summary.rows_per_second, 0.0), 1e9):.1f}" if summary.rows_per_second is not None else None,
        peak_memory_bytes=summary.peak_memory_bytes,
        report_uri=_report_uri(result),
    )


def _vocabulary(summary: PrepareSummary) -> dict[str, Any]:
    """What became of spec.vocabulary."""
    told = summary.vocabulary
    if told is None:
        return {}
    saved = 1 - told.sample_after / told.sample_before if told.sample_before > 0 else 0.0
    return {"new_tokens": told.tokens, "shorter_by": f"{min(max(saved, 0.0), 1.0):.4f}"}


def measured_estimate(estimate: Estimate, summary: TrainSummary) -> Estimate:
    """Beside what was estimated, what the training took, and how far the estimate was off. An attempt that took up a checkpoint has the
    time of its own steps alone, and says nothing about the whole run's."""
    measured, hours = summary.peak_memory_bytes, summary.seconds / 3600
    return estimate.model_copy(
        update={
            "measured_peak_memory_bytes": measured,
            "measured_hours": optional(hours),
            "peak_memory_ratio": sizing.number(estimate.peak_memory_bytes / measured) if measured else None,
            "hours_ratio": estimate.hours_ratio if summary.resumed_from_step else sizing.hours_ratio(estimate, hours),
        }
    )


def estimated(estimate: Estimate | None) -> Estimated | None:
    """As the trainer is told, for its report."""
    if estimate is None:
        return None
    return Estimated(
        device=estimate.device,
        peak_memory_bytes=estimate.peak_memory_bytes,
        micro_batch_size=estimate.micro_batch_size,
        hours_from=float(estimate.hours_from) if estimate.hours_from is not None else None,
        hours_to=float(estimate.hours_to) if estimate.hours_to is not None else None,
    )


def with_digests(resolved: Resolved, summary: PrepareSummary) -> Resolved:
    """What prepare found its inputs to be."""
    found = {
        "base_revision": summary.base_revision[:64] if summary.base_revision is not None else None,
        "base_digest": summary.base_digest[:80],
        "dataset_digests": {uri[:512]: digest[:80] for uri, digest in sorted(summary.dataset_digests.items())[:16]},
        "dataset_revisions": {uri[:512]: revision[:64] for uri, revision in sorted(summary.dataset_revisions.items())[:16]},
        "suite_digests": {suite[:63]: digest[:80] for suite, digest in sorted(summary.suite_digests.items())[:MAX_SUITES]},
        "prompt_probe": summary.prompt_probe_sha256[:80] if summary.prompt_probe_sha256 is not None else None,
    }
    return resolved.model_copy(update=found)


def progress_status(progress: Progress, before: ProgressStatus | None, now: datetime) -> ProgressStatus | None:
    """What to write of a running training: the new where it is worth a write, else what is written already."""
    percent = int(min(max(progress.percent, 0.0), 100.0))
    if before is not None and not _is_worth_a_write(progress, percent, before, now):
        return before
    remaining = progress.remaining_seconds
    done_at = times.to_minute(now + timedelta(seconds=min(max(remaining, 0.0), 365 * 86_400))) if remaining is not None else None
    return ProgressStatus(
        step=progress.step,
        max_steps=progress.max_steps,
        percent=percent,
        display=f"{progress.step}/{progress.max_steps}",
        loss=optional(progress.loss),
        reward=optional(progress.reward),
        learning_rate=optional(progress.learning_rate),
        gradient_norm=optional(progress.gradient_norm),
        utilisation=optional(progress.utilisation),
        memory_bytes=progress.peak_memory_bytes,
        first_step_seconds=optional(progress.first_step_seconds),
        tokens_per_second=optional(progress.tokens_per_second),
        estimated_completion_time=done_at,
        updated_at=times.to_text(now),
    )


def _is_worth_a_write(progress: Progress, percent: int, before: ProgressStatus, now: datetime) -> bool:
    """A percent after ten seconds, a minute with a step in it, or another run's beginning."""
    if before.max_steps != progress.max_steps:
        return True
    seconds = times.seconds_between(before.updated_at, now)
    return (before.percent != percent and seconds >= PERCENT_SECONDS) or (before.step != progress.step and seconds >= PROGRESS_SECONDS)


def stage_times(known: tuple[StageTimes, ...], result: StageResult) -> tuple[StageTimes, ...]:
    """With the stage's own; of a pod that only told again what an earlier one did, nothing is taken."""
    if not result.phase_seconds:
        return known
    phases = {phase[:64]: number(max(seconds, 0.0)) for phase, seconds in list(result.phase_seconds.items())[:MAX_PHASES]}
    told = StageTimes(stage=result.stage.value, seconds=number(sum(result.phase_seconds.values())), phases=phases)
    order = [stage.value for stage in Stage]
    return tuple(sorted((*(one for one in known if one.stage != told.stage), told), key=lambda one: order.index(one.stage)))


def stopped_progress(summary: TrainSummary, before: ProgressStatus | None) -> ProgressStatus:
    """Where an attempt stopped that was not done; the loss stays where it made no step."""
    known = before or ProgressStatus()
    return known.model_copy(
        update={
            "step": summary.step,
            "max_steps": summary.max_steps,
            "percent": 100 * summary.step // max(summary.max_steps, 1),
            "display": f"{summary.step}/{summary.max_steps}",
            "loss": optional(summary.loss) or known.loss,
            "reward": optional(summary.reward) or known.reward,
            "estimated_completion_time": None,
        }
    )


def finished_progress(summary: TrainSummary, before: ProgressStatus | None) -> ProgressStatus:
    """Early stopping ends below the last step, and is done all the same."""
    known = before or ProgressStatus()
    return known.model_copy(
        update={
            "step": summary.step,
            "max_steps": summary.max_steps,
            "percent": 100,
            "display": f"{summary.step}/{summary.max_steps}",
            "loss": optional(summary.loss),
            "reward": optional(summary.reward),
            "tokens_per_second": optional(summary.tokens_per_second),
            "estimated_completion_time": None,
        }
    )


def artifact_status(summary: PackageSummary, uri: str) -> ArtifactStatus:
    """The place is where it was told to go, whatever the pod says."""
    return ArtifactStatus(uri=uri, manifest_digest=summary.manifest_digest, format=summary.format, size_bytes=summary.size_bytes)


def evaluation_status(summary: EvaluateSummary, result: StageResult) -> EvaluationStatus:
    return EvaluationStatus(
        verdict=summary.verdict,
        artifact_digest=summary.artifact_digest,
        gates=tuple(map(_gate, summary.gates[:16])),
        scores=tuple(_score(suite, score) for suite, score in sorted(summary.scores.items())[:MAX_SUITES]),
        message=summary.message or None,
        report_uri=_report_uri(result),
    )


def push_statuses(summary: EvaluateSummary, targets: tuple[PushTarget, ...]) -> tuple[PushStatus, ...]:
    """The places are those that it was told; only the digests are the pod's word."""
    return tuple(PushStatus(uri=target.uri, digest=digest[:80]) for target, digest in zip(targets, summary.pushed, strict=False))


def _report_uri(result: StageResult) -> str | None:
    uri = names.pvc_uri(result.uri)
    return uri[:512] if uri is not None else None


def page_uri(summary: EvaluateSummary, result: StageResult) -> str | None:
    """The run's report lies beside the full results."""
    results = _report_uri(result)
    return f"{results.rpartition('/')[0]}/{summary.page}"[:512] if results is not None and summary.page is not None else None


def verdict_sentence(evaluation: EvaluationStatus) -> str:
    """The gates in words: what was compared, by how much, on how many items, and what the evaluation adds to it."""
    added = [evaluation.message] if evaluation.message is not None else []
    if not evaluation.gates:
        return " ".join(["No gate was set.", *added])
    compared = (
        f"{gate.suite} {gate.metric} {gate.rule}: {gate.verdict} "
        f"({gate.candidate} against {gate.baseline}, difference {gate.difference} in {gate.interval}, n {gate.n}"
        f"{f', p {gate.p}' if gate.p is not None else ''})."
        for gate in evaluation.gates
    )
    return " ".join([*compared, *added])


def _gate(gate: GateResult) -> GateStatus:
    return GateStatus(
        suite=gate.suite,
        metric=gate.metric,
        rule=gate.rule,
        verdict=gate.verdict,
        candidate=number(gate.candidate),
        baseline=number(gate.baseline),
        difference=number(gate.difference),
        interval=f"[{number(gate.lower)}, {number(gate.upper)}]",
        n=gate.n,
        p=optional(gate.p),
        detectable=optional(gate.detectable),
    )


def _score(suite: str, score: SuiteScore) -> ScoreStatus:
    return ScoreStatus(
        suite=suite[:63],
        n=score.n,
        accuracy=optional(score.accuracy),
        baseline_accuracy=optional(score.baseline_accuracy),
        macro_f1=optional(score.macro_f1),
        majority_rate=optional(score.majority_rate),
        parse_rate=optional(score.parse_rate),
        loss=optional(score.loss),
        reward=optional(score.reward),
        baseline_reward=optional(score.baseline_reward),
        chrf=optional(score.chrf),
        baseline_chrf=optional(score.baseline_chrf),
        bleu=optional(score.bleu),
    )
