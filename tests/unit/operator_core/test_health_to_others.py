"""What Flux (kstatus' own module) and Argo CD (our script in its Lua) make of every state of a deployment and of a job."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.finetunejob import builders as jobs
from tests.unit.modeldeployment.test_statuses import STATES, served
from tests.unit.modeldeployment.world import World

from tuneloop_trainer.contract import Reason, Stage

ROOT = Path(__file__).parents[3]
PROGRAM, SCRIPT = ROOT / "dev" / "health" / "health", ROOT / "examples" / "argo-cd" / "health.lua"
Json = dict[str, Any]

pytestmark = pytest.mark.skipif(
    subprocess.run([PROGRAM, "built"], check=False).returncode != 0, reason="not built: dev/health/health install"
)


def ask(*objects: Json) -> list[tuple[str, str]]:
    """(kstatus, Argo CD) of each object."""
    done = subprocess.run([PROGRAM, "ask", SCRIPT], input=json.dumps(objects), capture_output=True, text=True, check=True)
    return [(answer["kstatus"], answer["argocd"]) for answer in json.loads(done.stdout)]


def deployment(world: World) -> Json:
    metadata = {"name": "tweets", "generation": world.generation}
    return {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "metadata": metadata, "status": world.status}


def job(world: jobs.World) -> Json:
    raw: Json = world.job.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "FineTuneJob", **raw}


def is_true(world: World, type_: str) -> bool:
    found = world.condition(type_)
    return found is not None and found[0] == "True"


def test_every_state_of_a_deployment_is_to_both_what_its_conditions_say() -> None:
    worlds = {state: made() for state, made in STATES.items()}
    said = dict(zip(worlds, ask(*map(deployment, worlds.values())), strict=True))
    for state, world in worlds.items():
        if is_true(world, "Stalled"):
            expected = ("Failed", "Degraded")
        elif is_true(world, "Ready"):
            expected = ("Current", "Healthy")
        else:
            expected = ("InProgress", "Progressing")
        assert said[state] == expected, state
    assert len(set(said.values())) == 3


def under_way() -> jobs.World:
    return jobs.World().up_to(Stage.TRAIN)


def suspended() -> jobs.World:
    world = under_way()
    world.edit(jobs.make_spec(runPolicy={"suspend": True}))
    world.settle()
    return world


def done(verdict: str) -> jobs.World:
    world = jobs.World().up_to(Stage.EVALUATE)
    world.ends(jobs.evaluated(verdict))
    world.settle()
    return world


def refused() -> jobs.World:
    world = jobs.World()
    world.settle()
    world.ends(jobs.failed(Stage.PREPARE, 10, Reason.DATA_INVALID, "Row 7 has no label."), 10)
    world.settle()
    return world


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (under_way, ("InProgress", "Progressing")),
        (suspended, ("InProgress", "Suspended")),
        (lambda: done("Pass"), ("Current", "Healthy")),
        (lambda: done("Fail"), ("Current", "Healthy")),
        (refused, ("Failed", "Degraded")),
    ],
    ids=["under way", "suspended", "done", "its gate failed", "refused"],
)
def test_a_job(made: Callable[[], jobs.World], expected: tuple[str, str]) -> None:
    assert ask(job(made())) == [expected]


def test_what_the_operator_has_not_seen_is_done_to_nobody_but_a_new_object_to_kstatus() -> None:
    edited, new = deployment(served()), deployment(served())
    edited["metadata"]["generation"] += 1
    del new["status"]
    assert ask(edited, new) == [("InProgress", "Progressing"), ("Current", "Progressing")]
