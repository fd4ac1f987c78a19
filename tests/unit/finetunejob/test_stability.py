"""Whatever happens in whatever order: a decision on its own output changes nothing, and what was said once is not taken back."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.finetunejob.builders import RESULTS, World, make_job, make_spec

from tuneloop_operator.api.conditions import JobCondition
from tuneloop_operator.api.finetunejob import FineTuneJobStatus
from tuneloop_trainer.contract import Progress, Stage

ALWAYS = {"Succeeded", "DataReady", "Trained", "Packaged", "Evaluated"}
ENDS = ["done", "done", "done", 1, 10, 11, 12, 13, 75, 137, 143, "lost"]
HAPPENINGS = st.sampled_from([*ENDS, "runs", "pull", "unschedulable", "suspend", "resume", "wait", "progress"])


def happen(world: World, what: Any) -> None:
    """Something happens to the current Job, if there is one."""
    if what == "wait":
        world.wait(400)
    elif what in ("suspend", "resume") and world.job.status.finished_at is None:
        world.edit(make_spec(runPolicy={"suspend": what == "suspend"}))
    active = [run for run in world.runs.values() if not run.job.is_finished]
    if len(active) != 1:
        return
    world.progress = None
    if what == "done":
        world.ends(RESULTS[active[0].stage]())
    elif what == "lost":
        world.ends(None, 0, keep_pod=False)
    elif isinstance(what, int):
        world.ends(None, what)
    elif what == "runs":
        world.pod_runs()
    elif what == "pull":
        world.pod_is({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})
    elif what == "unschedulable":
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node"}
        world.pod_is(None, conditions=[condition])
    elif what == "progress" and active[0].stage is Stage.TRAIN:
        world.pod_runs()
        world.progress = Progress(pod_uid="x", stage=Stage.TRAIN, phase="Training", step=3, max_steps=12, percent=25, checkpoint_step=2)


@settings(max_examples=200, deadline=None)
@given(st.lists(HAPPENINGS, max_size=25))
def test_any_history_settles_and_stays_settled(history: list[Any]) -> None:
    world = World(job=make_job())
    for what in history:
        before = world.job.status
        world.settle()
        decision = world.decide()
        assert decision.events == ()
        assert_sound(before, world.job.status, decision.status)
        happen(world, what)


def assert_sound(before: FineTuneJobStatus, after: FineTuneJobStatus, written: dict[str, Any]) -> None:
    types = [condition.type for condition in after.conditions]
    assert set(types) >= ALWAYS
    assert len(types) == len(set(types))
    only_when_true = {JobCondition.SUSPENDED, JobCondition.RECONCILING, JobCondition.STALLED}
    assert all(condition.status.value == "True" for condition in after.conditions if condition.type in only_when_true)
    is_ended = after.phase in ("Succeeded", "Failed")
    assert ("Reconciling" in types) != (is_ended or "Stalled" in types)
    assert ("Stalled" in types) == (after.phase in ("Failed", "Stalled"))
    assert (after.finished_at is not None) == is_ended
    assert before.started_at in (None, after.started_at)
    assert before.model_version in (None, after.model_version)
    assert after.attempts >= before.attempts
    assert after.running_seconds >= before.running_seconds
    assert all(condition.message.count("\n") == 0 and len(condition.message) <= 1024 for condition in after.conditions)
    assert written["observedGeneration"] >= 1
