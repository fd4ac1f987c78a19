"""Kubernetes' own HorizontalPodAutoscaler scales a deployment by an external metric, which this serves by an APIService, as adapters do."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.harness import APPLY, Api, Object, OperatorProcess, wait_for
from tests.cluster.test_modeldeployment import NAME, Stage, deployment, gateway, operators_fields, stage  # noqa: F401 - fixtures

GROUP = "external.metrics.k8s.io"
SERVICE = f"/apis/apiregistration.k8s.io/v1/apiservices/v1beta1.{GROUP}"
METRIC = "requests_waiting"
SYNC_SECONDS = 120
"""The controller looks every 15 seconds."""


@dataclass
class Metrics:
    """What the metric says, and who asked."""

    value: int = 0
    asked: int = 0


@pytest.fixture
def metrics(api: Api, namespace: str, tmp_path: Path) -> Iterator[Metrics]:
    """The API group of external metrics, served here over HTTPS."""
    said, name = Metrics(), f"metrics.{namespace}.svc"
    key, certificate = tmp_path / "key", tmp_path / "crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-keyout", key,
         "-out", certificate, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"],
        check=True, capture_output=True,
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_value = METRIC in self.path
            said.asked += is_value
            body = json.dumps(values(said.value) if is_value else resources()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    api.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics", "namespace": namespace},
                "spec": {"type": "ExternalName", "externalName": "localhost"}})  # fmt: skip
    spec: Object = {"group": GROUP, "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100}
    spec |= {"service": {"name": "metrics", "namespace": namespace, "port": server.server_address[1]}}
    spec |= {"caBundle": base64.b64encode(certificate.read_bytes()).decode()}
    metadata = {"name": f"v1beta1.{GROUP}"}
    manifest = {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": metadata, "spec": spec}
    api.call("PATCH", f"{SERVICE}?fieldManager=test&force=true", manifest, APPLY)
    yield said
    api.call("DELETE", SERVICE)
    server.shutdown()
    server.server_close()


def resources() -> Object:
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": f"{GROUP}/v1beta1", "resources": []}


def values(value: int) -> Object:
    item = {"metricName": METRIC, "metricLabels": {}, "timestamp": "2026-01-01T00:00:00Z", "value": str(value)}
    return {"kind": "ExternalMetricValueList", "apiVersion": f"{GROUP}/v1beta1", "metadata": {}, "items": [item]}


def autoscaler(namespace: str) -> Object:
    """Two waiting requests for each engine pod."""
    spec: dict[str, Any] = {
        "scaleTargetRef": {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "name": NAME},
        "minReplicas": 1,
        "maxReplicas": 4,
        "metrics": [
            {"type": "External", "external": {"metric": {"name": METRIC}, "target": {"type": "AverageValue", "averageValue": "2"}}}
        ],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
    }
    metadata = {"name": NAME, "namespace": namespace}
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": spec}


@pytest.mark.long
def test_an_autoscaler_owns_the_replicas_and_nobody_takes_them_from_it(
    operator: OperatorProcess, stage: Stage, api: Api, namespace: str, metrics: Metrics  # noqa: F811
) -> None:  # fmt: skip
    stage.serve()
    engine = stage.engine(1)

    def replicas() -> tuple[int, int]:
        found, made = api.get("ModelDeployment", namespace, NAME), api.get("Deployment", namespace, engine)
        assert found is not None
        assert made is not None
        return found["spec"]["engine"]["replicas"], made["spec"]["replicas"]

    before = api.get("ModelDeployment", namespace, NAME)
    assert before is not None
    metrics.value = 5
    api.call("POST", f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers", autoscaler(namespace))
    wait_for(lambda: replicas() == (3, 3), SYNC_SECONDS, "three replicas")
    api.apply(deployment(namespace), manager="git")  # again, with more of its own, and still without replicas
    asked = metrics.asked
    wait_for(lambda: metrics.asked >= asked + 2, SYNC_SECONDS, "two more looks of the autoscaler")
    assert replicas() == (3, 3)
    after = api.get("ModelDeployment", namespace, NAME)
    assert after is not None
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1, "one write of the scale, and no other"
    metrics.value = 1
    wait_for(lambda: replicas() == (1, 1), SYNC_SECONDS, "one replica")
    assert not operators_fields(api, namespace)
    assert len(api.list("ControllerRevision", namespace)) == 1
