"""A canary's way: which step it is in, what its requests say, and the sentences about it. Who takes over is decided in `rollouts`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime

from tuneloop_operator.api import modeldeployment as api
from tuneloop_operator.domain import times
from tuneloop_operator.domain.modeldeployment.analysis import Analysis, Checked, Limits, analyse, summed
from tuneloop_operator.domain.modeldeployment.evidence import Finding
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.revisions import Progress, Revision


@dataclass(frozen=True)
class Canary:
    """One that takes traffic."""

    revision: str
    version: int
    progress: Progress
    steps: int
    weight: int
    """Percent of the traffic."""
    min_requests: int
    analysis: Analysis
    is_overdue: bool
    """Its step's time is over without a finding."""

    @property
    def window(self) -> str:
        """What the gateways call the step: they count afresh when it changes."""
        return f"{self.revision}:{self.progress.step}:{self.progress.since}"

    @property
    def finding(self) -> Finding:
        return self.analysis.finding

    @property
    def is_last_step(self) -> bool:
        return self.progress.step + 1 >= self.steps

    @property
    def place(self) -> str:
        return f"step {self.progress.step + 1} of {self.steps}, at {self.weight} % of the traffic"


def is_due(snapshot: Snapshot, candidate: Revision, stable: Revision) -> bool:
    """Not for one that took all traffic before (going back is at once), nor where the stable version must not serve on, or cannot."""
    served = snapshot.version(stable.pinned.version)
    must_go = served is not None and served.spec.approval in ("Withdrawn", "Rejected")
    return snapshot.deployment.spec.rollout.strategy == "Canary" and not (candidate.is_promoted or candidate.in_place or must_go)


def passes(canary: Canary, on_inconclusive: str) -> bool:
    """Its step is over, and the next one is due."""
    return canary.finding is Finding.PASS or (canary.is_overdue and on_inconclusive == "Promote")


def look(snapshot: Snapshot, candidate: Revision, stable: Revision, now: datetime) -> Canary | None:
    """What is known of it now; None where it takes no traffic yet."""
    if candidate.progress is None:
        return None
    rollout = snapshot.deployment.spec.rollout
    place = min(candidate.progress.step, len(rollout.steps) - 1)  # steps may have been taken out of the spec
    step, progress = rollout.steps[place], Progress(place, candidate.progress.since)
    found = Canary(
        revision=candidate.name,
        version=candidate.pinned.version,
        progress=progress,
        steps=len(rollout.steps),
        weight=step.weight,
        min_requests=step.min_requests,
        analysis=Analysis(0, (), Finding.INCONCLUSIVE),
        is_overdue=times.seconds_between(progress.since, now) >= rollout.analysis.timeout_seconds,
    )
    return _analysed(snapshot, found, stable, limits_of(rollout))


def limits_of(rollout: api.Rollout) -> Limits:
    analysis = rollout.analysis
    return Limits(
        false_rollback_probability=float(analysis.false_rollback_probability),
        max_error_ratio_increase=float(analysis.max_error_ratio_increase),
        max_time_to_first_token_increase=float(analysis.max_time_to_first_token_increase),
        max_inter_token_latency_increase=float(analysis.max_inter_token_latency_increase),
        max_harm_increase=float(analysis.max_harm_increase),
        min_feedback=analysis.min_feedback,
        steps=len(rollout.steps),
    )


def _analysed(snapshot: Snapshot, canary: Canary, stable: Revision, limits: Limits) -> Canary:
    """With the counts of all gateways that count for this step."""
    reports = [report for state in snapshot.states if state.window == canary.window for report in state.revisions]
    new = summed(report.outcomes for report in reports if report.name == canary.revision and report.outcomes is not None)
    old = summed(report.outcomes for report in reports if report.name == stable.name and report.outcomes is not None)
    analysis = analyse(new, old, limits, canary.min_requests)
    return replace(canary, analysis=analysis, is_overdue=canary.is_overdue and analysis.finding is Finding.INCONCLUSIVE)


# --- sentences and numbers ---------------------------------------------------


def progress_text(canary: Canary) -> str:
    """Without counts: it changes with the step alone."""
    said = f"It is in {canary.place}"
    return f"{said}, and its requests decide nothing yet: {overdue_text(canary)}" if canary.is_overdue else f"{said}."


def overdue_text(canary: Canary) -> str:
    """What is missing, check by check."""
    open_ones = [checked.check.value for checked in canary.analysis.checks if checked.finding is not Finding.PASS]
    missing = f" ({', '.join(open_ones[:3])})" if open_ones and canary.analysis.requests >= canary.min_requests else ""
    return (
        f"too few requests for a finding within rollout.analysis.timeoutSeconds{missing}."
        " Send more traffic, raise the step's weight, or set rollout.onInconclusive."
    )


def failure_text(canary: Canary, stable: Revision) -> str:
    """Why it was stopped, with the numbers."""
    worse = "; ".join(_compared(checked) for checked in canary.analysis.failed)
    return f"In {canary.place} and after {canary.analysis.requests} requests it was worse than version {stable.pinned.version}: {worse}."


def _compared(checked: Checked) -> str:
    return f"{checked.check.value} {checked.canary} against {checked.stable}"


def numbers(canary: Canary) -> str:
    """For the record of the revision: one line of JSON."""
    checks = {c.check.value: {"canary": c.canary, "stable": c.stable, "verdict": c.finding.value} for c in canary.analysis.checks}
    said = {"step": canary.progress.step + 1, "weight": canary.weight, "requests": canary.analysis.requests, "checks": checks}
    return json.dumps(said, separators=(",", ":"))
