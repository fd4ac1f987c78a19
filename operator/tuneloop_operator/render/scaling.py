"""A deployment's ScaledObject, which KEDA follows: by waiting requests, by the clock, and by what our external scaler says."""

from __future__ import annotations

from typing import Any

from tuneloop_gateway.contract import Metric
from tuneloop_operator.api.modeldeployment import ModelDeployment, ReplicaSchedule
from tuneloop_operator.render import names
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
POLLING_SECONDS = 15
CALM_SECONDS = 300
"""Nothing is taken away that was needed so recently."""
FAILURES = 3
"""Looks at Prometheus that fail before what runs is kept, whatever else is said."""


def render_scaled_object(deployment: ModelDeployment, settings: Settings) -> Json:
    """Asked for only where the deployment has `autoscaling`. It scales the deployment's scale subresource, never an engine."""
    bounds = deployment.spec.autoscaling
    assert bounds is not None
    waiting = [_waiting(deployment, bounds.waiting_requests, settings.prometheus_url)] if settings.prometheus_url is not None else []
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {
            "name": deployment.metadata.name,
            "namespace": deployment.metadata.namespace,
            "labels": names.labels("scaling", deployment.metadata.name, **{names.DEPLOYMENT_LABEL: deployment.metadata.name}),
        },
        "spec": {
            "scaleTargetRef": {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "name": deployment.metadata.name},
            "pollingInterval": POLLING_SECONDS,
            "cooldownPeriod": 1,  # the scaler says "active" for idleSeconds after the last request
            "minReplicaCount": bounds.min_replicas,
            "maxReplicaCount": bounds.max_replicas,
            "fallback": {"failureThreshold": FAILURES, "replicas": max(bounds.min_replicas, 1), "behavior": "currentReplicasIfHigher"},
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": CALM_SECONDS}}}},
            "triggers": [_pushed(settings), *waiting, *(_scheduled(time) for time in bounds.schedule)],
        },
    }


def _pushed(settings: Settings) -> Json:
    """Whether anybody asks or asked of late, and how many replicas must stay while one of them loads."""
    return {"type": "external-push", "name": "activity", "metadata": {"scalerAddress": settings.scaler_address}}


def _waiting(deployment: ModelDeployment, allowed: int, prometheus: str) -> Json:
    """Where no engine tells yet, what waits in the gateways; where they do not either, Prometheus is silent: an error, and no zero."""
    selector = f'namespace="{deployment.metadata.namespace}",deployment="{deployment.metadata.name}"'
    query = f"sum(vllm:num_requests_waiting{{{selector}}}) or sum({Metric.HELD}{{{selector}}})"
    metadata = {"serverAddress": prometheus, "query": query, "threshold": str(allowed), "ignoreNullValues": "false"}
    return {"type": "prometheus", "name": "waiting-requests", "metadata": metadata}


def _scheduled(time: ReplicaSchedule) -> Json:
    metadata = {"timezone": time.timezone, "start": time.start, "end": time.end, "desiredReplicas": str(time.replicas)}
    return {"type": "cron", "metadata": metadata}
