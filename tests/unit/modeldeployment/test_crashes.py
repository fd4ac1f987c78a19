"""The operator is killed after each of its writes, from the first engine to the retrained model: the same end, and nothing made twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.modeldeployment.world import RETRAINED, Killed, World, alarm, make_job, make_version

from tuneloop_gateway.contract import DriftReport, DriftStatus, FeedbackReport, Outcomes

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def inputs_change(world: World) -> None:
    world.drift = alarm()
    world.feedback = FeedbackReport(labelled_train=250, labelled_gate=310)


def a_better_model_is_trained(world: World) -> None:
    world.jobs = [make_job(world.status["retraining"]["lastJob"], succeeded="True", reason="GatePassed", modelVersion=2)]
    world.versions = [make_version(1), make_version(2)]


def the_gateway_starts_afresh(world: World) -> None:
    world.drift = DriftReport(status=DriftStatus.COLLECTING, epoch="1")


def time_passes(world: World) -> None:
    world.step(seconds=700)  # longer than the engine before is kept


CHAPTERS: tuple[Callable[[World], None], ...] = (
    lambda world: None, inputs_change, a_better_model_is_trained, the_gateway_starts_afresh, time_passes,
)  # fmt: skip


def a_version_comes(number: int, errors: int) -> Callable[[World], None]:
    """As a canary, that many of whose 1,500 requests fail."""

    def happens(world: World) -> None:
        world.versions = [*world.versions, make_version(number)]
        counted = {n: Outcomes(requests=5000, first_token=(*FAST, 5000)) for n in range(1, number)}
        world.outcomes_of = {**counted, number: Outcomes(requests=1500, errors=errors, first_token=(*FAST, 1500 - errors))}

    return happens


FAST = (0,) * 100
CANARIES: tuple[Callable[[World], None], ...] = (
    lambda world: None, a_version_comes(2, errors=0), time_passes, a_version_comes(3, errors=300), time_passes,
)  # fmt: skip


def live(world: World, kill_every: int | None, chapters: tuple[Callable[[World], None], ...] = CHAPTERS) -> int:
    """The whole life; returns how often the operator was killed. It comes back each time and makes at least one write more."""
    kills = 0
    for chapter in chapters:
        quiet = 0
        pending = [chapter]
        for _ in range(200):
            if quiet == 4:
                break
            world.writes_left = kill_every
            before = (world.status, dict(world.objects), len(world.created))
            try:
                while pending:
                    pending.pop()(world)
                world.step()
            except Killed:
                kills += 1
            quiet = quiet + 1 if before == (world.status, dict(world.objects), len(world.created)) else 0
        assert quiet == 4, "Each pass undoes or repeats what the one before wrote."
    return kills


def end_of(world: World) -> Any:
    def masked(value: Any) -> Any:
        return TIME.sub("TIME", repr(value))

    config = world.config.model_copy(update={"generation": 0})
    records = {name: masked(m) for (kind, name), m in world.objects.items() if kind == "ControllerRevision"}
    others = sorted(key for key in world.objects if key[0] != "ControllerRevision")
    status = {key: value for key, value in world.status.items() if key != "configGeneration"}
    return config, records, others, masked(status), [(m["kind"], m["metadata"]["name"]) for m in world.created]


@pytest.mark.parametrize("kill_every", [1, 2, 3, 5, 8])
def test_killed_again_and_again_it_ends_in_the_same_state(kill_every: int) -> None:
    calm, wild = World(spec=dict(RETRAINED)), World(spec=dict(RETRAINED))
    assert live(calm, None) == 0
    assert live(wild, kill_every) >= 1
    assert end_of(wild) == end_of(calm)
    assert [m["kind"] for m in wild.created] == ["Secret", "FineTuneJob"]
    assert wild.status["retraining"]["runsThisMonth"] == 1
    assert wild.weights() == {2: 100}
    assert (wild.config.drift.epoch, wild.config.drift.seed) == ("1", "SinceAlarm")  # type: ignore[union-attr]


@pytest.mark.parametrize("kill_every", [1, 2, 3, 5])
def test_canaries_end_in_the_same_state_under_an_operator_that_is_killed_again_and_again(kill_every: int) -> None:
    spec = {"rollout": {"strategy": "Canary"}}
    calm, wild = World(spec=dict(spec)), World(spec=dict(spec))
    assert live(calm, None, CANARIES) == 0
    assert live(wild, kill_every, CANARIES) >= 1
    assert end_of(wild) == end_of(calm)
    assert wild.outcomes() == {1: "Promoted", 2: "Promoted", 3: "Rejected"}
    assert wild.weights() == {2: 100}
