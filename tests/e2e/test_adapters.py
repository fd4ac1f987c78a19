"""LoRA adapters on a real engine: two versions in one process, a canary between them, after a restart too; and what cannot be served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import yaml
from dev.demo import story as tale
from dev.demo import traffic
from dev.demo.base_model import NAME
from dev.demo.kubectl import condition
from dev.demo.story import QUICKSTART, Story

pytestmark = pytest.mark.long

MODEL = "tone"
RANK = 12
"""Not one of vLLM's: the engine makes room for 16."""
ENGINES = f"app.kubernetes.io/component=engine,app.kubernetes.io/instance={MODEL}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

COPY = """
import hashlib, json, pathlib, shutil, sys
source, target, change = sys.argv[1:]
target = pathlib.Path(target)
shutil.rmtree(target, ignore_errors=True)
shutil.copytree(source, target, copy_function=shutil.copyfile)
weights = target / "adapter_model.safetensors"
if change in ("note", "flip"):
    manifest = json.loads((target / "manifest.json").read_bytes())
    manifest["metadata"]["note"] = f"{change}: another digest, hence another revision"
    (target / "manifest.json").write_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
if change == "flip":
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
if change == "zero":
    raw = weights.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    weights.write_bytes(raw[:start] + bytes(len(raw) - start))
    manifest = json.loads((target / "manifest.json").read_bytes())
    for file in manifest["files"]:
        file["sha256"] = hashlib.sha256((target / file["path"]).read_bytes()).hexdigest()
    (target / "manifest.json").write_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
if change == "base":
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"rope_theta": 1}))
manifest = target / "manifest.json"
print("sha256:" + hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.exists() else "")
"""
"""Copies a folder of the claim with one change; prints the digest of its manifest."""


@dataclass
class Served:
    """A deployment of version 1, an adapter, and the version's record."""

    story: Story
    version: dict[str, Any]

    @property
    def space(self) -> Any:
        return self.story.space

    def get(self) -> dict[str, Any]:
        found = self.space.get("modeldeployment", MODEL)
        assert found is not None
        return dict(found)

    def wait_for(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        return dict(self.space.wait_until("modeldeployment", MODEL, done, timeout=900))

    def pin(self, number: int, rollout: dict[str, Any] | None = None, **engine: Any) -> None:
        """`kubectl patch`: serve this version."""
        patch = json.dumps({"spec": {"model": {"version": number}, "engine": engine, "rollout": rollout or {}}})
        self.space.kubectl("patch", "modeldeployment", MODEL, "--type=merge", "-p", patch)

    def answers(self) -> list[str]:
        """Through the gateway, by the deployment's model name."""
        return [answer for answer, _ in self.asked()]

    def asked(self) -> list[tuple[str, str]]:
        """(answer, revision) of some texts."""
        rows = self.story.files["tweets/clean.jsonl"][:12]

        async def ask() -> list[tuple[str, dict[str, str]]]:
            with self.space.forward(f"service/{MODEL}", 80) as url:
                return [await traffic.ask_once(url, MODEL, row.text) for row in rows]

        return [(answer, headers["x-tuneloop-revision"]) for answer, headers in asyncio.run(ask())]

    def listed(self) -> set[str]:
        """What its pod's own /v1/models has beside the base."""
        secret = json.loads(self.space.kubectl("get", "secret", f"{MODEL}-keys", "-o", "json"))
        headers = {"Authorization": f"Bearer {tale.decode(secret['data']['engine-key'])}"}

        async def ask() -> set[str]:
            with self.space.forward(f"pod/{self.pod()['metadata']['name']}", 8000) as url:
                async with aiohttp.ClientSession(headers=headers) as client, client.get(f"{url}/v1/models") as response:
                    return {str(model["id"]) for model in (await response.json())["data"] if model["parent"]}

        return asyncio.run(ask())

    def name(self, number: int) -> str:
        """What the engine calls a version."""
        version = self.space.get("modelversion", f"{MODEL}-v{number}")
        assert version is not None
        return f"{MODEL}-v{number}-{version['spec']['artifact']['manifestDigest'].removeprefix('sha256:')[:12]}"

    def base_answers(self) -> list[str]:
        """Of the base model in the same engine, which the gateway does not let anybody ask."""
        rows = self.story.files["tweets/clean.jsonl"][:12]
        secret = json.loads(self.space.kubectl("get", "secret", f"{MODEL}-keys", "-o", "json"))
        headers = {"Authorization": f"Bearer {tale.decode(secret['data']['engine-key'])}"}

        async def ask() -> list[str]:
            with self.space.forward(f"pod/{self.pod()['metadata']['name']}", 8000) as url:
                async with aiohttp.ClientSession(headers=headers) as client:
                    return [await answer(client, url, row.text) for row in rows]

        async def answer(client: aiohttp.ClientSession, url: str, text: str) -> str:
            messages = [{"role": "user", "content": f"Sentiment of: {text}"}]
            body = {"model": f"{MODEL}-base", "messages": messages, "max_tokens": 4, "temperature": 0}
            async with client.post(f"{url}/v1/chat/completions", json=body) as response:
                return str((await response.json())["choices"][0]["message"]["content"]).strip()

        return asyncio.run(ask())

    def pod(self) -> dict[str, Any]:
        found = [pod for pod in self.space.list("pods", ENGINES) if not pod["metadata"].get("deletionTimestamp")]
        assert len(found) == 1, [pod["metadata"]["name"] for pod in found]
        return dict(found[0])

    def copy(self, source: str, target: str, change: str) -> str:
        return str(self.space.kubectl("exec", "loader", "--", "python3", "-c", COPY, source, target, change)).strip()

    def make(self, number: int, **changes: dict[str, Any]) -> None:
        """A version by hand: the first one with `changes` in its artifact or base."""
        spec = json.loads(json.dumps(self.version["spec"])) | {"version": number, "approval": "Approved"}
        spec.pop("evaluation")
        for field, change in changes.items():
            spec[field] |= change
        manifest = {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelVersion", "metadata": {"name": f"{MODEL}-v{number}"}, "spec": spec}
        self.space.apply(json.dumps(manifest))

    def refused(self, number: int) -> str:
        """Why this version cannot be served; version 1 serves on, and answers."""
        self.pin(number)
        found = self.wait_for(lambda found: condition(found, "Stalled").get("reason") == "RolledBack")
        assert condition(found, "Available")["status"] == "True"
        assert condition(found, "Ready")["status"] == "False"
        assert found["status"]["stable"]["version"] == 1
        assert len(self.answers()) == 12
        return str(condition(found, "Ready")["message"])


@pytest.fixture(scope="module")
def adapter(installed: Story) -> Iterator[Served]:
    """A FineTuneJob made an adapter, and a ModelDeployment serves it."""
    space = installed.space
    job = yaml.safe_load((QUICKSTART / "finetunejob.yaml").read_text())
    job["metadata"]["name"] = job["spec"]["output"]["model"] = MODEL
    job["spec"]["output"]["format"] = "Adapter"
    job["spec"]["method"] = {"type": "LoRA", "lora": {"rank": RANK, "alpha": 2 * RANK}}
    job["spec"]["training"]["maxSteps"] = installed.scale.first_steps
    job["spec"]["evaluation"]["gates"][0]["minItems"] = installed.scale.min_items
    space.apply(json.dumps(job))
    space.wait_until("finetunejob", MODEL, tale._is_finished)
    deployment = yaml.safe_load((QUICKSTART / "modeldeployment.yaml").read_text())
    deployment["metadata"]["name"] = MODEL
    spec = deployment["spec"]
    deployment["spec"] = {"model": {"name": MODEL}, **{field: spec[field] for field in ("engine", "rollout", "gateway")}}
    space.apply(json.dumps(deployment))
    version = space.get("modelversion", f"{MODEL}-v1")
    assert version is not None
    served = Served(installed, version)
    served.wait_for(lambda found: condition(found, "Ready").get("status") == "True")
    space.apply((QUICKSTART.parents[1] / "dev/demo/loader.yaml").read_text().replace("$IMAGE", tale.operator_image()))
    space.kubectl("wait", "--for=condition=Ready", "pod/loader", "--timeout=120s")
    yield served
    space.kubectl("delete", "modeldeployment", MODEL)  # its engine takes the CPUs of others
    space.kubectl("delete", "pod", "loader", "--wait=false")


def test_an_adapter_is_served_under_the_models_name_with_its_evaluators_answers(adapter: Served) -> None:
    artifact = adapter.version["spec"]["artifact"]
    assert (artifact["format"], artifact["rank"], adapter.version["spec"]["approval"]) == ("Adapter", RANK, "Approved")
    arguments = adapter.pod()["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--max-lora-rank") + 1] == "16"
    assert adapter.listed() == {adapter.name(1)}
    agreed = adapter.get()["status"]["stable"]["message"]
    assert "/50 probe items answered as evaluated" in agreed
    assert int(agreed.split("/")[0]) >= 48
    answers = adapter.answers()
    assert set(answers) <= {"positive", "negative"}
    assert not set(adapter.base_answers()) & {"positive", "negative"}


def test_a_canary_between_two_adapters_runs_on_one_engine_and_both_are_there_again_after_its_restart(adapter: Served) -> None:
    before, pod = adapter.answers(), adapter.pod()
    folder = adapter.version["spec"]["artifact"]["uri"].removeprefix("pvc://")
    digest = adapter.copy(f"/volumes/{folder}", "/volumes/models/second", "note")
    adapter.make(8, artifact={"uri": "pvc://models/second", "manifestDigest": digest})
    steps = {"strategy": "Canary", "affinity": "Request", "steps": [{"weight": 50, "minRequests": 1}]}
    adapter.pin(8, steps)
    found = adapter.wait_for(lambda found: found["status"].get("canary", {}).get("weight") == 50)
    revisions = {found["status"][role]["revision"] for role in ("stable", "canary")}
    asked = adapter.asked() + adapter.asked() + adapter.asked()
    assert {revision for _, revision in asked} == revisions
    assert [answer for answer, _ in asked] == before * 3
    assert adapter.pod()["metadata"]["uid"] == pod["metadata"]["uid"]
    assert adapter.listed() == {adapter.name(1), adapter.name(8)}

    restarted(adapter)
    assert adapter.answers() == before
    assert adapter.listed() == {adapter.name(1), adapter.name(8)}

    adapter.pin(8, {"onInconclusive": "Promote", "analysis": {"timeoutSeconds": 1}})
    adapter.wait_for(lambda found: found["status"]["stable"]["version"] == 8)
    uid = adapter.pod()["metadata"]["uid"]
    adapter.pin(1, {"strategy": "BlueGreen", "affinity": "Session"})
    adapter.wait_for(lambda found: found["status"]["stable"]["version"] == 1)
    assert adapter.pod()["metadata"]["uid"] == uid


def restarted(adapter: Served) -> None:
    """Its engine's pod is deleted; another one answers."""
    pod = adapter.pod()["metadata"]
    adapter.space.kubectl("delete", "pod", pod["name"], "--wait=false")
    adapter.space.kubectl("wait", "--for=delete", f"pod/{pod['name']}", "--timeout=180s")
    adapter.wait_for(lambda found: condition(found, "Available").get("status") == "True")
    assert adapter.pod()["metadata"]["uid"] != pod["uid"]


def test_an_adapter_is_there_again_after_a_restart_of_its_engine(adapter: Served) -> None:
    before = adapter.answers()
    restarted(adapter)
    assert adapter.answers() == before


def test_a_damaged_adapter_is_refused_by_its_digest(adapter: Served) -> None:
    folder = adapter.version["spec"]["artifact"]["uri"].removeprefix("pvc://")
    digest = adapter.copy(f"/volumes/{folder}", "/volumes/models/damaged", "flip")
    adapter.make(2, artifact={"uri": "pvc://models/damaged", "manifestDigest": digest})
    assert "adapter_model.safetensors is not what was published" in adapter.refused(2)


def test_an_adapter_on_another_base_is_refused_by_the_bases_digest(adapter: Served) -> None:
    adapter.copy(f"/volumes/models/bases/{NAME}", "/volumes/models/bases/other", "base")
    adapter.make(3, base={"source": {"uri": "pvc://models/bases/other"}})
    assert "The base model in /volumes/models/bases/other is refused" in adapter.refused(3)


def test_a_rank_above_the_recorded_one_is_told_in_the_engines_own_sentence(adapter: Served) -> None:
    adapter.make(4, artifact={"rank": 8})
    message = adapter.refused(4)
    assert f"LoRA rank {RANK} is greater than max_lora_rank 8." in message
    assert "artifact.rank" in message


def test_an_adapter_that_answers_unlike_its_evaluation_takes_no_traffic(adapter: Served) -> None:
    folder = adapter.version["spec"]["artifact"]["uri"].removeprefix("pvc://")
    digest = adapter.copy(f"/volumes/{folder}", "/volumes/models/zeroed", "zero")
    adapter.make(5, artifact={"uri": "pvc://models/zeroed", "manifestDigest": digest})
    message = adapter.refused(5)
    assert "ServingMismatch" in message
    assert "of 50 probe items" in message


def test_a_base_of_the_hub_is_served_from_where_the_training_kept_it_without_network(adapter: Served) -> None:
    kept = f"models/cache/bases/org--smol@{COMMIT}"
    adapter.copy(f"/volumes/models/bases/{NAME}", f"/volumes/{kept}", "nothing")
    source = {"uri": "hf://org/smol", "revision": COMMIT}
    adapter.make(6, base={"source": source, "snapshotUri": f"pvc://{kept}"})
    before = adapter.answers()
    adapter.pin(6)
    adapter.wait_for(lambda found: condition(found, "Ready").get("status") == "True" and found["status"]["stable"]["version"] == 6)
    assert adapter.answers() == before


def test_a_base_that_only_the_hub_has_is_named_where_the_hub_does_not_answer(adapter: Served) -> None:
    adapter.make(7, base={"source": {"uri": "hf://org/smol", "revision": COMMIT}})
    adapter.pin(7, pod={"env": [{"name": "HF_ENDPOINT", "value": "http://127.0.0.1:9"}]})
    found = adapter.wait_for(lambda found: condition(found, "Stalled").get("reason") == "RolledBack")
    assert "cannot reach the hub" in condition(found, "Ready")["message"]
    assert found["status"]["stable"]["version"] == 6
