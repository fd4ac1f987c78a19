"""The operator is killed after each of its writes, and the answer is lost: all ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import harness
from tests.cluster.conftest import Start, fresh_namespace
from tests.cluster.faults import FaultProxy, Write
from tests.cluster.gateways import FakeGateway
from tests.cluster.harness import Api, Play, wait_for
from tests.cluster.test_finetunejob import Trainee, make_claim
from tests.cluster.test_modeldeployment import NAME, version
from tests.cluster.test_modeldeployment import Stage as Serving

from tuneloop_trainer.contract import Stage

Object = dict[str, Any]
Life = Callable[[Api, str], None]
KINDS = (
    "FineTuneJob", "ModelVersion", "ModelDeployment", "Job", "ConfigMap", "NetworkPolicy", "Secret", "Service", "Deployment",
    "ControllerRevision", "PersistentVolumeClaim", "PodDisruptionBudget", "ServiceAccount", "Role", "RoleBinding",
)  # fmt: skip
MADE_BY_OTHERS = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
VOLATILE = re.compile(r"""\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z|generation[\\"]+: \d+""")
"""Times, and how often the gateway's configuration was written: intermediate states may be skipped."""
HASH = re.compile(r"\b[0-9a-f]{8,64}\b")
"""Of content that holds a UID."""
COUNTERS = ("runningSeconds", "since", "estimatedCompletionTime", "generation", "configGeneration")


def life_of_a_job(api: Api, namespace: str) -> None:
    """From the manifest to an approved version."""
    make_claim(api, namespace)
    job = Trainee(api, namespace, "tweets")
    job.make().up_to(Stage.EVALUATE).ends(Stage.EVALUATE)
    job.wait_for("True", "Completed")
    api.wait_for_condition("ModelVersion", namespace, "tweets-v1", "Verified")


def life_of_a_deployment(api: Api, namespace: str) -> None:
    """From the manifest to the second version's full traffic and the end of the first one's engine."""
    address = f"127.99.{int(namespace[-2:], 16)}.{int(namespace[-4:-2], 16) or 1}"
    with FakeGateway(api, namespace, NAME, address) as gateway:
        serving = Serving(api, namespace, Play(api, namespace), gateway)
        serving.serve()
        first = serving.engine(1)
        api.create(version(namespace, 2))
        serving.start_engine(2)
        wait_for(lambda: serving.status()["stable"]["version"] == 2, 60, "version 2 to take over")
        wait_for(lambda: api.get("Deployment", namespace, first) is None, 60, "the first engine to go")
        serving.wait("Ready", "True", "Serving")
        wait_for(lambda: "canary" not in serving.status(), 60)


def end_state(api: Api, namespace: str) -> dict[str, list[str]]:
    """Everything that is there at the end, without what differs between any two runs: UIDs, times, secrets, counters of versions."""
    found = [(kind, obj) for kind in KINDS for obj in api.list(kind, namespace) if (kind, obj["metadata"]["name"]) not in MADE_BY_OTHERS]
    uids = {obj["metadata"]["uid"]: f"<uid of {kind} {obj['metadata']['name']}>" for kind, obj in found}
    state: dict[str, list[str]] = {}
    for kind, obj in found:
        metadata = {key: obj["metadata"].get(key) for key in ("labels", "ownerReferences")}
        content = {key: value for key, value in obj.items() if key in ("spec", "data", "status", "rules", "subjects")}
        if kind == "Secret":
            content["data"] = sorted(obj.get("data", {}))
        text = json.dumps(masked({**content, "metadata": metadata}), sort_keys=True)
        for uid, name in uids.items():
            text = text.replace(uid, name)
        text = HASH.sub("<hash>", VOLATILE.sub("<volatile>", text).replace(namespace, "<namespace>"))
        state.setdefault(f"{kind} {HASH.sub('<hash>', obj['metadata']['name'])}", []).append(text)
    return {name: sorted(texts) for name, texts in state.items()}


def masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "<masked>" if key in (*COUNTERS, "clusterIP", "clusterIPs") else masked(member) for key, member in value.items()}
    return [masked(member) for member in value] if isinstance(value, list) else value


class Run:
    """One life, lived in a namespace of its own by an operator behind the proxy."""

    def __init__(self, api: Api, proxy: FaultProxy, start: Start, folder: Path) -> None:
        self.api, self.proxy, self.start, self.folder = api, proxy, start, folder
        self.deaths = 0

    def live(self, life: Life, *, is_killed: bool) -> tuple[dict[str, list[str]], Counter[str]]:
        """The end state, and how often each object was made."""
        faults = self.proxy.faults
        faults.created.clear()
        faults.writes.clear()
        pid_file = self.folder / "pid"

        def kill(write: Write) -> bool:
            if not is_killed:
                return True
            self.deaths += 1
            with contextlib.suppress(ProcessLookupError, ValueError):  # two writes at once: it is dead already
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
            return False

        with fresh_namespace(self.api, f"{life.__name__} {is_killed}") as namespace:
            faults.after_write = kill
            operator = self.start(
                "mortal",
                wait=False,
                kubeconfig=self.proxy.kubeconfig,
                module="tests.cluster.reborn",
                TUNELOOP_NAMESPACE=namespace,
                TUNELOOP_WATCH_NAMESPACES=namespace,
                TUNELOOP_PID_FILE=str(pid_file),
            )
            life(self.api, namespace)
            wait_for(lambda: self.is_quiet(operator), 60, "an end of the writes")
            state = end_state(self.api, namespace)
            operator.stop()
        made = Counter(f"{kind}/{HASH.sub('<hash>', name)}" for kind, name in faults.created)
        return state, made

    def is_quiet(self, operator: Any) -> bool:
        """Two seconds without a write, and the operator alive."""
        before = len(self.proxy.faults.writes)
        operator.process.poll()
        try:
            operator.process.wait(2)
        except Exception:  # noqa: BLE001 - it lives on, as it should
            return len(self.proxy.faults.writes) == before and operator.probe("/readyz")[0] == 200
        raise RuntimeError("the operator ended")


@pytest.mark.parametrize("life", [life_of_a_job, life_of_a_deployment])
def test_a_death_after_each_write_changes_nothing(
    api: Api, proxy: FaultProxy, start_operator: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: Life
) -> None:
    monkeypatch.setattr(harness, "TIMEOUT", 120.0)  # so many deaths take their time
    run = Run(api, proxy, start_operator, tmp_path)
    expected, made = run.live(life, is_killed=False)
    undisturbed = len(proxy.faults.writes)
    state, made_by_the_dead = run.live(life, is_killed=True)
    assert state.keys() == expected.keys()
    assert {name: text for name, text in state.items() if text != expected[name]} == {
        name: text for name, text in expected.items() if text != state[name]
    }
    assert made_by_the_dead == made, "nothing is made twice, nothing that is not made otherwise"
    assert run.deaths >= undisturbed * 0.6, f"{run.deaths} deaths, {undisturbed} writes without any"
