"""Not one failed request on real pods: vLLM's engines and two gateways on PostgreSQL, through all that ends a pod.

Its clients are those of `openai`. They run on this machine and ask the address of the Service, so that kube-proxy chooses for them, and
send nothing twice.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from dev.demo import story as tale
from dev.demo.base_model import NAME as BASE
from dev.demo.kubectl import CommandFailed, condition
from dev.demo.story import QUICKSTART, Story
from openai import AsyncOpenAI
from tests.unit.gateway.postgresql import Server

pytestmark = [pytest.mark.long, pytest.mark.skipif(not tale.IS_LOCAL, reason="pods must reach this machine's database")]

NAME = "load"
GATEWAYS, ENGINES = (f"tuneloop.dev/modeldeployment={NAME},app.kubernetes.io/component={part}" for part in ("gateway", "engine"))
QUESTION: Any = [{"role": "user", "content": "Count from one to fifty in words."}]
LENGTHS = (6, 6, 30)
"""Tokens that the clients ask for: one waits for a short answer, one streams a short one, one streams a long one."""
PAUSE_SECONDS = 1.0
"""Between two requests of a client, so that engines that start have something of two cores."""

PUBLISH = """
import hashlib, json, os, pathlib, shutil, sys
source, number = pathlib.Path("/volumes/models/bases", sys.argv[1]), sys.argv[2]
folder = pathlib.Path("/volumes/models/load", number)
shutil.rmtree(folder, ignore_errors=True)
shutil.copytree(source, folder, copy_function=os.link)
files = [
    {"path": str(p.relative_to(folder)), "size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
    for p in sorted(folder.rglob("*")) if p.is_file()
]
content = {"version": 1, "kind": "model", "files": files, "metadata": {"number": number}}
manifest = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
(folder / "manifest.json").write_bytes(manifest)
print("sha256:" + hashlib.sha256(manifest).hexdigest())
"""
"""Publishes the base model as a version: the same weights under a digest of its own, hence another engine."""

KILL_ENGINE = """
import os, pathlib, signal
pids = [int(p.parent.name) for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if p.read_bytes().startswith(b"VLLM::EngineCore")]
assert len(pids) == 1, pids
os.kill(pids[0], signal.SIGKILL)
"""


@dataclass
class Clients:
    """Three, in a thread of their own; each answer counts for the phase in which it was asked for."""

    url: str
    phase: str = "steady"
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    _stopped: bool = False

    @contextmanager
    def asking(self) -> Iterator[Clients]:
        thread = threading.Thread(target=lambda: asyncio.run(self._all()))
        thread.start()
        try:
            yield self
        finally:
            self._stopped = True
            thread.join(120)

    def begin(self, phase: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {phase}", flush=True)
        self.phase = phase

    async def _all(self) -> None:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(api_key="none", base_url=f"{self.url}/v1", max_retries=0, timeout=120, http_client=http) as client:
            await asyncio.gather(*(self._one(client, number) for number in range(len(LENGTHS))))

    async def _one(self, client: AsyncOpenAI, number: int) -> None:
        while not self._stopped:
            counts, begun = self.counts.setdefault(self.phase, Counter()), False
            counts["sent"] += 1
            reason = None
            try:
                if number == 0:
                    whole = await client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=LENGTHS[0])
                    reason = whole.choices[0].finish_reason if whole.choices[0].message.content else None
                else:
                    stream = await client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=LENGTHS[number], stream=True)
                    async for chunk in stream:
                        begun = True
                        reason = (chunk.choices[0].finish_reason if chunk.choices else None) or reason
            except Exception as error:  # noqa: BLE001 - whatever the client sees of it is counted
                if begun:
                    self.counts.setdefault(self.phase, Counter())["cut"] += 1  # by what happens now, not by what did when it was asked
                else:
                    counts["failed"] += 1
                print(f"{time.strftime('%H:%M:%S')} {self.phase}: {'cut' if begun else 'failed'}: {error!r:.300}", flush=True)
            else:
                counts["answered" if reason in ("stop", "length") else "truncated"] += 1
            await asyncio.sleep(PAUSE_SECONDS)


@dataclass
class Fleet:
    """The deployment, its pods and what happens to them."""

    story: Story

    @property
    def space(self) -> Any:
        return self.story.space

    def publish(self, number: int) -> None:
        digest = self.space.kubectl("exec", "loader", "--", "python3", "-c", PUBLISH, BASE, str(number)).strip()
        artifact = {"uri": f"pvc://models/load/{number}", "manifestDigest": digest, "format": "Merged", "sizeBytes": 1}
        evaluation = {"verdict": "Pass", "artifactDigest": digest}
        spec = {"model": NAME, "version": number, "artifact": artifact, "evaluation": evaluation, "prompt": {"format": "Chat"}}
        version = {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelVersion", "metadata": {"name": f"{NAME}-v{number}"}}
        self.space.apply(json.dumps(version | {"spec": spec | {"approval": "Approved"}}))

    def deploy(self, database: str) -> None:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "load-database"}, "stringData": {"url": database}}
        self.space.apply(json.dumps(secret))
        resources = {"requests": {"cpu": "100m", "memory": "3Gi"}}
        options = {"enforce-eager": "true", "max-num-seqs": "8"}
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # else every engine binds itself to the same core
        pod = {"resources": resources, "env": [{"name": name, "value": value} for name, value in threads.items()]}
        engine = {"acceleratorsPerReplica": 0, "maxModelLength": 512, "options": options, "pod": pod}
        spec = {
            "model": {"name": NAME, "version": 1},
            "engine": engine,
            "rollout": {"keepPreviousSeconds": 30},
            "gateway": {"replicas": 2, "capture": {"database": {"secretRef": {"name": "load-database"}}}},
        }
        deployment = {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": NAME}, "spec": spec}
        self.space.apply(json.dumps(deployment))
        self.serves(1)
        self.until(GATEWAYS, 2)

    def pin(self, number: int) -> None:
        self.space.kubectl("patch", "modeldeployment", NAME, "--type=merge", "-p", json.dumps({"spec": {"model": {"version": number}}}))

    def serves(self, number: int) -> None:
        self.space.wait_until("modeldeployment", NAME, lambda found: _serves(found, number), timeout=600)

    def pods(self, selector: str) -> list[dict[str, Any]]:
        return list(self.space.list("pods", selector))

    def until(self, selector: str, ready: int, seconds: float = 600) -> None:
        """So many pods are ready, and no other is there."""
        end = time.monotonic() + seconds
        while not ((pods := self.pods(selector)) and len(pods) == ready and all(map(_is_ready, pods))):
            assert time.monotonic() < end, [pod["metadata"]["name"] for pod in pods]
            time.sleep(1)

    def evict(self, name: str) -> None:
        """As `kubectl drain` does. Raises CommandFailed where the disruption budget forbids it."""
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": self.space.name}}
        path = f"/api/v1/namespaces/{self.space.name}/pods/{name}/eviction"
        self.space.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))

    def evict_in_turn(self, selector: str) -> None:
        """Each once the one before has been replaced. Of two at once the budget lets one go."""
        first, second = (pod["metadata"]["name"] for pod in self.pods(selector))
        self._evict_when_allowed(first)
        with pytest.raises(CommandFailed, match="disruption budget"):
            self.evict(second)
        self.until(selector, 2)
        self._evict_when_allowed(second)
        self.until(selector, 2)

    def _evict_when_allowed(self, name: str) -> None:
        for _ in range(60):
            with suppress(CommandFailed):
                return self.evict(name)
            time.sleep(1)
        return self.evict(name)

    def kill_an_engine(self) -> None:
        """Its process that computes, by SIGKILL. The container starts again."""
        pod = self.pods(ENGINES)[0]["metadata"]["name"]
        self.space.kubectl("exec", pod, "-c", "engine", "--", "python3", "-c", KILL_ENGINE)
        self.space.wait_until("pod", pod, _was_restarted, timeout=120)
        self.until(ENGINES, 2)


def _serves(found: dict[str, Any], number: int) -> bool:
    is_ready = condition(found, "Ready").get("status") == "True"
    return is_ready and bool((found["status"].get("stable") or {}).get("version") == number)


def _is_ready(pod: dict[str, Any]) -> bool:
    return not pod["metadata"].get("deletionTimestamp") and condition(pod, "Ready").get("status") == "True"


def _was_restarted(pod: dict[str, Any]) -> bool:
    return bool(pod["status"]["containerStatuses"][0]["restartCount"])


@contextmanager
def database_for_pods() -> Iterator[str]:
    """The URL of a PostgreSQL of this machine, at the address that pods know the node by."""
    node = json.loads(tale.run("kubectl", "get", "nodes", "-o", "json"))["items"][0]
    address = next(a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP")
    server = Server().start()
    relay = subprocess.Popen(
        ("socat", f"TCP-LISTEN:25432,bind={address},fork,reuseaddr", f"UNIX-CONNECT:{server.folder}/socket/.s.PGSQL.5432")
    )
    try:
        yield f"postgresql://tuneloop@{address}:25432/tuneloop"
    finally:
        relay.terminate()
        relay.wait()
        server.remove()


@pytest.fixture(scope="module")
def fleet(installed: Story) -> Iterator[Fleet]:
    """Version 1 is served by one engine behind two gateways; version 2 is published."""
    space, made = installed.space, Fleet(installed)
    space.kubectl("delete", "pod", "loader", "--ignore-not-found")
    space.apply((QUICKSTART.parents[1] / "dev/demo/loader.yaml").read_text().replace("$IMAGE", tale.operator_image()))
    space.kubectl("wait", "--for=condition=Ready", "pod/loader", "--timeout=120s")
    made.publish(1)
    made.publish(2)
    space.kubectl("delete", "pod", "loader", "--wait=false")
    with database_for_pods() as database:
        made.deploy(database)
        yield made
        space.kubectl("delete", "modeldeployment", NAME)


def events(fleet: Fleet) -> tuple[tuple[str, Callable[[], None]], ...]:
    """What happens to the pods, one after another; each waits until all is calm again."""

    def roll_out() -> None:
        fleet.pin(2)
        fleet.serves(2)

    def roll_back() -> None:
        fleet.pin(1)
        fleet.serves(1)
        fleet.until(ENGINES, 1)

    def scale_out() -> None:
        fleet.space.kubectl("scale", "modeldeployment", NAME, "--replicas=2")
        fleet.until(ENGINES, 2)

    def scale_in() -> None:
        fleet.space.kubectl("scale", "modeldeployment", NAME, "--replicas=1")
        fleet.until(ENGINES, 1)

    def restart_gateways() -> None:
        fleet.space.kubectl("rollout", "restart", f"deployment/{NAME}-gateway")
        fleet.space.kubectl("rollout", "status", f"deployment/{NAME}-gateway", "--timeout=300s")
        fleet.until(GATEWAYS, 2)

    return (
        ("roll-out", roll_out),
        ("rollback", roll_back),
        ("scale-out", scale_out),
        ("kill -9 of an engine", fleet.kill_an_engine),
        ("gateway restart", restart_gateways),
        ("eviction of each gateway", lambda: fleet.evict_in_turn(GATEWAYS)),
        ("eviction of each engine", lambda: fleet.evict_in_turn(ENGINES)),
        ("scale-in", scale_in),
    )


def test_no_request_fails_through_all_that_ends_pods(fleet: Fleet) -> None:
    service = fleet.space.get("service", NAME)
    clients = Clients(f"http://{service['spec']['clusterIP']}")
    with clients.asking():
        for name, happens in events(fleet):
            clients.begin(name)
            happens()
            time.sleep(3)
    print(json.dumps({name: dict(counts) for name, counts in clients.counts.items()}, indent=1))
    assert all(counts["sent"] for counts in clients.counts.values())
    assert {name: (counts["failed"], counts["truncated"]) for name, counts in clients.counts.items()} == dict.fromkeys(
        clients.counts, (0, 0)
    )
    # What a killed engine had begun to stream nobody can end: its client is told. Two of the three stream.
    cut = {name: counts["cut"] for name, counts in clients.counts.items() if counts["cut"]}
    assert set(cut) <= {"kill -9 of an engine"}
    assert cut.get("kill -9 of an engine", 0) <= 2
