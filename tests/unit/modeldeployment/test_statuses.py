"""Every row of the table of ModelDeployments in docs/status.md is a state that this builds, and says what the status says then."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.modeldeployment.world import World, in_place, make_adapter, make_version

from tuneloop_gateway.contract import Outcomes, ProbeState
from tuneloop_operator.domain.decision import Key, Refusal
from tuneloop_operator.render import names
from tuneloop_operator.settings import Settings

DOCUMENT = Path(__file__).parents[3] / "docs" / "status.md"
COLUMNS = ("Available", "Ready", "Reconciling", "Stalled", "Degraded")
MISMATCH = ProbeState(status="Done", asked=50, agreed=1)


def served(**changes: object) -> World:
    world = World(**changes)  # type: ignore[arg-type]
    world.settle()
    return world


def unserved(**changes: object) -> World:
    """A first pass has made the engine, and nothing of it is ready."""
    world = World(**changes)  # type: ignore[arg-type]
    world.step()
    world.ready = dict.fromkeys(world.engines(), 0)
    world.settle()
    return world


def rolling_out(**pod: object) -> World:
    """Version 1 serves, version 2 starts, and its pod is in this state."""
    world = served()
    world.versions.append(make_version(2))
    world.step()
    world.ready[world.engine_of(2)] = 0
    world.pod_status[world.engine_of(2)] = pod
    world.settle()
    return world


def waiting(reason: str, message: str = "why.") -> dict[str, object]:
    state = {"name": "engine", "state": {"waiting": {"reason": reason, "message": message}}}
    return {"phase": "Pending", "containerStatuses": [state]}


REFUSING = Settings(vulnerable_engines="Refuse")
OLD_ENGINE = {"engine": {"image": "vllm/vllm-openai:v0.19.1"}}
BROKEN = {"template": "{{ text | nonsense }}"}
"""What a gateway refuses; the world's says so of any template with this word."""


def ended(name: str = "engine", code: int = 1, reason: str = "Error", restarts: int = 5, message: str = "Boom.") -> dict[str, object]:
    state = {"name": name, "restartCount": restarts, "lastState": {"terminated": {"exitCode": code, "reason": reason, "message": message}}}
    return {"initContainerStatuses" if name == "verify" else "containerStatuses": [state]}


def unschedulable() -> dict[str, object]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available."}
    return {"phase": "Pending", "startTime": None, "conditions": [condition]}


def edited(world: World, **spec: object) -> World:
    world.spec, world.generation = {**world.spec, **spec}, world.generation + 1
    world.settle()
    return world


def withdrawn(world: World, approval: str = "Withdrawn") -> World:
    world.versions = [make_version(1, approval=approval), *world.versions[1:]]
    world.settle()
    return world


def rejected(pinned: bool) -> World:
    world = served(spec={"model": {"name": "sentiment", "version": 1}} if pinned else {})
    world.versions.append(make_version(2))
    world.probe = MISMATCH
    return edited(world, model={"name": "sentiment", "version": 2} if pinned else {"name": "sentiment"})


def rejected_edit() -> World:
    world = served()
    world.probe = MISMATCH
    return edited(world, engine={"maxModelLength": 64})


def lost_engine() -> World:
    world = served()
    world.ready = dict.fromkeys(world.engines(), 0)
    world.settle()
    return world


def lost_gateway() -> World:
    world = served()
    world.gateways = 0
    world.settle()
    return world


def conflict(kind: str, name: str) -> World:
    world = served()
    world.conflicts = (Key(kind, "shop", name),)
    world.settle()
    return world


def refused(world: World, kind: str) -> World:
    """The API server does not take the newest object of this kind."""
    name = [name for found, name in world.objects if found == kind][-1]
    world.refusals = (Refusal(Key(kind, "shop", name), f'{kind} "{name}" is invalid: spec.template.labels', 1),)
    world.settle()
    return world


def first_refused() -> World:
    world = unserved()
    hashed = world.engines()[0]
    world.refusals = (Refusal(Key("Deployment", "shop", names.engine("tweets", hashed)), "invalid: spec.template.labels", 1),)
    world.settle()
    return world


def first_mismatch() -> World:
    return served(probe=MISMATCH)


def unserved_failure(**pod: object) -> World:
    world = unserved()
    world.pod_status = dict.fromkeys(world.engines(), pod)
    world.settle()
    return world


def timed_out() -> World:
    world = rolling_out()
    world.step(seconds=1300)
    world.settle()
    return world


def degraded_replica() -> World:
    world = served(spec={"engine": {"replicas": 2}})
    world.ready = dict.fromkeys(world.engines(), 1)
    world.pod_status = dict.fromkeys(world.engines(), unschedulable())
    world.settle()
    return world


FAST = (0,) * 100


def canary(outcomes: Outcomes, seconds: float = 1, **spec: object) -> World:
    """Version 1 serves, version 2 has its first share of the traffic, and its requests came to this."""
    world = served(spec={"rollout": {"strategy": "Canary"}})
    world.versions.append(make_version(2))
    world = edited(world, **spec)
    world.outcomes_of = {1: Outcomes(requests=5000, first_token=(*FAST, 5000)), 2: outcomes}
    world.step(seconds)
    world.settle()
    world.step(seconds=60)  # what was stopped has drained
    world.settle()
    return world


def no_device() -> World:
    world = rolling_out(**unschedulable())
    world.step(seconds=301)
    world.settle()
    return world


def asleep() -> World:
    world = served(spec={"autoscaling": {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 60}})
    world.idle = 60
    world.step(seconds=60)
    world.settle()
    return world


def woken() -> World:
    world = asleep()
    world.held, world.ready = 1, dict.fromkeys(world.engines(), 0)
    world.settle()
    return world


FAILING = Outcomes(requests=100, errors=30, first_token=(*FAST, 70))


def adapters(number: int, **world: Any) -> World:
    """Adapters up to this version on one engine, the last one served where it can be."""
    made = World(versions=[make_adapter(1)], **world)
    made.settle()
    made.versions += [make_adapter(n) for n in range(2, number + 1)]
    made.settle()
    return made


def adapter_refused() -> World:
    return adapters(2, load_errors={2: "The adapter in /volumes/models/sentiment/v2 is refused: x.safetensors is missing."})


def adapter_lost() -> World:
    world = adapters(1)
    world.load_errors = {1: "The adapter in /volumes/models/sentiment/v1 is refused: x.safetensors is missing."}
    world.settle()
    return world


STATES: dict[str, Callable[[], World]] = {
    "A pinned version does not exist": lambda: served(spec={"model": {"name": "sentiment", "version": 9}}),
    "A pinned version is not approved": lambda: served(
        spec={"model": {"name": "sentiment", "version": 1}}, versions=[make_version(1, approval="Pending")]
    ),
    "The model has no approved and verified version yet": lambda: served(
        versions=[make_version(1, verified=False), make_version(2, approval="Pending")]
    ),
    "An engine option has a value that it does not take": lambda: served(spec={"engine": {"options": {"dtype": "int1"}}}),
    "The cluster has no LeaderWorkerSets, and a replica has several nodes": lambda: served(spec={"engine": {"nodesPerReplica": 2}}),
    "An adapter does not name its base": lambda: served(
        versions=[make_version(1, base=None, artifact=make_version(1).spec.artifact.model_dump(by_alias=True) | {"format": "Adapter"})]
    ),
    "The first revision starts": unserved,
    "The first revision cannot pull its image": lambda: unserved_failure(**waiting("ImagePullBackOff")),
    "The first revision answers unlike the evaluator": first_mismatch,
    "It serves": served,
    "A new revision is being rolled out": rolling_out,
    "A new revision finds no node": lambda: rolling_out(**unschedulable()),
    "A new revision finds no node for surgeTimeoutSeconds": no_device,
    "A new revision cannot pull its image": lambda: rolling_out(**waiting("ErrImagePull")),
    "A new revision lacks a Secret": lambda: rolling_out(**waiting("CreateContainerConfigError")),
    "A new revision ran out of memory, Latest": lambda: rolling_out(**ended(code=137, reason="OOMKilled", restarts=1)),
    "A new revision crashed three times, Latest": lambda: rolling_out(**ended()),
    "A new revision's engine refuses its adapter, Latest": lambda: rolling_out(
        **ended(restarts=0, message="ValueError: Loading lora sentiment failed: No adapter found for <path>")
    ),
    "A new version's adapter cannot be loaded, Latest": adapter_refused,
    "The first version's adapter cannot be loaded": lambda: adapters(1, load_errors={1: "LoRA rank 12 is greater than max_lora_rank 8."}),
    "A replica that started anew cannot load what serves": adapter_lost,
    "The first revision's model is not where it should be": lambda: unserved_failure(
        **ended(restarts=0, message="HFValidationError: Repo id must be in the form 'repo_name': '/volumes/models/gone'.")
    ),
    "A new revision's image cannot run an engine, Latest": lambda: rolling_out(**ended("verify", 128, "StartError", 0)),
    "The prompt does not render": lambda: edited(served(), prompt=BROKEN),
    "The engine is below the security floor": lambda: served(engine_versions={1: "0.21.9"}),
    "The engine of a first revision is below the floor, refused": lambda: served(settings=REFUSING, spec=OLD_ENGINE),
    "The engine of a new revision is below the floor, refused": lambda: edited(served(settings=REFUSING), **OLD_ENGINE),
    "The first revision's prompt does not render": lambda: served(spec={"prompt": BROKEN}),
    "A new revision's files do not have its digest, Latest": lambda: rolling_out(**ended("verify", restarts=1)),
    "A new revision was not ready in time, Latest": timed_out,
    "A new version answers unlike the evaluator, Latest": lambda: rejected(pinned=False),
    "A new version answers unlike the evaluator, pinned": lambda: rejected(pinned=True),
    "An edit of the spec was rejected": rejected_edit,
    "The version was withdrawn and no other may serve": lambda: withdrawn(served()),
    "The version was withdrawn and another one took over": lambda: withdrawn(served(versions=[make_version(1), make_version(2)])),
    "The pinned version was withdrawn": lambda: withdrawn(served(spec={"model": {"name": "sentiment", "version": 1}})),
    "The engine reads the prompt otherwise than training did": lambda: served(
        versions=[make_version(1, prompt={"probeSha256": "sha256:" + "1" * 64})], prompt_digest="sha256:" + "2" * 64
    ),
    "The prompt is not the one it was trained with": lambda: edited(served(), prompt={"system": "Hi."}),
    "A canary takes its first share": lambda: canary(Outcomes()),
    "A canary's step is inconclusive": lambda: canary(Outcomes(requests=9), seconds=4000),
    "A canary was worse, Latest": lambda: canary(FAILING),
    "A canary was worse, pinned": lambda: canary(FAILING, model={"name": "sentiment", "version": 2}),
    "A new revision takes the place of the one before, Recreate": in_place,
    "All engine pods are lost": lost_engine,
    "One of two engine pods finds no node": degraded_replica,
    "Nobody asks, and its engine is at zero": asleep,
    "A request wakes an engine from zero": woken,
    "All gateway pods are lost": lost_gateway,
    "The name of its Service is taken": lambda: conflict("Service", "tweets"),
    "The name of another child is taken": lambda: conflict("NetworkPolicy", "tweets-engine"),
    "The API server refuses the first engine": first_refused,
    "The API server refuses a child of one that serves": lambda: refused(served(), "Deployment"),
}


def table() -> dict[str, tuple[str, ...]]:
    """State -> what the document says of each condition."""
    text = DOCUMENT.read_text()
    section = text[text.index("## ModelDeployment") :].split("\n## ")[0] if "## ModelDeployment" in text else ""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:6] for row in rows[2:]}


def said(world: World, column: str) -> str:
    """As it stands in the document: `True` and the reason, or a dash."""
    found = world.condition(column)
    return f"{found[0]} {found[1]}" if found else "-"


def row(state: str, world: World) -> str:
    return f"| {state} | {' | '.join(said(world, column) for column in COLUMNS)} |"


@pytest.mark.parametrize("state", STATES)
def test_the_document_says_what_the_status_says(state: str) -> None:
    world = STATES[state]()
    assert table().get(state) == tuple(said(world, column) for column in COLUMNS), row(state, world)


def test_the_document_has_no_other_rows() -> None:
    assert set(table()) == set(STATES)


@pytest.mark.parametrize("state", STATES)
def test_a_message_is_sentences_and_ready_and_stalled_agree(state: str) -> None:
    world = STATES[state]()
    for condition in world.status["conditions"]:
        assert re.fullmatch(r"[A-Z0-9].*[.!?…]", condition["message"]), condition
    stalled, ready = world.condition("Stalled"), world.condition("Ready")
    assert ready is not None
    assert stalled is None or ready[0] == "False"
    assert (stalled is None) or world.condition("Reconciling") is None
    assert ready[0] == "True" or stalled is not None or world.condition("Reconciling") is not None


def test_all_conditions_are_there_from_the_first_write() -> None:
    world = World(versions=[])
    world.step()
    types = [condition["type"] for condition in world.status["conditions"]]
    assert types == [
        "Available",
        "Ready",
        "CanaryHealthy",
        "DriftDetected",
        "TrainingServingSkew",
        "RetrainingNeeded",
        "Degraded",
        "Reconciling",
    ]
    assert {condition["observedGeneration"] for condition in world.status["conditions"]} == {1}
    assert world.status["observedGeneration"] == 1


def test_a_deployment_comes_back_by_itself() -> None:
    world = lost_engine()
    world.ready = {}
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")


def test_the_time_of_a_condition_is_that_of_its_turn() -> None:
    world = served()
    before = {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]}
    world.step(seconds=500)
    assert {c["type"]: c["lastTransitionTime"] for c in world.status["conditions"]} == before


def test_a_rejected_edit_is_given_up_when_the_edit_is_taken_back() -> None:
    world = rejected_edit()
    assert edited(world, engine={}).condition("Ready") == ("True", "Serving")


def test_a_version_that_was_never_evaluated_is_served_by_its_number_alone() -> None:
    world = served(versions=[make_version(1, verified=False)])
    assert world.condition("Ready") == ("False", "NoApprovedVersion")
    assert edited(world, model={"name": "sentiment", "version": 1}).condition("Ready") == ("True", "Serving")


def test_a_pinned_version_below_the_latest_is_served() -> None:
    world = served(versions=[make_version(1), make_version(2)], spec={"model": {"name": "sentiment", "version": 1}})
    assert world.weights() == {1: 100}
