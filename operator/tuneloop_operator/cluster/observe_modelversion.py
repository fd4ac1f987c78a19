"""Observes a ModelVersion: the object, and the deployments that may serve it. Everything is in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from tuneloop_operator.api import modeldeployment, modelversion
from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.cluster.cache import Cache
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain.decision import Key
from tuneloop_operator.domain.modelversion import ModelVersionSnapshot, decide
from tuneloop_operator.settings import Settings


async def observe(key: Key, cluster: Cluster, settings: Settings, now: datetime) -> ModelVersionSnapshot | None:
    raw = cluster.cache.get(key.kind, key.namespace, key.name)
    if raw is None:
        return None
    deployments = cluster.cache.list(modeldeployment.KIND, key.namespace)
    return ModelVersionSnapshot(ModelVersion.model_validate(raw), tuple(map(ModelDeployment.model_validate, deployments)))


def _versions_of_deployment(raw: dict[str, Any], cache: Cache) -> Iterable[Key]:
    """Versions of its model, and those that it served before its model was changed."""
    metadata = raw["metadata"]
    model = ((raw.get("spec") or {}).get("model") or {}).get("name")
    for version in cache.list(modelversion.KIND, metadata["namespace"]):
        served_by = (version.get("status") or {}).get("servedBy") or ()
        if version["spec"].get("model") == model or metadata["name"] in served_by:
            yield Key(modelversion.KIND, metadata["namespace"], version["metadata"]["name"])


def _new_version(raw: dict[str, Any], cache: Cache) -> Iterable[Key]:
    """A version that a job's pass has just made: an own write is no news to the queue."""
    return [] if raw.get("status") else [Key(modelversion.KIND, raw["metadata"]["namespace"], raw["metadata"]["name"])]


REGISTRATION = Registration(
    kind=modelversion.KIND,
    observe=observe,
    decide=decide,
    watches={modelversion.KIND: _new_version, modeldeployment.KIND: _versions_of_deployment},
)
