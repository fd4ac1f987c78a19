"""Who may reach whom: NetworkPolicies of engines and gateway, and the gateway's own rights at the API server."""

from __future__ import annotations

from typing import Any

from tuneloop_gateway.contract import ENGINE_PORT, INTERNAL_PORT, PUBLIC_PORT
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.render import names
from tuneloop_operator.render.groups import WORKER
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
MONITORING: Json = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
"""Prometheus, wherever it runs, by the label that its charts give it. It reads /metrics; all else asks for a key."""


def component_selector(deployment: str, component: str) -> dict[str, str]:
    return {names.DEPLOYMENT_LABEL: deployment, "app.kubernetes.io/component": component}


def render_engine_policy(deployment: ModelDeployment) -> Json:
    """Only the gateway asks engines, and Prometheus scrapes them: vLLM's own key leaves many paths open."""
    name = deployment.metadata.name
    gateway = {"podSelector": {"matchLabels": component_selector(name, "gateway")}}
    return _policy(deployment, f"{name}-engine", component_selector(name, "engine"), [_allow([gateway, MONITORING], ENGINE_PORT)])


def render_group_policy(deployment: ModelDeployment) -> Json:
    """Engine pods of the deployment reach each other, and nobody else the workers: NCCL, Gloo and vLLM open ports as they like."""
    parts = {"key": "app.kubernetes.io/component", "operator": "In", "values": ["engine", WORKER]}
    members = {"matchLabels": {names.DEPLOYMENT_LABEL: deployment.metadata.name}, "matchExpressions": [parts]}
    policy = _policy(deployment, f"{deployment.metadata.name}-engine-group", {}, [{"from": [{"podSelector": members}]}])
    return policy | {"spec": policy["spec"] | {"podSelector": members}}


def render_gateway_policy(deployment: ModelDeployment, settings: Settings) -> Json:
    """The public port is for all; state, metrics, exports and labels for the operator, the trainers of the namespace and Prometheus."""
    name = deployment.metadata.name
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.namespace}}}
    trainers = {"podSelector": {"matchExpressions": [{"key": names.JOB_LABEL, "operator": "Exists"}]}}
    rules = [{"ports": [{"protocol": "TCP", "port": PUBLIC_PORT}]}, _allow([operator, trainers, MONITORING], INTERNAL_PORT)]
    return _policy(deployment, names.gateway(name), component_selector(name, "gateway"), rules)


def _allow(peers: list[Json], port: int) -> Json:
    return {"from": peers, "ports": [{"protocol": "TCP", "port": port}]}


def _policy(deployment: ModelDeployment, name: str, selector: dict[str, str], ingress: list[Json]) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(deployment, name),
        "spec": {"podSelector": {"matchLabels": selector}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def render_gateway_identity(deployment: ModelDeployment) -> list[Json]:
    """ServiceAccount, Role and RoleBinding: its own ConfigMap by name, and the EndpointSlices of its namespace. No Secrets."""
    name = names.gateway(deployment.metadata.name)
    metadata = _metadata(deployment, name)
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata, "automountServiceAccountToken": False},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": metadata,
            "rules": [
                {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [name], "verbs": ["get", "list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": deployment.metadata.namespace}],
        },
    ]


def _metadata(deployment: ModelDeployment, name: str) -> Json:
    labels = names.labels("gateway", deployment.metadata.name, **{names.DEPLOYMENT_LABEL: deployment.metadata.name})
    return {"name": name, "namespace": deployment.metadata.namespace, "labels": labels}
