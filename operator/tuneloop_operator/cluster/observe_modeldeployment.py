"""What a ModelDeployment's decision rests on: its children from the cache, its gateways' answers, and Prometheus where it is asked."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any

from pydantic import ValidationError

from tuneloop_gateway.contract import INTERNAL_PORT, GatewayConfig, GatewayState, Metric
from tuneloop_operator.api import finetunejob, modeldeployment, modelversion
from tuneloop_operator.api.finetunejob import FineTuneJob
from tuneloop_operator.api.kubernetes import Deployment, Pod
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster, Unreachable
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Key, Target
from tuneloop_operator.domain.modeldeployment import (
    EPOCH_ANNOTATION,
    REARMED_ANNOTATION,
    STABLE_ANNOTATION,
    Evidence,
    GatewayPod,
    ObservedConfig,
    Snapshot,
    decide,
)
from tuneloop_operator.render import groups, names
from tuneloop_operator.render.engine import COMPONENT as ENGINE
from tuneloop_operator.render.engine import GUARD_FILE
from tuneloop_operator.render.gateway import COMPONENT as GATEWAY
from tuneloop_operator.render.gateway import CONFIG_KEY, FreshKeys
from tuneloop_operator.render.revisions import IN_PLACE_SINCE, Revision, decoded, parse_progress, parse_verdict
from tuneloop_operator.settings import Settings

Object = dict[str, Any]
CHILDREN = (
    "ControllerRevision", "Deployment", "Service", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy",
    "PodDisruptionBudget", "PersistentVolumeClaim", "ScaledObject", "LeaderWorkerSet",
)  # fmt: skip
STATE_LIMIT = 64 * 1024
STUCK_SECONDS = 15
"""A pod that has not started for so long may have an event that says why."""


async def observe(key: Key, cluster: Cluster, settings: Settings, now: datetime) -> Snapshot | None:
    """None where the object is gone or going."""
    raw = cluster.cache.get(key.kind, key.namespace, key.name)
    if raw is None or raw["metadata"].get("deletionTimestamp"):
        return None
    deployment = ModelDeployment.model_validate(raw)
    uid = deployment.metadata.uid
    children = {kind: cluster.cache.owned(kind, key.namespace, uid) for kind in CHILDREN}
    pods = [Pod.model_validate(pod) for pod in cluster.cache.list("Pod", key.namespace, {names.DEPLOYMENT_LABEL: key.name})]
    workloads = [Deployment.model_validate(item) for kind in ("Deployment", groups.KIND) for item in children[kind]]
    gateway = next((item for item in workloads if item.metadata.name == names.gateway(key.name)), None)
    config = _config(children["ConfigMap"], key.name)
    reads_prometheus = deployment.spec.monitoring.source == "Prometheus" and settings.prometheus_url is not None
    gateway_pods = await ask_gateways([pod for pod in pods if component(pod) == GATEWAY], cluster)
    warnings = await _warnings(pods, cluster, now)
    return Snapshot(
        deployment=deployment,
        versions=tuple(_versions(deployment, cluster.cache)),
        revisions=tuple(revision for item in children["ControllerRevision"] if (revision := _revision(item)) is not None),
        engines={hashed: item for item in workloads if (hashed := item.metadata.labels.get(names.ENGINE_LABEL))},
        engine_pods=_by_engine(pods, ENGINE),
        engine_workers=_by_engine(pods, groups.WORKER),
        guards=_guards(children["ConfigMap"]),
        guard_source=guard_source(),
        gateway=gateway,
        gateway_pods=gateway_pods,
        config=config,
        jobs=tuple(_jobs(cluster.cache, key)),
        evidence=await _prometheus_evidence(deployment, config, cluster) if reads_prometheus else None,
        reads_prometheus=reads_prometheus,
        has_keda=settings.scaler_address is not None and "ScaledObject" not in cluster.unserved,
        has_groups=groups.KIND not in cluster.unserved,
        warnings=warnings,
        owned=tuple(_target(kind, item) for kind, items in children.items() for item in items),
        conflicts=tuple(sorted(cluster.conflicts.get(uid, ()), key=lambda taken: (taken.kind, taken.name))),
        refusals=cluster.refused(uid),
        keys=_fresh_keys() if gateway is None or _misses_secret(warnings, names.gateway_secret(key.name)) else None,
    )


@cache
def guard_source() -> str:
    """Source of the engine's guard, as it is installed beside the contract; read as a text, never imported."""
    return resources.files("tuneloop_gateway").joinpath(GUARD_FILE).read_text()


# --- children ----------------------------------------------------------------


def component(pod: Pod) -> str:
    return pod.metadata.labels.get("app.kubernetes.io/component", "")


def _versions(deployment: ModelDeployment, objects: Cache) -> Iterable[ModelVersion]:
    for raw in objects.list(modelversion.KIND, deployment.metadata.namespace):
        if raw["spec"].get("model") == deployment.spec.model.name and not raw["metadata"].get("deletionTimestamp"):
            yield ModelVersion.model_validate(raw)


def _jobs(objects: Cache, key: Key) -> Iterable[FineTuneJob]:
    for raw in objects.list(finetunejob.KIND, key.namespace, {names.DEPLOYMENT_LABEL: key.name}):
        yield FineTuneJob.model_validate(raw)


def _revision(raw: Object) -> Revision | None:
    """None for one whose data another release wrote in another shape: it is not served, and goes."""
    pinned = decoded(raw.get("data") or {})
    if pinned is None:
        return None
    metadata = raw["metadata"]
    return Revision(
        name=metadata["name"],
        number=raw.get("revision", 0),
        created_at=metadata.get("creationTimestamp", ""),
        pinned=pinned,
        data=raw["data"],
        verdict=parse_verdict(metadata.get("annotations") or {}),
        progress=parse_progress(metadata.get("annotations") or {}),
        in_place=(metadata.get("annotations") or {}).get(IN_PLACE_SINCE, ""),
    )


def _by_engine(pods: Iterable[Pod], part: str) -> dict[str, tuple[Pod, ...]]:
    found: dict[str, tuple[Pod, ...]] = {}
    for pod in (pod for pod in pods if component(pod) == part and pod.metadata.deletion_timestamp is None):
        hashed = pod.metadata.labels.get(names.ENGINE_LABEL, "")
        found[hashed] = (*found.get(hashed, ()), pod)
    return found


def _guards(config_maps: list[Object]) -> dict[str, str]:
    labelled = ((item["metadata"].get("labels", {}).get(names.ENGINE_LABEL), item.get("data", {}).get(GUARD_FILE)) for item in config_maps)
    return {hashed: source for hashed, source in labelled if hashed and source}


def _config(config_maps: list[Object], name: str) -> ObservedConfig | None:
    raw = next((item for item in config_maps if item["metadata"]["name"] == names.gateway(name)), None)
    if raw is None:
        return None
    text = (raw.get("data") or {}).get(CONFIG_KEY, "")
    annotations = raw["metadata"].get("annotations") or {}
    try:
        config: GatewayConfig | None = GatewayConfig.model_validate_json(text)
    except ValidationError:
        config = None
    generation = config.generation if config is not None else _generation(text)
    return ObservedConfig(
        text=text,
        generation=generation,
        config=config,
        rearmed=annotations.get(REARMED_ANNOTATION, ""),
        stable_since=_number(annotations.get(STABLE_ANNOTATION, "")),
        epoch_since=_number(annotations.get(EPOCH_ANNOTATION, "")),
    )


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 1


def _generation(text: str) -> int:
    """Of a configuration that is otherwise not understood; 0 where there is none."""
    try:
        generation = json.loads(text).get("generation", 0)
    except (ValueError, AttributeError):
        return 0
    return generation if isinstance(generation, int) else 0


def _target(kind: str, raw: Object) -> Target:
    metadata = raw["metadata"]
    return Target(Key(kind, metadata.get("namespace", ""), metadata["name"]), metadata["uid"])


# --- what pods say -----------------------------------------------------------


async def ask_gateways(pods: list[Pod], cluster: Cluster) -> tuple[GatewayPod, ...]:
    """All at once: one that hangs costs two seconds, however many there are."""
    states = await asyncio.gather(*(_state(pod, cluster) for pod in pods))
    return tuple(GatewayPod(pod, state) for pod, state in zip(pods, states, strict=True))


async def _state(pod: Pod, cluster: Cluster) -> GatewayState | None:
    """None where the pod does not answer, answers nonsense, or is another one by now (addresses are used again)."""
    if pod.status.pod_ip is None or pod.status.phase != "Running" or pod.metadata.deletion_timestamp is not None:
        return None
    host = f"[{pod.status.pod_ip}]" if ":" in pod.status.pod_ip else pod.status.pod_ip
    try:
        answer = await cluster.http_get(f"http://{host}:{INTERNAL_PORT}/internal/state", STATE_LIMIT)
        state = GatewayState.model_validate_json(answer)
    except (Unreachable, ValidationError):
        return None
    return state if state.pod_uid == pod.metadata.uid else None


async def _warnings(pods: list[Pod], cluster: Cluster, now: datetime) -> dict[str, str]:
    """The last warning of each pod that does not start, and whose status does not say why (a Secret that cannot be mounted)."""
    stuck = [pod for pod in pods if _is_stuck(pod, now)]
    found: dict[str, str] = {}
    for pod in stuck[:8]:
        events = await cluster.list("Event", pod.metadata.namespace, fields={"involvedObject.uid": pod.metadata.uid, "type": "Warning"})
        messages = sorted((event.get("lastTimestamp") or event.get("eventTime") or "", event.get("message") or "") for event in events)
        if messages:
            found[pod.metadata.uid] = messages[-1][1]
    return found


def _is_stuck(pod: Pod, now: datetime) -> bool:
    has_node = pod.spec.node_name is not None and pod.status.phase == "Pending"
    waits = [status.state.waiting for status in (*pod.status.init_container_statuses, *pod.status.container_statuses)]
    is_silent = not waits or any(wait is not None and wait.reason in ("ContainerCreating", "PodInitializing") for wait in waits)
    return has_node and is_silent and times.seconds_between(pod.status.start_time, now) > STUCK_SECONDS


def _misses_secret(warnings: dict[str, str], secret: str) -> bool:
    return any(f'secret "{secret}" not found' in warning for warning in warnings.values())


def _fresh_keys() -> FreshKeys:
    return FreshKeys(*(secrets.token_urlsafe(32) for _ in range(3)))


# --- Prometheus --------------------------------------------------------------


async def _prometheus_evidence(deployment: ModelDeployment, config: ObservedConfig | None, cluster: Cluster) -> Evidence | None:
    """None where a series is missing, or still of a configuration from before the epoch."""
    name, namespace = deployment.metadata.name, deployment.metadata.namespace
    if config is None:
        return None

    async def value(metric: str, function: str = "max", **labels: str) -> float | None:
        """One number: `function by (namespace, deployment)`. The namespace and the name cannot hold a quote."""
        selector = ",".join(f'{label}="{text}"' for label, text in {"namespace": namespace, "deployment": name, **labels}.items())
        series = await cluster.prometheus(f"{function} by (namespace, deployment) ({metric}{{{selector}}})")
        return series[0][1] if series else None

    try:
        # First: whatever is read after it was scraped with this generation, or a later one.
        generation = await value(Metric.CONFIG_GENERATION, "min")
        if generation is None or generation < config.epoch_since:
            return None
        alarm, evidence, threshold, effect, pairs, remaining = [
            await value(metric)
            for metric in (
                Metric.DRIFT_ALARM, Metric.DRIFT_LOG_EVIDENCE, Metric.DRIFT_LOG_THRESHOLD, Metric.DRIFT_EFFECT, Metric.DRIFT_PAIRS,
                Metric.DRIFT_REFERENCE_REMAINING,
            )
        ]  # fmt: skip
        train, gate = [await value(Metric.LABELLED_ROWS, split=split) for split in ("train", "gate")]
    except Unreachable:
        return None
    if alarm is None or evidence is None or threshold is None or effect is None:
        return None
    return Evidence(
        is_alarm=alarm >= 1,
        is_collecting=not pairs,
        is_exhausted=bool(pairs) and remaining is not None and remaining < 1,
        log_evidence=evidence,
        log_threshold=threshold,
        effect=effect,
        pairs=int(pairs or 0),
        labelled_train=int(train or 0),
        labelled_gate=int(gate or 0),
    )


# --- registration ------------------------------------------------------------


def _deployments_of_version(raw: Object, objects: Cache) -> Iterable[Key]:
    """Those that serve the version's model."""
    namespace, model = raw["metadata"]["namespace"], raw["spec"].get("model")
    for deployment in objects.list(modeldeployment.KIND, namespace):
        if deployment["spec"]["model"]["name"] == model:
            yield Key(modeldeployment.KIND, namespace, deployment["metadata"]["name"])


def _deployment_of_job(raw: Object, objects: Cache) -> Iterable[Key]:
    """The one that had the job made."""
    name = (raw["metadata"].get("labels") or {}).get(names.DEPLOYMENT_LABEL)
    if name:
        yield Key(modeldeployment.KIND, raw["metadata"]["namespace"], name)


REGISTRATION: Registration[Snapshot] = Registration(
    kind=modeldeployment.KIND,
    observe=observe,
    decide=decide,
    children=(*CHILDREN, "Pod"),
    watches={modelversion.KIND: _deployments_of_version, finetunejob.KIND: _deployment_of_job},
)
