"""A canary from end to end but for the pods: the real operator, API server and gateway, engines that are fast and scripted, and clients."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from tests.cluster.harness import ROOT, Api, OperatorProcess, Play, wait_for
from tests.cluster.test_modeldeployment import NAME, deployment, record, version

from tuneloop_gateway.contract import ENGINE_PORT, PUBLIC_PORT, REVISION_HEADER, Outcomes
from tuneloop_operator.domain.modeldeployment.analysis import Limits, analyse
from tuneloop_operator.domain.modeldeployment.evidence import Finding

pytestmark = pytest.mark.long

Object = dict[str, Any]
CLIENTS = 3
DECISION_SECONDS, SWITCH_SECONDS = 10.0, 1.0
STEPS = [{"weight": 20, "minRequests": 50}, {"weight": 50, "minRequests": 50}]
ANALYSIS = {"maxErrorRatioIncrease": "0.05", "maxTimeToFirstTokenIncrease": "3", "maxInterTokenLatencyIncrease": "3"}
"""Latencies of a busy machine are no measure."""
ROLLOUT = {"strategy": "Canary", "steps": STEPS, "analysis": ANALYSIS, "keepPreviousSeconds": 1}
ANSWER = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "positive"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 1},
    }
).encode()


@contextmanager
def engine(address: str, fails_every: int = 0) -> Iterator[None]:
    """Answers at once; every so manieth request, warm-ups aside, with 500."""
    asked = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            is_warm_up = body.get("max_tokens") == 1
            fails = fails_every and not is_warm_up and next(asked) % fails_every == 0
            said = b'{"error":{"message":"no"}}' if fails else ANSWER
            self.send_response(500 if fails else 200 if self.path.endswith("completions") else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((address, ENGINE_PORT), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def endpoint_slice(service: str, address: str) -> Object:
    """Of a Service's one pod. Kubernetes' own controller makes none for addresses of this machine: they are written as names."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-played", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "FQDN",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": "http", "port": ENGINE_PORT}],
    }


@contextmanager
def real_gateway(api: Api, namespace: str, pod: Object, address: str, folder: Path) -> Iterator[None]:
    """`python -m tuneloop_gateway` as in its pod: with the ConfigMap, the Secret and a token of its ServiceAccount."""
    name = f"{NAME}-gateway"
    config = api.get("ConfigMap", namespace, name)
    keys = api.get("Secret", namespace, f"{NAME}-keys")
    assert config is not None
    assert keys is not None
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = api.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token", asked)["status"]["token"]
    kubeconfig = yaml.safe_load(Path(api.kubeconfig).read_text())["clusters"][0]["cluster"]
    inline, path = kubeconfig.get("certificate-authority-data"), kubeconfig.get("certificate-authority")
    authority = base64.b64decode(inline) if inline else Path(path).read_bytes()
    files = {f"secrets/{key}": base64.b64decode(value) for key, value in keys["data"].items()}
    files |= {"token/token": token.encode(), "token/ca.crt": authority, "config.json": config["data"]["config.json"].encode()}
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    places = {
        "CONFIG": "config.json", "SECRETS": "secrets", "KEYS": "keys", "DATA": ".", "DATABASE_URL_FILE": "url", "TOKEN_PATH": "token",
    }  # fmt: skip
    environment = {f"TUNELOOP_GATEWAY_{variable}": str(folder / place) for variable, place in places.items()}
    environment |= {
        "TUNELOOP_GATEWAY_HOST": address,
        "TUNELOOP_GATEWAY_API_SERVER": api.server,
        "TUNELOOP_GATEWAY_DRAIN_DELAY_SECONDS": "0",
    }
    environment |= {"NAMESPACE": namespace, "POD_UID": pod["metadata"]["uid"], "CONFIG_MAP": name}
    environment |= {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "trainer_image", "gateway_image"))}
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "tuneloop_gateway"], env=os.environ | environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: is_ready(address), 30, f"the gateway (log: {folder}/gateway.log)")
        yield
    finally:
        process.terminate()
        process.wait(30)


def is_ready(address: str) -> bool:
    try:
        return bool(urllib3.request("GET", f"http://{address}:{PUBLIC_PORT}/readyz", retries=False, timeout=2).status == 200)
    except urllib3.exceptions.HTTPError:
        return False


@dataclass(frozen=True)
class Request:
    """As a client saw it."""

    sent: float
    received: float
    status: int
    revision: str


@dataclass
class Users:
    """Clients that ask without pause, each request a session of its own."""

    url: str
    requests: list[Request] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Users:
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(10)

    def _ask(self, client: int) -> None:
        pool = urllib3.PoolManager(maxsize=1)
        for number in itertools.count():
            if self._stopped.wait(0.004):
                return
            body = json.dumps({"model": "sentiment", "messages": [{"role": "user", "content": f"{client} {number}"}]})
            sent = time.monotonic()
            answer = pool.request("POST", self.url, body=body, retries=False, timeout=30)
            self.requests.append(Request(sent, time.monotonic(), answer.status, answer.headers.get(REVISION_HEADER, "")))

    def of(self, revision: str, since: float = 0.0) -> list[Request]:
        return [request for request in list(self.requests) if request.revision == revision and request.sent >= since]


def crossing(canary: list[Request], stable: list[Request]) -> float:
    """When a client had the answer with which the evidence sufficed: by the analysis over what clients saw."""
    for end in range(1, len(canary) + 1):
        seen, errors = canary[:end], sum(request.status >= 500 for request in canary[:end])
        usual = sum(request.received <= seen[-1].received for request in stable)
        limits = Limits(max_error_ratio_increase=0.05, steps=len(STEPS))
        found = analyse(Outcomes(requests=end, errors=errors), Outcomes(requests=usual), limits, 1)
        if found.finding is Finding.FAIL:
            return seen[-1].received
    raise AssertionError(f"{len(canary)} requests of the canary are no evidence against it.")


def test_a_good_canary_is_promoted_and_one_that_fails_a_fifth_is_rolled_back(
    operator: OperatorProcess, api: Api, namespace: str, play: Play, tmp_path: Path
) -> None:
    base = f"127.89.{int(namespace[-2:], 16)}"

    def start_engine(number: int) -> str:
        """The version's engine pod runs; the name of its revision."""
        found = wait_for(
            lambda: [r for r in api.list("ControllerRevision", namespace) if r["data"]["version"] == number], what="a revision"
        )
        name = f"{NAME}-{found[0]['data']['engineHash']}"
        wait_for(lambda: api.get("Deployment", namespace, name), what=f"the engine of version {number}")
        play.run(play.pod(name))
        api.call("POST", f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", endpoint_slice(name, f"{base}.{number}"))
        return str(found[0]["metadata"]["name"])

    def weights() -> dict[int, int]:
        found = api.get("ConfigMap", namespace, f"{NAME}-gateway")
        revisions = json.loads(found["data"]["config.json"])["revisions"] if found else []
        return {revision["version"]: revision["weight"] for revision in revisions}

    def until(holds: Callable[[], bool], what: str) -> float:
        wait_for(holds, 90, what, every=0.02)
        return time.monotonic()

    with engine(f"{base}.1"), engine(f"{base}.2"), engine(f"{base}.3", fails_every=5):
        api.create(version(namespace, 1, probesUri=None))
        api.create(deployment(namespace, rollout=ROLLOUT))
        start_engine(1)
        pod = play.pod(f"{NAME}-gateway")
        with real_gateway(api, namespace, pod, f"{base}.100", tmp_path):
            play.run(pod, f"{base}.100")
            api.wait_for_condition("ModelDeployment", namespace, NAME, "Ready", "True", "Serving")
            with Users(f"http://{base}.100:{PUBLIC_PORT}/v1/chat/completions") as users:
                api.create(version(namespace, 2, probesUri=None))
                good = start_engine(2)
                until(lambda: weights().get(2) == 20, "the first share of version 2")
                promoted = until(lambda: weights().get(2) == 100, "version 2 to take over")
                assert {request.status for request in users.requests} == {200}
                print(f"version 2 was promoted after {len(users.of(good))} requests of its own")

                api.create(version(namespace, 3, probesUri=None))
                bad = start_engine(3)
                until(lambda: weights().get(3) == 20, "the first share of version 3")
                decided = until(lambda: weights().get(3, 0) == 0, "the rollback")
                until(lambda: len(users.of(good, since=decided + SWITCH_SECONDS)) > 20, "requests after the rollback")
        canary, stable = users.of(bad), users.of(good, since=promoted)
        crossed = crossing(canary, stable)
        harmed = sum(request.status >= 500 for request in canary)
        print(f"rolled back after {len(canary)} requests, {harmed} failed; decided {decided - crossed:.2f} s after the evidence")
        print(f"last request to the canary {max(request.sent for request in canary) - decided:.2f} s after the decision")
        assert decided - crossed <= DECISION_SECONDS
        assert max(request.sent for request in canary) <= decided + SWITCH_SECONDS
        assert {request.status for request in users.requests if request.revision != bad} == {200}
    assert record(api, namespace, 2)["tuneloop.dev/outcome"] == "Promoted"
    assert record(api, namespace, 3)["tuneloop.dev/outcome-reason"] == "CanaryFailed"
    print(record(api, namespace, 3)["tuneloop.dev/outcome-message"])
