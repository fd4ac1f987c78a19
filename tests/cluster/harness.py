"""What tests on a real API server share: bare requests, the operator as a process, and the parts of kubelet played by hand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import urllib3

from tuneloop_operator.cluster.credentials import load_credentials
from tuneloop_operator.cluster.kinds import KINDS

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
Found = TypeVar("Found")
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
TIMEOUT = 30.0
"""Seconds that is waited for what is expected, where nothing else is said."""


def wait_for(predicate: Callable[[], Found], timeout: float | None = None, what: str = "", every: float = 0.05) -> Found:
    """The first truthy value of the predicate, asked every 50 ms. An AssertionError in it counts as no."""
    timeout = TIMEOUT if timeout is None else timeout
    deadline = time.monotonic() + timeout
    last: object = None
    while True:
        try:
            last = value = predicate()
            if value:
                return value
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{what or 'the condition'} did not come true within {timeout:.0f} s; last: {str(last)[:2000]}")
        time.sleep(every)


class ApiAnswer(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, body: Object) -> None:
        super().__init__(f"{status} {body.get('reason')}: {body.get('message')}")
        self.status = status
        self.body = body


class Api:
    """Requests to the API server as the test's user."""

    def __init__(self, kubeconfig: str) -> None:
        self.kubeconfig = kubeconfig
        credentials = load_credentials({"KUBECONFIG": kubeconfig})
        self.server = credentials.server
        self._token = {"Authorization": f"Bearer {credentials.token}"} if credentials.token else {}
        self._pool = urllib3.PoolManager(ssl_context=credentials.tls if credentials.server.startswith("https") else None, maxsize=8)

    def call(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> Object:
        answer = self._pool.request(
            method,
            self.server + path,
            body=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": content_type, **self._token},
            retries=False,
            timeout=30,
        )
        try:
            content = json.loads(answer.data) if answer.data else {}
        except ValueError:
            content = {"message": answer.data.decode(errors="replace")}
        if answer.status >= 300:
            raise ApiAnswer(answer.status, content)
        return content

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        try:
            return self.call("GET", KINDS[kind].path(namespace, name))
        except ApiAnswer as error:
            if error.status == 404:
                return None
            raise

    def list(self, kind: str, namespace: str | None = None, labels: str = "") -> list[Object]:
        return self.call("GET", KINDS[kind].path(namespace) + (f"?labelSelector={labels}" if labels else ""))["items"]

    def create(self, manifest: Object) -> Object:
        return self.call("POST", KINDS[manifest["kind"]].path(manifest["metadata"].get("namespace")), manifest)

    def apply(self, manifest: Object, manager: str = "test-user") -> Object:
        metadata = manifest["metadata"]
        path = KINDS[manifest["kind"]].path(metadata.get("namespace"), metadata["name"])
        return self.call("PATCH", f"{path}?fieldManager={manager}&force=true", manifest, APPLY)

    def patch(self, kind: str, namespace: str, name: str, body: Object, subresource: str | None = None) -> Object:
        """A merge patch."""
        return self.call("PATCH", KINDS[kind].path(namespace, name, subresource), body, MERGE)

    def patch_status(self, kind: str, namespace: str, name: str, status: Object) -> Object:
        return self.patch(kind, namespace, name, {"status": status}, "status")

    def delete(self, kind: str, namespace: str, name: str, propagation: str = "Background") -> None:
        self.call("DELETE", KINDS[kind].path(namespace, name), {"propagationPolicy": propagation})

    def owned(self, kind: str, namespace: str, uid: str) -> list[Object]:
        """Objects of a kind whose controller has this UID."""
        return [
            o
            for o in self.list(kind, namespace)
            if any(r["uid"] == uid and r.get("controller") for r in o["metadata"].get("ownerReferences", []))
        ]

    def condition(self, kind: str, namespace: str, name: str, type_: str) -> Object | None:
        """A condition of an object's status."""
        obj = self.get(kind, namespace, name) or {}
        return next((c for c in obj.get("status", {}).get("conditions", []) if c["type"] == type_), None)

    def wait_for_condition(
        self,
        kind: str,
        namespace: str,
        name: str,
        type_: str,
        status: str = "True",
        reason: str | None = None,
        timeout: float | None = None,
    ) -> Object:
        """Waits until a condition has this status (and reason), and returns it."""

        def holds() -> Object | None:
            found = self.condition(kind, namespace, name, type_)
            assert found is not None, (self.get(kind, namespace, name) or {}).get("status")
            assert (found["status"], reason or found["reason"]) == (status, found["reason"]), found
            return found

        return wait_for(holds, timeout, f"{kind} {name}: {type_}={status}{' ' + reason if reason else ''}")  # type: ignore[return-value]


class Play:
    """Plays scheduler and kubelet for pods that no node runs: their manifests name the scheduler `nobody`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self._addresses = 0

    def pods(self, owner: str) -> list[Object]:
        """Living pods of a Job, or of a Deployment through its ReplicaSets."""
        pods = [p for p in self.api.list("Pod", self.namespace) if not p["metadata"].get("deletionTimestamp")]
        names = {owner} | {r["metadata"]["name"] for r in self.api.list("ReplicaSet", self.namespace) if owner in _owners(r)}
        return [p for p in pods if names & set(_owners(p))]

    def pod(self, owner: str, timeout: float | None = None) -> Object:
        """Waits for a pod of this Job or Deployment that has not ended."""
        alive = lambda: [p for p in self.pods(owner) if p["status"].get("phase") in (None, "Pending", "Running")]  # noqa: E731
        return wait_for(alive, timeout, f"a pod of {owner}")[0]

    def run(self, pod: Object, address: str | None = None, ready: bool = True) -> Object:
        """The pod runs, and is ready unless said otherwise. Without an address it gets one of 127.77/16, where nothing listens."""
        self._addresses += 1
        address = address or f"127.77.{self._addresses // 250}.{self._addresses % 250 + 1}"
        now = _now()
        state = {"running": {"startedAt": now}}
        conditions = [{"type": t, "status": "True", "lastTransitionTime": now} for t in ("PodScheduled", "Initialized")]
        conditions += [{"type": t, "status": str(ready), "lastTransitionTime": now} for t in ("ContainersReady", "Ready")]
        return self._status(pod, phase="Running", podIP=address, podIPs=[{"ip": address}], startTime=now, conditions=conditions,
                            containerStatuses=_containers(pod, state, ready))  # fmt: skip

    def finish(self, pod: Object, exit_code: int = 0, message: str = "", reason: str | None = None, disrupted: bool = False) -> Object:
        """The pod ends: with this exit code and termination message in its first container; `disrupted` adds DisruptionTarget."""
        now = _now()
        ended = {
            "exitCode": exit_code,
            "reason": reason or ("Completed" if exit_code == 0 else "Error"),
            "startedAt": now,
            "finishedAt": now,
        }
        first = {"terminated": {**ended, **({"message": message} if message else {})}}
        conditions = [{"type": "Ready", "status": "False", "lastTransitionTime": now}]
        if disrupted:
            conditions.append({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "lastTransitionTime": now})
        return self._status(
            pod, phase="Succeeded" if exit_code == 0 else "Failed", conditions=conditions, containerStatuses=_containers(pod, first, False)
        )

    def wait_in_container(self, pod: Object, reason: str, message: str = "") -> Object:
        """A container waits: ImagePullBackOff, CreateContainerConfigError, CrashLoopBackOff, …"""
        state = {"waiting": {"reason": reason, "message": message}}
        return self._status(pod, phase="Pending", containerStatuses=_containers(pod, state, False))

    def crash(self, pod: Object, ended: Object) -> Object:
        """Every container ended once like this, and is about to be started again."""
        state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}
        again = {"restartCount": 1, "lastState": {"terminated": ended}}
        return self._status(pod, phase="Running", containerStatuses=[found | again for found in _containers(pod, state, False)])

    def unschedulable(self, pod: Object, message: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.") -> Object:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message, "lastTransitionTime": _now()}
        return self._status(pod, phase="Pending", conditions=[condition])

    def warn(self, involved: Object, reason: str, message: str) -> Object:
        """A Warning event about an object, as controllers and kubelet write them."""
        metadata = involved["metadata"]
        about = {"kind": involved["kind"], "namespace": self.namespace, "name": metadata["name"], "uid": metadata["uid"]}
        now = _now()
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": f"{metadata['name']}.", "namespace": self.namespace}}
        event |= {"type": "Warning", "reason": reason, "message": message, "involvedObject": about}
        return self.api.create({**event, "firstTimestamp": now, "lastTimestamp": now, "count": 1})

    def _status(self, pod: Object, **status: Any) -> Object:
        answer = self.api.patch_status("Pod", self.namespace, pod["metadata"]["name"], status)
        return {"kind": "Pod", **answer}


def _owners(obj: Object) -> list[str]:
    return [r["name"] for r in obj["metadata"].get("ownerReferences", [])]


def _containers(pod: Object, first: Object, ready: bool) -> list[Object]:
    others = first if "terminated" not in first else {"terminated": {**first["terminated"], "message": ""}}
    return [
        {
            "name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0, "ready": ready,
            "started": "running" in first, "state": first if place == 0 else others,
        }
        for place, container in enumerate(pod["spec"]["containers"])
    ]  # fmt: skip


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class OperatorProcess:
    """`python -m tuneloop_operator` on one namespace, which also holds its Lease."""

    def __init__(
        self,
        kubeconfig: str,
        namespace: str,
        log: Path,
        identity: str = "operator-a",
        module: str = "tuneloop_operator",
        **environment: str,
    ) -> None:
        self.port = free_port()
        self.log = log
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "operator", "trainer_image", "gateway_image")),
            "KUBECONFIG": kubeconfig,
            "TUNELOOP_NAMESPACE": namespace,
            "TUNELOOP_WATCH_NAMESPACES": namespace,
            "TUNELOOP_IDENTITY": identity,
            "TUNELOOP_METRICS_PORT": str(self.port),
            **environment,
        }
        self.module = module
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> OperatorProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", self.module], env=self.environment, stdout=log, stderr=log, cwd=ROOT)
        if wait:
            wait_for(self.is_ready, 30, f"readiness of the operator (log: {self.log})")
        return self

    def is_ready(self) -> bool:
        self._assert_alive()
        return self.probe("/readyz")[0] == 200

    def _assert_alive(self) -> None:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the operator ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}")

    def probe(self, path: str) -> tuple[int, str]:
        """Status and text of an endpoint; 0 where nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name that have these labels; 0 without any. An operator that does not answer is no 0."""
        self._assert_alive()
        status, text = self.probe("/metrics")
        assert status == 200, f"/metrics answered {status}"
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{key}="{text}"' in sample for key, text in labels.items()):
                total += float(value)
        return total

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def pause(self) -> None:
        self.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 20) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def stop(self) -> int:
        """SIGTERM, and the exit code; SIGKILL if it does not heed it."""
        if self.process is None or self.process.poll() is not None:
            return -1 if self.process is None else self.process.returncode
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise
