"""How many pods an engine has, and when none: while nobody asks, and until somebody does."""

from __future__ import annotations

import math
from datetime import datetime

from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.domain import times
from tuneloop_operator.domain.modeldeployment import canaries
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render.revisions import Revision


def wanted_replicas(snapshot: Snapshot) -> int:
    """Of an engine that runs: what the scale path says, within the bounds; a roll-out needs one of an engine at zero, too."""
    replicas, bounds = snapshot.deployment.spec.engine.replicas, snapshot.deployment.spec.autoscaling
    if bounds is None:
        return max(replicas, 1)
    return min(max(replicas, bounds.min_replicas, 1), bounds.max_replicas)


def replicas_at(snapshot: Snapshot, candidate: Revision, stable: Revision | None, step: int) -> int:
    """Ready pods that a candidate needs before it takes the traffic of this step, counted from 0: so many that its pods are no busier than
    those of the stable revision, or latencies would not compare. All where it is no canary, and past the last step."""
    wanted, steps = wanted_replicas(snapshot), snapshot.deployment.spec.rollout.steps
    if stable is None or stable.pinned.engine_hash == candidate.pinned.engine_hash or step >= len(steps):
        return wanted
    weight = steps[step].weight
    return math.ceil(wanted * weight / (100 - weight)) if weight < 50 and canaries.is_due(snapshot, candidate, stable) else wanted


def hold_seconds(deployment: ModelDeployment) -> float | None:
    """How long requests wait for an engine that sleeps; None where it never does."""
    bounds = deployment.spec.autoscaling
    return bounds.hold_seconds if bounds is not None and bounds.min_replicas == 0 else None


def wants_sleep(snapshot: Snapshot, stable: Revision, now: datetime) -> bool:
    """From when nobody has asked for idleSeconds, until a request waits. What no gateway tells changes nothing. With KEDA: as it says."""
    bounds = snapshot.deployment.spec.autoscaling
    if bounds is None or bounds.min_replicas > 0:
        return False
    if snapshot.has_keda:
        return snapshot.deployment.spec.engine.replicas == 0
    config = snapshot.config.config if snapshot.config is not None else None
    if config is not None and config.asleep:
        return not any(state.held for state in snapshot.states)
    idle = min((state.idle_seconds for state in snapshot.states), default=0.0)
    all_tell = len(snapshot.states) == len(snapshot.gateway_pods)
    return all_tell and idle >= bounds.idle_seconds and _ready_for(snapshot, stable, now) >= bounds.idle_seconds


def _ready_for(snapshot: Snapshot, stable: Revision, now: datetime) -> float:
    """Seconds since the last pod of its engine got ready; 0 while one loads: whom it was started for may come again."""
    pods = snapshot.engine_pods.get(stable.pinned.engine_hash, ())
    if not pods or not all(pod.is_ready for pod in pods):
        return 0.0
    since = [ready.last_transition_time for pod in pods if (ready := pod.condition("Ready")) is not None]
    return min(times.seconds_between(at, now) for at in since)


def may_stop(snapshot: Snapshot, engine_hash: str) -> bool:
    """No gateway sends this engine anything, and nothing runs on it; or it is stopped already."""
    engine, config = snapshot.engines.get(engine_hash), snapshot.config
    if engine is None or engine.spec.replicas == 0:
        return True
    is_told = config is not None and config.config is not None and config.config.asleep and snapshot.applied_everywhere(config.generation)
    return is_told and bool(snapshot.states) and all(state.idle_seconds > 0 for state in snapshot.states)
