"""The operator is killed after each of its writes in a ModelDeployment's life: the same objects, and the same end, as without."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from typing import Any

import pytest
from tests.cluster.conftest import Start
from tests.cluster.faults import FaultProxy, Faults, Write
from tests.cluster.gateways import FakeGateway
from tests.cluster.harness import Api, OperatorProcess, Play, wait_for
from tests.cluster.test_modeldeployment import deployment, digest, version
from tests.cluster.test_retraining import ALARM, LINEAGE, SPEC

Object = dict[str, Any]
KINDS = (
    "Deployment", "Service", "ConfigMap", "ControllerRevision", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount", "Secret",
    "PersistentVolumeClaim", "FineTuneJob", "ModelVersion",
)  # fmt: skip
QUIET_SECONDS = 3.0
HASH = re.compile(r"\b[0-9a-f]{10}\b")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


class Story:
    """From the first version to the retrained one; each look at the cluster plays one step of pods, gateway and people."""

    def __init__(self, api: Api, namespace: str, play: Play, faults: Faults, name: str, address: str) -> None:
        self.api, self.namespace, self.play, self.faults, self.name = api, namespace, play, faults, name
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
        is_alone = all(len(self._of_engines(kind)) == 1 for kind in ("Deployment", "Service", "ConfigMap"))
        return is_served and is_alone and _holds(status, "Ready") and not _holds(status, "DriftDetected")

    def _run(self, pod: Object) -> None:
        is_gateway = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"
        if is_gateway:
            self.gateway.pod_uid = pod["metadata"]["uid"]
        self.play.run(pod, self.gateway.address if is_gateway else None)

    def _of_engines(self, kind: str) -> list[Object]:
        return self.api.list(kind, self.namespace, f"tuneloop.dev%2Fengine,tuneloop.dev%2Fmodeldeployment={self.name}")

    # --- what is compared ---

    def writes(self) -> list[Write]:
        """Those of this story that the API server carried out, in order."""
        own = re.compile(rf"\b{self.name}\b")
        return [write for write, status in self.faults.statuses if status < 300 and own.search(write.target)]

    def written(self) -> set[tuple[str, str]]:
        return {(write.method, self._masked(write.target)) for write in self.writes()}

    def made(self) -> Counter[str]:
        """How often each object was made."""
        return Counter(self._masked(write.target) for write in self.writes() if write.method == "POST")

    def objects(self) -> list[tuple[str, str]]:
        """What there is at the end."""
        found = ((kind, obj["metadata"]["name"]) for kind in KINDS for obj in self.api.list(kind, self.namespace))
        return sorted((kind, self._masked(name)) for kind, name in found if re.match(rf"{self.name}\b", name))

    def end(self) -> Any:
        """Status, configuration and records, without what differs from run to run."""
        config = self.gateway.config()
        assert config is not None
        records = {
            obj["metadata"]["name"]: obj["metadata"].get("annotations")
            for obj in self.api.list("ControllerRevision", self.namespace, f"tuneloop.dev%2Fmodeldeployment={self.name}")
        }
        versions = [self.api.get("ModelVersion", self.namespace, f"{self.name}-v{number}") for number in (1, 2)]
        told = [self.status(), config.model_dump(mode="json"), records, [(found or {}).get("status") for found in versions]]
        text = TIME.sub("TIME", self._masked(json.dumps(told)))
        text = re.sub(r'"(configGeneration|generation)": \d+', '"generation": 0', text)
        return json.loads(re.sub(r'"lastJobUid": "[^"]*"', '"lastJobUid": "UID"', text))

    def _masked(self, text: str) -> str:
        """The story's name and its hashes, which are numbered as they first appear."""
        hashes = list(dict.fromkeys(found for write in self.writes() for found in HASH.findall(write.target)))
        text = re.sub(rf"\b{self.name}\b", "X", text)
        return HASH.sub(lambda found: f"HASH{hashes.index(found[0])}" if found[0] in hashes else "HASH", text)


def _holds(status: Object, type_: str) -> bool:
    return any(c["type"] == type_ and c["status"] == "True" for c in status.get("conditions", []))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_after_every_write_the_operator_ends_with_the_same_objects(
    api: Api, namespace: str, play: Play, proxy: FaultProxy, start_operator: Start
) -> None:
    operator, faults = start_operator(kubeconfig=proxy.kubeconfig), proxy.faults
    calm, wild = (Story(api, namespace, play, faults, name, f"127.89.0.{n}") for n, name in ((1, "calm"), (2, "wild")))
    with calm.gateway, wild.gateway:
        calm.begin()
        wait_for(calm.go_on, 120, "the end of the story")
        _wait_for_rest(operator, calm)
        killed: list[Write] = []

        def kill(write: Write) -> bool:
            """The write is carried out, its answer never arrives, and nothing else of the process happens."""
            assert operator.process is not None
            operator.process.kill()
            killed.append(write)
            return False

        faults.after_write = kill
        wild.begin()
        wait_for(lambda: _goes_on(operator, wild), 240, "the end of a story whose operator is killed after each write")
        _wait_for_rest(operator, wild)
        assert killed == wild.writes()
        assert wild.written() == calm.written()
        assert wild.made() == calm.made()
        assert set(wild.made().values()) == {1}
        assert wild.objects() == calm.objects()
        assert wild.end() == calm.end()


def _goes_on(operator: OperatorProcess, story: Story) -> bool:
    assert operator.process is not None
    if operator.process.poll() is not None:
        operator.start(wait=False)
    return story.go_on()


def _wait_for_rest(operator: OperatorProcess, story: Story) -> None:
    """Until a running operator has found nothing to write for a while."""
    seen, since = -1, 0.0

    def is_at_rest() -> bool:
        nonlocal seen, since
        is_at_end = _goes_on(operator, story)
        if not is_at_end or len(story.faults.writes) != seen or operator.probe("/readyz")[0] != 200:
            seen, since = len(story.faults.writes), time.monotonic()
        return time.monotonic() - since > QUIET_SECONDS

    wait_for(is_at_rest, 60, "an operator that has nothing left to write")
