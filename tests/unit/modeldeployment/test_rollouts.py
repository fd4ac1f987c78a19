"""How a revision takes over: nothing is promoted on silence, and what was promoted before stays warm."""

from __future__ import annotations

import pytest
from tests.unit.modeldeployment.world import DIGEST, LINEAGE_SPEC, World, in_place, make_version

from tuneloop_gateway.contract import ProbeState
from tuneloop_operator.domain import times


def served(**world: object) -> World:
    """Version 1 takes all traffic."""
    made = World(**world)  # type: ignore[arg-type]
    made.settle()
    assert made.condition("Ready") == ("True", "Serving")
    return made


def test_a_new_deployment_comes_into_service() -> None:
    world = World()
    world.step()
    assert world.condition("Available") == ("False", "Starting")
    assert world.weights() == {1: 0}
    world.settle()
    assert world.condition("Available") == world.condition("Ready") == ("True", "Serving")
    assert world.weights() == {1: 100}
    assert world.status["url"] == "http://tweets.shop.svc"
    assert world.status["stable"]["message"] == "50/50 probe items answered as evaluated."


def test_the_new_version_takes_all_traffic_and_the_old_one_drains() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.warm = False
    world.settle()
    assert world.roles() == {1: "Stable", 2: "Candidate"}
    assert world.condition("Ready") == ("False", "RollingOut")
    world.warm = True
    world.settle()
    assert world.weights() == {2: 100, 1: 0}
    assert world.roles()[1] == "Draining"
    assert len(world.engines()) == 2


def test_the_old_engine_goes_after_its_time_and_not_before_the_gateway_let_go_of_it() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.settle()
    old = world.engine_of(1)
    world.applies = False  # the gateway lags behind
    world.step(seconds=601)
    world.step()
    assert world.roles() == {2: "Stable"}
    assert old in world.engines()
    world.apply_config()
    world.step()
    assert world.engines() == [world.engine_of(2)]


def test_requests_in_flight_keep_the_old_engine() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.settle()
    draining = next(r.name for r in world.config.revisions if r.version == 1)
    world.in_flight = {draining: 1}
    world.step(seconds=660)
    assert world.roles()[1] == "Draining"
    world.in_flight = {}
    world.settle()
    assert world.roles() == {2: "Stable"}


def test_requests_that_never_end_do_not_keep_it_for_ever() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.settle()
    world.in_flight = {next(r.name for r in world.config.revisions if r.version == 1): 1}
    world.step(seconds=600 + 601)
    assert world.roles() == {2: "Stable"}


@pytest.mark.parametrize(
    ("change", "waits_for"),
    [
        ({"ready": 0}, "0 of 1 engine pods are ready."),
        ({"warm": False}, "The gateway warms the new revision up."),
        ({"probe": ProbeState(status="Running")}, "The gateway asks the probe items."),
        ({"probe": ProbeState(status="Pending")}, "The gateway asks the probe items."),
        ({"gateway_answers": False}, "The gateway has not taken up the new revision yet."),
        ({"applies": False}, "The gateway has not taken up the new revision yet."),
    ],
)
def test_nothing_is_promoted_on_silence(change: dict[str, object], waits_for: str) -> None:
    world = served()
    world.versions.append(make_version(2))
    if change == {"ready": 0}:
        world.step()
        world.ready[world.engine_of(2)] = 0
    else:
        for name, value in change.items():
            setattr(world, name, value)
    for _ in range(5):
        world.step()
    assert world.weights().get(1) == 100
    assert world.status["canary"]["message"] == waits_for
    assert world.condition("Available") == ("True", "Serving")


@pytest.mark.parametrize(
    ("agreed", "asked", "promoted"), [(50, 50, True), (48, 50, True), (47, 50, False), (0, 0, False), (10, 10, True), (9, 10, False)]
)
def test_48_of_50_probe_items_must_be_answered_as_evaluated(agreed: int, asked: int, promoted: bool) -> None:
    world = served()
    world.versions.append(make_version(2))
    world.probe = ProbeState(status="Done", asked=asked, agreed=agreed)
    world.settle()
    assert world.outcomes()[2] == ("Promoted" if promoted else "Rejected")
    assert world.weights() == ({2: 100, 1: 0} if promoted else {1: 100})


def test_a_mismatch_rejects_the_version_and_the_stable_one_serves_on() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.probe = ProbeState(status="Done", asked=50, agreed=40)
    world.settle()
    assert world.condition("Ready") == ("True", "RolledBack")
    assert world.message("Ready") == (
        "Version 2 was rejected here (ServingMismatch): The served version 2 answered 40 of 50 probe items as its evaluation did;"
        " 48 are needed. Compare engine, task and prompt with what it was trained with. Version 1 serves on."
    )
    assert world.engines() == [world.engine_of(1)]


def test_every_gateway_must_agree() -> None:
    world = served(gateways=2)
    world.versions.append(make_version(2))
    world.second_probe = ProbeState(status="Running")
    world.settle()
    assert world.outcomes()[2] is None
    world.second_probe = ProbeState(status="Done", asked=50, agreed=40)
    world.settle()
    assert world.outcomes()[2] == "Rejected"


def test_a_gateway_that_does_not_speak_of_the_revision_holds_it_up() -> None:
    world = served(gateways=2)
    world.versions.append(make_version(2))
    world.warm = False
    world.settle()
    world.warm, world.omitted = True, world.status["canary"]["revision"]
    world.settle()
    assert world.outcomes()[2] is None
    assert world.status["canary"]["message"] == "The gateway has not taken up the new revision yet."


def test_a_gateway_that_still_drains_a_revision_does_not_vouch_for_it() -> None:
    world = served(versions=[make_version(1, probesUri=None)])
    world.spec = {"engine": {"maxModelLength": 256}}
    world.settle()
    stable = world.status["stable"]["revision"]
    world.applies = False  # it knows the first revision, as one that drains
    world.spec = {}
    for _ in range(5):
        world.step()
    assert world.status["stable"]["revision"] == stable
    world.applies = True
    world.apply_config()
    world.settle()
    assert world.status["stable"]["revision"] != stable


def test_it_is_ready_only_when_the_gateway_sends_the_traffic_there() -> None:
    world = served()
    world.versions.append(make_version(2))
    for _ in range(20):
        world.applies = "stable" in world.status and world.status["stable"]["version"] == 1
        world.step()
    world.applied = world.config.model_copy(update={"generation": world.config.generation - 1})
    world.step()
    assert world.status["stable"]["version"] == 2
    assert world.condition("Ready") == ("False", "RollingOut")
    world.apply_config()
    world.step()
    assert world.condition("Ready") == ("True", "Serving")


def test_it_stays_ready_while_a_configuration_of_the_same_stable_revision_spreads() -> None:
    world = served()
    world.applies = False
    world.spec = {"gateway": {"capture": {"retentionDays": 3}}}
    world.generation = 2
    for _ in range(3):
        world.step()
        assert world.condition("Ready") == ("True", "Serving")


def test_a_shared_engine_that_breaks_rejects_no_prompt() -> None:
    world = served()
    engine = world.engine_of(1)
    world.ready[engine] = 0
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    world.pod_status[engine] = {"containerStatuses": [{"name": "engine", "restartCount": 1, "lastState": killed}]}
    world.spec = {"prompt": {"template": "Sentiment of: {{ text }}", "parameters": {"maxTokens": 4}}}
    world.settle()
    assert "Rejected" not in world.outcomes().values()
    assert world.condition("Stalled") == ("True", "OutOfMemory")
    world.ready = {}
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")


@pytest.mark.parametrize(
    "container",
    [
        {"name": "engine", "restartCount": 2, "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}},
        {"name": "engine", "restartCount": 0, "state": {"running": {"startedAt": "2026-01-15T12:00:00Z"}}},
        {"name": "verify", "restartCount": 0, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
    ],
)
def test_what_may_still_come_right_is_waited_for(container: dict[str, object]) -> None:
    world = served()
    world.versions.append(make_version(2))
    world.step()
    world.ready[world.engine_of(2)] = 0
    world.pod_status[world.engine_of(2)] = {"containerStatuses": [container]}
    world.settle()
    assert world.condition("Ready") == ("False", "RollingOut")
    world.ready = {}
    world.settle()
    assert world.weights()[2] == 100


def test_a_rejected_edit_is_not_tried_on_an_older_version() -> None:
    world = served(versions=[make_version(1), make_version(2)])
    world.probe = ProbeState(status="Done", asked=50, agreed=1)
    world.spec = {"engine": {"maxModelLength": 256}}
    world.settle()
    assert world.condition("Ready") == ("False", "RolledBack")
    assert world.weights() == {2: 100}
    assert len(world.outcomes()) == 1  # of version 2 alone
    assert world.message("Ready").endswith("It serves on under the old one.")


def test_a_version_without_probes_is_not_probed() -> None:
    world = served()
    world.warm = False
    world.versions.append(make_version(2, probesUri=None))
    world.settle()
    assert {r.version: r.probe for r in world.config.revisions} == {1: False, 2: False}
    world.versions[1] = make_version(2)
    world.spec = {"engine": {"maxModelLength": 64}}
    world.settle()
    assert {r.version: r.probe for r in world.config.revisions if r.state.value == "Candidate"} == {2: True}


def test_a_version_without_probes_needs_none_and_one_that_names_them_does() -> None:
    world = served()
    world.probe = ProbeState(status="NoProbes")
    world.versions.append(make_version(2, probesUri=None))
    world.settle()
    assert world.outcomes()[2] == "Promoted"
    world.versions.append(make_version(3))
    world.settle()
    assert world.outcomes()[3] == "Rejected"


def test_probes_that_could_not_be_asked_block_but_do_not_reject() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.probe = ProbeState(status="Failed", message="the engine answered 500")
    world.settle()
    assert world.condition("Stalled") == ("True", "ServingMismatch")
    assert world.outcomes()[2] is None
    world.probe = ProbeState(status="Done", asked=50, agreed=50)
    world.settle()
    assert world.outcomes()[2] == "Promoted"


def test_a_prompt_edit_needs_no_second_engine() -> None:
    world = served()
    world.spec = {"prompt": {"template": "Sentiment of: {{ text }}", "parameters": {"maxTokens": 4}}}
    world.generation = 2
    world.settle()
    assert len(world.engines()) == 1
    assert world.condition("Ready") == ("True", "Serving")
    assert world.config.revisions[0].prompt.max_tokens == 4
    assert world.condition("Degraded") == ("False", "Healthy")


def test_a_prompt_that_renders_differently_is_served_and_called_degraded() -> None:
    world = served()
    world.spec = {"prompt": {"system": "Be short.", "template": "Sentiment of: {{ text }}"}}
    world.probe = ProbeState(status="Done", asked=50, agreed=3)
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")
    assert world.condition("Degraded") == ("True", "PromptMismatch")
    assert not any(revision.probe for revision in world.config.revisions)


TRAINED = {"prompt": {"format": "Chat", "template": "Sentiment of: {{ text }}", "probeSha256": "sha256:" + "1" * 64}}


def test_a_prompt_that_is_written_otherwise_and_read_alike_is_none_that_differs() -> None:
    world = World(versions=[make_version(1, **TRAINED)], prompt_digest="sha256:" + "1" * 64)
    world.spec = {"prompt": {"template": "Sentiment of: {{ input }}"}}
    world.settle()
    assert world.config.revisions[0].probe_text == "Is the sky blue?"
    assert world.condition("Ready") == ("True", "Serving")
    assert world.condition("Degraded") == ("False", "Healthy")


def test_an_engine_that_reads_an_inherited_prompt_otherwise_is_named_with_the_remedy() -> None:
    world = World(versions=[make_version(1, **TRAINED)], prompt_digest="sha256:" + "2" * 64)
    world.settle()
    assert world.condition("Degraded") == ("True", "PromptMismatch")
    assert world.message("Degraded") == (
        "The engine makes other tokens of a prompt than the training of version 1 did: its evaluation says nothing of what is served."
        " Serve it with the tokenizer and the chat template that it was trained with (engine.image, the files of the base)."
    )
    world.gateway_answers = False
    world.settle()
    assert world.condition("Degraded") == ("True", "PromptMismatch"), "what was read before traffic stays on record"


@pytest.mark.parametrize("recorded", ["a" * 64, None])
def test_where_nothing_is_recorded_that_an_engine_could_tell_the_settings_are_compared(recorded: str | None) -> None:
    prompt = TRAINED["prompt"] | {"probeSha256": recorded}
    world = World(versions=[make_version(1, prompt=prompt)], prompt_digest="sha256:" + "2" * 64)
    world.settle()
    assert world.config.revisions[0].probe_text is None
    assert world.condition("Degraded") == ("False", "Healthy")


def test_back_to_a_revision_that_is_still_warm() -> None:
    world = served()
    world.spec = {"engine": {"maxModelLength": 256}}
    world.settle()
    assert len(world.engines()) == 2
    world.spec = {}
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")
    assert world.config.revisions[0].weight == 100
    assert world.config.revisions[0].state.value == "Stable"


def test_replicas_are_scaled_without_a_new_revision() -> None:
    world = served()
    before = world.engines()
    world.spec = {"engine": {"replicas": 3}}
    world.settle()
    assert world.engines() == before
    assert world.objects["Deployment", f"tweets-{before[0]}"]["spec"]["replicas"] == 3
    assert world.status["replicas"] == 3
    assert ("PodDisruptionBudget", f"tweets-{before[0]}") in world.objects


def test_another_operator_changes_nothing_that_runs() -> None:
    world = served()
    before = {key: manifest for key, manifest in world.objects.items() if key[0] in ("Deployment", "ConfigMap", "ControllerRevision")}
    world.guard_source = "GUARD = 2"
    world.settings = world.settings.model_copy(update={"engine_image": "vllm:9", "engine_cpu_image": "cpu:9", "gateway_image": "gateway:9"})
    world.settle()
    assert {key: world.objects[key] for key in before} == before
    world.versions.append(make_version(2))
    world.settle()
    assert world.objects["ConfigMap", f"tweets-{world.engine_of(2)}"]["data"]["engine_guard.py"] == "GUARD = 2"
    template = world.objects["Deployment", f"tweets-{world.engine_of(2)}"]["spec"]["template"]
    assert template["spec"]["containers"][0]["image"] == "vllm:9"


def test_the_record_of_idle_revisions_is_cut() -> None:
    world = served()
    for length in range(100, 130):
        world.spec = {"engine": {"maxModelLength": length}, "rollout": {"keepPreviousSeconds": 0}}
        world.settle()
    assert sum(kind == "ControllerRevision" for kind, _ in world.objects) == 21


@pytest.mark.parametrize("objective", ["SequenceClassification", "RewardModel", "Seq2Seq", "SFT"])
def test_a_model_that_no_engine_knows_is_not_served(objective: str) -> None:
    method = "PromptTuning" if objective == "SFT" else "LoRA"
    spec = LINEAGE_SPEC | {"objective": {"type": objective}, "method": {"type": method}}
    lineage = {"fineTuneJob": "tune", "fineTuneJobUid": "1", "spec": spec, "configDigest": DIGEST}
    world = World(versions=[make_version(1, lineage=lineage)])
    world.settle()

    assert world.condition("Stalled") == ("True", "NotServable")
    assert world.message("Stalled") == (
        f"ModelVersion sentiment-v1 was trained with {objective if method == 'LoRA' else method}, and no engine here serves "
        "what that makes. Set spec.model to another version."
    )
    assert not world.engines()


# --- in place ----------------------------------------------------------------


def pods_of(world: World, version: int) -> int:
    """Pods that the version's engine should have."""
    name = f"tweets-{world.engine_of(version)}"
    return int(world.objects["Deployment", name]["spec"]["replicas"]) if ("Deployment", name) in world.objects else 0


def test_recreate_stops_the_engine_before_and_then_serves_by_the_new_one() -> None:
    world = in_place()
    assert (pods_of(world, 1), pods_of(world, 2)) == (0, 1)
    assert world.condition("Available") == ("False", "NoEndpoints")
    assert world.weights() == {1: 100, 2: 0}, "requests wait"
    world.ready = {}
    world.settle()
    assert world.weights() == {2: 100}
    assert world.engines() == [world.engine_of(2)]
    assert world.condition("Ready") == ("True", "Serving")


def test_recreate_goes_back_where_the_new_engine_fails() -> None:
    world = in_place()
    ended = {"exitCode": 137, "reason": "OOMKilled"}
    world.pod_status[world.engine_of(2)] = {
        "containerStatuses": [{"name": "engine", "restartCount": 1, "lastState": {"terminated": ended}}]
    }
    world.settle()
    assert (pods_of(world, 1), pods_of(world, 2)) == (1, 0)
    assert world.condition("Ready") == ("True", "RolledBack")


def test_recreate_waits_for_an_image_no_longer_than_a_start_may_take() -> None:
    world = in_place()
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no."}}
    world.pod_status[world.engine_of(2)] = {"containerStatuses": [{"name": "engine", "state": waiting}]}
    world.step(seconds=600)
    assert pods_of(world, 1) == 0
    world.step(seconds=700)
    world.settle()
    assert (pods_of(world, 1), pods_of(world, 2)) == (1, 0)
    assert world.condition("Ready") == ("True", "RolledBack")


def test_recreate_goes_back_where_the_new_engine_is_ready_but_never_answers() -> None:
    world = in_place()
    world.ready, world.warm = {}, False
    world.step(seconds=600)
    world.settle()
    assert (pods_of(world, 1), pods_of(world, 2)) == (0, 1), "it has time"
    world.step(seconds=700)
    world.settle()
    assert (pods_of(world, 1), pods_of(world, 2)) == (1, 0)
    assert world.condition("Ready") == ("True", "RolledBack")
    assert "is ready, but took over nothing" in world.message("Ready")


def test_recreate_blames_no_version_for_a_gateway_that_is_not_ready() -> None:
    world = in_place()
    world.ready, world.gateways = {}, 0
    world.step(seconds=1300)
    world.settle()
    assert world.outcomes()[2] is None


def test_recreate_stops_nothing_for_another_prompt() -> None:
    world = served(spec={"rollout": {"strategy": "Recreate"}})
    world.spec = world.spec | {"prompt": {"system": "Hi."}}
    world.generation += 1
    world.step()
    assert pods_of(world, 1) == 1
    world.settle()
    assert len(world.engines()) == 1
    assert world.condition("Available") == ("True", "Serving")


# --- devices for one engine alone --------------------------------------------

NO_NODE = {"phase": "Pending", "startTime": None, "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}


def one_device(**rollout: object) -> World:
    """Version 1 has the device; version 2 comes."""
    world = served(spec={"rollout": rollout})
    world.versions.append(make_version(2))
    world.step()
    world.ready[world.engine_of(2)] = 0
    world.pod_status[world.engine_of(2)] = NO_NODE
    world.settle()
    return world


def test_without_allowed_downtime_the_stable_version_serves_on_and_the_status_says_what_to_do() -> None:
    world = one_device()
    assert world.condition("Ready") == ("False", "Unschedulable")
    world.step(seconds=301)
    world.settle()
    assert world.condition("Available") == ("True", "Serving")
    assert world.condition("Stalled") == ("True", "NoDeviceForCanary")
    assert "rollout.allowDowntime: true" in world.message("Stalled")
    assert (pods_of(world, 1), pods_of(world, 2)) == (1, 1)


@pytest.mark.parametrize("strategy", ["BlueGreen", "Canary"])
def test_with_allowed_downtime_the_engine_before_makes_room(strategy: str) -> None:
    world = one_device(strategy=strategy, allowDowntime=True)
    assert pods_of(world, 1) == 1
    world.step(seconds=301)
    world.settle()
    assert (pods_of(world, 1), pods_of(world, 2)) == (0, 1)
    assert world.condition("Stalled") is None, "it finds its node as soon as the other is gone"
    world.pod_status, world.ready = {}, {}  # the device is free
    world.settle()
    assert world.weights() == {2: 100}
    assert world.condition("Ready") == ("True", "Serving")
    assert world.engines() == [world.engine_of(2)]


def test_the_engine_before_makes_no_room_for_one_that_has_looked_for_a_node_only_now() -> None:
    world = served(spec={"rollout": {"allowDowntime": True}})
    world.versions.append(make_version(2))
    world.step()
    hashed = world.engine_of(2)
    world.ready[hashed] = 0
    world.step(seconds=900)  # it was loading, and then its node went
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "lastTransitionTime": times.to_text(world.now)}
    world.pod_status[hashed] = NO_NODE | {"conditions": [condition]}
    world.step(seconds=60)
    assert pods_of(world, 1) == 1
    world.step(seconds=241)
    world.settle()
    assert pods_of(world, 1) == 0


def test_what_made_room_comes_back_where_that_did_not_help() -> None:
    world = one_device(allowDowntime=True)
    world.step(seconds=301)
    world.settle()
    world.step(seconds=1300)
    world.settle()
    assert (pods_of(world, 1), pods_of(world, 2)) == (1, 0)
    assert world.condition("Ready") == ("True", "RolledBack")


def test_surge_never_stops_the_engine_before_at_once_and_always_never_does() -> None:
    assert pods_of(one_device(surge="Never", allowDowntime=True), 1) == 0
    world = one_device(surge="Always", allowDowntime=True)
    world.step(seconds=301)
    world.settle()
    assert pods_of(world, 1) == 1
    assert world.condition("Stalled") == ("True", "Unschedulable")
