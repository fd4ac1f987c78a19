"""A canary's way: step by step while its requests are no worse, back at once when they are, and never on too little."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.modeldeployment.world import World, make_version

from tuneloop_gateway.contract import Outcomes, ProbeState

ROLLOUT: dict[str, Any] = {"strategy": "Canary"}
FAST = (0,) * 100
GOOD = Outcomes(requests=1500, errors=1, first_token=(*FAST, 1500))
USUAL = Outcomes(requests=5000, errors=5, first_token=(*FAST, 5000))
BAD = Outcomes(requests=100, errors=20, first_token=(*FAST, 80))
FEW = Outcomes(requests=30, first_token=(*FAST, 30))


def canary(*, gateways: int = 1, **rollout: Any) -> World:
    """Version 1 serves, version 2 has just been approved and takes its first share."""
    world = World(spec={"rollout": ROLLOUT | rollout}, gateways=gateways)
    world.settle()
    assert world.weights() == {1: 100}
    world.versions.append(make_version(2))
    world.settle()
    return world


def counted(world: World, new: Outcomes, usual: Outcomes = USUAL) -> World:
    world.outcomes_of = {1: usual, 2: new}
    return world


def record(world: World, version: int) -> dict[str, str]:
    found = [m for (kind, _), m in world.objects.items() if kind == "ControllerRevision" and m["data"]["version"] == version]
    annotations: dict[str, str] = found[0]["metadata"]["annotations"]
    return annotations


def test_the_first_revision_has_nothing_to_be_compared_with() -> None:
    world = World(spec={"rollout": ROLLOUT})
    world.settle()
    assert world.weights() == {1: 100}
    assert world.condition("CanaryHealthy") == ("Unknown", "NoCanary")


def test_a_new_version_starts_with_the_first_steps_weight() -> None:
    world = canary()
    assert world.weights() == {1: 95, 2: 5}
    assert (world.status["canary"]["version"], world.status["canary"]["weight"]) == (2, 5)
    assert world.status["canary"]["message"] == "It is in step 1 of 3, at 5 % of the traffic."
    assert world.condition("Ready") == ("False", "RollingOut")
    assert world.condition("CanaryHealthy") == ("Unknown", "Analysing")
    assert world.config.window


def test_it_takes_no_traffic_before_it_answered_the_probes() -> None:
    world = World(spec={"rollout": ROLLOUT})
    world.settle()
    world.versions.append(make_version(2))
    world.probe = ProbeState(status="Running")
    world.settle()
    assert world.weights() == {1: 100, 2: 0}
    world.probe = ProbeState(status="Done", asked=50, agreed=40)
    world.settle()
    assert world.outcomes()[2] == "Rejected"
    assert world.condition("CanaryHealthy") == ("Unknown", "NoCanary")


def test_a_good_one_goes_step_by_step_to_all_traffic() -> None:
    world = canary()
    seen = [world.weights()[2]]
    windows = {world.config.window}
    for _ in range(3):
        counted(world, GOOD)
        world.step()
        world.outcomes_of = {}
        world.settle()
        seen.append(world.weights()[2])
        windows.add(world.config.window)
    assert seen == [5, 25, 50, 100]
    assert len(windows) == 4, "each step counts afresh, and none is counted at the end"
    assert world.outcomes()[2] == "Promoted"
    assert world.condition("Ready") == ("True", "Serving")
    assert world.condition("CanaryHealthy") == ("True", "CanaryPassed")
    assert json.loads(record(world, 2)["tuneloop.dev/analysis"])["checks"]["Errors"]["verdict"] == "Pass"
    assert world.roles()[1] == "Draining", "the old engine stays warm"


def test_each_step_needs_requests_of_its_own() -> None:
    world = counted(canary(), GOOD)
    world.applies = False  # what is counted stays that of the first step
    for _ in range(3):
        world.step()
    assert world.weights()[2] == 25
    world.apply_config()
    world.step()
    assert world.weights()[2] == 50


def test_what_was_counted_in_another_window_is_no_evidence() -> None:
    world = counted(canary(), GOOD)
    world.applies = False
    world.step()
    counted(world, BAD)  # still of the first step, which is over
    world.step()
    assert world.weights()[2] == 25
    world.apply_config()
    world.step()
    assert world.weights()[1] == 100


def test_a_worse_one_is_stopped_in_the_pass_that_sees_it() -> None:
    world = counted(canary(), BAD)
    decision = world.step()
    assert world.weights() == {1: 100, 2: 0}
    assert world.roles()[2] == "Draining"
    assert world.outcomes()[2] == "Rejected"
    assert world.condition("CanaryHealthy") == ("False", "CanaryFailed")
    assert [(note.type, note.reason) for note in decision.events if note.reason == "Rejected"] == [("Warning", "Rejected")]
    said = record(world, 2)
    assert said["tuneloop.dev/outcome-reason"] == "CanaryFailed"
    assert said["tuneloop.dev/outcome-message"] == (
        "In step 1 of 3, at 5 % of the traffic and after 100 requests it was worse than version 1:"
        " Errors 20/100 (20.0 %) against 5/5000 (0.1 %)."
    )
    assert json.loads(said["tuneloop.dev/analysis"])["requests"] == 100
    assert said["tuneloop.dev/canary-step"] == "1"


def test_what_was_stopped_is_not_tried_again_until_something_changes() -> None:
    world = counted(canary(), BAD)
    world.step()
    world.outcomes_of = {}
    for _ in range(3):
        world.step(seconds=1000)
    assert world.weights() == {1: 100}
    assert world.condition("Ready") == ("True", "RolledBack")
    assert world.engines() == [world.engine_of(1)]
    world.spec = world.spec | {"engine": {"maxModelLength": 128}}
    world.generation += 1
    world.settle()
    assert world.weights() == {1: 95, 2: 5}


def test_requests_that_run_on_a_stopped_one_keep_its_engine() -> None:
    world = canary()
    name = next(r.name for r in world.config.revisions if r.version == 2)
    world.in_flight = {name: 1}
    counted(world, BAD).step()
    engine = world.engine_of(2)
    world.step(seconds=60)
    assert engine in world.engines()
    world.in_flight = {}
    world.settle()
    assert engine not in world.engines()


def test_the_counts_of_all_gateways_are_added() -> None:
    world = counted(
        canary(gateways=2), Outcomes(requests=800, first_token=(*FAST, 800)), Outcomes(requests=2500, first_token=(*FAST, 2500))
    )
    world.step()
    assert world.weights()[2] == 25
    assert world.outcomes()[2] is None


@pytest.mark.parametrize(("policy", "expected"), [("Hold", {1: 95, 2: 5}), ("Promote", {1: 75, 2: 25}), ("Rollback", {1: 100, 2: 0})])
def test_a_step_without_a_finding_ends_as_the_policy_says(policy: str, expected: dict[int, int]) -> None:
    world = counted(canary(onInconclusive=policy), FEW)
    world.step()
    assert world.weights() == {1: 95, 2: 5}
    world.step(seconds=3601)
    assert world.weights() == expected
    if policy == "Hold":
        assert world.condition("CanaryHealthy") == ("Unknown", "CanaryInconclusive")
        assert "too few requests for a finding" in world.message("CanaryHealthy")
        counted(world, GOOD).step()
        assert world.weights()[2] == 25, "a finding that comes late counts"
    if policy == "Rollback":
        assert record(world, 2)["tuneloop.dev/outcome-reason"] == "CanaryInconclusive"


def test_too_little_traffic_is_never_a_pass() -> None:
    world = counted(canary(steps=[{"weight": 50, "minRequests": 1}]), FEW)
    for _ in range(5):
        world.step(seconds=600)
    assert world.weights() == {1: 50, 2: 50}
    assert world.status["analysis"]["verdict"] == "Inconclusive"


def test_a_newer_approval_replaces_a_running_canary_and_the_analysis_starts_again() -> None:
    world = counted(canary(), FEW)
    world.step()
    world.versions.append(make_version(3))
    world.settle()
    assert world.weights() == {1: 95, 3: 5, 2: 0}
    assert record(world, 2)["tuneloop.dev/outcome"] == "Replaced"
    assert record(world, 2)["tuneloop.dev/outcome-message"] == "Version 3 is to be served instead."
    assert world.config.window.startswith(next(r.name for r in world.config.revisions if r.version == 3))


def test_a_replaced_canary_begins_again_when_its_turn_comes() -> None:
    world = canary()
    world.versions.append(make_version(3))
    world.settle()
    world.outcomes_of = {1: USUAL, 3: BAD}
    world.step()
    world.outcomes_of = {}
    world.settle()
    assert world.weights()[2] == 5
    assert record(world, 2)["tuneloop.dev/canary-step"] == "1"
    assert "tuneloop.dev/outcome" not in record(world, 2)


def test_a_withdrawn_canary_goes_at_once() -> None:
    world = canary()
    world.versions[1] = make_version(2, approval="Withdrawn")
    world.step()
    assert world.weights() == {1: 100, 2: 0}
    assert world.roles() == {1: "Stable", 2: "Draining"}
    assert record(world, 2)["tuneloop.dev/outcome"] == "Replaced"


def test_a_withdrawn_stable_version_is_left_at_once() -> None:
    world = canary()
    world.versions[0] = make_version(1, approval="Withdrawn")
    world.settle()
    assert world.weights() == {2: 100, 1: 0}


def test_a_worse_one_takes_no_traffic_over_from_a_stable_version_that_is_withdrawn_either() -> None:
    world = counted(canary(), BAD)
    world.versions[0] = make_version(1, approval="Withdrawn")
    world.settle()
    assert world.outcomes()[2] == "Rejected"
    assert world.weights()[2] == 0


def test_going_back_to_what_served_before_is_no_canary() -> None:
    world = World(spec={"rollout": ROLLOUT}, versions=[make_version(1)])
    world.settle()
    world.versions.append(make_version(2))
    for _ in range(3):
        world.settle()
        counted(world, GOOD).step()
        world.outcomes_of = {}
    world.settle()
    assert world.weights()[2] == 100
    world.spec = world.spec | {"model": {"name": "sentiment", "version": 1}}
    world.generation += 1
    world.settle()
    assert world.weights() == {1: 100, 2: 0}


def test_a_canary_whose_engine_dies_for_good_is_stopped() -> None:
    world = canary()
    dead = world.engine_of(2)
    state = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    world.ready[dead] = 0
    world.pod_status[dead] = {"containerStatuses": [{"name": "engine", "restartCount": 3, "state": state, "lastState": state}]}
    world.settle()
    assert world.weights()[1] == 100
    assert world.outcomes()[2] == "Rejected"


def test_status_is_not_written_for_every_request() -> None:
    world = counted(canary(), Outcomes(requests=100, first_token=(*FAST, 100)))
    world.step()
    before = json.dumps(world.status)
    counted(world, Outcomes(requests=105, first_token=(*FAST, 105))).step()
    assert json.dumps(world.status) == before
    counted(world, Outcomes(requests=120, first_token=(*FAST, 120))).step()
    assert world.status["analysis"]["requests"] == 120


def test_it_is_looked_at_every_second() -> None:
    world = counted(canary(), FEW)
    assert world.step().requeue_after == 1.0


def test_steps_that_were_taken_out_of_the_spec_do_not_stop_it() -> None:
    world = counted(canary(), GOOD)
    world.step()
    world.outcomes_of = {}
    world.settle()
    world.spec = {"rollout": ROLLOUT | {"steps": [{"weight": 10, "minRequests": 1}]}}
    world.generation += 1
    world.settle()
    assert world.weights() == {1: 90, 2: 10}


def test_a_canary_that_loses_its_node_stops_no_engine_and_is_not_promoted_unseen() -> None:
    world = canary(allowDowntime=True)
    world.step(seconds=3000)  # its engine is old by now
    hashed, old = world.engine_of(2), f"tweets-{world.engine_of(1)}"
    world.ready[hashed] = 0
    world.pod_status[hashed] = {
        "phase": "Pending", "startTime": None, "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}],
    }  # fmt: skip
    world.step(seconds=301)
    world.settle()
    assert world.objects["Deployment", old]["spec"]["replicas"] == 1
    assert world.condition("Available") == ("True", "Serving")
    world.pod_status, world.ready = {}, {}
    world.settle()
    assert world.weights() == {1: 95, 2: 5}, "it goes on where it was"


def test_a_step_that_was_taken_out_of_the_spec_is_told_once_also_while_the_canary_is_not_ready() -> None:
    world = canary()
    for _ in range(2):
        counted(world, GOOD).step()
        world.outcomes_of = {}
        world.settle()
    assert world.weights()[2] == 50
    world.spec = world.spec | {"rollout": ROLLOUT | {"steps": [{"weight": 10}]}}
    world.generation += 1
    world.ready[world.engine_of(2)] = 0
    told = [event.reason for _ in range(5) for event in world.step().events]
    assert told.count("CanaryStep") == 1
    assert world.weights()[2] == 10


def replicas_of(world: World, version: int) -> int:
    found: int = world.objects["Deployment", f"tweets-{world.engine_of(version)}"]["spec"]["replicas"]
    return found


def with_replicas(count: int, **rollout: Any) -> World:
    """As `canary`, on engines of so many pods."""
    world = World(spec={"rollout": ROLLOUT | rollout, "engine": {"replicas": count}})
    world.settle()
    world.versions.append(make_version(2))
    world.settle()
    return world


NO_NODE: dict[str, Any] = {
    "phase": "Pending", "startTime": None, "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}],
}  # fmt: skip


def test_its_pods_are_as_many_as_are_no_busier_than_the_stable_ones_before_its_share_rises() -> None:
    world = with_replicas(4)
    assert (world.weights()[2], replicas_of(world, 2), replicas_of(world, 1)) == (5, 1, 4)
    hashed, seen = world.engine_of(2), []
    for ready, needed in ((1, 2), (2, 4), (4, 4)):
        world.ready[hashed] = ready
        before = world.weights()[2]
        counted(world, GOOD).step()
        assert replicas_of(world, 2) == needed
        assert ready == needed or world.weights()[2] == before, "no share without its pods"
        world.ready[hashed] = needed
        world.step()
        world.outcomes_of = {}
        world.settle()
        seen.append(world.weights()[2])
    assert seen == [25, 50, 100]
    assert world.outcomes()[2] == "Promoted"


def test_what_it_waits_for_is_told_and_it_is_still_stopped_meanwhile() -> None:
    world = with_replicas(4, steps=[{"weight": 20}, {"weight": 30}])
    world.ready[world.engine_of(2)] = 1
    counted(world, GOOD).settle()
    assert replicas_of(world, 2) == 2
    assert "It passed step 1 of 2, at 20 % of the traffic; 1 of the 2 engine pods for its next share are ready." in world.message("Ready")
    counted(world, BAD).step()
    assert world.outcomes()[2] == "Rejected"


def test_pods_that_were_made_for_the_next_share_stay() -> None:
    world = with_replicas(4, steps=[{"weight": 20}, {"weight": 30}])
    world.ready[world.engine_of(2)] = 1
    counted(world, GOOD).settle()
    counted(world, FEW).settle()
    assert (world.weights()[2], replicas_of(world, 2)) == (20, 2)


@pytest.mark.parametrize("allow_downtime", [True, False])
def test_one_that_passed_and_finds_no_nodes_for_the_rest_gets_those_of_the_engine_before(allow_downtime: bool) -> None:
    world = with_replicas(4, steps=[{"weight": 20}], allowDowntime=allow_downtime)
    old, hashed = world.engine_of(1), world.engine_of(2)
    world.ready[hashed], world.pod_status[hashed] = 1, NO_NODE
    counted(world, GOOD).settle()
    world.step(seconds=301)
    world.settle()
    assert world.objects["Deployment", f"tweets-{old}"]["spec"]["replicas"] == (0 if allow_downtime else 4)
    if not allow_downtime:
        assert "Or set rollout.allowDowntime: true" in world.message("Ready")
        assert world.weights() == {1: 80, 2: 20}
        return
    world.ready, world.pod_status, world.outcomes_of = {}, {}, {}
    world.settle()
    assert world.weights()[2] == 100


def test_an_engine_that_takes_all_traffic_at_once_has_all_its_pods_before() -> None:
    world = with_replicas(3, strategy="BlueGreen")
    assert (world.weights()[2], replicas_of(world, 2)) == (100, 3)
