"""The engine behind the gateway: closed to everybody else, and rendering prompts as the trainer did."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import aiohttp
from dev.demo import story as tale
from dev.demo.base_model import NAME
from dev.demo.packages import cache_folder
from dev.demo.story import DEPLOYMENT, MODEL, Story

from tuneloop_gateway.contract import Revision
from tuneloop_gateway.inbound import parse_inbound
from tuneloop_gateway.prompts import compile_prompt
from tuneloop_trainer.chat import Formatter

OPEN = {"/health", "/metrics"}
ENGINES = f"app.kubernetes.io/component=engine,app.kubernetes.io/instance={DEPLOYMENT}"

LIST_ROUTES = """
import json
from fastapi import FastAPI
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
class Unset:
    def __getattr__(self, name):
        return None
app = FastAPI()
app.state.args = Unset()
register_api_routers(app.state.args, app, ("generate",))
routes = {(method, r.path) for r in app.routes if hasattr(r, "path") for method in (getattr(r, "methods", None) or {"GET"})}
print("ROUTES" + json.dumps(sorted(routes)))
"""

ASK_ALL = """
import json, sys, urllib.request, urllib.error
for method, path in json.load(sys.stdin):
    request = urllib.request.Request(sys.argv[1] + path, method=method, data=None if method in ("GET", "HEAD") else b"{}")
    try:
        code = urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        code = error.code
    print(json.dumps([method, path, code]))
"""


STOP_ENGINE = """
import os, pathlib, signal
pids = [int(p.parent.name) for p in pathlib.Path("/proc").glob("[0-9]*/cmdline") if p.read_bytes().startswith(b"VLLM::EngineCore")]
assert len(pids) == 1, pids
os.kill(pids[0], signal.SIGSTOP)
"""


def _engine_pod(story: Story) -> dict[str, object]:
    pods = [pod for pod in story.space.list("pods", ENGINES) if pod["status"]["phase"] == "Running"]
    assert pods, f"no engine pod: {ENGINES}"
    return dict(pods[0])


def test_a_pod_without_any_policy_gets_401_on_every_route_of_the_engine_but_health_and_metrics(serving: Story) -> None:
    pod = _engine_pod(serving)
    name, address = pod["metadata"]["name"], pod["status"]["podIP"]  # type: ignore[index]
    printed = serving.space.kubectl("exec", name, "-c", "engine", "--", "python3", "-c", LIST_ROUTES)
    routes = json.loads(printed.split("ROUTES", 1)[1])
    assert len(routes) > 20
    serving.space.apply((Path(tale.__file__).parent / "loader.yaml").read_text().replace("$IMAGE", tale.operator_image()))
    serving.space.kubectl("wait", "--for=condition=Ready", "pod/loader", "--timeout=120s")
    command = ("exec", "-i", "loader", "--", "python3", "-c", ASK_ALL, f"http://{address}:8000")
    answers = [json.loads(line) for line in serving.space.kubectl(*command, stdin=json.dumps(routes)).splitlines()]
    assert len(answers) == len(routes)
    wrong = [(method, path, code) for method, path, code in answers if path not in OPEN and code != 401]
    assert not wrong


async def test_a_request_for_logprobs_is_answered_and_ends_no_engine(serving: Story) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "fine"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    with serving.space.forward(f"service/{DEPLOYMENT}", 80) as url:
        async with aiohttp.ClientSession() as client:
            for _ in range(2):
                async with client.post(f"{url}/v1/chat/completions", json=body) as response:
                    answer = await response.json(content_type=None)
                assert response.status == 200, answer
                assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2


async def test_the_engine_reads_the_same_tokens_that_the_trainer_taught(serving: Story) -> None:
    from transformers import AutoTokenizer

    config = json.loads(serving.space.get("configmap", f"{DEPLOYMENT}-gateway")["data"]["config.json"])  # type: ignore[index]
    revision = Revision.model_validate(config["revisions"][0])
    formatter = Formatter(AutoTokenizer.from_pretrained(cache_folder() / NAME), frozenset(), "Chat")
    secret = json.loads(serving.space.kubectl("get", "secret", f"{DEPLOYMENT}-keys", "-o", "json"))
    headers = {"Authorization": f"Bearer {tale.decode(secret['data']['engine-key'])}"}
    pod = _engine_pod(serving)["metadata"]["name"]  # type: ignore[index]
    with serving.space.forward(f"pod/{pod}", 8000) as url:
        async with aiohttp.ClientSession(headers=headers) as client:
            for row in serving.files["tweets/clean.jsonl"][:20]:
                raw = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": row.text}]}).encode()
                body = compile_prompt(revision).apply(parse_inbound(raw, "/v1/chat/completions", MODEL))
                async with client.post(f"{url}/tokenize", json={"messages": body["messages"], "add_generation_prompt": True}) as response:
                    served = (await response.json())["tokens"]
                assert served == formatter.prompt_ids(f"Sentiment of: {row.text}")


def test_an_engine_whose_process_stands_still_is_started_anew_after_90_seconds(serving: Story) -> None:
    name = str(_engine_pod(serving)["metadata"]["name"])  # type: ignore[index]

    def container() -> dict[str, object]:
        return dict(serving.space.get("pod", name)["status"]["containerStatuses"][0])  # type: ignore[index]

    def ask(url: str) -> None:
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "fine"}]}).encode()
        with suppress(OSError, http.client.HTTPException):
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/chat/completions", body), timeout=120)

    before = container()
    serving.space.kubectl("exec", name, "-c", "engine", "--", "python3", "-c", STOP_ENGINE)
    stopped = time.monotonic()
    with serving.space.forward(f"service/{DEPLOYMENT}", 80) as url:
        asking = threading.Thread(target=ask, args=(url,), daemon=True)
        asking.start()
        serving.space.wait_until("pod", name, lambda _: container()["restartCount"] != before["restartCount"], timeout=150)
        taken = time.monotonic() - stopped
    print(f"started anew after {taken:.0f} s")
    # Guard and probes take 89 at most; the kubelet and kubectl some more.
    assert taken <= 95
    serving.space.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=300s")
