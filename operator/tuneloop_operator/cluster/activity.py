"""Whether anybody asks a deployment, and whether its engine loads: what our external scaler tells KEDA."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tuneloop_operator.api import modeldeployment
from tuneloop_operator.api.kubernetes import Pod
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.observe_modeldeployment import ask_gateways, component
from tuneloop_operator.domain import times
from tuneloop_operator.render import names
from tuneloop_operator.render.engine import COMPONENT as ENGINE
from tuneloop_operator.render.gateway import COMPONENT as GATEWAY


class Silent(Exception):
    """No gateway says whether there are requests."""


@dataclass(frozen=True)
class Activity:
    """Of one moment."""

    is_awaited: bool
    """Requests wait, and the engine is at zero."""
    is_active: bool
    """Somebody asks, or did within idleSeconds; or the engine loads."""
    least_replicas: int
    """None of these may go while one of them loads."""


async def look(cluster: Cluster, namespace: str, name: str, now: datetime) -> Activity | None:
    """None where there is no such deployment with `autoscaling`. Raises Silent where a gateway does not answer."""
    raw = cluster.cache.get(modeldeployment.KIND, namespace, name)
    deployment = ModelDeployment.model_validate(raw) if raw is not None else None
    if deployment is None or deployment.spec.autoscaling is None:
        return None
    pods = [Pod.model_validate(pod) for pod in cluster.cache.list("Pod", namespace, {names.DEPLOYMENT_LABEL: name})]
    gateways = await ask_gateways([pod for pod in pods if component(pod) == GATEWAY], cluster)
    states = [gateway.state for gateway in gateways if gateway.state is not None]
    engines = [pod for pod in pods if component(pod) == ENGINE and pod.metadata.deletion_timestamp is None]
    loads = any(_loads(pod, deployment.spec.engine.startup_timeout_seconds, now) for pod in engines)
    idle = min((state.idle_seconds for state in states), default=float("inf"))
    is_active = loads or idle < deployment.spec.autoscaling.idle_seconds
    if not is_active and (not gateways or len(states) < len(gateways)):
        raise Silent(f"no answer from a gateway of {namespace}/{name}")
    replicas = deployment.spec.engine.replicas
    is_awaited = replicas == 0 and any(state.held for state in states)
    return Activity(is_awaited, is_active, replicas if loads else 0)


def _loads(pod: Pod, startup_seconds: int, now: datetime) -> bool:
    """Not ready yet, and not for longer than it may take: what never starts keeps nothing."""
    return not pod.is_ready and times.seconds_between(pod.metadata.creation_timestamp, now) < startup_seconds
