"""The operator is killed after each of its writes in a ModelDeployment's life: the same objects, and the same end, as without."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.faults import FaultProxy, Write
from tests.cluster.gateways import FakeGateway
from tests.cluster.harness import Api, OperatorProcess, Play, wait_for
from tests.cluster.test_modeldeployment import deployment, digest, version
from tests.cluster.test_retraining import ALARM, LINEAGE, SPEC

Object = dict[str, Any]
KINDS = (
    "Deployment", "Service", "ConfigMap", "ControllerRevision", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount", "Secret",
    "PersistentVolumeClaim", "FineTuneJob",
)  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


class Story:
    """From the first version to the retrained one; each look at the cluster plays one step of pods, gateway and people."""

    def __init__(self, api: Api, namespace: str, play: Play, name: str, address: str) -> None:
        self.api, self.namespace, self.play, self.name = api, namespace, play, name
        self.gateway = FakeGateway(api, namespace, name, address)
        self.alarmed = False

    def begin(self) -> None:
        lineage = {"fineTuneJob": "tune", "fineTuneJobUid": "1", "spec": LINEAGE, "configDigest": digest(7)}
        self.api.create(self._version(1, lineage=lineage))
        made = deployment(self.namespace, **SPEC, model={"name": self.name})
        made["metadata"]["name"] = self.name
        self.api.create(made)

    def _version(self, number: int, **spec: Any) -> Object:
        made = version(self.namespace, number, model=self.name, **spec)
        made["metadata"]["name"] = f"{self.name}-v{number}"
        return made

    def status(self) -> Object:
        found = self.api.get("ModelDeployment", self.namespace, self.name)
        return (found or {}).get("status", {})

    def go_on(self) -> bool:
        """True at the end."""
        for pod in self.api.list("Pod", self.namespace, f"tuneloop.dev%2Fmodeldeployment={self.name}"):
            if pod["status"].get("phase") == "Pending" and not pod["metadata"].get("deletionTimestamp"):
                self._run(pod)
        status, config = self.status(), self.gateway.config()
        if config is not None and any(r.weight for r in config.revisions) and not self.alarmed:
            self.gateway.drift, self.gateway.feedback, self.alarmed = dict(ALARM), {"labelledTrain": 250, "labelledGate": 320}, True
        if status.get("retraining", {}).get("lastJobUid") and not self.api.get("ModelVersion", self.namespace, f"{self.name}-v2"):
            self.api.create(self._version(2))
        if config is not None and config.drift is not None and config.drift.epoch == "1":
            self.gateway.drift = {}
        is_served = status.get("stable", {}).get("version") == 2
        return is_served and len(self._engines()) == 1 and _holds(status, "Ready") and not _holds(status, "DriftDetected")

    def _run(self, pod: Object) -> None:
        is_gateway = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
        if is_gateway:
            self.gateway.pod_uid = pod["metadata"]["uid"]
        self.play.run(pod, self.gateway.address if is_gateway else None)

    def _engines(self) -> list[Object]:
        return self.api.list("Deployment", self.namespace, f"tuneloop.dev%2Fengine,tuneloop.dev%2Fmodeldeployment={self.name}")

    def objects(self) -> set[tuple[str, str]]:
        found = {(kind, obj["metadata"]["name"]) for kind in KINDS for obj in self.api.list(kind, self.namespace)}
        return {(kind, self._masked(name)) for kind, name in found if name.startswith(self.name)}

    def end(self) -> Any:
        """Status and configuration, without what differs from run to run."""
        config = self.gateway.config()
        assert config is not None
        text = json.dumps([self.status(), config.model_dump(mode="json")], sort_keys=True)
        text = re.sub(r'"(configGeneration|generation)": \d+', '"generation": 0', TIME.sub("TIME", self._masked(text)))
        return json.loads(re.sub(r'"lastJobUid": "[^"]*"', '"lastJobUid": "UID"', text))

    def _masked(self, text: str) -> str:
        return re.sub(r"\b[0-9a-f]{10}\b", "HASH", text.replace(self.name, "X"))


def _holds(status: Object, type_: str) -> bool:
    return any(c["type"] == type_ and c["status"] == "True" for c in status.get("conditions", []))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_after_every_write_the_operator_ends_with_the_same_objects(
    api: Api, namespace: str, play: Play, proxy: FaultProxy, start_operator: Start
) -> None:
    operator = start_operator(kubeconfig=proxy.kubeconfig)
    calm, wild = (Story(api, namespace, play, name, f"127.89.0.{n}") for n, name in ((1, "calm"), (2, "wild")))
    with calm.gateway, wild.gateway:
        calm.begin()
        wait_for(calm.go_on, 120, "the end of the story")
        writes = len(proxy.faults.writes)
        killed: list[Write] = []

        def kill(write: Write) -> bool:
            """The write is carried out, its answer never arrives, and nothing else of the process happens."""
            assert operator.process is not None
            if write.path.endswith("/secrets") and any(known.path == write.path for known in killed):
                return True  # answered 409: it cannot be read, so it is asked for again, and nothing is written
            operator.process.kill()
            killed.append(write)
            return False

        proxy.faults.after_write = kill
        wild.begin()
        wait_for(lambda: _goes_on(operator, wild), 240, "the end of a story whose operator is killed after each write")
        assert len(killed) >= writes / 2
        assert wild.objects() == calm.objects()
        assert wild.end() == calm.end()
        jobs = [path for path in _posts(proxy) if path.endswith("/finetunejobs")]
        assert len(jobs) == 2


def _posts(proxy: FaultProxy) -> list[str]:
    """Paths of all objects that were made."""
    return [write.path for write, status in proxy.faults.statuses if write.method == "POST" and status == 201]


def _goes_on(operator: OperatorProcess, story: Story) -> bool:
    assert operator.process is not None
    if operator.process.poll() is not None:
        operator.start(wait=False)
    return story.go_on()
