"""Every example of an objective, a method and of data goes from `kubectl apply` to a ModelVersion, with a tiny base and a few steps; and to
the answers of a real engine, where its cell of the table of what goes together says so."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from dev.demo import story as tale
from dev.demo.kubectl import ROOT, condition
from dev.demo.story import Story
from tests.unit.trainer.builders import make_base, make_encoder_decoder

pytestmark = pytest.mark.long

BASE = "tiny"
ENCODER_DECODER = "tiny-t5"
JUDGE = "rewardmodel"
"""What it makes, rloo's model earns its rewards from."""
AT_ONCE = 3
ENGINES_AT_ONCE = 2
STEPS = 3
ROWS = 240
EXAMPLES = {path.stem: path for folder in ("objectives", "methods", "data") for path in sorted((ROOT / "examples" / folder).glob("*.yaml"))}


def _sources(spec: dict[str, Any]) -> Iterator[str]:
    """Where its rows are read; nothing for feedback."""
    for entry in [
        *spec["data"]["train"],
        *(suite["dataset"] for suite in spec.get("evaluation", {}).get("suites", ()) if "dataset" in suite),
    ]:
        yield entry.get("source", {}).get("uri", "")


NAMES = [
    name for name, path in EXAMPLES.items() if all(uri.startswith("pvc://") for uri in _sources(yaml.safe_load(path.read_text())["spec"]))
]
"""Those that read a bucket, a hub or a deployment's feedback have tests of their own beside what they read."""
NAMES.sort(key=lambda name: name != JUDGE)
NOT_SERVABLE = {"classification", "rewardmodel", "seq2seq", "prompttuning"}
ENGINE = {"acceleratorsPerReplica": 0, "maxModelLength": 256, "options": {"enforce-eager": "true", "max-num-seqs": "4"}}


@pytest.fixture(scope="module")
def finished(installed: Story, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Example -> its FineTuneJob at the end."""
    space = installed.space
    jobs = {name: _small(yaml.safe_load(EXAMPLES[name].read_text())) for name in NAMES}
    datasets = tmp_path_factory.mktemp("datasets")
    rows = [_row(number, row.text, str(row.label)) for number, row in enumerate(installed.files["tweets/train.jsonl"][:ROWS])]
    for uri in {uri for job in jobs.values() for uri in _sources(job["spec"])}:
        _write(datasets / uri.removeprefix("pvc://datasets/"), rows)
    bases = tmp_path_factory.mktemp("bases")
    make_base(bases / BASE, head_dim=32)  # 8, as it has otherwise, is none of the engine's
    make_encoder_decoder(bases / ENCODER_DECODER)
    for file in bases.rglob("*.safetensors"):
        file.chmod(0o644)  # trainer and engine are not of one user
    tale._upload(space, {datasets: "/volumes/datasets", bases: "/volumes/models/bases"})
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(NAMES), AT_ONCE):
        wave = NAMES[start : start + AT_ONCE]
        for name in wave:
            _judge(jobs[name], found, installed)
            space.apply(json.dumps(jobs[name]))
        for name in wave:
            found[name] = space.wait_until("finetunejob", jobs[name]["metadata"]["name"], tale._is_finished)
            tale.say(f"{name}: {condition(found[name], 'Succeeded')}")
    return found


@pytest.fixture(scope="module")
def deployed(installed: Story, finished: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Example -> its ModelDeployment, and what it `answered`."""
    found: dict[str, dict[str, Any]] = {}
    done = [name for name in NAMES if "modelVersion" in finished[name].get("status", {})]
    for start in range(0, len(done), ENGINES_AT_ONCE):
        wave = {name: finished[name]["spec"]["output"]["model"] for name in done[start : start + ENGINES_AT_ONCE]}
        for name, model in wave.items():
            approval = json.dumps({"spec": {"approval": "Approved"}})  # three steps make no model better
            made = _version(installed, finished[name])["metadata"]["name"]
            installed.space.kubectl("patch", "modelversion", made, "--type=merge", "-p", approval)
            installed.space.apply(json.dumps(_deployment(model, finished[name])))
        for name, model in wave.items():
            found[name] = installed.space.wait_until("modeldeployment", model, _is_settled, timeout=900)
            tale.say(f"{name}: {condition(found[name], 'Ready')}")
            if condition(found[name], "Ready").get("status") == "True":
                with installed.space.forward(f"service/{model}", 80) as url:
                    found[name]["answered"] = asyncio.run(_answer(url, model, found[name]["spec"].get("task", "Chat")))
        for model in wave.values():
            installed.space.kubectl("delete", "modeldeployment", model, "--wait=true")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_example_becomes_a_model_version(installed: Story, finished: dict[str, dict[str, Any]], name: str) -> None:
    job = finished[name]
    status = job["status"]
    assert condition(job, "Succeeded").get("status") == "True", condition(job, "Succeeded").get("message")
    assert status["progress"]["step"] == STEPS
    assert status["evaluation"]["gates"], "rows that are held out judge it"
    version = _version(installed, job)
    assert version["spec"]["artifact"]["manifestDigest"].startswith("sha256:")
    assert version["spec"]["lineage"]["fineTuneJob"] == job["metadata"]["name"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_served_or_said_not_to_be(deployed: dict[str, dict[str, Any]], name: str) -> None:
    if name in NOT_SERVABLE:
        assert condition(deployed[name], "Stalled").get("reason") == "NotServable"
    else:
        assert condition(deployed[name], "Ready").get("status") == "True", condition(deployed[name], "Ready").get("message")
        assert deployed[name]["answered"]["usage"]["completion_tokens"] > 0


def _version(installed: Story, job: dict[str, Any]) -> dict[str, Any]:
    """The ModelVersion that the job made."""
    found = installed.space.get("modelversion", f"{job['spec']['output']['model']}-v{job['status']['modelVersion']}")
    assert found is not None
    return found


def _deployment(model: str, job: dict[str, Any]) -> dict[str, Any]:
    is_completion = job["spec"].get("objective", {}).get("type") == "Pretraining"
    spec = {"model": {"name": model}, "engine": ENGINE} | ({"task": "Completion"} if is_completion else {})
    return {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": model}, "spec": spec}


def _is_settled(deployment: dict[str, Any]) -> bool:
    return "True" in {condition(deployment, kind).get("status") for kind in ("Ready", "Stalled")}


async def _answer(url: str, model: str, task: str) -> dict[str, Any]:
    chat = task == "Chat"
    body = {"messages": [{"role": "user", "content": "Is it good?"}]} if chat else {"prompt": "It was"}
    body |= {"model": model, "max_tokens": 4, "temperature": 0}
    address = f"{url}/v1/{'chat/' if chat else ''}completions"
    async with aiohttp.ClientSession(raise_for_status=True) as client, client.post(address, json=body) as response:
        return dict(await response.json())


def _small(job: dict[str, Any]) -> dict[str, Any]:
    """What is an example's own stays; its size becomes a test's."""
    name, spec = f"example-{job['metadata']['name']}", job["spec"]
    objective = spec.get("objective", {})
    job["metadata"]["name"] = spec["output"]["model"] = name
    if "uri" in spec.get("baseModel", {}):
        spec["baseModel"] = {"uri": f"pvc://models/bases/{ENCODER_DECODER if objective.get('type') == 'Seq2Seq' else BASE}"}
    if "architecture" in spec.get("baseModel", {}):
        spec["baseModel"] = {"architecture": {"layers": 2, "hiddenSize": 64, "heads": 2}, "tokenizer": {"train": {"vocabularySize": 400}}}
    spec["compute"] = {"acceleratorsPerNode": 0}
    training = spec.setdefault("training", {})
    training.pop("epochs", None)
    training.update(maxSteps=STEPS, globalBatchSize=8, maxSequenceLength=256)
    return job


def _judge(job: dict[str, Any], found: dict[str, dict[str, Any]], installed: Story) -> None:
    """Puts the reward model that an example before it made in its place, as its user would."""
    for options in job["spec"].get("objective", {}).values():
        for reward in options.get("rewards", ()) if isinstance(options, dict) else ():
            if "model" in reward:
                artifact = _version(installed, found[JUDGE])["spec"]["artifact"]
                reward["model"] = {key: artifact[key] for key in ("uri", "manifestDigest")}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """In the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".csv" in path.suffixes:
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _row(number: int, text: str, label: str) -> dict[str, Any]:
    """What any of the examples reads."""
    other = "negative" if label == "positive" else "positive"
    question = f"Sentiment of: {text}"
    return {
        "text": text, "label": label, "prompt": question, "completion": label, "chosen": label, "rejected": other,
        "thumb": number % 2 == 0, "subject": f"Letter {number}", "body": text, "topic": label, "question": question, "answer": label,
        "source": text, "target": label, "reference": label, "article": text, "summary": label,
        "de": text, "en": label,
        "turns": [
            {"role": "user", "content": text[:60]}, {"role": "assistant", "content": "What of it?", "weight": 0},
            {"role": "user", "content": f"Is it {label} or {other}?"}, {"role": "assistant", "content": label},
        ],
        "ticket": f"t{number}", "site": ("north", "south")[number % 2], "document": f"d{number}",
    }  # fmt: skip
