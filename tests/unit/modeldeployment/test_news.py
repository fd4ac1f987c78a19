"""Events: one for each turn, none for a state that goes on."""

from __future__ import annotations

import pytest
from tests.unit.modeldeployment.test_statuses import STATES
from tests.unit.modeldeployment.world import World, alarm, make_version

from tuneloop_gateway.contract import ProbeState


def told(world: World, passes: int = 6) -> list[tuple[str, str]]:
    """(type, reason) of all events of some passes."""
    return [(note.type, note.reason) for _ in range(passes) for note in world.step().events]


def test_a_life_in_events() -> None:
    world = World(spec={"monitoring": {"drift": {}}})
    assert told(world) == [
        ("Normal", "Starting"),
        ("Normal", "Promoted"),
        ("Normal", "Serving"),
    ]
    assert told(world) == []
    world.versions.append(make_version(2))
    world.probe = ProbeState(status="Done", asked=50, agreed=0)
    reasons = told(world)
    assert ("Warning", "Rejected") in reasons
    assert reasons.count(("Normal", "RolledBack")) == 1
    world.drift = alarm()
    assert ("Warning", "DriftAlarm") in told(world)
    assert told(world) == []
    world.annotations = {"tuneloop.dev/rearm": "seen"}
    world.drift = None
    assert told(world) == [("Normal", "CollectingReference")]


def test_an_event_says_what_the_condition_says() -> None:
    world = World()
    world.settle()
    world.ready = dict.fromkeys(world.engines(), 0)
    (note,) = world.step().events
    assert (note.type, note.reason, note.message) == ("Warning", "NoEndpoints", "No engine pod of version 1 is ready.")


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_goes_on_is_written_once(state: str) -> None:
    """`decide` on its own output changes nothing, however late: no status, no object, no event, no job."""
    world = STATES[state]()
    status, objects, created = world.status, dict(world.objects), list(world.created)
    for seconds in (1, 5, 3):
        decision = world.step(seconds)
        assert decision.events == ()
        assert decision.delete == ()
    assert (world.status, world.objects, world.created) == (status, objects, created)
