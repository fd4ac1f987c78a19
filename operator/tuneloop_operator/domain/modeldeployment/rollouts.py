"""A new revision takes over, at once or step by step, when it is ready, warm and answers like the evaluator; the one before drains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from tuneloop_operator.api.conditions import DeploymentReason
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Invalid
from tuneloop_operator.domain.modeldeployment import canaries, runtimes
from tuneloop_operator.domain.modeldeployment.canaries import Canary
from tuneloop_operator.domain.modeldeployment.failures import Failure
from tuneloop_operator.domain.modeldeployment.judgements import Judgement, judge, rejected
from tuneloop_operator.domain.modeldeployment.revisions import new_revision, revision_of
from tuneloop_operator.domain.modeldeployment.scaling import wants_sleep
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.domain.modeldeployment.targets import Target, resolve
from tuneloop_operator.render import names
from tuneloop_operator.render.revisions import Outcome, Pinned, Revision, Verdict
from tuneloop_operator.settings import Settings

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
    is_asleep: bool = False
    """No engine runs until there is a request."""

    @property
    def live(self) -> tuple[Revision, ...]:
        """Those that the gateway knows, stable first."""
        return tuple(r for r in (self.stable, self.candidate, *self.draining) if r is not None)

    def gives_way(self, revision: Revision) -> bool:
        """Its engine has no pods while the candidate's takes its place."""
        candidate = self.candidate
        return candidate is not None and candidate.in_place != "" and candidate.pinned.engine_hash != revision.pinned.engine_hash


def plan(snapshot: Snapshot, settings: Settings, now: datetime) -> Rollout:
    """The roles by what is observed. A verdict is taken into account at once: the next target is looked for in the same pass."""
    stable = stable_of(snapshot.revisions)
    target = resolve(snapshot, stable)
    if target.version is None:
        return _finished(snapshot, Rollout(target, snapshot.revisions, stable), now)
    known = _anew(revision_of(snapshot.deployment, target.version, snapshot.revisions))
    try:
        candidate = known or new_revision(
            snapshot.deployment, target.version, _next_number(snapshot), times.to_text(now), settings, _running(snapshot)
        )  # fmt: skip
    except Invalid as error:
        refused = Target(reason=DeploymentReason(error.reason), message=error.message, is_final=True)
        return _finished(snapshot, Rollout(refused, snapshot.revisions, stable), now)
    if stable is not None and candidate.name == stable.name:
        return _finished(snapshot, Rollout(target, snapshot.revisions, stable), now)
    if not snapshot.can_run(candidate):
        refused = Target(reason=DeploymentReason.NO_LEADER_WORKER_SETS, message=_NO_GROUPS, is_final=True)
        return _finished(snapshot, Rollout(refused, snapshot.revisions, stable), now)
    flaws = runtimes.vulnerability(snapshot, candidate, settings) if settings.vulnerable_engines == "Refuse" else ""
    if flaws and not runtimes.told_version(snapshot, candidate):
        refused = Target(reason=DeploymentReason.RUNTIME_VULNERABLE, message=flaws, is_final=True)
        return _finished(snapshot, Rollout(refused, snapshot.revisions, stable), now)
    judgement = judge(snapshot, candidate, stable, now)
    if flaws:
        judgement = Judgement(verdict=rejected(DeploymentReason.RUNTIME_VULNERABLE, flaws, now))
    if judgement.verdict is not None:
        is_promoted = judgement.verdict.outcome is Outcome.PROMOTED
        verdict = replace(
            judgement.verdict, at=_decided_at(snapshot, candidate, now), in_place=is_promoted and candidate.in_place != ""
        )  # fmt: skip
        ended = replace(candidate, verdict=verdict, progress=None if is_promoted else candidate.progress, in_place="")
        return plan(_recorded(snapshot, ended), settings, now)
    candidate = replace(candidate, progress=judgement.progress, in_place=judgement.in_place)
    recorded = _recorded(snapshot, candidate)
    canary = canaries.look(snapshot, candidate, stable, now) if stable is not None else None
    rollout = Rollout(target, recorded.revisions, stable, candidate, (), judgement.failure, judgement.waits_for, canary)
    return _finished(snapshot, rollout, now)


def _running(snapshot: Snapshot) -> dict[str, Pinned]:
    """What is pinned of each engine that there is, and that has served."""
    return {r.pinned.engine_hash: r.pinned for r in _promoted(snapshot.revisions) if r.pinned.engine_hash in snapshot.engines}


_NO_GROUPS = (
    "A replica of several nodes (engine.nodesPerReplica) needs LeaderWorkerSets (leaderworkerset.x-k8s.io/v1), and this cluster had none"
    " when the operator started. Install LeaderWorkerSet and restart the operator, or set engine.nodesPerReplica to 1."
)


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


# --- what goes ---------------------------------------------------------------


def _finished(snapshot: Snapshot, rollout: Rollout, now: datetime) -> Rollout:
    """With those that drain, and the record cut to its length."""
    in_use = {r.name for r in (rollout.stable, rollout.candidate) if r is not None}
    is_asleep = rollout.candidate is None and rollout.stable is not None and wants_sleep(snapshot, rollout.stable, now)
    rollout = replace(
        rollout, is_asleep=is_asleep, revisions=tuple(r if r.name in in_use else _ended(r, rollout, now) for r in rollout.revisions)
    )
    drains = tuple(r for r in rollout.revisions if r.name not in in_use and _drains(snapshot, rollout, r, now))
    with_draining = replace(rollout, draining=drains)
    live = {r.name for r in with_draining.live}
    idle = sorted((r for r in rollout.revisions if r.name not in live), key=lambda r: r.number, reverse=True)[:HISTORY]
    kept = {r.name for r in idle} | live
    return replace(with_draining, revisions=tuple(sorted((r for r in rollout.revisions if r.name in kept), key=lambda r: r.number)))


def _ended(revision: Revision, rollout: Rollout, now: datetime) -> Revision:
    """A canary whose turn it is no longer, though nothing was found."""
    revision = replace(revision, in_place="")
    if revision.progress is None or revision.verdict is not None:
        return revision
    wanted, refused = rollout.target.version, rollout.target.message
    why = f"Version {wanted.spec.version} is to be served instead." if wanted is not None else refused
    return replace(revision, verdict=Verdict(Outcome.REPLACED, times.to_text(now), message=why))


def _drains(snapshot: Snapshot, rollout: Rollout, revision: Revision, now: datetime) -> bool:
    """Warm for keepPreviousSeconds after another took over; longer while requests run on it. A canary that was stopped: while they do."""
    if revision.is_promoted and rollout.stable is not None and rollout.stable.verdict is not None and rollout.stable.verdict.in_place:
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
