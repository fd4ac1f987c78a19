"""Two pods prepare one set, one of them is deleted on the way, and the rows are those that one pod makes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from dev.demo import story as tale
from dev.demo.kubectl import condition
from dev.demo.story import QUICKSTART, Story

pytestmark = pytest.mark.long

TIMES = ("rowsPerSecond", "peakMemoryBytes", "reportUri")
"""Of status.data: what differs between two runs of the same rows."""


def test_two_pods_prepare_the_rows_of_one(installed: Story) -> None:
    one, two = prepare(installed, "one-worker", 1), prepare(installed, "two-workers", 2)

    assert digest(installed, "one-worker") == digest(installed, "two-workers")
    assert counts(one) == counts(two)
    assert counts(two)["validationRows"] > 0


def prepare(installed: Story, name: str, workers: int) -> dict[str, Any]:
    """The job once it has succeeded, with a training of two steps."""
    space = installed.space
    job = yaml.safe_load((QUICKSTART / "finetunejob.yaml").read_text())
    job["metadata"]["name"] = job["spec"]["output"]["model"] = name
    job["spec"]["data"] |= {
        "validation": {"fraction": "0.1"},
        "curation": {"deduplicate": "Near", "personalData": "Redact"},
        "workers": workers,
    }
    job["spec"]["training"] |= {"maxSteps": 2, "warmupSteps": 0}
    del job["spec"]["evaluation"]
    space.apply(json.dumps(job))
    if workers > 1:
        space.wait_until("finetunejob", name, lambda found: len(pods(installed, name)) == workers)
        last = pods(installed, name)[-1]
        assert last["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == str(workers - 1)
        space.kubectl("delete", "pod", last["metadata"]["name"])
    finished = space.wait_until("finetunejob", name, tale._is_finished)
    assert condition(finished, "Succeeded").get("status") == "True", condition(finished, "Succeeded").get("message")
    return finished


def pods(installed: Story, name: str) -> list[dict[str, Any]]:
    found = installed.space.list("pods", f"tuneloop.dev/finetunejob={name},tuneloop.dev/stage=prepare")
    return sorted(found, key=lambda pod: str(pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "")))


def digest(installed: Story, name: str) -> str:
    """Of the shards, as the pod told it that made them."""
    statuses = [status for pod in pods(installed, name) for status in pod["status"].get("containerStatuses", ())]
    states = [status["state"].get("terminated") or {} for status in statuses]
    results = [json.loads(state["message"]) for state in states if state.get("exitCode") == 0]
    (made,) = {result["prepare"]["shardsDigest"] for result in results if "prepare" in result}
    return str(made)


def counts(finished: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in finished["status"]["data"].items() if name not in TIMES}
