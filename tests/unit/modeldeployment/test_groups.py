"""Replicas of several nodes: a group of a LeaderWorkerSet each, of which the leader is asked, and every pod is looked at."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.modeldeployment.world import World, make_adapter, make_version

from tuneloop_operator.api.kubernetes import Pod
from tuneloop_operator.domain import times
from tuneloop_operator.domain.decision import Decision
from tuneloop_operator.domain.modeldeployment import decide

ENGINE: dict[str, Any] = {"acceleratorsPerReplica": 4, "nodesPerReplica": 2, "replicas": 2}
FATAL = {"containerStatuses": [{"name": "engine", "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]}


def world(**engine: Any) -> World:
    return World(spec={"engine": ENGINE | engine}, has_groups=True)


def starting() -> World:
    """A first pass has made the group, and nothing of it is ready."""
    made = world()
    made.step()
    made.ready = dict.fromkeys(made.engines(), 0)
    made.step()
    return made


def the_set(found: World) -> dict[str, Any]:
    return next(manifest for (kind, _), manifest in found.objects.items() if kind == "LeaderWorkerSet")


def container(template: dict[str, Any]) -> dict[str, Any]:
    return dict(template["spec"]["containers"][0])


def test_a_replica_of_several_nodes_is_one_group_and_no_deployment() -> None:
    found = world()
    found.settle()
    made = the_set(found)
    assert [kind for kind, name in found.objects if name == made["metadata"]["name"] and kind in ("Deployment", "LeaderWorkerSet")] == [
        "LeaderWorkerSet"
    ]
    assert (made["spec"]["replicas"], made["spec"]["leaderWorkerTemplate"]["size"]) == (2, 2)
    assert found.condition("Ready") == ("True", "Serving")
    assert found.status["replicas"] == 2


def test_leader_and_workers_hold_parts_of_one_model_and_the_leader_alone_serves_and_has_the_key() -> None:
    found = world()
    found.settle()
    templates = the_set(found)["spec"]["leaderWorkerTemplate"]
    leader, worker = container(templates["leaderTemplate"]), container(templates["workerTemplate"])
    assert worker["args"] == [*leader["args"][1:], "--headless"]
    told = " ".join(leader["args"])
    assert "--pipeline-parallel-size 2 --tensor-parallel-size 4" in told
    assert "--nnodes 2 --node-rank $(LWS_WORKER_INDEX) --master-addr $(LWS_LEADER_ADDRESS) --master-port 29501" in told
    assert {"readinessProbe", "livenessProbe", "startupProbe", "ports"} <= leader.keys()
    assert not {"readinessProbe", "livenessProbe", "startupProbe", "ports", "lifecycle"} & worker.keys()
    assert "TUNELOOP_ENGINE_KEY_FILE" in str(leader)
    assert "secret" not in str(templates["workerTemplate"]).lower()
    assert worker["resources"] == leader["resources"]
    assert templates["workerTemplate"]["spec"]["initContainers"] == templates["leaderTemplate"]["spec"]["initContainers"]


def test_requests_and_the_scale_path_see_leaders_alone_and_the_budget_sees_all() -> None:
    found = world()
    found.settle()
    name = the_set(found)["metadata"]["name"]
    templates = the_set(found)["spec"]["leaderWorkerTemplate"]

    def has(selector: dict[str, str], part: str) -> bool:
        return selector.items() <= templates[part]["metadata"]["labels"].items()

    service = found.objects["Service", name]["spec"]["selector"]
    scale = dict(pair.split("=") for pair in found.status["selector"].split(","))
    for selector in (service, scale):
        assert (has(selector, "leaderTemplate"), has(selector, "workerTemplate")) == (True, False)
    budget = found.objects["PodDisruptionBudget", name]["spec"]["selector"]["matchLabels"]
    assert (has(budget, "leaderTemplate"), has(budget, "workerTemplate")) == (True, True)


def test_pods_of_a_group_reach_each_other_and_nobody_else_a_worker() -> None:
    found = world()
    found.settle()
    worker = the_set(found)["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
    policies = {name: manifest["spec"] for (kind, name), manifest in found.objects.items() if kind == "NetworkPolicy"}
    assert policies["tweets-engine-group"]["ingress"] == [{"from": [{"podSelector": policies["tweets-engine-group"]["podSelector"]}]}]
    chosen = [name for name, spec in policies.items() if spec["podSelector"].get("matchLabels", {}).items() <= worker.items()]
    assert chosen == ["tweets-engine-group"]


def test_one_node_needs_no_group_and_no_policy_for_one() -> None:
    found = World(has_groups=True)
    found.settle()
    assert ("NetworkPolicy", "tweets-engine-group") not in found.objects
    assert not any(kind == "LeaderWorkerSet" for kind, _ in found.objects)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor-parallel-size": "8", "pipeline-parallel-size": "1"}, "Serving"),
        ({"tensor-parallel-size": "2"}, "InvalidOption"),
        ({"pipeline-parallel-size": "4"}, "InvalidOption"),
    ],
)
def test_options_divide_the_model_otherwise_but_into_as_many_parts_as_there_are_devices(options: dict[str, str], reason: str) -> None:
    found = world(options=options)
    found.settle()
    assert found.condition("Ready") == (str(reason == "Serving"), reason)
    if reason != "Serving":
        assert "has 8 devices: 4 on each of 2 nodes" in found.message("Ready")


def test_a_cluster_without_leader_worker_sets_says_what_to_install_and_the_old_engine_serves_on() -> None:
    found = World()
    found.settle()
    before = found.engines()
    found.spec = {"engine": ENGINE}
    found.generation += 1
    found.settle()
    assert (found.condition("Available"), found.condition("Ready")) == (("True", "Serving"), ("False", "NoLeaderWorkerSets"))
    assert "Install LeaderWorkerSet" in found.message("Ready")
    assert found.engines() == before
    found.has_groups = True
    found.settle()
    assert found.condition("Ready") == ("True", "Serving")
    assert the_set(found)["spec"]["replicas"] == 2


def test_where_leader_worker_sets_are_gone_none_is_asked_for() -> None:
    found = world()
    found.settle()
    found.has_groups = False
    made = decide(found.snapshot(), found.settings, found.now)
    assert not any(manifest["kind"] == "LeaderWorkerSet" for manifest in made.apply)


def test_a_group_is_ready_with_its_leader_and_waits_without() -> None:
    found = starting()
    assert found.condition("Ready") == ("False", "Starting")
    found.ready = dict.fromkeys(found.engines(), 2)
    found.settle()
    assert found.condition("Ready") == ("True", "Serving")


def test_a_worker_that_fails_is_why_its_engine_does_not_start() -> None:
    found = starting()
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes."}
    found.worker_status = {hashed: {"phase": "Pending", "conditions": [unscheduled]} for hashed in found.engines()}
    found.settle()
    assert found.condition("Ready") == ("False", "Unschedulable")


def test_a_new_engine_whose_worker_is_killed_for_memory_gives_way() -> None:
    found = world()
    found.settle()
    found.versions.append(make_version(2))
    found.step()
    hashed = found.engine_of(2)
    found.ready, found.worker_status = {hashed: 0}, {hashed: FATAL}
    found.settle()
    assert found.outcomes() == {1: "Promoted", 2: "Rejected"}
    assert found.condition("Ready") == ("True", "RolledBack")


def test_a_scale_changes_replicas_alone() -> None:
    found = world()
    found.settle()
    before = the_set(found)
    found.spec = {"engine": ENGINE | {"replicas": 3}}
    found.settle()
    assert the_set(found) == before | {"spec": before["spec"] | {"replicas": 3}}


def test_the_group_before_is_kept_warm_and_goes() -> None:
    found = world()
    found.settle()
    found.versions.append(make_version(2))
    found.settle()
    assert len(found.engines()) == 2
    found.step(seconds=700)
    found.settle()
    assert found.engines() == [found.engine_of(2)]


def test_adapters_share_a_group() -> None:
    found = world()
    found.versions = [make_adapter(1)]
    found.settle()
    before = the_set(found)
    found.versions.append(make_adapter(2))
    found.settle()
    assert found.outcomes() == {1: "Promoted", 2: "Promoted"}
    assert (len(found.engines()), the_set(found)) == (1, before)


def test_in_place_the_group_before_has_no_pods() -> None:
    found = world()
    found.spec |= {"rollout": {"strategy": "Recreate"}}
    found.settle()
    found.versions.append(make_version(2))
    found.step()
    found.ready[found.engine_of(2)] = 0
    found.step()
    sets = [manifest for (kind, _), manifest in found.objects.items() if kind == "LeaderWorkerSet"]
    replicas = {made["metadata"]["labels"]["tuneloop.dev/engine"]: made["spec"]["replicas"] for made in sets}
    assert replicas == {found.engine_of(1): 0, found.engine_of(2): 2}


@pytest.mark.parametrize(("made_after", "reason"), [(60, "Starting"), (1200, "Starting"), (1300, "StartupTimeout")])
def test_groups_that_end_and_begin_again_are_given_up_after_the_time_to_start(made_after: int, reason: str) -> None:
    """A pod that is looked at is always a young one: its group was made anew."""
    found = starting()
    (hashed,) = found.engines()
    decision = looked_at(found, hashed, made_after)
    ready = next(condition for condition in decision.status["conditions"] if condition["type"] == "Ready")
    assert ready["reason"] == reason


def looked_at(found: World, hashed: str, made_after: int) -> Decision:
    snapshot = found.snapshot()
    made = times.parse(snapshot.engines[hashed].metadata.creation_timestamp)
    assert made is not None
    again = made + timedelta(seconds=made_after)
    at = times.to_text(again)
    pod = Pod.model_validate(
        {"metadata": {"name": "x", "uid": "x", "creationTimestamp": at}, "status": {"phase": "Running", "startTime": at}}
    )
    return decide(replace(snapshot, engine_pods={hashed: (pod,)}), found.settings, again + timedelta(seconds=5))
