"""An engine at zero, from end to end but for the pods: the real operator, API server and gateway, clients, and an engine that loads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3
from tests.cluster.harness import Api, OperatorProcess, Play, wait_for
from tests.cluster.test_canary import endpoint_slice, engine, real_gateway
from tests.cluster.test_modeldeployment import NAME, deployment, version

from tuneloop_gateway.contract import PUBLIC_PORT

pytestmark = pytest.mark.long

DECISION_SECONDS = 2.0
TIMES = 5
CLIENTS = 20
QUESTION = b'{"model": "sentiment", "messages": [{"role": "user", "content": "hello"}]}'


def test_what_asks_an_engine_at_zero_wakes_it_within_two_seconds_and_nothing_is_lost(
    operator: OperatorProcess, api: Api, namespace: str, play: Play, tmp_path: Path
) -> None:
    base = f"127.90.{int(namespace[-2:], 16)}"

    def engine_name() -> str:
        wait_for(lambda: api.list("ControllerRevision", namespace), what="a revision")
        return f"{NAME}-{api.list('ControllerRevision', namespace)[0]['data']['engineHash']}"

    def replicas() -> int:
        found = api.get("Deployment", namespace, name)
        return int(found["spec"]["replicas"]) if found else -1

    @contextmanager
    def runs() -> Iterator[None]:
        """Its pod is ready, and in the Service."""
        play.run(play.pod(name))
        api.call("POST", f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", endpoint_slice(name, f"{base}.1"))
        yield
        api.delete("EndpointSlice", namespace, f"{name}-played")

    def ask(_: int) -> int:
        answer = urllib3.request("POST", f"http://{base}.100:{PUBLIC_PORT}/v1/chat/completions", body=QUESTION, retries=False, timeout=60)
        return int(answer.status)

    took = []
    with engine(f"{base}.1"), ThreadPoolExecutor(CLIENTS) as clients:
        api.create(version(namespace, 1, probesUri=None))
        api.create(deployment(namespace, autoscaling={"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 2}))
        name = engine_name()
        pod = play.pod(f"{NAME}-gateway")
        with real_gateway(api, namespace, pod, f"{base}.100", tmp_path):
            play.run(pod, f"{base}.100")
            with runs():
                api.wait_for_condition("ModelDeployment", namespace, NAME, "Ready", "True", "Serving")
                wait_for(lambda: replicas() == 0, what="its sleep")
            for _ in range(TIMES):
                wait_for(lambda: not play.pods(name), what="its pods to go")
                api.wait_for_condition("ModelDeployment", namespace, NAME, "Ready", "True", "ScaledToZero")
                began = time.monotonic()
                answers = [clients.submit(ask, number) for number in range(CLIENTS)]
                wait_for(lambda: replicas() == 1, what="its waking", every=0.01)
                took.append(time.monotonic() - began)
                with runs():
                    assert [answer.result(60) for answer in answers] == [200] * CLIENTS
                    wait_for(lambda: replicas() == 0, what="its sleep")
    print(f"from a request to the decision to wake: {', '.join(f'{seconds:.2f}' for seconds in took)} s")
    assert max(took) <= DECISION_SECONDS
