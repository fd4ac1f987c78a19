"""A new revision takes over, at once or step by step, when it is ready, warm and answers like the evaluator; the one before drains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime

from tuneloop_gateway.contract import ProbeState, RevisionReport, RevisionState
from tuneloop_operator.api.conditions import DeploymentReason
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Invalid
from tuneloop_operator.domain.modeldeployment import canaries
from tuneloop_operator.domain.modeldeployment.canaries import Canary
from tuneloop_operator.domain.modeldeployment.evidence import Finding
from tuneloop_operator.domain.modeldeployment.failures import Failure, find_failure
from tuneloop_operator.domain.modeldeployment.revisions import new_revision, revision_name
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.domain.modeldeployment.targets import Target, resolve
from tuneloop_operator.render import names
from tuneloop_operator.render.revisions import Outcome, Progress, Revision, Verdict
from tuneloop_operator.settings import Settings

AGREEMENT = 0.96
"""Share of the probe items that must be answered as the evaluator was: 48 of 50."""
IN_FLIGHT_SECONDS = 600
"""How much longer than keepPreviousSeconds a revision drains while requests are running on it."""
STOPPED_SECONDS = 5
"""A canary that was stopped drains at least so long: until all gateways have let go of it and said what still runs on it."""
HISTORY = 20
"""Revisions kept beside those in use; a rejected version whose revision is forgotten would be tried again."""


@dataclass(frozen=True)
class Rollout:
    """Who plays which role from now on."""

    target: Target
    revisions: tuple[Revision, ...]
    """All that should be on record."""
    stable: Revision | None = None
    candidate: Revision | None = None
    draining: tuple[Revision, ...] = ()
    failure: Failure | None = None
    """What keeps the candidate from taking over."""
    waits_for: str = ""
    """What the candidate waits for, where nothing is wrong."""
    canary: Canary | None = None
    """The candidate's share of the traffic, and what comes of it."""

    @property
    def live(self) -> tuple[Revision, ...]:
        """Those that the gateway knows, stable first."""
        return tuple(r for r in (self.stable, self.candidate, *self.draining) if r is not None)

    def gives_way(self, revision: Revision, strategy: str) -> bool:
        """Its engine has no pods while the candidate's takes its place."""
        candidate = self.candidate
        return strategy == "Recreate" and candidate is not None and candidate.pinned.engine_hash != revision.pinned.engine_hash


@dataclass(frozen=True)
class Judgement:
    """What is known of a candidate: a verdict, a failure, or what it waits for."""

    verdict: Verdict | None = None
    failure: Failure | None = None
    waits_for: str = ""
    progress: Progress | None = None
    """Of a canary, from now on."""


def plan(snapshot: Snapshot, settings: Settings, now: datetime) -> Rollout:
    """The roles by what is observed. A verdict is taken into account at once: the next target is looked for in the same pass."""
    stable = stable_of(snapshot.revisions)
    target = resolve(snapshot, stable)
    if target.version is None:
        return _finished(snapshot, Rollout(target, snapshot.revisions, stable), now)
    known = _anew(snapshot.revision(revision_name(snapshot.deployment, target.version)))
    try:
        candidate = known or new_revision(snapshot.deployment, target.version, _next_number(snapshot), times.to_text(now), settings)
    except Invalid as error:
        refused = Target(reason=DeploymentReason(error.reason), message=error.message, is_final=True)
        return _finished(snapshot, Rollout(refused, snapshot.revisions, stable), now)
    if stable is not None and candidate.name == stable.name:
        return _finished(snapshot, Rollout(target, snapshot.revisions, stable), now)
    judgement = judge(snapshot, candidate, stable, now)
    if judgement.verdict is not None:
        verdict = replace(judgement.verdict, at=_decided_at(snapshot, candidate, now))
        progress = candidate.progress if verdict.outcome is Outcome.REJECTED else None
        return plan(_recorded(snapshot, replace(candidate, verdict=verdict, progress=progress)), settings, now)
    candidate = replace(candidate, progress=judgement.progress)
    recorded = _recorded(snapshot, candidate)
    canary = canaries.look(snapshot, candidate, stable, now) if stable is not None else None
    rollout = Rollout(target, recorded.revisions, stable, candidate, (), judgement.failure, judgement.waits_for, canary)
    return _finished(snapshot, rollout, now)


def _anew(known: Revision | None) -> Revision | None:
    """A canary that was replaced, and whose turn it is again, begins again."""
    if known is None or known.verdict is None or known.verdict.outcome is not Outcome.REPLACED:
        return known
    return replace(known, verdict=None, progress=None)


def _decided_at(snapshot: Snapshot, candidate: Revision, now: datetime) -> str:
    """Now; or when the status said so already, whose record did not get written. Another time each time would never come to rest."""
    said = snapshot.deployment.status.stable
    return said.since if said is not None and said.revision == candidate.name and said.since else times.to_text(now)


def stable_of(revisions: tuple[Revision, ...]) -> Revision | None:
    """The one that was promoted last."""
    promoted = _promoted(revisions)
    return promoted[-1] if promoted else None


def _promoted(revisions: tuple[Revision, ...]) -> list[Revision]:
    """In the order of their promotion; of one second, in the order in which they were made."""
    return sorted((r for r in revisions if r.is_promoted), key=lambda r: (r.verdict.at if r.verdict else "", r.number))


def _next_number(snapshot: Snapshot) -> int:
    return max((revision.number for revision in snapshot.revisions), default=0) + 1


def _recorded(snapshot: Snapshot, revision: Revision) -> Snapshot:
    others = tuple(r for r in snapshot.revisions if r.name != revision.name)
    return replace(snapshot, revisions=(*others, revision))


# --- the verdict on a candidate ----------------------------------------------


def judge(snapshot: Snapshot, candidate: Revision, stable: Revision | None, now: datetime) -> Judgement:
    """By its start and its probes; a canary's requests decide the rest."""
    if stable is None or not canaries.is_due(snapshot, candidate, stable):
        return judge_start(snapshot, candidate, stable, now)
    canary = canaries.look(snapshot, candidate, stable, now)
    if canary is not None and canary.finding is Finding.FAIL:  # first: whatever else holds it up, it does harm
        rejected = _rejected(DeploymentReason.CANARY_FAILED, canaries.failure_text(canary, stable), now)
        return Judgement(verdict=replace(rejected, numbers=canaries.numbers(canary)))
    judgement = judge_start(snapshot, candidate, stable, now)
    if judgement.verdict is None or judgement.verdict.outcome is Outcome.REJECTED:
        return replace(judgement, progress=candidate.progress)
    if canary is None:
        return Judgement(progress=Progress(0, times.to_text(now)))
    return _step_on(canary, judgement.verdict, snapshot.deployment.spec.rollout.on_inconclusive, now)


def _step_on(canary: Canary, promoted: Verdict, on_inconclusive: str, now: datetime) -> Judgement:
    """A step's pass leads to the next, the last one's to all traffic."""
    if canary.finding is Finding.PASS or (canary.is_overdue and on_inconclusive == "Promote"):
        if canary.is_last_step:
            return Judgement(verdict=replace(promoted, numbers=canaries.numbers(canary)))
        return Judgement(progress=Progress(canary.progress.step + 1, times.to_text(now)))
    if canary.is_overdue and on_inconclusive == "Rollback":
        message = f"In {canary.place} there were {canaries.overdue_text(canary)}"
        rejected = _rejected(DeploymentReason.CANARY_INCONCLUSIVE, message, now)
        return Judgement(verdict=replace(rejected, numbers=canaries.numbers(canary)))
    return Judgement(progress=canary.progress, waits_for=canaries.progress_text(canary))


def judge_start(snapshot: Snapshot, candidate: Revision, stable: Revision | None, now: datetime) -> Judgement:
    """Looks at the engine, then at what every ready gateway says of it. Nothing is promoted on silence."""
    pinned, replicas = candidate.pinned, snapshot.deployment.spec.engine.replicas
    ready = snapshot.ready_replicas(pinned.engine_hash)
    if ready < replicas:
        failure = engine_failure(snapshot, candidate, now)
        is_another = stable is not None and stable.pinned.engine_hash != pinned.engine_hash
        if failure is not None and is_another and (failure.is_fatal or _holds_the_place(snapshot, candidate, now)):
            return Judgement(verdict=_rejected(failure.reason, failure.message, now))
        return Judgement(failure=failure, waits_for=f"{ready} of {replicas} engine pods are ready.")
    gateways = snapshot.ready_gateways
    if not gateways:
        return Judgement(failure=gateway_failure(snapshot, now), waits_for="The gateway is not ready.")
    reports = snapshot.reports(candidate.name)
    if len(reports) < len(gateways) or not _is_offered(snapshot, candidate):
        return Judgement(waits_for="The gateway has not taken up the new revision yet.")
    unusable = next((report.prompt_error for report in reports if report.prompt_error), None)
    if unusable is not None:
        return Judgement(verdict=_rejected(DeploymentReason.PROMPT_INVALID, f"{unusable.rstrip('.')}. {_PROMPT_REMEDY}", now))
    if not all(report.warm and report.endpoints >= 1 for report in reports):
        return Judgement(waits_for="The gateway warms the new revision up.")
    judgement = _judge_probes(candidate, reports, now) if pinned.has_probes else Judgement(_promoted_at(now))
    if judgement.verdict is None:
        return judgement
    return replace(judgement, verdict=replace(judgement.verdict, prompt=_prompt_read(candidate, reports)))


def _holds_the_place(snapshot: Snapshot, candidate: Revision, now: datetime) -> bool:
    """Under Recreate nothing serves meanwhile: what might yet heal has as long as a start may take."""
    made = snapshot.engines.get(candidate.pinned.engine_hash)
    if snapshot.deployment.spec.rollout.strategy != "Recreate" or made is None or not made.metadata.creation_timestamp:
        return False
    return times.seconds_between(made.metadata.creation_timestamp, now) > candidate.pinned.startup_timeout_seconds


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
    pinned = revision.pinned
    pods, deployment = snapshot.engine_pods.get(pinned.engine_hash, ()), snapshot.engines.get(pinned.engine_hash)
    what = f"The engine of version {pinned.version}"
    return find_failure(what, pods, deployment, snapshot.warnings, pinned.startup_timeout_seconds, now)


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
        return Judgement(verdict=_rejected(DeploymentReason.SERVING_MISMATCH, message, now))
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
        return Judgement(verdict=replace(_rejected(DeploymentReason.SERVING_MISMATCH, message, now), probes=counted))
    return Judgement(verdict=Verdict(Outcome.PROMOTED, times.to_text(now), probes=counted))


def _agreement(probe: ProbeState) -> float:
    return probe.agreed / probe.asked if probe.asked else 0.0


def _rejected(reason: DeploymentReason, message: str, now: datetime) -> Verdict:
    return Verdict(Outcome.REJECTED, times.to_text(now), reason.value, message)


# --- what goes ---------------------------------------------------------------


def _finished(snapshot: Snapshot, rollout: Rollout, now: datetime) -> Rollout:
    """With those that drain, and the record cut to its length."""
    in_use = {r.name for r in (rollout.stable, rollout.candidate) if r is not None}
    rollout = replace(rollout, revisions=tuple(r if r.name in in_use else _ended(r, rollout, now) for r in rollout.revisions))
    drains = tuple(r for r in rollout.revisions if r.name not in in_use and _drains(snapshot, rollout, r, now))
    with_draining = replace(rollout, draining=drains)
    live = {r.name for r in with_draining.live}
    idle = sorted((r for r in rollout.revisions if r.name not in live), key=lambda r: r.number, reverse=True)[:HISTORY]
    kept = {r.name for r in idle} | live
    return replace(with_draining, revisions=tuple(sorted((r for r in rollout.revisions if r.name in kept), key=lambda r: r.number)))


def _ended(revision: Revision, rollout: Rollout, now: datetime) -> Revision:
    """A canary whose turn it is no longer, though nothing was found."""
    if revision.progress is None or revision.verdict is not None:
        return revision
    wanted, refused = rollout.target.version, rollout.target.message
    why = f"Version {wanted.spec.version} is to be served instead." if wanted is not None else refused
    return replace(revision, verdict=Verdict(Outcome.REPLACED, times.to_text(now), message=why))


def _drains(snapshot: Snapshot, rollout: Rollout, revision: Revision, now: datetime) -> bool:
    """Warm for keepPreviousSeconds after another took over; longer while requests run on it. A canary that was stopped: while they do."""
    if revision.is_promoted and snapshot.deployment.spec.rollout.strategy == "Recreate":
        return False  # it has no pods any more
    if revision.is_promoted:
        passed, keep = (
            times.seconds_between(superseded_at(rollout.revisions, revision), now),
            snapshot.deployment.spec.rollout.keep_previous_seconds,
        )
    elif revision.progress is not None and revision.verdict is not None:
        passed, keep = times.seconds_between(revision.verdict.at, now), STOPPED_SECONDS
    else:
        return False
    if passed < keep:
        return True
    is_busy = any(report.in_flight > 0 for report in snapshot.reports(revision.name))
    return is_busy and passed < keep + IN_FLIGHT_SECONDS


def superseded_at(revisions: tuple[Revision, ...], revision: Revision) -> str | None:
    """When the next one was promoted."""
    promoted = _promoted(revisions)
    place = next((i for i, r in enumerate(promoted) if r.name == revision.name), None)
    after = promoted[place + 1] if place is not None and place + 1 < len(promoted) else None
    return after.verdict.at if after is not None and after.verdict is not None else None


def is_released(snapshot: Snapshot, engine_hash: str) -> bool:
    """No gateway can still send requests to this engine: the configuration in the cluster does not name it, and all work by that one."""
    config = snapshot.config
    if config is None:
        return True
    if config.config is None:
        return False
    service = names.engine(snapshot.name, engine_hash)
    is_named = any(revision.service == service for revision in config.config.revisions)
    return not is_named and snapshot.applied_everywhere(config.generation)
