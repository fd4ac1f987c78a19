"""The pods and Services of a cluster as target groups, labelled as Prometheus' own discovery labels them.

Debian builds Prometheus without discovery by Kubernetes, so this stands in for it, by way of files.
"""

import re
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]  # JSON as the API server sent it
Labels = dict[str, str]

PREFIX = "__meta_kubernetes_"


def pods(items: list[Object]) -> list[Object]:
    """One group per pod that has an address, one target per port of its containers."""
    groups = []
    for pod in items:
        address = pod.get("status", {}).get("podIP")
        if not address or pod["spec"].get("hostNetwork"):
            continue
        for container, port in _ports(pod):
            groups.append(
                {
                    "targets": [f"{address}:{port['containerPort']}"],
                    "labels": pod_labels(pod)
                    | {
                        PREFIX + "pod_container_name": container,
                        PREFIX + "pod_container_port_name": port.get("name", ""),
                        PREFIX + "pod_container_port_number": str(port["containerPort"]),
                    },
                }
            )
    return groups


def services(items: list[Object], slices: list[Object], pod_items: list[Object]) -> list[Object]:
    """One target per address and port of the EndpointSlices of each Service."""
    by_name = {_key(service): service for service in items}
    pod_by_name = {_key(pod): pod for pod in pod_items}
    groups = []
    for piece in slices:
        meta = piece["metadata"]
        service = by_name.get((meta["namespace"], meta.get("labels", {}).get("kubernetes.io/service-name", "")))
        if service is None:
            continue
        owner = {PREFIX + "namespace": meta["namespace"], PREFIX + "service_name": service["metadata"]["name"]}
        owner |= _labels("service", service)
        for endpoint in piece.get("endpoints") or []:
            reference = endpoint.get("targetRef") or {}
            pod = pod_by_name.get((meta["namespace"], reference.get("name", ""))) if reference.get("kind") == "Pod" else None
            for port in piece.get("ports") or []:
                labels = owner | (pod_labels(pod) if pod else {}) | {PREFIX + "endpointslice_port_name": port.get("name", "")}
                if pod:
                    labels[PREFIX + "pod_container_name"] = _container(pod, port["port"])
                groups.append({"targets": [f"{address}:{port['port']}" for address in endpoint["addresses"]], "labels": labels})
    return groups


def pod_labels(pod: Object) -> Labels:
    meta, status = pod["metadata"], pod.get("status", {})
    named = {
        "namespace": meta["namespace"],
        "pod_name": meta["name"],
        "pod_uid": meta["uid"],
        "pod_ip": status.get("podIP", ""),
        "pod_phase": status.get("phase", ""),
        "pod_node_name": pod["spec"].get("nodeName", ""),
    }
    return {PREFIX + name: value for name, value in named.items()} | _labels("pod", pod)


def _labels(owner: str, item: Object) -> Labels:
    found = {}
    for name, value in (item["metadata"].get("labels") or {}).items():
        safe = re.sub(r"[^a-zA-Z0-9_]", "_", name)
        found[f"{PREFIX}{owner}_label_{safe}"] = value
        found[f"{PREFIX}{owner}_labelpresent_{safe}"] = "true"
    return found


def _ports(pod: Object) -> Iterator[tuple[str, Object]]:
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or []:
            yield container["name"], port


def _container(pod: Object, number: int) -> str:
    return next((container for container, port in _ports(pod) if port["containerPort"] == number), "")


def _key(item: Object) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]
