"""An engine that nobody asks is stopped, and comes back for the first request; `spec.engine.replicas` is never written."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.modeldeployment.world import World, in_place, make_adapter, make_version

from tuneloop_operator.api.modeldeployment import ModelDeployment
from tuneloop_operator.api.modelversion import ModelVersion
from tuneloop_operator.domain.modeldeployment.scaling import wanted_replicas
from tuneloop_operator.domain.modeldeployment.snapshot import Snapshot
from tuneloop_operator.render import names
from tuneloop_operator.settings import Settings

IDLE = 60
SCALED: dict[str, Any] = {"autoscaling": {"minReplicas": 0, "maxReplicas": 2, "idleSeconds": IDLE, "holdSeconds": 120}}


def replicas(world: World, version: int = 1) -> int:
    return int(world.objects["Deployment", names.engine(world.name, world.engine_of(version))]["spec"]["replicas"])


def serving(versions: list[ModelVersion] | None = None, **spec: object) -> World:
    world = World(spec=SCALED | spec, **({"versions": versions} if versions else {}))
    world.settle()
    return world


def asleep(versions: list[ModelVersion] | None = None, **spec: object) -> World:
    world = serving(versions, **spec)
    world.idle = IDLE
    world.step(IDLE)
    world.settle()
    return world


def test_an_engine_that_nobody_asked_for_idle_seconds_is_stopped() -> None:
    world = serving()
    world.idle = IDLE - 1
    world.step(2 * IDLE)
    assert (replicas(world), world.config.asleep, world.config.hold_seconds) == (1, False, 120)
    world.idle = IDLE
    world.settle()
    assert (replicas(world), world.config.asleep) == (0, True)
    assert world.condition("Available") == world.condition("Ready") == ("True", "ScaledToZero")
    assert world.status["replicas"] == 0


def test_gateways_hold_requests_before_the_engine_is_stopped() -> None:
    world = serving()
    world.idle, world.applies = IDLE, False
    world.step(IDLE)
    world.step()
    assert (replicas(world), world.config.asleep) == (1, True)
    world.apply_config()
    world.idle = 0  # one request came before the gateway heard of it, and runs
    world.step()
    assert replicas(world) == 1
    world.idle = 1
    world.step()
    assert replicas(world) == 0


def test_a_request_that_waits_starts_the_engine_in_the_pass_that_sees_it() -> None:
    world = asleep()
    assert world.step().requeue_after == 1.0
    world.held, world.idle, world.ready = 1, 0, {world.engine_of(1): 0}
    world.step()
    assert (replicas(world), world.config.asleep) == (1, False)
    world.settle()
    assert world.condition("Available") == ("False", "Starting")
    assert "120 s" in world.message("Available")
    assert world.condition("Reconciling") is not None
    world.held, world.ready = 0, {}
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")


def test_an_adapter_sleeps_with_its_engine_and_requests_wait_until_it_is_loaded_again() -> None:
    world = asleep(versions=[make_adapter(1)])
    assert (replicas(world), world.condition("Ready")) == (0, ("True", "ScaledToZero"))
    world.held, world.idle, world.loaded = 1, 0, {1: 0}
    world.settle()
    assert world.condition("Available") == ("False", "Starting")
    assert world.message("Available") == "No engine pod has loaded the adapter of version 1. Requests wait for it up to 120 s."
    world.held, world.loaded = 0, {}
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")


def test_the_next_adapter_wakes_the_engine_that_it_shares() -> None:
    world = asleep(versions=[make_adapter(1)])
    world.versions.append(make_adapter(2))
    world.step()
    assert (replicas(world, 2), len(world.engines())) == (1, 1)
    world.settle()
    assert world.weights() == {2: 100, 1: 0}


def test_a_request_that_comes_while_it_falls_asleep_wakes_it_and_no_pod_goes() -> None:
    world = serving()
    world.idle = IDLE
    world.step(IDLE)
    assert (replicas(world), world.config.asleep) == (1, True)
    world.held, world.idle = 1, 0
    world.step()
    assert (replicas(world), world.config.asleep) == (1, False)


def test_an_engine_that_loads_is_not_stopped_though_its_caller_went_away() -> None:
    world = asleep()
    world.held, world.ready = 1, {world.engine_of(1): 0}
    world.step()
    world.held, world.idle = 0, 10 * IDLE
    world.step(10 * IDLE)
    assert replicas(world) == 1


@pytest.mark.parametrize("blind", ["gateway_answers", "gateways"])
def test_what_no_gateway_tells_changes_nothing(blind: str) -> None:
    world = serving()
    world.idle = IDLE
    setattr(world, blind, False if blind == "gateway_answers" else 0)
    world.step(10 * IDLE)
    assert not world.config.asleep
    sleeping = asleep()
    setattr(sleeping, blind, False if blind == "gateway_answers" else 0)
    sleeping.settle()
    assert (replicas(sleeping), sleeping.config.asleep) == (0, True)


@pytest.mark.parametrize("second", ["busy_second", "silent_second"])
def test_of_two_gateways_the_busier_one_counts_and_so_does_one_that_is_silent(second: str) -> None:
    world = World(spec=SCALED | {"gateway": {"replicas": 2}}, gateways=2)
    world.settle()
    world.idle = IDLE
    setattr(world, second, True)
    world.step(IDLE)
    assert not world.config.asleep


def test_a_roll_out_wakes_it_for_its_checks_and_it_sleeps_again_on_the_new_version() -> None:
    world = asleep()
    world.versions.append(make_version(2))
    world.step()
    assert (replicas(world, 1), replicas(world, 2), world.config.asleep) == (1, 1, False)
    world.idle = 0
    world.settle()
    assert world.condition("Ready") == ("True", "Serving")
    world.idle = IDLE
    world.step(IDLE)
    world.settle()
    assert (replicas(world, 1), replicas(world, 2), world.condition("Ready")) == (0, 0, ("True", "ScaledToZero"))


def test_only_a_minimum_of_zero_lets_it_sleep() -> None:
    world = World(spec={"autoscaling": {"minReplicas": 1, "maxReplicas": 2, "idleSeconds": IDLE}}, idle=10 * IDLE)
    world.settle()
    world.step(10 * IDLE)
    assert (replicas(world), world.config.asleep, world.config.hold_seconds) == (1, False, None)


@pytest.mark.parametrize(("asked", "bounds", "wanted"), [
    (3, None, 3), (0, (0, 4), 1), (3, (0, 4), 3), (9, (0, 4), 4), (1, (2, 4), 2),
])  # fmt: skip
def test_the_scale_path_counts_within_the_bounds(asked: int, bounds: tuple[int, int] | None, wanted: int) -> None:
    scaled = {"autoscaling": {"minReplicas": bounds[0], "maxReplicas": bounds[1]}} if bounds else {}
    spec = {"model": {"name": "sentiment"}, "engine": {"replicas": asked}} | scaled
    assert wanted_replicas(Snapshot(ModelDeployment.model_validate({"metadata": {"name": "d"}, "spec": spec}))) == wanted


def test_a_failed_start_is_told_while_requests_wait() -> None:
    world = asleep()
    world.held, world.ready = 1, {world.engine_of(1): 0}
    no_node = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available."}
    world.pod_status = {world.engine_of(1): {"phase": "Pending", "startTime": None, "conditions": [no_node]}}
    world.step()
    world.settle()
    assert world.condition("Available") == ("False", "Unschedulable")


def test_taking_its_place_is_no_sleep() -> None:
    world = in_place()
    world.spec, world.idle = world.spec | SCALED, 10 * IDLE
    world.step(10 * IDLE)
    assert not world.config.asleep


# --- with KEDA ---

KEDA = Settings(scaler_address="scaler:9090", prometheus_url="http://prometheus:9090")


def with_keda(replicas: int = 1, **autoscaling: object) -> World:
    spec = {"engine": {"replicas": replicas}, "autoscaling": SCALED["autoscaling"] | autoscaling}
    world = World(spec=spec, settings=KEDA, has_keda=True)
    world.settle()
    return world


def test_with_keda_only_the_scale_path_stops_and_starts_the_engine() -> None:
    world = with_keda()
    world.idle = 10 * IDLE
    world.step(10 * IDLE)
    assert (replicas(world), world.config.asleep) == (1, False)
    world.spec = world.spec | {"engine": {"replicas": 0}}
    world.settle()
    assert (replicas(world), world.config.asleep) == (0, True)
    world.held, world.idle = 1, 0
    world.settle()
    assert (replicas(world), world.config.asleep) == (0, True)
    world.spec = world.spec | {"engine": {"replicas": 1}}
    world.settle()
    assert (replicas(world), world.config.asleep) == (1, False)


def test_a_deployment_that_begins_at_zero_is_started_for_its_checks() -> None:
    world = World(spec=SCALED | {"engine": {"replicas": 0}}, settings=KEDA, has_keda=True)
    world.step()
    assert replicas(world) == 1
    world.settle()
    world.idle = 1
    world.settle()
    assert (replicas(world), world.condition("Ready")) == (0, ("True", "ScaledToZero"))


def test_what_keda_is_told() -> None:
    schedule = [{"start": "0 8 * * *", "end": "0 18 * * *", "timezone": "Europe/Berlin", "replicas": 2}]
    world = with_keda(schedule=schedule, waitingRequests=7)
    spec = world.objects["ScaledObject", "tweets"]["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "tuneloop.dev/v1alpha1", "kind": "ModelDeployment", "name": "tweets"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 2)
    pushed, waiting, cron = spec["triggers"]
    assert (pushed["type"], pushed["metadata"]) == ("external-push", {"scalerAddress": "scaler:9090"})
    ours = '{namespace="shop",deployment="tweets"}'
    assert waiting["metadata"]["query"] == f"sum(vllm:num_requests_waiting{ours}) or sum(tuneloop_gateway_held_requests{ours})"
    assert (waiting["metadata"]["threshold"], waiting["metadata"]["ignoreNullValues"]) == ("7", "false")
    assert cron["metadata"] == {"timezone": "Europe/Berlin", "start": "0 8 * * *", "end": "0 18 * * *", "desiredReplicas": "2"}
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 1, "behavior": "currentReplicasIfHigher"}


def test_without_a_prometheus_keda_has_no_trigger_on_it() -> None:
    world = World(spec=SCALED, settings=Settings(scaler_address="scaler:9090"), has_keda=True)
    world.settle()
    assert [trigger["type"] for trigger in world.objects["ScaledObject", "tweets"]["spec"]["triggers"]] == ["external-push"]


def test_a_scaled_object_goes_with_the_autoscaling() -> None:
    world = with_keda()
    world.spec = {}
    world.settle()
    assert ("ScaledObject", "tweets") not in world.objects
