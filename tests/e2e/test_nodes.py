"""Two pods train one model; one of them is evicted on the way, and they go on together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from dev.demo import story as tale
from dev.demo.kubectl import condition
from dev.demo.story import QUICKSTART, Story

pytestmark = pytest.mark.long

JOB = "together"
STEPS = 6
PODS = f"tuneloop.dev/finetunejob={JOB},tuneloop.dev/stage=train"


def test_two_pods_train_together_and_outlive_the_loss_of_one(installed: Story) -> None:
    space = installed.space
    job = yaml.safe_load((QUICKSTART / "finetunejob.yaml").read_text())
    job["metadata"]["name"] = job["spec"]["output"]["model"] = JOB
    job["spec"]["compute"]["nodes"] = 2
    job["spec"]["training"]["maxSteps"] = STEPS
    job["spec"]["checkpoint"] = {"everySteps": 2}
    del job["spec"]["evaluation"]
    space.apply(json.dumps(job))

    space.wait_until("finetunejob", JOB, lambda found: step(found) >= 2)
    training = space.list("pods", PODS)
    assert sorted(pod["spec"]["hostname"] for pod in training) == [f"{JOB}-train-1-0", f"{JOB}-train-1-1"]
    space.kubectl("delete", "pod", next(pod["metadata"]["name"] for pod in training if pod["spec"]["hostname"].endswith("-1")))
    finished = space.wait_until("finetunejob", JOB, tale._is_finished)

    assert condition(finished, "Succeeded").get("status") == "True", condition(finished, "Succeeded").get("message")
    status = finished["status"]
    assert (status["progress"]["step"], status["attempts"]) == (STEPS, 2)
    assert status.get("stepsLost", 0) <= 2


def step(found: dict[str, Any]) -> int:
    return int((found.get("status", {}).get("progress") or {}).get("step") or 0)
