"""How long an engine took to start, phase by phase, by what its pods and the gateways say."""

from __future__ import annotations

import itertools

from tuneloop_operator.api.kubernetes import ContainerStatus, Pod
from tuneloop_operator.api.modeldeployment import ModelDeploymentStatus, StartupStatus
from tuneloop_operator.domain import times
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.engine import COMPONENT, VERIFY
from tuneloop_operator.render.revisions import Revision


def startup_status(snapshot: Snapshot, revision: Revision) -> StartupStatus | None:
    """Of the replica that took longest; None until one is ready and was warmed up. Told once for a revision: a replica that comes later,
    or is not ready for a while, does not change it."""
    return _told(snapshot.deployment.status, revision) or _measured(snapshot, revision)


def _told(status: ModelDeploymentStatus, revision: Revision) -> StartupStatus | None:
    roles = (status.stable, status.canary)
    return next((role.startup for role in roles if role is not None and role.revision == revision.name and role.startup is not None), None)


def _measured(snapshot: Snapshot, revision: Revision) -> StartupStatus | None:
    pods = [pod for pod in snapshot.engine_pods.get(revision.pinned.engine_hash, ()) if pod.is_ready]
    reports = snapshot.reports(revision.name)
    if not pods or not reports or not all(report.warm for report in reports):
        return None
    first_token = max(report.warm_up_seconds for report in reports)
    phases = [found for pod in pods if (found := _phases(pod)) is not None]
    if not phases:
        return None
    schedule, pull, fetch, load = max(phases, key=sum)
    return StartupStatus(
        schedule_seconds=schedule, pull_seconds=pull, fetch_seconds=fetch, load_seconds=load, first_token_seconds=f"{first_token:.2f}"
    )


def _phases(pod: Pod) -> tuple[int, int, int, int] | None:
    """Seconds until it had a node, its image and volumes, its verified model, and was ready; None where the pod does not say all of it.
    A base that the engine fetches from the hub is not verified: there is no time for it."""
    scheduled, ready = pod.condition("PodScheduled"), pod.condition("Ready")
    verified = _container(pod.status.init_container_statuses, VERIFY)
    server = _container(pod.status.container_statuses, COMPONENT)
    if scheduled is None or ready is None or server is None:
        return None
    if verified is not None:
        began, fetched = (ended.started_at, ended.finished_at) if (ended := verified.state.terminated) is not None else (None, None)
    else:
        began = fetched = server.state.running.started_at if server.state.running is not None else None
    marks = (
        pod.metadata.creation_timestamp,
        scheduled.last_transition_time,
        began,
        fetched,
        ready.last_transition_time,
    )
    moments = [times.parse(mark) for mark in marks]
    if any(moment is None for moment in moments):
        return None
    known = [moment for moment in moments if moment is not None]
    schedule, pull, fetch, load = (max(0, int((later - earlier).total_seconds())) for earlier, later in itertools.pairwise(known))
    return schedule, pull, fetch, load


def _container(statuses: tuple[ContainerStatus, ...] | list[ContainerStatus], name: str) -> ContainerStatus | None:
    return next((status for status in statuses if status.name == name), None)
