"""The gateway of a deployment: its configuration, Deployment, Services, claim, keys and disruption budget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tuneloop_gateway.contract import (
    CONFIG_PATH,
    DATA_PATH,
    DATABASE_URL_PATH,
    INTERNAL_PORT,
    KEYS_PATH,
    PUBLIC_PORT,
    SECRETS_PATH,
    TOKEN_PATH,
    GatewayConfig,
)
from tuneloop_operator.api.modeldeployment import DatabaseSecret, ModelDeployment
from tuneloop_operator.render import names, pods
from tuneloop_operator.settings import Settings

Json = dict[str, Any]
COMPONENT = "gateway"
CONFIG_KEY = "config.json"
CONFIG_FOLDER = CONFIG_PATH.rpartition("/")[0]
DATABASE_FOLDER, _, DATABASE_FILE = DATABASE_URL_PATH.rpartition("/")
GRACE_SECONDS = 80
"""Readiness fails, endpoints follow (6 s), running requests end (60 s), what was captured is stored (8 s), the rest ends (5 s)."""
TOKEN_SECONDS = 3600


@dataclass(frozen=True)
class FreshKeys:
    """Random values for a Secret that is made once; never kept, logged or read again."""

    engine_key: str
    internal_token: str
    feedback_key: str

    def __repr__(self) -> str:
        return "FreshKeys(…)"


def gateway_labels(deployment: str) -> dict[str, str]:
    return names.labels(COMPONENT, deployment, **{names.DEPLOYMENT_LABEL: deployment})


def gateway_selector(deployment: str) -> dict[str, str]:
    return {names.DEPLOYMENT_LABEL: deployment, "app.kubernetes.io/component": COMPONENT}


def uses_sqlite(deployment: ModelDeployment) -> bool:
    return deployment.spec.gateway.capture.database.secret_ref is None


# --- configuration -----------------------------------------------------------


def config_text(config: GatewayConfig) -> str:
    """Without what is default, so that a gateway that is older than the operator does not meet fields it does not know."""
    shown = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return json.dumps(shown, sort_keys=True, indent=1, ensure_ascii=False)


def render_config(deployment: ModelDeployment, text: str, annotations: dict[str, str]) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(deployment, names.gateway(deployment.metadata.name)) | {"annotations": annotations},
        "data": {CONFIG_KEY: text},
    }


# --- the pod -----------------------------------------------------------------


def render_gateway(deployment: ModelDeployment, image: str, settings: Settings) -> Json:
    name = deployment.metadata.name
    # Two processes on one SQLite file would lock each other out: the old one goes first.
    rolling: Json = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(deployment, names.gateway(name)),
        "spec": {
            "replicas": deployment.spec.gateway.replicas,
            "selector": {"matchLabels": gateway_selector(name)},
            "strategy": {"type": "Recreate"} if uses_sqlite(deployment) else rolling,
            "revisionHistoryLimit": 2,
            "template": pods.with_overrides(_template(deployment, image, settings), deployment.spec.gateway.pod),
        },
    }


def _template(deployment: ModelDeployment, image: str, settings: Settings) -> Json:
    name = deployment.metadata.name
    storage_volume, storage_mounts = _storage(deployment)
    return {
        "metadata": {"labels": gateway_labels(name)},
        "spec": {
            **pods.pod_defaults(settings, settings.pod_user),
            "serviceAccountName": names.gateway(name),
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [_container(deployment, image, storage_mounts, settings)],
            "volumes": [
                pods.config_volume("config", names.gateway(name)),
                pods.secret_volume("secrets", names.gateway_secret(name), ["engine-key", "internal-token", "feedback-key"]),
                *_key_volumes(deployment),
                storage_volume,
                _token_volume(),
                {"name": "tmp", "emptyDir": {}},
            ],
        },
    }


def _container(deployment: ModelDeployment, image: str, storage_mounts: list[Json], settings: Settings) -> Json:
    keys = [pods.read_only_mount("keys", KEYS_PATH)] if deployment.spec.gateway.auth.api_keys is not None else []
    return {
        "name": COMPONENT,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": [
            pods.from_field("NAMESPACE", "metadata.namespace"),
            pods.from_field("POD_UID", "metadata.uid"),
            pods.value("CONFIG_MAP", names.gateway(deployment.metadata.name)),
        ],
        "ports": [{"name": "http", "containerPort": PUBLIC_PORT}, {"name": "internal", "containerPort": INTERNAL_PORT}],
        "resources": pods.resources({"cpu": "100m", "memory": "192Mi"}, deployment.spec.gateway.pod.resources),
        "securityContext": pods.container_security(),
        "startupProbe": pods.http_probe("/healthz", PUBLIC_PORT, period=1, timeout=2, failures=120),
        "livenessProbe": pods.http_probe("/healthz", PUBLIC_PORT, period=10, timeout=5, failures=6),
        "readinessProbe": pods.http_probe("/readyz", PUBLIC_PORT, period=2, timeout=2, failures=2),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            pods.read_only_mount("config", CONFIG_FOLDER),
            pods.read_only_mount("secrets", SECRETS_PATH),
            *keys,
            *storage_mounts,
            pods.read_only_mount("token", TOKEN_PATH),
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _key_volumes(deployment: ModelDeployment) -> list[Json]:
    auth = deployment.spec.gateway.auth.api_keys
    return [] if auth is None else [pods.secret_volume("keys", auth.secret_ref.name)]


def _storage(deployment: ModelDeployment) -> tuple[Json, list[Json]]:
    """Where captured traffic goes: a Secret with a database's URL, or the claim of a SQLite file."""
    secret = deployment.spec.gateway.capture.database.secret_ref
    if secret is None:
        claim = names.gateway_data(deployment.metadata.name)
        return {"name": "data", "persistentVolumeClaim": {"claimName": claim}}, [{"name": "data", "mountPath": DATA_PATH}]
    return _database_volume(secret), [pods.read_only_mount("database", DATABASE_FOLDER)]


def _database_volume(secret: DatabaseSecret) -> Json:
    items = [{"key": secret.key, "path": DATABASE_FILE}]
    return {"name": "database", "secret": {"secretName": secret.name, "defaultMode": 0o440, "items": items}}


def _token_volume() -> Json:
    """The only token in a pod of ours: for one hour, renewed by the kubelet."""
    sources: list[Json] = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": TOKEN_SECONDS}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
    ]
    return {"name": "token", "projected": {"defaultMode": 0o440, "sources": sources}}


# --- beside the pod ----------------------------------------------------------


def render_public_service(deployment: ModelDeployment) -> Json:
    """The stable URL: called like the deployment, whatever revision answers."""
    ports = [
        {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"},
        {"name": "internal", "port": INTERNAL_PORT, "targetPort": "internal", "protocol": "TCP"},
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(deployment, deployment.metadata.name),
        "spec": {"type": "ClusterIP", "selector": gateway_selector(deployment.metadata.name), "ports": ports},
    }


def render_keys(deployment: ModelDeployment, keys: FreshKeys) -> Json:
    """Made by POST under its one name; if it exists, it stays as it is."""
    owner = {
        "apiVersion": "tuneloop.dev/v1alpha1",
        "kind": "ModelDeployment",
        "name": deployment.metadata.name,
        "uid": deployment.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    metadata = _metadata(deployment, names.gateway_secret(deployment.metadata.name)) | {"ownerReferences": [owner]}
    values = {"engine-key": keys.engine_key, "internal-token": keys.internal_token, "feedback-key": keys.feedback_key}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "stringData": values}


def render_claim(deployment: ModelDeployment) -> Json | None:
    """Where SQLite lies. Retained (the default) it has no owner: captured data survives the object. None: there is a database."""
    volume = deployment.spec.gateway.capture.database.volume
    if not uses_sqlite(deployment):
        return None
    size, storage_class = ("10Gi", None) if volume is None else (volume.size, volume.storage_class_name)
    metadata = _metadata(deployment, names.gateway_data(deployment.metadata.name))
    if volume is None or volume.retention_policy == "Retain":
        metadata["ownerReferences"] = []
    spec: Json = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def render_gateway_budget(deployment: ModelDeployment) -> Json:
    name = deployment.metadata.name
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(deployment, names.gateway(name)),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": gateway_selector(name)}},
    }


def _metadata(deployment: ModelDeployment, name: str) -> Json:
    return {"name": name, "namespace": deployment.metadata.namespace, "labels": gateway_labels(deployment.metadata.name)}
