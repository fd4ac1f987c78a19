"""A kind of the tests' own, so that the runtime is tested without the real kinds: `python -m tests.cluster.toy` runs its operator.

A Widget has a ConfigMap with its settings, a suspended Job, a Secret that is made once, and, for each number up to `spec.records`, a record
that is counted in the status before it is made and survives the Widget.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.cluster.harness import Api, wait_for

from tuneloop_operator.__main__ import main
from tuneloop_operator.cluster.client import Cluster
from tuneloop_operator.cluster.kinds import KINDS, Resource
from tuneloop_operator.cluster.registration import Registration
from tuneloop_operator.domain.decision import Decision, EventNote, Key, Manifest, Target
from tuneloop_operator.render.names import labels
from tuneloop_operator.settings import Settings

KINDS["Widget"] = Resource("tuneloop.dev/v1alpha1", "widgets", "Widget")
OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
CONDITIONS = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
    "items": {
        "type": "object",
        "properties": {"type": {"type": "string"}},
        "required": ["type"],
        "x-kubernetes-preserve-unknown-fields": True,
    },
}
STATUS = {"type": "object", "properties": {"conditions": CONDITIONS}, "x-kubernetes-preserve-unknown-fields": True}
CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.tuneloop.dev"},
    "spec": {
        "group": "tuneloop.dev",
        "scope": "Namespaced",
        "names": {"kind": "Widget", "plural": "widgets", "singular": "widget"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": OPEN, "status": STATUS}}},
            }
        ],
    },
}


def widget(name: str, namespace: str, **spec: Any) -> Manifest:
    return {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "Widget", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


@dataclass(frozen=True)
class Snapshot:
    name: str
    uid: str
    generation: int
    spec: dict[str, Any]
    status: dict[str, Any]
    settings: dict[str, Any] | None
    extras: tuple[dict[str, Any], ...]
    taken: frozenset[Key]


async def observe(key: Key, cluster: Cluster, settings: Settings, now: datetime) -> Snapshot | None:
    found = cluster.cache.get("Widget", key.namespace, key.name)
    if found is None:
        return None
    metadata = found["metadata"]
    config_maps = cluster.cache.owned("ConfigMap", key.namespace, metadata["uid"])
    return Snapshot(
        name=key.name,
        uid=metadata["uid"],
        generation=metadata["generation"],
        spec=found.get("spec", {}),
        status=found.get("status", {}),
        settings=next((c for c in config_maps if c["metadata"]["name"] == f"{key.name}-settings"), None),
        extras=tuple(c for c in config_maps if "-extra-" in c["metadata"]["name"]),
        taken=frozenset(cluster.conflicts.get(metadata["uid"], ())),
    )


def decide(snapshot: Snapshot, settings: Settings, now: datetime) -> Decision:
    name, spec = snapshot.name, snapshot.spec
    wanted, counted = spec.get("records", 0), snapshot.status.get("records", 0)
    ready = {"type": "Ready", "status": "True", "reason": "Made"}
    if snapshot.taken:
        ready = {
            "type": "Ready",
            "status": "False",
            "reason": "NameConflict",
            "message": ", ".join(sorted(key.name for key in snapshot.taken)),
        }
    old = next((c.get("reason") for c in snapshot.status.get("conditions", []) if c["type"] == "Ready"), None)
    events = (EventNote("Normal", ready["reason"], f"{name} is now {ready['reason']}"),) if old != ready["reason"] else ()
    extras = spec.get("extras", [])
    return Decision(
        status={"observedGeneration": snapshot.generation, "records": min(wanted, counted + 1), "conditions": [ready], "nothing": None},
        create=(secret(name), *(record(name, number) for number in range(1, counted + 1))),
        apply=(
            config_map(f"{name}-settings", spec.get("settings", {})),
            job(name, spec),
            *(config_map(f"{name}-extra-{e}", {}) for e in extras),
        ),
        delete=tuple(
            Target(Key("ConfigMap", c["metadata"]["namespace"], c["metadata"]["name"]), c["metadata"]["uid"])
            for c in snapshot.extras
            if c["metadata"]["name"].rpartition("-")[2] not in extras
        ),
        events=events,
        requeue_after=spec.get("requeueAfter"),
    )


def config_map(name: str, data: dict[str, str]) -> Manifest:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels("settings", name)}, "data": data}


def record(name: str, number: int) -> Manifest:
    metadata = {"name": f"{name}-record-{number}", "labels": labels("record", name), "ownerReferences": []}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def secret(name: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-key", "labels": labels("key", name)},
        "stringData": {"key": "x"},
    }


def job(name: str, spec: dict[str, Any]) -> Manifest:
    pod = {
        "restartPolicy": "Never",
        "schedulerName": "nobody",
        "containers": [{"name": "main", "image": spec.get("image", "example.invalid/none"), "command": ["true"]}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{name}-work-1", "labels": labels("work", name)},
        "spec": {
            "suspend": spec.get("suspend", True),
            "backoffLimit": 0,
            "template": {"metadata": {"labels": labels("work", name)}, "spec": pod},
        },
    }


# --- for the tests ---


def edit(api: Api, namespace: str, **spec: Any) -> None:
    """Replaces the whole spec."""
    current = api.get("Widget", namespace, "w")
    assert current is not None
    api.call("PUT", f"/apis/tuneloop.dev/v1alpha1/namespaces/{namespace}/widgets/w", {**current, "spec": spec})


def settled(api: Api, namespace: str) -> Manifest:
    """Waits until the status speaks of the newest generation and all children are there."""

    def holds() -> Manifest:
        found = api.get("Widget", namespace, "w")
        assert found is not None
        assert found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
        assert found["status"]["conditions"][0]["reason"] == "Made", found["status"]
        assert api.get("ConfigMap", namespace, "w-settings")
        assert api.get("Job", namespace, "w-work-1")
        return found

    return wait_for(holds)


def data(api: Api, namespace: str) -> dict[str, str] | None:
    return (api.get("ConfigMap", namespace, "w-settings") or {}).get("data")


REGISTRATION = Registration("Widget", observe, decide, children=("ConfigMap", "Job", "Pod"))

if __name__ == "__main__":
    sys.exit(main([REGISTRATION]))
