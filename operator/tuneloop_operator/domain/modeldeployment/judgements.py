"""What is known of a candidate: whether it starts, is warm and answers like the evaluator; and, of a canary, what its requests say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime

from tuneloop_gateway.contract import ProbeState, RevisionReport, RevisionState
from tuneloop_operator.api.conditions import DeploymentReason
from tuneloop_operator.domain import times
from tuneloop_operator.domain.modeldeployment import canaries, runtimes
from tuneloop_operator.domain.modeldeployment.canaries import Canary
from tuneloop_operator.domain.modeldeployment.evidence import Finding
from tuneloop_operator.domain.modeldeployment.failures import Failure, find_failure, never_ready, not_loaded
from tuneloop_operator.domain.modeldeployment.scaling import replicas_at, wanted_replicas
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.engine import GRACE_SECONDS
from tuneloop_operator.render.revisions import Outcome, Progress, Revision, Verdict

AGREEMENT = 0.96
"""Share of the probe items that must be answered as the evaluator was: 48 of 50."""


@dataclass(frozen=True)
class Judgement:
    """What is known of a candidate: a verdict, a failure, or what it waits for."""

    verdict: Verdict | None = None
    failure: Failure | None = None
    waits_for: str = ""
    progress: Progress | None = None
    """Of a canary, from now on."""
    in_place: str = ""
    """Since when the engine before is stopped for it."""
    has_passed: bool = False
    """A canary's step is over, and pods for its next share are all that it waits for."""


def judge(snapshot: Snapshot, candidate: Revision, stable: Revision | None, now: datetime) -> Judgement:
    """What becomes of it, and whether the engine before is to make room for it."""
    judgement = _judge(snapshot, candidate, stable, now)
    if stable is None or stable.pinned.engine_hash == candidate.pinned.engine_hash or judgement.verdict is not None:
        return judgement
    rollout, failure, waited = snapshot.deployment.spec.rollout, judgement.failure, _without_node(snapshot, candidate, now)
    has_no_node = failure is not None and failure.reason is DeploymentReason.UNSCHEDULABLE and waited >= rollout.surge_timeout_seconds
    if candidate.in_place:
        return _given_up(snapshot, candidate, judgement, now) or replace(judgement, in_place=candidate.in_place)
    # a canary that lost its node has proven nothing: the stable one serves on
    makes_room = has_no_node and (candidate.progress is None or judgement.has_passed)
    if rollout.strategy == "Recreate" or rollout.surge == "Never" or (rollout.surge == "Auto" and rollout.allow_downtime and makes_room):
        return replace(judgement, in_place=times.to_text(now))
    if failure is not None and makes_room and rollout.surge == "Auto":
        message = f"{failure.message} Or set rollout.allowDowntime: true, and version {stable.pinned.version} makes room for it."
        return replace(judgement, failure=replace(failure, reason=DeploymentReason.NO_DEVICE_FOR_CANARY, message=message))
    return judgement


def _given_up(snapshot: Snapshot, candidate: Revision, judgement: Judgement, now: datetime) -> Judgement | None:
    """Where it took the place of another, but does not answer though its engine is ready: nothing serves meanwhile."""
    limit, version = candidate.pinned.startup_timeout_seconds, candidate.pinned.version
    pods = [pod for pod in snapshot.engine_pods.get(candidate.pinned.engine_hash, ()) if pod.is_ready]
    if not snapshot.ready_gateways or len(pods) < wanted_replicas(snapshot):
        return None
    since = [ready.last_transition_time for pod in pods if (ready := pod.condition("Ready")) and ready.last_transition_time]
    if times.seconds_between(max([candidate.in_place, *since]), now) <= limit:
        return None
    why = judgement.failure.message if judgement.failure is not None else judgement.waits_for
    message = f"The engine of version {version} is ready, but took over nothing within {limit} s: {why}"
    return Judgement(verdict=rejected(DeploymentReason.STARTUP_TIMEOUT, message, now))


def _without_node(snapshot: Snapshot, candidate: Revision, now: datetime) -> float:
    """Seconds for which one of its pods has found no node; where no pod tells, since its engine was made."""
    hashed = candidate.pinned.engine_hash
    scheduled = [pod.condition("PodScheduled") for pod in snapshot.engine_pods.get(hashed, ()) if pod.is_unschedulable]
    told = [condition.last_transition_time for condition in scheduled if condition is not None and condition.last_transition_time]
    made = snapshot.engines.get(hashed)
    since = min(told, default=made.metadata.creation_timestamp if made is not None else None)
    return times.seconds_between(since, now) if since else 0.0


def _judge(snapshot: Snapshot, candidate: Revision, stable: Revision | None, now: datetime) -> Judgement:
    """By its start and its probes; a canary's requests decide the rest."""
    if stable is None:
        return judge_start(snapshot, candidate, stable, now)
    canary = canaries.look(snapshot, candidate, stable, now)
    if canary is not None and canary.finding is Finding.FAIL:  # first: whatever else holds it up or on, it does harm
        verdict = rejected(DeploymentReason.CANARY_FAILED, canaries.failure_text(canary, stable), now)
        return Judgement(verdict=replace(verdict, numbers=canaries.numbers(canary)))
    if not canaries.is_due(snapshot, candidate, stable):
        return judge_start(snapshot, candidate, stable, now)
    judgement = judge_start(snapshot, candidate, stable, now)
    if judgement.verdict is None or judgement.verdict.outcome is Outcome.REJECTED:
        return replace(judgement, progress=canary.progress if canary is not None else None)
    if canary is None:
        return Judgement(progress=Progress(0, times.to_text(now)))
    on_inconclusive = snapshot.deployment.spec.rollout.on_inconclusive
    ready = _answering(snapshot, candidate)
    needed = replicas_at(snapshot, candidate, stable, canary.progress.step + 1)
    if canaries.passes(canary, on_inconclusive) and ready < needed:
        waits_for = f"It passed {canary.place}; {ready} of the {needed} engine pods for its next share are ready."
        failure = engine_failure(snapshot, candidate, now)
        return Judgement(failure=failure, waits_for=waits_for, progress=canary.progress, has_passed=True)
    return _step_on(canary, judgement.verdict, on_inconclusive, now)


def _step_on(canary: Canary, promoted: Verdict, on_inconclusive: str, now: datetime) -> Judgement:
    """A step's pass leads to the next, the last one's to all traffic."""
    if canaries.passes(canary, on_inconclusive):
        if canary.is_last_step:
            return Judgement(verdict=replace(promoted, numbers=canaries.numbers(canary)))
        return Judgement(progress=Progress(canary.progress.step + 1, times.to_text(now)))
    if canary.is_overdue and on_inconclusive == "Rollback":
        message = f"In {canary.place} there were {canaries.overdue_text(canary)}"
        verdict = rejected(DeploymentReason.CANARY_INCONCLUSIVE, message, now)
        return Judgement(verdict=replace(verdict, numbers=canaries.numbers(canary)))
    return Judgement(progress=canary.progress, waits_for=canaries.progress_text(canary))


def judge_start(snapshot: Snapshot, candidate: Revision, stable: Revision | None, now: datetime) -> Judgement:
    """Looks at the engine, then at what every ready gateway says of it. Nothing is promoted on silence."""
    pinned, step = candidate.pinned, candidate.progress.step if candidate.progress is not None else 0
    replicas = replicas_at(snapshot, candidate, stable, min(step, len(snapshot.deployment.spec.rollout.steps) - 1))
    ready = snapshot.ready_replicas(pinned.engine_hash)
    if ready < replicas:
        failure = engine_failure(snapshot, candidate, now)
        is_another = stable is not None and stable.pinned.engine_hash != pinned.engine_hash
        alone = times.seconds_between(candidate.in_place, now) if candidate.in_place else 0.0  # nothing serves meanwhile
        if failure is not None and failure.reason is DeploymentReason.UNSCHEDULABLE and 0 < alone < GRACE_SECONDS:
            return Judgement(waits_for="The engine before it makes room.")
        if failure is not None and is_another and (failure.is_fatal or alone > pinned.startup_timeout_seconds):
            return Judgement(verdict=rejected(failure.reason, failure.message, now))
        return Judgement(failure=failure, waits_for=f"{ready} of {replicas} engine pods are ready.")
    gateways = snapshot.ready_gateways
    if not gateways:
        return Judgement(failure=gateway_failure(snapshot, now), waits_for="The gateway is not ready.")
    reports = snapshot.reports(candidate.name)
    if len(reports) < len(gateways) or not _is_offered(snapshot, candidate):
        return Judgement(waits_for="The gateway has not taken up the new revision yet.")
    if (failure := load_failure(snapshot, candidate)) is not None:
        return Judgement(verdict=rejected(failure.reason, failure.message, now)) if stable is not None else Judgement(failure=failure)
    if (loaded := _answering(snapshot, candidate)) < replicas:
        return Judgement(waits_for=f"{loaded} of {replicas} engine pods have loaded the adapter.")
    unusable = next((report.prompt_error for report in reports if report.prompt_error), None)
    if unusable is not None:
        return Judgement(verdict=rejected(DeploymentReason.PROMPT_INVALID, f"{unusable.rstrip('.')}. {_PROMPT_REMEDY}", now))
    if not all(report.warm and report.endpoints >= 1 for report in reports):
        return Judgement(waits_for="The gateway warms the new revision up.")
    judgement = _judge_probes(candidate, reports, now) if pinned.has_probes else Judgement(_promoted_at(now))
    if judgement.verdict is None:
        return judgement
    told = runtimes.told_version(snapshot, candidate)
    return replace(judgement, verdict=replace(judgement.verdict, prompt=_prompt_read(candidate, reports), engine=told))


def _answering(snapshot: Snapshot, revision: Revision) -> int:
    """Ready pods of its engine; of an adapter, those that have it, as every gateway knows."""
    ready = snapshot.ready_replicas(revision.pinned.engine_hash)
    if revision.pinned.adapter is None:
        return ready
    return min([ready, *(report.endpoints for report in snapshot.reports(revision.name))])


def _promoted_at(now: datetime) -> Verdict:
    return Verdict(Outcome.PROMOTED, times.to_text(now))


def _prompt_read(candidate: Revision, reports: tuple[RevisionReport, ...]) -> str:
    """Digest of the prompt that the engine read; of several, one that is not as it was trained."""
    told = sorted({report.prompt_digest for report in reports if report.prompt_digest})
    return next((digest for digest in told if digest != candidate.pinned.prompt_probe), told[0] if told else "")


_PROMPT_REMEDY = "Correct spec.prompt.template: Jinja over `text`, the last user message."


def _is_offered(snapshot: Snapshot, candidate: Revision) -> bool:
    """The configuration that names it as a candidate is in the cluster, and all gateways work by it."""
    observed = snapshot.config
    if observed is None or observed.config is None:
        return False
    is_named = any(r.name == candidate.name and r.state is RevisionState.CANDIDATE for r in observed.config.revisions)
    return is_named and snapshot.applied_everywhere(observed.generation)


def engine_failure(snapshot: Snapshot, revision: Revision, now: datetime) -> Failure | None:
    """Of its pods; of a group, the workers' as well. A group begins anew where one of its pods does, so that no pod tells for how long."""
    pinned = revision.pinned
    leaders, deployment = snapshot.engine_pods.get(pinned.engine_hash, ()), snapshot.engines.get(pinned.engine_hash)
    what, pods = f"The engine of version {pinned.version}", (*leaders, *snapshot.engine_workers.get(pinned.engine_hash, ()))
    failure = find_failure(what, pods, deployment, snapshot.warnings, pinned.startup_timeout_seconds, now)
    is_group_to_be = pinned.group is not None and revision.verdict is None and revision.progress is None
    if failure is None and deployment is not None and is_group_to_be:
        failure = never_ready(what, leaders, deployment, pinned.startup_timeout_seconds)
    return failure or load_failure(snapshot, revision)


def load_failure(snapshot: Snapshot, revision: Revision) -> Failure | None:
    """An adapter that a replica could not load: each gateway tells it in the engine's own words."""
    said = next((report.load_error for report in snapshot.reports(revision.name) if report.load_error), None)
    return not_loaded(f"The engine of version {revision.pinned.version}", said) if said is not None else None


def gateway_failure(snapshot: Snapshot, now: datetime) -> Failure | None:
    pods = [gateway.pod for gateway in snapshot.gateway_pods]
    return find_failure("The gateway", pods, snapshot.gateway, snapshot.warnings, 300, now)


def _judge_probes(candidate: Revision, reports: tuple[RevisionReport, ...], now: datetime) -> Judgement:
    """Every gateway must agree; the worst answer counts."""
    version = candidate.pinned.version
    probes = [report.probe for report in reports]
    if any(probe.status in ("Pending", "Running") for probe in probes):
        return Judgement(waits_for="The gateway asks the probe items.")
    if any(probe.status == "NoProbes" for probe in probes):
        message = f"Version {version} names probe items, but its engine has none: was probesUri deleted? Nothing vouches for its answers."
        return Judgement(verdict=rejected(DeploymentReason.SERVING_MISMATCH, message, now))
    failed = next((probe for probe in probes if probe.status == "Failed"), None)
    if failed is not None:
        message = f"The probe items of version {version} could not be asked: {failed.message or 'see the gateway log.'}"
        return Judgement(failure=Failure(DeploymentReason.SERVING_MISMATCH, message, is_fatal=False))
    worst = min(probes, key=_agreement)
    counted = f"{worst.agreed}/{worst.asked}"
    if worst.asked == 0 or worst.agreed < math.ceil(AGREEMENT * worst.asked):
        message = (
            f"The served version {version} answered {worst.agreed} of {worst.asked} probe items as its evaluation did;"
            f" {math.ceil(AGREEMENT * worst.asked)} are needed. Compare engine, task and prompt with what it was trained with."
        )
        return Judgement(verdict=replace(rejected(DeploymentReason.SERVING_MISMATCH, message, now), probes=counted))
    return Judgement(verdict=Verdict(Outcome.PROMOTED, times.to_text(now), probes=counted))


def _agreement(probe: ProbeState) -> float:
    return probe.agreed / probe.asked if probe.asked else 0.0


def rejected(reason: DeploymentReason, message: str, now: datetime) -> Verdict:
    return Verdict(Outcome.REJECTED, times.to_text(now), reason.value, message)
