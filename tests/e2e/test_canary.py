"""Canaries on real pods: operator, gateway and engines' pods are real; the engines are scripted, and fail as their model's files say."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from dev.demo import story as tale
from dev.demo.kubectl import condition
from dev.demo.story import QUICKSTART, Story

pytestmark = pytest.mark.long

NAME = "canary"
CLIENTS = 4
PUBLISH = """
import hashlib, json, pathlib, sys
number, fails_every = sys.argv[1:]
folder = pathlib.Path("/volumes/models/canary", number)
folder.mkdir(parents=True, exist_ok=True)
raw = json.dumps({"failsEvery": int(fails_every), "number": int(number)}).encode()
(folder / "behaviour.json").write_bytes(raw)
file = {"path": "behaviour.json", "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
manifest = json.dumps({"version": 1, "kind": "model", "files": [file], "metadata": {}}, sort_keys=True, separators=(",", ":")).encode()
(folder / "manifest.json").write_bytes(manifest)
engine = pathlib.Path("/volumes/models/engine/vllm/entrypoints/openai/api_server.py")
engine.parent.mkdir(parents=True, exist_ok=True)
engine.write_text(sys.stdin.read())
print("sha256:" + hashlib.sha256(manifest).hexdigest())
"""
"""Writes a model that says how its engine fails, and the engine, to the claim; prints the digest of the model's manifest."""

ENGINE = """
import itertools, json, pathlib, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

model = pathlib.Path(sys.argv[sys.argv.index("--model") + 1])
fails_every = json.loads((model / "behaviour.json").read_text())["failsEvery"]
asked = itertools.count(1)
choice = {"index": 0, "message": {"role": "assistant", "content": "positive"}, "finish_reason": "stop"}
ANSWER = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self):
        self.say(200 if self.path == "/health" else 404, b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_warm_up = body.get("max_tokens") == 1
        fails = fails_every and not is_warm_up and next(asked) % fails_every == 0
        self.say(500 if fails else 200 if self.path.endswith("completions") else 404, b"{}" if fails else ANSWER)

    def say(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
"""Started by the engine's own command, in place of vLLM: PYTHONPATH leads to it."""


def deployment(image: str) -> dict[str, Any]:
    small = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}}
    steps = [{"weight": 20, "minRequests": 50}, {"weight": 50, "minRequests": 50}]
    limits = {"maxErrorRatioIncrease": "0.05", "maxTimeToFirstTokenIncrease": "3", "maxInterTokenLatencyIncrease": "3"}
    return {
        "apiVersion": "tuneloop.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"name": NAME},
            "engine": {
                "image": image,
                "acceleratorsPerReplica": 0,
                "pod": {"resources": small, "env": [{"name": "PYTHONPATH", "value": "/volumes/models/engine"}]},
            },
            "rollout": {"strategy": "Canary", "steps": steps, "analysis": limits, "keepPreviousSeconds": 5},
            "gateway": {"capture": {"database": {"volume": {"size": "1Gi"}}}},
        },
    }


@dataclass
class Fleet:
    """The deployment, and those who ask it."""

    story: Story
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(revision, status) -> how often."""

    def publish(self, number: int, fails_every: int = 0) -> None:
        """An approved version whose engine fails every so manieth request."""
        command = ("exec", "-i", "loader", "--", "python3", "-c", PUBLISH, str(number), str(fails_every))
        digest = self.story.space.kubectl(*command, stdin=ENGINE).strip()
        artifact = {"uri": f"pvc://models/canary/{number}", "manifestDigest": digest, "format": "Merged", "sizeBytes": 1}
        spec = {
            "model": NAME,
            "version": number,
            "artifact": artifact,
            "evaluation": {"verdict": "Pass", "artifactDigest": digest},
            "prompt": {"format": "Chat"},
            "approval": "Approved",
        }
        manifest = {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelVersion", "metadata": {"name": f"{NAME}-v{number}"}, "spec": spec}
        self.story.space.apply(json.dumps(manifest))

    def wait_for(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        return dict(self.story.space.wait_until("modeldeployment", NAME, done, timeout=600))

    def wait_under_load(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Clients ask without pause meanwhile."""
        self.answers.clear()

        async def both() -> dict[str, Any]:
            with self.story.space.forward(f"service/{NAME}", 80) as url:
                async with self._asked(url):
                    return await asyncio.to_thread(self.wait_for, done)

        return asyncio.run(both())

    @asynccontextmanager
    async def _asked(self, url: str) -> Any:
        numbers = itertools.count()

        async def ask(client: aiohttp.ClientSession) -> None:
            for number in numbers:
                body = {"model": NAME, "messages": [{"role": "user", "content": f"question {number}"}]}
                async with client.post(f"{url}/v1/chat/completions", json=body) as response:
                    await response.read()
                    self.answers[response.headers.get("x-tuneloop-revision", ""), response.status] += 1

        async with aiohttp.ClientSession() as client:
            tasks = [asyncio.create_task(ask(client)) for _ in range(CLIENTS)]
            yield
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [error for error in ended if error is not None and not isinstance(error, asyncio.CancelledError)]

    def outcome(self, number: int) -> dict[str, str]:
        revisions = self.story.space.list("controllerrevisions", f"tuneloop.dev/modeldeployment={NAME}")
        return dict(next(r["metadata"]["annotations"] for r in revisions if r["data"]["version"] == number))


@pytest.fixture(scope="module")
def fleet(installed: Story) -> Iterator[Fleet]:
    """Version 1 takes all traffic."""
    space, image = installed.space, tale.operator_image()
    space.kubectl("delete", "pod", "loader", "--ignore-not-found")
    space.apply((QUICKSTART.parents[1] / "dev/demo/loader.yaml").read_text().replace("$IMAGE", image))
    space.kubectl("wait", "--for=condition=Ready", "pod/loader", "--timeout=120s")
    made = Fleet(installed)
    made.publish(1)
    space.apply(json.dumps(deployment(image)))
    made.wait_for(lambda found: condition(found, "Ready").get("status") == "True")
    yield made
    space.kubectl("delete", "modeldeployment", NAME)
    space.kubectl("delete", "pod", "loader", "--wait=false")


def test_a_good_canary_is_promoted_without_one_failed_request(fleet: Fleet) -> None:
    fleet.publish(2)
    found = fleet.wait_under_load(lambda found: found["status"].get("stable", {}).get("version") == 2)
    assert condition(found, "CanaryHealthy")["status"] == "True"
    assert {status for _, status in fleet.answers} == {200}
    assert fleet.outcome(2)["tuneloop.dev/outcome"] == "Promoted"


def test_a_canary_that_fails_a_fifth_of_its_requests_is_rolled_back(fleet: Fleet) -> None:
    fleet.publish(3, fails_every=5)
    found = fleet.wait_under_load(lambda found: condition(found, "CanaryHealthy").get("reason") == "CanaryFailed")
    assert found["status"]["stable"]["version"] == 2
    said = fleet.outcome(3)
    assert (said["tuneloop.dev/outcome"], said["tuneloop.dev/outcome-reason"]) == ("Rejected", "CanaryFailed")
    failed = {revision: count for (revision, status), count in fleet.answers.items() if status >= 500}
    assert len(failed) == 1
    assert sum(failed.values()) < 100
    fleet.wait_for(lambda found: condition(found, "Ready").get("reason") == "RolledBack")
    fleet.wait_under_load(lambda found: sum(fleet.answers.values()) > 100)
    assert {status for _, status in fleet.answers} == {200}, "what was rolled back is not tried again"
