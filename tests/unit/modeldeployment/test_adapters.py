"""Versions that are adapters share an engine: a new one is loaded beside the old, judged like any other, and going back loads nothing."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.modeldeployment.test_canaries import BAD, GOOD, ROLLOUT, counted
from tests.unit.modeldeployment.world import World, make_adapter, make_version

from tuneloop_operator.domain.modeldeployment import revisions
from tuneloop_operator.render import names
from tuneloop_operator.settings import Settings

RANK = "Call to add_lora method failed: LoRA rank 64 is greater than max_lora_rank 16."


def served(**world: Any) -> World:
    """Version 1, an adapter, takes all traffic."""
    made = World(versions=[make_adapter(1)], **world)
    made.settle()
    assert made.condition("Ready") == ("True", "Serving")
    return made


def approved(world: World, *numbers: int) -> World:
    world.versions += [make_adapter(number) for number in numbers]
    world.settle()
    return world


def adapters(world: World) -> dict[int | None, str]:
    """Version -> path of the adapter that the gateway has loaded for it."""
    return {r.version: r.adapter.path for r in world.config.revisions if r.adapter is not None}


def test_the_next_version_is_served_by_the_engine_of_the_one_before() -> None:
    world = served()
    engine = world.objects["Deployment", names.engine("tweets", world.engine_of(1))]
    approved(world, 2)
    assert world.weights() == {2: 100, 1: 0}
    assert world.engines() == [world.engine_of(1)] == [world.engine_of(2)]
    assert world.objects["Deployment", names.engine("tweets", world.engine_of(2))] == engine
    assert len({revision.model_id for revision in world.config.revisions}) == 2


def test_what_drains_stays_loaded_for_its_time_and_is_let_go_then() -> None:
    world = approved(served(), 2)
    assert adapters(world) == {2: "/volumes/models/sentiment/v2", 1: "/volumes/models/sentiment/v1"}
    world.step(seconds=601)
    world.settle()
    assert adapters(world) == {2: "/volumes/models/sentiment/v2"}


@pytest.mark.parametrize(("loaded", "said"), [(0, "0 of 2 engine pods have loaded"), (1, "1 of 2 engine pods have loaded")])
def test_it_takes_no_traffic_before_every_replica_has_it(loaded: int, said: str) -> None:
    world = served(spec={"engine": {"replicas": 2}})
    world.loaded = {2: loaded}
    approved(world, 2)
    assert world.weights() == {1: 100, 2: 0}
    assert said in world.status["canary"]["message"]
    world.loaded = {}
    world.settle()
    assert world.weights() == {2: 100, 1: 0}


def test_a_canary_between_two_adapters_goes_step_by_step_on_one_engine() -> None:
    world = approved(served(spec={"rollout": ROLLOUT}), 2)
    assert world.weights() == {1: 95, 2: 5}
    counted(world, GOOD).step()
    assert world.weights() == {1: 75, 2: 25}
    assert len(world.engines()) == 1


def test_pods_for_the_next_share_count_once_they_have_loaded() -> None:
    steps = ROLLOUT | {"steps": [{"weight": 20}, {"weight": 30}]}
    world = served(spec={"rollout": steps, "engine": {"replicas": 4}})
    world.versions.append(make_adapter(2, rank=40))  # on an engine of its own
    world.settle()
    assert world.weights() == {1: 80, 2: 20}
    world.loaded = {2: 1}
    counted(world, GOOD).settle()
    assert world.weights() == {1: 80, 2: 20}
    assert "1 of the 2 engine pods for its next share are ready." in world.message("Ready")
    world.loaded = {}
    world.step()
    assert world.weights() == {1: 70, 2: 30}


def test_a_worse_adapter_is_stopped_and_the_one_before_never_left() -> None:
    world = counted(approved(served(spec={"rollout": ROLLOUT}), 2), BAD)
    world.step()
    assert world.weights()[1] == 100
    assert world.outcomes() == {1: "Promoted", 2: "Rejected"}
    world.step(seconds=6)
    world.settle()
    assert adapters(world) == {1: "/volumes/models/sentiment/v1"}
    assert len(world.engines()) == 1


def test_a_load_that_fails_rejects_the_version_in_the_engines_own_words() -> None:
    world = served()
    world.load_errors = {2: RANK}
    approved(world, 2)
    assert world.weights() == {1: 100}
    assert world.outcomes() == {1: "Promoted", 2: "Rejected"}
    assert "could not load the adapter: Call to add_lora method failed: LoRA rank 64 is greater" in world.message("Ready")
    assert "Record the adapter's true rank (at most 512) as artifact.rank" in world.message("Ready")


def test_the_first_version_that_cannot_be_loaded_is_tried_again() -> None:
    world = World(versions=[make_adapter(1)], load_errors={1: "The adapter in /volumes/x is refused: weights is missing."})
    world.settle()
    assert world.condition("Stalled") == ("True", "EngineFailed")
    assert "is refused: weights is missing. Put its files back" in world.message("Stalled")
    world.load_errors = {}
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")


def test_one_of_two_replicas_that_lost_its_adapter_is_degraded_and_all_is_unavailable() -> None:
    world = served(spec={"engine": {"replicas": 2}})
    world.load_errors = {1: "The adapter in /volumes/x is refused: weights is missing."}
    world.settle()
    assert world.condition("Degraded") == ("True", "EngineFailed")
    assert world.condition("Available") == ("False", "EngineFailed")
    assert "could not load the adapter" in world.message("Available")


def test_a_replica_that_is_still_loading_is_no_failure() -> None:
    world = served()
    world.loaded = {1: 0}
    world.settle()
    assert world.condition("Available") == ("False", "NoEndpoints")
    assert world.message("Available") == "No engine pod has loaded the adapter of version 1."
    assert world.condition("Degraded") == ("False", "Healthy")


def test_a_version_of_a_larger_rank_gets_an_engine_of_its_own() -> None:
    world = served()
    world.versions.append(make_adapter(2, rank=40))
    world.settle()
    assert world.engine_of(1) != world.engine_of(2)
    assert len(world.engines()) == 2


def test_an_upgrade_leaves_the_shared_engine_as_it_is() -> None:
    world = served(settings=Settings(engine_image="vllm:1"))
    world.settings = world.settings.model_copy(update={"engine_image": "vllm:2"})
    world.step()
    assert "vllm:2" not in str(world.objects)
    approved(world, 2)
    assert world.weights() == {2: 100, 1: 0}
    engine = world.objects["Deployment", names.engine("tweets", world.engine_of(2))]
    assert engine["spec"]["template"]["spec"]["containers"][0]["image"] == "vllm:1"


def test_an_engine_that_never_served_is_made_anew_for_the_next_version() -> None:
    world = World(versions=[make_adapter(1)], warm=False, settings=Settings(engine_image="vllm:1"))
    world.settle()
    world.settings, world.warm = world.settings.model_copy(update={"engine_image": "vllm:2"}), True
    world.versions.append(make_adapter(2))
    world.settle()
    assert world.weights() == {2: 100}
    engine = world.objects["Deployment", names.engine("tweets", world.engine_of(2))]
    assert engine["spec"]["template"]["spec"]["containers"][0]["image"] == "vllm:2"


def test_recreate_stops_nothing_for_another_adapter() -> None:
    world = served(spec={"rollout": {"strategy": "Recreate"}})
    world.loaded = {2: 0}
    approved(world, 2)
    assert world.weights() == {1: 100, 2: 0}
    world.loaded = {}
    world.settle()
    assert world.weights()[2] == 100


# --- from a release that gave each adapter an engine of its own ---------------


def of_an_earlier_release(monkeypatch: pytest.MonkeyPatch) -> World:
    """Version 1 as it was served then: under a name, a hash and an engine of that time."""
    with monkeypatch.context() as earlier:
        earlier.setattr(revisions, "is_adapter", lambda version: False)
        earlier.setattr(revisions, "adapter", lambda version: None)
        world = served(settings=Settings(gateway_image="gateway:1"))
    assert adapters(world) == {}
    return world


def test_an_upgrade_rolls_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = of_an_earlier_release(monkeypatch)
    before = str(world.objects)
    world.settings = world.settings.model_copy(update={"gateway_image": "gateway:2"})
    world.settle()
    assert str(world.objects) == before


def test_the_next_version_gets_the_shared_engine_and_the_gateway_that_can_load(monkeypatch: pytest.MonkeyPatch) -> None:
    world = of_an_earlier_release(monkeypatch)
    world.settings = world.settings.model_copy(update={"gateway_image": "gateway:2"})
    world.versions.append(make_adapter(2))
    world.warm = False
    world.settle()
    gateway = world.objects["Deployment", names.gateway("tweets")]["spec"]["template"]["spec"]["containers"][0]
    assert gateway["image"] == "gateway:2"
    assert world.weights() == {1: 100, 2: 0}
    world.warm = True
    world.settle()
    assert world.weights() == {2: 100, 1: 0}
    assert world.engine_of(1) != world.engine_of(2)


def test_what_was_rejected_by_an_earlier_release_stays_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    world = of_an_earlier_release(monkeypatch)
    with monkeypatch.context() as earlier:
        earlier.setattr(revisions, "is_adapter", lambda version: False)
        earlier.setattr(revisions, "adapter", lambda version: None)
        world.probe = world.probe.model_copy(update={"agreed": 3})
        approved(world, 2)
    assert world.outcomes()[2] == "Rejected"
    world.settle()
    assert world.weights() == {1: 100}


def test_a_merged_version_after_an_adapter_is_a_second_engine() -> None:
    world = served()
    world.versions.append(make_version(2))
    world.settle()
    assert world.weights() == {2: 100, 1: 0}
    assert len(world.engines()) == 2
